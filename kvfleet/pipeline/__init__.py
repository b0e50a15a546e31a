"""Builds, runs, draws and checks pipelines."""
