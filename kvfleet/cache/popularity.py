"""How often beginnings of prompts were asked for of late: what it is worth to hold one in another cache."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from math import exp

import attrs

__all__ = ["Popularity"]

_SELDOM = 0.05
"""Uses that are as good as none."""


@attrs.define
class Popularity:
    """Counts of the beginnings of prompts, fading with time.

    A beginning is counted at 1, 2, 4, 8 … blocks, at the prompt's end, and where the prompt parts from all that
    somebody holds: after a system prompt of 200 blocks that is at 200, where the count at 128 would not tell of the
    last 72. It takes a few dictionary lookups a prompt.

    Args:
        span_s: A count fades to 1/e in this time.
        most: Beginnings that are remembered, at least; twice as many at most. Each takes about 200 bytes.

    >>> popular = Popularity(span_s=60)
    >>> for _ in range(3):
    ...     popular.note([11, 12, 13], now_s=0.0)
    >>> [(blocks, round(uses)) for blocks, uses in popular.uses([11, 12, 99], now_s=0.0)]
    [(1, 3), (2, 3)]
    >>> popular.note([11, 12, 13, 14], now_s=0.0, known=3)
    >>> [(blocks, round(uses)) for blocks, uses in popular.uses([11, 12, 13, 15], now_s=0.0, known=3)]
    [(1, 4), (2, 4), (3, 4)]
    """

    span_s: float = 60.0
    most: int = 100_000
    _counts: dict[int, tuple[float, float]] = attrs.field(init=False, factory=dict, repr=False)
    _older: Mapping[int, tuple[float, float]] = attrs.field(init=False, factory=dict, repr=False)

    def note(self, hashes: Sequence[int], now_s: float, known: int = 0) -> None:
        """A prompt of these chained hashes was asked for, of which somebody held so many blocks already."""
        counts, older, span_s = self._counts, self._older, self.span_s
        for place in _places(len(hashes), known):
            block = hashes[place]
            before = counts.get(block) or older.get(block)
            if before is None:
                counts[block] = 1.0, now_s
            else:
                count, then_s = before
                counts[block] = count * exp(min((then_s - now_s) / span_s, 0.0)) + 1, now_s
        if len(counts) > self.most:
            self._older, self._counts = counts, {}

    def uses(self, hashes: Sequence[int], now_s: float, known: int = 0) -> list[tuple[int, float]]:
        """How often this prompt's beginnings were asked for: blocks and uses, from the shortest to the longest."""
        counts, older, span_s = self._counts, self._older, self.span_s
        found = []
        for place in _places(len(hashes), known):
            block = hashes[place]
            before = counts.get(block) or older.get(block)
            if before is None:
                break
            count = before[0] * exp(min((before[1] - now_s) / span_s, 0.0))
            if count < _SELDOM:
                break
            found.append((place + 1, count))
        return found


@functools.lru_cache(maxsize=16_384)
def _places(blocks: int, known: int) -> tuple[int, ...]:
    """Where a chain of so many blocks is counted: its 1st, 2nd, 4th, 8th … block, its last, and the last known one."""
    found, depth = {blocks - 1, min(known, blocks) - 1}, 1
    while depth < blocks:
        found.add(depth - 1)
        depth *= 2
    return tuple(sorted(found - {-1}))
