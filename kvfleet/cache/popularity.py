"""How often beginnings of prompts were asked for of late: what it is worth to hold one in another cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import attrs

__all__ = ["Popularity"]

_SELDOM = 0.05
"""Uses that are as good as none."""


@attrs.define
class Popularity:
    """Counts of the beginnings of prompts, fading with time.

    A beginning is counted at 1, 2, 4, 8 … blocks and at the prompt's end, which is enough to see how far prompts are
    alike to within a factor of two, and takes a few dictionary lookups a prompt.

    Args:
        span_s: A count fades to 1/e in this time.
        most: Beginnings that are remembered, at least; twice as many at most. Each takes about 200 bytes.

    >>> popular = Popularity(span_s=60)
    >>> for _ in range(3):
    ...     popular.note([11, 12, 13], now_s=0.0)
    >>> [(blocks, round(uses)) for blocks, uses in popular.uses([11, 12, 99], now_s=0.0)]
    [(1, 3), (2, 3)]
    """

    span_s: float = 60.0
    most: int = 100_000
    _counts: dict[int, tuple[float, float]] = attrs.field(init=False, factory=dict, repr=False)
    _older: Mapping[int, tuple[float, float]] = attrs.field(init=False, factory=dict, repr=False)

    def note(self, hashes: Sequence[int], now_s: float) -> None:
        """A prompt of these chained hashes was asked for."""
        counts = self._counts
        for blocks in _depths(len(hashes)):
            block = hashes[blocks - 1]
            counts[block] = self._count(block, now_s) + 1, now_s
        if len(counts) > self.most:
            self._older, self._counts = counts, {}

    def uses(self, hashes: Sequence[int], now_s: float) -> Iterator[tuple[int, float]]:
        """How often this prompt's beginnings were asked for: blocks and uses, from the shortest to the longest."""
        for blocks in _depths(len(hashes)):
            count = self._count(hashes[blocks - 1], now_s)
            if count < _SELDOM:
                return
            yield blocks, count

    def _count(self, block: int, now_s: float) -> float:
        known = self._counts.get(block) or self._older.get(block)
        return known[0] * math.exp(min((known[1] - now_s) / self.span_s, 0.0)) if known is not None else 0.0


def _depths(blocks: int) -> Iterator[int]:
    """1, 2, 4, 8 … and the end."""
    depth = 1
    while depth < blocks:
        yield depth
        depth *= 2
    if blocks:
        yield blocks
