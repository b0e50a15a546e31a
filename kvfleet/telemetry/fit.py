"""A straight line (or plane) fitted to what is seen, newer sights counting more."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

__all__ = ["Fit"]

_FADES = 4.0
"""Sights after which the prior counts half."""


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
    """

    prior: tuple[float, ...]
    keep: float = 0.97
    trust: float = 0.25
    seen: int = attrs.field(init=False, default=0)
    coefficients: tuple[float, ...] = attrs.field(init=False)
    _xx: list[list[float]] = attrs.field(init=False, repr=False)
    _xy: list[float] = attrs.field(init=False, repr=False)
    _weight: float = attrs.field(init=False, default=0.0, repr=False)

    def __attrs_post_init__(self) -> None:
        size = len(self.prior)
        self.coefficients = self.prior
        self._xx = [[0.0] * size for _ in range(size)]
        self._xy = [0.0] * size

    def __call__(self, *features: float) -> float:
        """What is expected for these features."""
        return sum(map(float.__mul__, self.coefficients, map(float, features)))

    def learn(self, y: float, *features: float) -> None:
        """Take in one sight."""
        keep, size = self.keep, len(features)
        self._weight = keep * self._weight + 1
        for i in range(size):
            row, x = self._xx[i], features[i]
            self._xy[i] = keep * self._xy[i] + x * y
            for j in range(size):
                row[j] = keep * row[j] + x * features[j]
        self.seen += 1
        self.coefficients = self._solve(list(range(size)))

    def _solve(self, active: list[int]) -> tuple[float, ...]:
        while active:
            found = self._solve_for(active)
            below = [i for i, value in zip(active, found, strict=True) if value < 0]
            if not below:
                chosen = dict(zip(active, found, strict=True))
                return tuple(chosen.get(i, 0.0) for i in range(len(self.prior)))
            active = [i for i in active if i not in below]
        return (0.0,) * len(self.prior)

    def _solve_for(self, active: Sequence[int]) -> list[float]:
        """The normal equations of some features, by elimination; the ridge makes them regular."""
        rows = []
        for i in active:
            ridge = self.trust * self._xx[i][i] / (self._weight * (1 + self.seen / _FADES)) + 1e-12
            row = [self._xx[i][j] + (ridge if i == j else 0.0) for j in active]
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
