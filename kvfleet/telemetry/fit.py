"""A straight line (or plane) fitted to what is seen, newer sights counting more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement, starmap
from operator import add, mul

import attrs

__all__ = ["Fit"]

_FADES = 4.0
"""Sights after which the prior counts half."""
_EAGER = 32
"""So many sights are each worth a new fit."""
_EVERY = 16
"""After that, so many together are."""


@attrs.define
class Fit:
    """Coefficients, none below zero, of ``y = c[0]*x[0] + c[1]*x[1] + …``, by recursively weighted least squares.

    Each sight weighs `keep` times the one after it. Ridge regression (Hoerl and Kennard 1970) towards `prior`, with the
    weight of `trust` sights at the features' own scale, less and less as sights come in, decides what they do not: with
    prompts that are all alike nobody can tell a time for each token from a time for each prompt. A coefficient that
    would come out below zero is zero, and the others are fitted again (the active-set idea of Lawson and Hanson 1974,
    for a handful of features).

    Args:
        prior: What the coefficients are before anything was seen.
        keep: The weight of a sight, relative to the next.
        trust: How many sights the prior is worth.
        is_shaped: True if the prior tells how the coefficients compare with each other: what it does not explain is
            then put down to what it takes for the most of it, not to all features in equal parts. None may be zero.
    """

    prior: tuple[float, ...]
    keep: float = 0.97
    trust: float = 0.25
    is_shaped: bool = False
    seen: int = attrs.field(init=False, default=0)
    coefficients: tuple[float, ...] = attrs.field(init=False)
    _xx: list[float] = attrs.field(init=False, repr=False)  # of the products of two features, each pair once
    _xy: list[float] = attrs.field(init=False, repr=False)
    _weight: float = attrs.field(init=False, default=0.0, repr=False)

    def __attrs_post_init__(self) -> None:
        size = len(self.prior)
        self.coefficients = self.prior
        self._xx = [0.0] * (size * (size + 1) // 2)
        self._xy = [0.0] * size

    def __call__(self, *features: float) -> float:
        """What is expected for these features."""
        return float(sum(map(mul, self.coefficients, features)))

    def learn(self, y: float, *features: float) -> bool:
        """Take in one sight; True if the coefficients are others now.

        Once there are some sights, the coefficients are made anew after every few: it is what costs most here.
        """
        fade = self.keep.__mul__
        self._weight = fade(self._weight) + 1
        # The sums in C: this runs for every answer.
        pairs = starmap(mul, combinations_with_replacement(features, 2))
        self._xx = list(map(add, map(fade, self._xx), pairs))
        self._xy = list(map(add, map(fade, self._xy), map(float(y).__mul__, features)))
        self.seen += 1
        if self.seen > _EAGER and self.seen % _EVERY:
            return False
        self.coefficients = self._solve(list(range(len(features))))
        return True

    def _solve(self, active: list[int]) -> tuple[float, ...]:
        size = len(self.prior)
        xx: dict[tuple[int, int], float] = {}
        for (i, j), value in zip(combinations_with_replacement(range(size), 2), self._xx, strict=True):
            xx[i, j] = xx[j, i] = value
        while active:
            found = self._solve_for(active, xx)
            below = [i for i, value in zip(active, found, strict=True) if value < 0]
            if not below:
                chosen = dict(zip(active, found, strict=True))
                return tuple(chosen.get(i, 0.0) for i in range(size))
            active = [i for i in active if i not in below]
        return (0.0,) * size

    def _solve_for(self, active: Sequence[int], xx: dict[tuple[int, int], float]) -> list[float]:
        """The normal equations of some features, by elimination; the ridge makes them regular."""
        rows, worth = [], self.trust / (self._weight * (1 + self.seen / _FADES))
        whole = sum(self.prior[i] ** 2 * xx[i, i] for i in active) if self.is_shaped else 0.0
        for i in active:
            ridge = worth * (whole / self.prior[i] ** 2 if self.is_shaped else xx[i, i]) + 1e-12
            row = [xx[i, j] + (ridge if i == j else 0.0) for j in active]
            rows.append([*row, self._xy[i] + ridge * self.prior[i]])
        size = len(rows)
        for i in range(size):
            pivot = rows[i]
            for other in rows[i + 1 :]:
                factor = other[i] / pivot[i]
                for j in range(i, size + 1):
                    other[j] -= factor * pivot[j]
        found = [0.0] * size
        for i in range(size - 1, -1, -1):
            rest = sum(rows[i][j] * found[j] for j in range(i + 1, size))
            found[i] = (rows[i][size] - rest) / rows[i][i]
        return found
