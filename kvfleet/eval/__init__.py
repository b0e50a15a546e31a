"""Offline evaluation: shadow traffic and comparison."""
