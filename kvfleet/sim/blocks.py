"""The KV cache of a simulated engine: blocks that requests hold, and released ones that still know a prefix.

A block's hash stands for all that is before it too, so whoever holds a block holds all before it, and what was used of
a prompt was used from its beginning. Blocks are therefore kept as runs, neighbours of one prompt whose lot has always
been the same. A conversation is a few runs, and touching it costs a few steps, however long it is.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Sequence

import attrs

__all__ = ["BlockPool"]


@attrs.define(eq=False)
class _Run:
    """Neighbouring blocks of one prompt, all of which the same requests hold."""

    blocks: list[int]
    holders: int


@attrs.define
class BlockPool:
    """A fixed number of blocks. Each is empty, private to a request, shared under a hash, or released.

    A shared block is pinned while anyone holds it. Released, it knows its prefix and can be pinned again until its turn
    to be taken comes, least recently used first. Private blocks released are empty: vLLM's automatic prefix caching,
    https://docs.vllm.ai/en/latest/design/prefix_caching.html, and ``BlockPool.free_blocks`` of vLLM 0.32. A block
    computed twice is kept once.

    Hashes are chained: two prompts with the same hash in one place have the same ones in all places before it.

    >>> pool = BlockPool(3)
    >>> pool.take(2), pool.share([10, 11])
    ([], 0)
    >>> pool.release([10, 11], private=0)
    >>> pool.match([10, 11, 12]), pool.available
    (2, 3)
    >>> pool.take(2)  # the empty one, then the end of the released prefix
    [11]
    """

    capacity: int
    _run_of: dict[int, _Run] = attrs.field(init=False, factory=dict, repr=False)
    _released: OrderedDict[_Run, None] = attrs.field(init=False, factory=OrderedDict, repr=False)  # oldest first
    _pinned: int = attrs.field(init=False, default=0)
    _private: int = attrs.field(init=False, default=0)
    _kept: int = attrs.field(init=False, default=0)

    @property
    def held(self) -> int:
        """Blocks that requests hold."""
        return self._pinned + self._private

    @property
    def available(self) -> int:
        """Blocks that can be taken or pinned."""
        return self.capacity - self._pinned - self._private

    @property
    def cached(self) -> int:
        """Released blocks that still know a prefix."""
        return self._kept

    def match(self, blocks: Sequence[int], most: int | None = None) -> int:
        """How many leading blocks are there, of the first `most`."""
        most = len(blocks) if most is None else min(most, len(blocks))
        if not most or blocks[0] not in self._run_of:
            return 0
        if blocks[most - 1] in self._run_of:
            return most
        return bisect.bisect_left(blocks, True, 1, most - 1, key=lambda block: block not in self._run_of)

    def unpinned(self, blocks: Sequence[int], most: int | None = None) -> int:
        """How many of the first `most` of these blocks nobody holds, which are there if there is one."""
        most = len(blocks) if most is None else most
        return most - bisect.bisect_left(blocks, True, 0, most, key=self._is_free)

    def pin(self, blocks: Sequence[int], most: int | None = None) -> None:
        """Hold the first `most` of these blocks, which are there."""
        released = self._released
        for run in self._runs(blocks, 0, len(blocks) if most is None else most):
            if not run.holders:
                del released[run]
                self._kept -= len(run.blocks)
                self._pinned += len(run.blocks)
            run.holders += 1

    def take(self, count: int) -> list[int]:
        """Make so many blocks private to a request, empty ones first; gives the hashes that were forgotten for it.

        The caller has seen that so many are `available`.
        """
        missing = count - (self.capacity - self._pinned - self._private - self._kept)
        self._private += count
        if missing <= 0:
            return []
        self._kept -= missing
        forgotten: list[int] = []
        while missing > len(forgotten):
            run = next(iter(self._released))
            blocks, rest = run.blocks, missing - len(forgotten)
            forgotten += blocks[: -rest - 1 : -1]
            if len(blocks) <= rest:
                del self._released[run]
            else:
                del blocks[-rest:]
        for block in forgotten:
            del self._run_of[block]
        return forgotten

    def share(self, blocks: Sequence[int], after: int | None = None) -> int:
        """Give private blocks, now full, their hashes; gives how many of these, the first ones, were there already.

        A hash that somebody holds is held in the new block's stead, which is empty again.

        Args:
            blocks: The hashes.
            after: That of the block before them, which is held by the same request.
        """
        self._private -= len(blocks)
        known = self.match(blocks)
        self.pin(blocks, known)
        if known == len(blocks):
            return known
        new = blocks[known:]
        run = self._run_of[after] if after is not None and not known else None
        if run is not None and run.holders == 1:  # that one goes on, then, which ends there
            run.blocks += new
        else:
            run = _Run([*new], 1)
        self._run_of.update(dict.fromkeys(new, run))
        self._pinned += len(new)
        return known

    def release(self, shared: Sequence[int], private: int) -> None:
        """Let go of a request's blocks; the end of the prefix will be taken before its beginning."""
        self._private -= private
        for run in reversed([*self._runs(shared, 0, len(shared))]):
            run.holders -= 1
            if not run.holders:
                self._released[run] = None
                self._pinned -= len(run.blocks)
                self._kept += len(run.blocks)

    def clear(self) -> None:
        """Forget every released block."""
        for run in self._released:
            for block in run.blocks:
                del self._run_of[block]
        self._released.clear()
        self._kept = 0

    # Runs

    def _is_free(self, block: int) -> bool:
        return not self._run_of[block].holders

    def _runs(self, blocks: Sequence[int], first: int, last: int) -> list[_Run]:
        """The runs of blocks that are there, in their order; one that also has others is parted first."""
        found = []
        while first < last:
            run = self._run_of[blocks[first]]
            size = len(run.blocks)
            if first + size > last or run.blocks[-1] != blocks[first + size - 1]:
                run = self._part(run, blocks, first, min(size, last - first))
                size = len(run.blocks)
            found.append(run)
            first += size
        return found

    def _part(self, run: _Run, blocks: Sequence[int], first: int, most: int) -> _Run:
        """Make what a run has of these blocks a run of its own, and give that; the rest keeps its turn."""
        own = run.blocks
        size = bisect.bisect_left(range(most), True, key=lambda place: own[place] != blocks[first + place])
        head = _Run(own[:size], run.holders)
        self._run_of.update(dict.fromkeys(head.blocks, head))
        del own[:size]
        if not run.holders:
            self._released[head] = None  # anywhere: it is parted because somebody is about to hold it
        return head
