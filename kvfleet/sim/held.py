"""What the requests of a simulated engine hold of its KV cache, and what becomes of its blocks.

The engine says when a request needs blocks, fills some, or leaves; here is decided what of a prompt is there, and noted
what has to be told at the step's end. A hybrid model's layers with a sliding window have a cache of their own, and a
request goes on from where both have what it needs (`kvfleet.sim.window`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from kvfleet.sim.blocks import BlockPool
from kvfleet.sim.events import Event, Job, Removed, Stored
from kvfleet.sim.spec import EngineSpec
from kvfleet.sim.window import WindowPool

__all__ = ["HeldBlocks"]

_WHOLE, _LATEST = 0, 1
"""Groups of layers, as events number them: those with full attention, and those with a window."""

_Note = tuple[Job | None, int, int, int, Sequence[int]]
"""The request whose blocks from one place to another are there, in a group; or the blocks that are gone from it."""


@attrs.define(eq=False)
class HeldBlocks:
    """The blocks of one engine.

    Args:
        spec: Its size.

    Attributes:
        tells: False if nobody asks what becomes of blocks.
        pool: The blocks of the layers with full attention.
        window: Those of the layers with a window; None if there are none.
        is_noted: True if something has to be told.
    """

    spec: EngineSpec
    tells: bool = True
    pool: BlockPool = attrs.field(init=False, repr=False)
    window: WindowPool | None = attrs.field(init=False, default=None, repr=False)
    is_noted: bool = attrs.field(init=False, default=False)
    _notes: list[_Note] = attrs.field(init=False, factory=list, repr=False)

    def __attrs_post_init__(self) -> None:
        spec = self.spec
        self.pool = BlockPool(spec.cache_blocks)
        if spec.window_tokens:
            self.window = WindowPool.of(spec.window_cache_blocks, spec.window_tokens, spec.block_tokens)

    # What is there

    def hits(self, job: Job) -> int:
        """Blocks of a request from which it goes on; its last token is always computed."""
        hashes = job.hashes
        found = self.pool.match(hashes, (job.target - 1) // self.spec.block_tokens)
        return found if self.window is None else self.window.last(hashes, found)

    def fits(self, job: Job, hits: int) -> bool:
        """True if there is room for a request that goes on from so many blocks."""
        fresh = -(-job.target // self.spec.block_tokens) - hits
        return fresh + self.pool.unpinned(job.hashes, hits) <= self.pool.available

    def are_new(self, hashes: Sequence[int]) -> bool:
        """True if none of these is there, and no two are the same."""
        return len({*hashes}) == len(hashes) and not any(self.pool.match((one,)) for one in hashes)

    # What becomes of it

    def admit(self, job: Job, hits: int) -> None:
        """Hold the blocks from which a request goes on."""
        self.pool.pin(job.hashes, hits)
        job.held = job.shared = hits
        job.computed = hits * self.spec.block_tokens
        if self.window is not None:
            self.window.use(job.hashes, hits)

    def take(self, blocks: int) -> None:
        """Make so many blocks a request's own; the caller has seen that they are available."""
        forgotten = self.pool.take(blocks)
        if forgotten and self.tells:
            self._note(None, 0, 0, _WHOLE, forgotten)

    def share(self, job: Job, full: int) -> None:
        """Give a request's full blocks their hashes, as far as they are known."""
        first, last = job.shared, min(full, len(job.hashes))
        if first >= last:
            return
        blocks = job.hashes[first:last]
        known = self.pool.share(blocks, job.hashes[first - 1] if first else None)
        job.shared = last
        gone, kept = self.window.keep(blocks) if self.window is not None else ((), ())
        if not self.tells:
            return
        self._note_but(job, first, last, range(known), _WHOLE)
        if self.window is not None:
            if gone:
                self._note(None, 0, 0, _LATEST, gone)
            self._note_but(job, first, last, kept, _LATEST)

    def release(self, job: Job) -> None:
        """Let go of all that a request holds."""
        self.pool.release(job.hashes[: job.shared], job.held - job.shared)
        job.held = job.shared = job.computed = 0

    def clear(self) -> bool:
        """Forget everything; False, and nothing happens, while requests hold blocks."""
        if self.pool.held:
            return False
        self.pool.clear()
        if self.window is not None:
            self.window.clear()
        return True

    # What is told of it

    def _note(self, job: Job | None, first: int, last: int, group: int, gone: Sequence[int] = ()) -> None:
        self._notes.append((job, first, last, group, gone))
        self.is_noted = True

    def _note_but(self, job: Job, first: int, last: int, known: Sequence[int], group: int) -> None:
        """Note blocks as stored, but those places among them that were known before."""
        start = first
        for place in known:
            if start < first + place:
                self._note(job, start, first + place, group)
            start = first + place + 1
        if start < last:
            self._note(job, start, last, group)

    def told(self, at_s: float) -> Iterator[Event]:
        """What became of blocks in a step, at its end."""
        for job, first, last, group, gone in self._notes:
            if job is None:
                yield Removed(at_s, tuple(gone), group)
            else:
                yield Stored(at_s, job, first, last, group)
        self._notes.clear()
        self.is_noted = False
