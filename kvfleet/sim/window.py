"""The latest blocks of prompts, which is all that a hybrid model's layers with a sliding window look back on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Self

import attrs

__all__ = ["WindowPool"]


@attrs.define
class WindowPool:
    """The blocks of such layers that can be found, least recently used first.

    vLLM's rule (``SlidingWindowManager.find_longest_cache_hit``, 0.32): a request goes on from the longest beginning of
    which these layers have the blocks that hold the last ``window - 1`` tokens before its end, and those with full
    attention all. What requests at work look back on is their own; here is what others may find, in a pool apart, where
    vLLM has one for all groups.

    Args:
        capacity: Blocks.
        needed: How many before a place are needed to go on from there.

    >>> pool = WindowPool.of(3, window_tokens=33, block_tokens=16)
    >>> pool.keep([1, 2, 3])
    ([], [])
    >>> pool.keep([7])
    ([1], [])
    >>> pool.last([1, 2, 3, 4], 4), pool.last([1, 2, 9], 3)
    (3, 0)
    """

    capacity: int
    needed: int
    _kept: OrderedDict[int, None] = attrs.field(init=False, factory=OrderedDict)

    @classmethod
    def of(cls, capacity: int, window_tokens: int, block_tokens: int) -> Self:
        """One for layers that look back on so many tokens, the one that is computed among them."""
        return cls(capacity, max(1, -(-(window_tokens - 1) // block_tokens)))

    def __len__(self) -> int:
        return len(self._kept)

    def last(self, blocks: Sequence[int], most: int) -> int:
        """The last place to go on from, of the first `most`: blocks before it."""
        found, kept, needed = 0, self._kept, self.needed
        for place in range(most - 1, -1, -1):
            found = found + 1 if blocks[place] in kept else 0
            if found == needed:
                return place + found
        return found

    def use(self, blocks: Sequence[int], last: int) -> None:
        """A request goes on from a place."""
        for block in blocks[max(0, last - self.needed) : last]:
            self._kept.move_to_end(block)

    def keep(self, blocks: Sequence[int]) -> tuple[list[int], list[int]]:
        """Keep blocks that were computed: the hashes that were forgotten for it, and the places that need no telling.

        These are those that were there, and those that are gone again because there are more than there is room for.
        """
        kept, before = self._kept, set[int]()
        for block in blocks:
            if block in kept:
                before.add(block)
            kept[block] = None
            kept.move_to_end(block)
        new = set(blocks) - before
        gone = [kept.popitem(last=False)[0] for _ in range(len(kept) - self.capacity)]
        silent = [place for place, block in enumerate(blocks) if block in before or block not in kept]
        return [block for block in gone if block not in new], silent

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
