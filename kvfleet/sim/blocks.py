"""The KV cache of a simulated engine: blocks that requests hold, and released ones that still know a prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import attrs

__all__ = ["BlockPool"]


@attrs.define
class BlockPool:
    """A fixed number of blocks. Each is empty, private to a request, shared under a hash, or released.

    A shared block is pinned while anyone holds it. Released, it knows its prefix and can be pinned again until its turn
    to be taken comes, least recently used first. Private blocks released are empty: vLLM's automatic prefix caching,
    https://docs.vllm.ai/en/latest/design/prefix_caching.html, and ``BlockPool.free_blocks`` of vLLM 0.32. A block
    computed twice is kept once.

    >>> pool = BlockPool(3)
    >>> pool.take(2), pool.share([10, 11])
    ([], [])
    >>> pool.release([10, 11], private=0)
    >>> pool.match([10, 11, 12]), pool.available
    (2, 3)
    >>> pool.take(2)  # the empty one, then the end of the released prefix
    [11]
    """

    capacity: int
    _pins: dict[int, int] = attrs.field(init=False, factory=dict)
    _released: OrderedDict[int, None] = attrs.field(init=False, factory=OrderedDict)
    _private: int = attrs.field(init=False, default=0)

    @property
    def held(self) -> int:
        """Blocks that requests hold."""
        return len(self._pins) + self._private

    @property
    def available(self) -> int:
        """Blocks that can be taken or pinned."""
        return self.capacity - len(self._pins) - self._private

    @property
    def cached(self) -> int:
        """Released blocks that still know a prefix."""
        return len(self._released)

    def match(self, blocks: Sequence[int], most: int | None = None) -> int:
        """How many leading blocks are there, of the first `most`."""
        pins, released = self._pins, self._released
        found = 0
        for block in blocks if most is None else blocks[:most]:
            if block not in pins and block not in released:
                break
            found += 1
        return found

    def unpinned(self, blocks: Sequence[int]) -> int:
        """How many of these blocks nobody holds."""
        return sum(block not in self._pins for block in blocks)

    def pin(self, blocks: Sequence[int]) -> None:
        """Hold blocks that are there."""
        for block in blocks:
            if block in self._pins:
                self._pins[block] += 1
            else:
                del self._released[block]
                self._pins[block] = 1

    def take(self, count: int) -> list[int]:
        """Make so many blocks private to a request, empty ones first; gives the hashes that were forgotten for it.

        The caller has seen that so many are `available`.
        """
        empty = self.capacity - self.held - len(self._released)
        self._private += count
        return [self._released.popitem(last=False)[0] for _ in range(count - empty)] if count > empty else []

    def share(self, blocks: Sequence[int]) -> list[int]:
        """Give private blocks, now full, their hashes; gives the places of those hashes that were there already.

        A hash that somebody holds is held in the new block's stead, which is empty again.
        """
        pins, released = self._pins, self._released
        self._private -= len(blocks)
        known = []
        for place, block in enumerate(blocks):
            if block in pins:
                pins[block] += 1
                known.append(place)
                continue
            if block in released:
                del released[block]
                known.append(place)
            pins[block] = 1
        return known

    def release(self, shared: Sequence[int], private: int) -> None:
        """Let go of a request's blocks; the end of the prefix will be taken before its beginning."""
        self._private -= private
        pins, released = self._pins, self._released
        for block in reversed(shared):
            holders = pins[block] - 1
            if holders:
                pins[block] = holders
            else:
                del pins[block]
                released[block] = None

    def clear(self) -> None:
        """Forget every released block."""
        self._released.clear()
