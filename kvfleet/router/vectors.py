"""Vectors of texts, as embedders make them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

__all__ = ["Vector", "cosine", "is_unit"]

Vector = Sequence[float]


def cosine(one: Vector, other: Vector) -> float:
    """The cosine of two unit vectors, -1..1.

    >>> cosine((0.6, 0.8), (0.6, 0.8))
    1.0
    """
    return max(-1.0, min(1.0, float(sum(map(mul, one, other)))))


def is_unit(vector: Vector) -> bool:
    """True if it is of length 1, as well as single precision has it."""
    return math.isclose(sum(map(mul, vector, vector)), 1.0, abs_tol=1e-2)
