"""How far an engine's account of its cache may be believed, and why no further.

============  =======================================================================================================
mode          what is known
============  =======================================================================================================
exact         all of it: no event is missing since the cache was empty
degraded      only a part: some events were never seen. What is claimed is there, and more may be
approximate   nothing that may be used now; what was routed there has to do
load_only     nothing at all: nobody tells of this cache, and nothing is learned of it
============  =======================================================================================================

A `CacheState` goes from one to the other by itself, both ways. It is plain bookkeeping, without I/O: what brings the
events is `kvfleet.telemetry.kv_stream` (ZMQ) and `kvfleet.telemetry.kv_drain` (HTTP).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence

import attrs

from kvfleet.adapters.base import EngineLoad
from kvfleet.cache.engine_blocks import EngineBlocks
from kvfleet.cache.kv_events import BlockRemoved, BlockStored, Event
from kvfleet.clock import Clock, SystemClock

__all__ = ["CacheState", "KVCounts", "KVMode"]

_MOST_RANKS = 256
_KNOWN_SHARE = 0.98
"""Share of an engine's blocks that must be known for its account to count as whole again after a loss."""
_SILENT_BLOCKS = 64
"""Blocks' worth of prompt tokens that an engine may compute without telling of a block, before it counts as silent."""
_FIRST_WAIT_S = 30.0
_LONGEST_WAIT_S = 960.0
_FORGIVEN_S = 3600.0
_MOST_DISAPPOINTMENTS = 16
_SURELY = 8
"""Answers in a row that differ from what was claimed by just one block, until that is taken to be the engine's way."""


class KVMode(enum.StrEnum):
    """How a replica's cache is known."""

    EXACT = "exact"
    DEGRADED = "degraded"
    APPROXIMATE = "approximate"
    LOAD_ONLY = "load_only"


@attrs.define(kw_only=True)
class KVCounts:
    """What came of one source of events.

    Attributes:
        batches, events: Taken in.
        unknown: Events of types that nobody here knows.
        unreadable: Messages, or events in them, that could not be read.
        gaps: Times that messages were missing.
        replays, failed_replays: Times that missed messages were asked for again, and got or not.
        restarts: Times that the engine had begun anew.
        losses: Times that everything known was given up.
    """

    batches: int = 0
    events: int = 0
    unknown: int = 0
    unreadable: int = 0
    gaps: int = 0
    replays: int = 0
    failed_replays: int = 0
    restarts: int = 0
    losses: int = 0


