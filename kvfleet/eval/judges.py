"""Judges for `observe.shadow`, for answers that are right or wrong: a function of prompt, answer given, and another."""

from __future__ import annotations

import orjson

__all__ = ["same_json", "same_text"]


def same_text(prompt: str, given: str, other: str) -> float:  # noqa: ARG001 - a judge's signature
    """1 if both say the same, apart from case and white space, else 0.

    >>> same_text("2 + 2?", "Four ", "four"), same_text("2 + 2?", "four", "five")
    (1.0, 0.0)
    """
    return float(given.casefold().split() == other.casefold().split())


def same_json(prompt: str, given: str, other: str) -> float:  # noqa: ARG001 - a judge's signature
    """1 if both are JSON of the same value, else 0; for extraction and classification.

    >>> same_json("Extract.", '{"a": 1, "b": 2}', '{"b":2,"a":1}'), same_json("Extract.", "1", "not JSON")
    (1.0, 0.0)
    """
    try:
        return float(orjson.loads(given) == orjson.loads(other))
    except orjson.JSONDecodeError:
        return 0.0
