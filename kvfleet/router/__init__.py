"""Routing algorithms: scores, strategies, modalities."""
