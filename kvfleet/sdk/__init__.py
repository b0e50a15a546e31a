"""Clients for Python programs."""