@attrs.define(eq=False, kw_only=True)
class CacheState:
    """What one source of events tells, and how far it is believed.

    Args:
        make_blocks: Makes the blocks of a data-parallel rank, one set for each model or adapter that is served.
        clock: For how long ago something was.
        grace_s: How long what is known may be used after the source was lost.
        silence_s: How long an engine at work may tell nothing.

    Attributes:
        is_connected: True while the source is there.
        is_whole: True if nothing is missing, False if something is; None before anything is known.
        lag_s: Age of the last message when it was read, by the engine's clock and ours.
        drops_block: True if the engine computes the last block that it finds anew, as vLLM does for a model that drafts
            (EAGLE, MTP). No event says so; answers do.
    """

    make_blocks: Callable[[int], Sequence[EngineBlocks]]
    clock: Clock = attrs.field(factory=SystemClock)
    grace_s: float = 10.0
    silence_s: float = 10.0
    counts: KVCounts = attrs.field(init=False, factory=KVCounts)
    is_connected: bool = attrs.field(init=False, default=False)
    is_whole: bool | None = attrs.field(init=False, default=None)
    is_silent: bool = attrs.field(init=False, default=False)
    lag_s: float | None = attrs.field(init=False, default=None)
    why: str = attrs.field(init=False, default="no event was seen yet")
    drops_block: bool = attrs.field(init=False, default=False)
    _ranks: dict[int, Sequence[EngineBlocks]] = attrs.field(init=False, factory=dict, repr=False)
    _lost_s: float = attrs.field(init=False, default=float("-inf"))
    _heard_s: float = attrs.field(init=False, default=float("-inf"))
    _doubted_until_s: float = attrs.field(init=False, default=float("-inf"))
    _wait_s: float = attrs.field(init=False, default=_FIRST_WAIT_S)
    _computed: float | None = attrs.field(init=False, default=None)
    _disappointments: int = attrs.field(init=False, default=0)
    _blocks_off: int = attrs.field(init=False, default=0)

    # What is known

    @property
    def ranks(self) -> Sequence[int]:
        """The data-parallel ranks that were heard of."""
        return tuple(self._ranks)

    def blocks(self) -> Iterator[EngineBlocks]:
        """Every set of blocks."""
        for of_rank in self._ranks.values():
            yield from of_rank

    def judge(self) -> tuple[KVMode, str]:
        """The mode, and if it is not exact, why."""
        now_s = self.clock.now_s()
        if now_s < self._doubted_until_s:
            return KVMode.APPROXIMATE, self.why
        if self.is_silent:
            return KVMode.APPROXIMATE, "the engine computes prompts and tells of no block"
        if self.is_whole is None:
            return KVMode.APPROXIMATE, self.why if self.is_connected else "not connected"
        if not self.is_connected:
            mode = KVMode.DEGRADED if now_s - self._lost_s < self.grace_s else KVMode.APPROXIMATE
            return mode, "the connection is lost"
        if not self.is_whole:
            return KVMode.DEGRADED, self.why
        flaw = self._flaw()
        return (KVMode.DEGRADED, flaw) if flaw else (KVMode.EXACT, "")

    def _flaw(self) -> str:
        """Why a whole account is still not exact; empty if it is."""
        if len(self._ranks) > 1:
            return f"{len(self._ranks)} data-parallel ranks, of which the engine chooses one"
        for blocks in self.blocks():
            if blocks.is_cut:
                return "it holds more blocks than are remembered"
            if blocks.flaw:
                return blocks.flaw
            if blocks.counts.sparse and not blocks.counts.stored:
                return "its blocks do not fit ours in size"
        return ""

    # What happens

    def connected(self) -> None:
        """The source is there."""
        self.is_connected, self._heard_s = True, self.clock.now_s()

    def disconnected(self) -> None:
        """The source is gone."""
        if self.is_connected:
            self.is_connected, self._lost_s = False, self.clock.now_s()

    def take_in(self, rank: int, events: Iterable[Event], time_s: float) -> None:
        """Events, in order; at `time_s`, by the engine's clock, or 0."""
        self._heard_s, self._computed, self.is_silent = self.clock.now_s(), None, False
        if time_s:
            self.lag_s = max(self.clock.time_ns() / 1e9 - time_s, 0.0)
        self.counts.batches += 1
        of_rank = self._of_rank(rank)
        orphans = sum(blocks.counts.orphans for blocks in of_rank)
        for event in events:
            self.counts.events += 1
            for blocks in of_rank:
                if isinstance(event, BlockStored):
                    blocks.stored(event)
                elif isinstance(event, BlockRemoved):
                    blocks.removed(event)
                else:
                    self._emptied(blocks)
        for blocks in of_rank:
            blocks.settle()
        if any(blocks.is_torn for blocks in of_rank):
            self.doubt("a block was removed amid others that follow it")
        elif self.is_whole and sum(blocks.counts.orphans for blocks in of_rank) > orphans:
            self.lose("a block follows one that was never announced")

    def _of_rank(self, rank: int) -> Sequence[EngineBlocks]:
        found = self._ranks.get(rank)
        if found is None:
            if len(self._ranks) >= _MOST_RANKS:
                self.counts.unreadable += 1
                return ()
            found = self._ranks[rank] = self.make_blocks(rank)
        return found

    def _emptied(self, blocks: EngineBlocks) -> None:
        """The engine's cache is empty, and with it nothing is missing any more."""
        blocks.clear()
        if len(self._ranks) == 1:
            self.is_whole = True

    def forget(self) -> None:
        """Nothing is known any more, as after a restart."""
        for blocks in self.blocks():
            blocks.clear()
        self.is_whole, self._computed = None, None
        self.drops_block, self._blocks_off = False, 0

    def lose(self, why: str) -> None:
        """Events are missing: what was claimed may be gone, so nothing is claimed until it is announced anew."""
        self.forget()
        self.counts.losses += 1
        self.is_whole, self.why = False, why

    def doubt(self, why: str) -> None:
        """What the engine says makes no sense: give up what is known, and do not use what comes for a while."""
        self.lose(why)
        now_s = self.clock.now_s()
        if now_s >= self._doubted_until_s:
            self._doubted_until_s = now_s + self._wait_s
            self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)

    # What the engine says elsewhere

    def told(self, load: EngineLoad) -> None:
        """Compare with the engine's own figures: the size of its cache, and how much it computed."""
        self._compare_size(load)
        computed = _computed(load)
        if computed is None or not self.is_connected:
            return
        if self._computed is None or computed < self._computed:
            self._computed = computed
            return
        block = max((blocks.engine_block_tokens for blocks in self.blocks()), default=0) or load.block_tokens or 16
        is_long = self.clock.now_s() - self._heard_s >= self.silence_s
        if is_long and computed - self._computed >= _SILENT_BLOCKS * block:
            self._computed = computed
            self.miss_events()

    def tick(self) -> None:
        """Time has passed; what was doubted an hour ago is forgiven."""
        if self._wait_s > _FIRST_WAIT_S and self.clock.now_s() - self._doubted_until_s > _FORGIVEN_S:
            self._wait_s = _FIRST_WAIT_S

    def miss_events(self) -> None:
        """The engine is at work and says nothing."""
        self.is_silent = True

    def _compare_size(self, load: EngineLoad) -> None:
        kept = {(rank, one.lora): one.copies for rank, of_rank in self._ranks.items() for one in of_rank}
        if not load.cache_blocks or not kept:
            return
        total = sum(kept.values())
        if total > load.cache_blocks * 1.02 + 16:
            self.doubt("it announced more blocks than its cache has")
        elif self.is_whole is False and total >= _KNOWN_SHARE * (load.cache_blocks - len(self._ranks)):
            self.is_whole = True  # what could still be missing is less than can be in the cache

    def answered(self, expected_tokens: float, cached_tokens: int) -> None:
        """An answer's own account of the cache, against what was claimed; too many disappointments are doubts.

        One is no proof: what was there may be gone when a request has waited for its turn.
        """
        block = max((blocks.engine_block_tokens for blocks in self.blocks()), default=0)
        if not block or not (expected_tokens or cached_tokens):
            return
        self._compare_last(expected_tokens - cached_tokens, block)
        if expected_tokens < 2 * block:
            return
        if cached_tokens >= expected_tokens / 2:
            self._disappointments = 0
            return
        self._disappointments += 1
        if self._disappointments >= _MOST_DISAPPOINTMENTS:
            self._disappointments = 0
            self.doubt("answers had less cached than the events say")

    def _compare_last(self, short_by: float, block: int) -> None:
        """See whether the engine drops the last block that it finds: then what is expected is a block too much."""
        if short_by != (-block if self.drops_block else block):
            self._blocks_off = 0
            return
        self._blocks_off += 1
        if self._blocks_off >= _SURELY:
            self.drops_block, self._blocks_off = not self.drops_block, 0


def _computed(load: EngineLoad) -> float | None:
    """Prompt tokens the engine looked up in its cache and did not find, since it started."""
    if load.prefix_queries_tokens is None or load.prefix_hits_tokens is None:
        return None
    return load.prefix_queries_tokens - load.prefix_hits_tokens
