"""Traces of requests replayed through pipelines on a virtual clock."""
