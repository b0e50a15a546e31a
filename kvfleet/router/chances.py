"""The arithmetic of chances: drawing by them, and the chance of being the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import xxhash

__all__ = ["among", "chances_to_be_best", "draw"]

_MOST_BELIEVED = 16
"""Beliefs that are compared at once: the most promising ones."""
_QUANTILES = tuple(NormalDist().inv_cdf((k + 0.5) / 16) for k in range(16))


def draw(chances: Sequence[float], seed: int) -> int:
    """An index, by the seed."""
    point = xxhash.xxh3_64_intdigest(b"learned", seed) / 2**64
    for i, chance in enumerate(chances):
        point -= chance
        if point < 0:
            return i
    return max(range(len(chances)), key=chances.__getitem__)  # rounding left a crumb


def among(places: Sequence[int], count: int) -> list[float]:
    """Equal chances for some of so many."""
    chances = [0.0] * count
    for i in places:
        chances[i] = 1 / len(places)
    return chances


def chances_to_be_best(beliefs: Sequence[tuple[float, float]]) -> list[float]:
    """For each belief (mean, deviation), taken as normal, the probability that it is the greatest."""
    promising = sorted(range(len(beliefs)), key=lambda i: -beliefs[i][0] - 2 * beliefs[i][1])[:_MOST_BELIEVED]
    weights = [0.0] * len(beliefs)
    for i in promising:
        mean, deviation = beliefs[i]
        others = [(beliefs[j][0], max(beliefs[j][1], 1e-9) * math.sqrt(2)) for j in promising if j != i]
        for quantile in _QUANTILES:
            at = mean + deviation * quantile
            weights[i] += math.prod([0.5 + 0.5 * math.erf((at - m) / d) for m, d in others])
    whole = sum(weights)
    return [weight / whole for weight in weights]
