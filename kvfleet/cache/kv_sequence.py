"""One publisher's stream of numbered messages: gaps, duplicates, replays and restarts.

vLLM and SGLang number their messages from 0 and keep the last of them (10,000 by default) for whoever missed some
(``vllm/distributed/kv_events.py``). A number alone proves little: an engine that restarted may have reached the next
number expected. So a replay is always asked for from the last message that was seen, and only if that one comes back as
it was, the stream is the same one.
"""

from __future__ import annotations

from collections import deque

import attrs
import xxhash

from kvfleet.cache.kv_events import EventBatch, decode
from kvfleet.cache.kv_state import CacheState, KVMode
from kvfleet.errors import KVEventError

__all__ = ["EventStream"]

_MOST_PENDING = 10_000
_SETTLE_S = 2.0


@attrs.define(eq=False, kw_only=True)
class EventStream(CacheState):
    """The state that one publisher's messages make.

    Whoever brings the messages calls `connected`, `live` for each message as it comes, and, while `wanted` is a number,
    asks for a replay from there and calls `replayed` for each message of it, and `replay_ended` or `replay_failed`, or
    `replay_broken_off`.

    Args:
        can_replay: True if missed messages can be asked for.
        rank: The data-parallel rank of messages that do not say.

    Attributes:
        wanted: The number from which a replay is wanted; None for none.
    """

    can_replay: bool = False
    rank: int = 0
    wanted: int | None = attrs.field(init=False, default=None)
    duplicates: int = attrs.field(init=False, default=0)
    _last: int | None = attrs.field(init=False, default=None)
    _digest: int = attrs.field(init=False, default=0, repr=False)
    _time_s: float = attrs.field(init=False, default=0.0)
    _live: int = attrs.field(init=False, default=-1)
    _pending: deque[tuple[int, bytes]] = attrs.field(init=False, factory=deque, repr=False)
    _is_syncing: bool = attrs.field(init=False, default=False)
    _is_probe: bool = attrs.field(init=False, default=False)
    _is_first: bool = attrs.field(init=False, default=False)
    _is_other: bool = attrs.field(init=False, default=False)
    _is_short: bool = attrs.field(init=False, default=False)
    _came_to: int = attrs.field(init=False, default=-1)
    _again_s: float | None = attrs.field(init=False, default=None)
    _no_replay_until_s: float = attrs.field(init=False, default=float("-inf"))

    def connected(self) -> None:
        """The publisher is there, perhaps again; what was said meanwhile was missed."""
        if self.is_connected:
            return
        super().connected()
        self._live = -1
        if self.can_replay:
            self._want(self._last if self._last is not None and self._last >= 0 else 0)
            self._again_s = self.clock.now_s() + _SETTLE_S  # a subscription takes effect a little after the connection
        elif self._last is not None:
            self.lose("the connection was lost for a while, and there is no replay")
            self._last = None

    def tick(self) -> None:
        """Time has passed: ask again where that was put off."""
        super().tick()
        is_due = self._again_s is not None and self.clock.now_s() >= self._again_s
        if not is_due or self._is_syncing or not self.is_connected:
            return
        self._again_s = None
        if self.is_whole:
            self._probe()
        elif self.can_replay:
            self.forget()
            self._last = None
            self._want(0)

    def miss_events(self) -> None:
        """The engine is at work and says nothing: ask whether it said something."""
        if self.can_replay and self.clock.now_s() >= self._no_replay_until_s:
            self._probe()
        else:
            super().miss_events()

    # Live

    def live(self, seq: int, payload: bytes) -> None:
        """A message as it was published."""
        self.connected()
        if self._is_syncing:
            if len(self._pending) < _MOST_PENDING:  # what is dropped here is a gap later, and asked for again
                self._pending.append((seq, payload))
            return
        if self._last is not None and seq <= self._last:
            if seq > self._live and not self._is_newer(payload):
                self._live = seq
                self.duplicates += 1  # it came with a replay already
                return
            self._restarted()
        is_next = seq == (0 if self._last is None else self._last + 1)
        if is_next or not self._await_missed(seq, payload):
            if self._last is None:
                self._begin(seq)
            self._live = seq
            self._apply(seq, payload)

    def _await_missed(self, seq: int, payload: bytes) -> bool:
        """Keep a message until those before it are replayed; False, and what is known is lost, if they will not be."""
        last = self._last
        self.counts.gaps += last is not None
        if self.can_replay and self.clock.now_s() >= self._no_replay_until_s:
            self._pending.append((seq, payload))
            self._want(max(last or 0, 0))
            return True
        if last is not None:
            self.lose(f"{seq - last - 1} messages were missed, and there is no replay")
        return False

    def _is_newer(self, payload: bytes) -> bool:
        try:
            return decode(payload).time_s > self._time_s
        except KVEventError:
            return False

    # Replays

    def replayed(self, seq: int, payload: bytes) -> None:
        """A message of the replay that was asked for."""
        if self._is_other or self._is_short:
            return
        is_first, self._is_first = self._is_first, False
        last = self._last
        if not is_first or last is None or last < 0:
            if last is None:
                self._begin(seq)
            elif seq <= last:
                return
            elif seq > last + 1 and not is_first:
                self._is_short = True  # ZMQ drops what a full queue has no room for: ask for the rest
                return
            elif seq > last + 1:
                self.lose("the engine no longer has all that was missed")
            self._apply(seq, payload)
        elif seq > last:
            self.lose("the engine no longer has all that was missed")
            self._apply(seq, payload)
        elif xxhash.xxh3_64_intdigest(payload) != self._digest:
            self._is_other = True

    def replay_ended(self) -> None:
        """That was all of it."""
        self.counts.replays += 1
        nothing_came, is_other, is_short = self._is_first, self._is_other, self._is_short
        self._is_first = self._is_other = self._is_short = False
        if self.wanted is not None:  # the connection was lost meanwhile, and there is more to ask for
            return
        if is_other or (nothing_came and self._last is not None and self._last >= 0):
            self._restarted()
            self._want(0)
            return
        if is_short and self._last is not None and self._last > self._came_to:
            self._want(self._last)
            return
        if is_short:
            self._no_replay_until_s = self.clock.now_s() + self._wait_s
            self.lose("the engine did not replay all that was missed")
            self._last = None
        if self._last is None and not is_short:  # it has published nothing so far, so there is nothing in its cache
            self._last, self.is_whole = -1, True
        self.is_silent = False
        self._go_live()

    def replay_failed(self) -> None:
        """No replay came, or not all of it."""
        self.counts.failed_replays += 1
        self._is_first = self._is_other = self._is_short = False
        if self.wanted is not None:  # the same
            return
        self._no_replay_until_s = self._again_s = self.clock.now_s() + self._wait_s
        if self._is_probe:
            self.is_silent = True
        else:
            self.lose("messages were missed, and the replay did not come")
            self._last = None
        self._go_live()

    def replay_broken_off(self) -> None:
        """Whoever asked has stopped listening; whoever goes on has to ask again, from where it came to."""
        self._is_first = self._is_other = self._is_short = False
        if self.wanted is None:
            self.wanted = max(self._last or 0, 0)

    def take_wanted(self) -> int:
        """The number from which to ask; the replay begins."""
        assert self.wanted is not None  # noqa: S101 - the contract
        start, self.wanted = self.wanted, None
        self._came_to = -1 if self._last is None else self._last
        self._is_first, self._is_other, self._is_short = True, False, False
        return start

    def judge(self) -> tuple[KVMode, str]:
        """See `CacheState.judge`; while missed messages are awaited, what is known may be out of date."""
        mode, why = super().judge()
        if mode is KVMode.EXACT and self._is_syncing and not self._is_probe:
            return KVMode.DEGRADED, "missed messages are being replayed"
        return mode, why

    def lose(self, why: str) -> None:
        """See `CacheState.lose`; a replay of everything may mend it later."""
        super().lose(why)
        if self.can_replay and self._again_s is None:
            self._again_s = self.clock.now_s() + self._wait_s

    def _want(self, start: int) -> None:
        self.wanted, self._is_syncing, self._is_probe = start, True, False

    def _probe(self) -> None:
        if not self._is_syncing and self._last is not None:
            self._want(max(self._last, 0))
            self._is_probe = True

    def _go_live(self) -> None:
        """Go on with what came meanwhile."""
        self._is_syncing = self._is_probe = False
        pending, self._pending = self._pending, deque()
        for seq, payload in pending:
            self.live(seq, payload)

    # Taking in

    def _begin(self, seq: int) -> None:
        """The first message: of the engine's life, or of what can still be had of it."""
        self.is_whole = seq == 0
        if seq:
            self.why = f"its first {seq} messages can no longer be had"

    def _restarted(self) -> None:
        self.counts.restarts += 1
        self.forget()
        self._last, self._live, self.why = None, -1, "the engine restarted"

    def _apply(self, seq: int, payload: bytes) -> None:
        self._last, self._digest = seq, xxhash.xxh3_64_intdigest(payload)
        try:
            batch = decode(payload)
        except KVEventError:
            batch = EventBatch(0.0, (), malformed=1)
        self._time_s = batch.time_s or self._time_s
        self.counts.unknown += batch.unknown
        self.take_in(self.rank if batch.rank is None else batch.rank, batch.events, batch.time_s)
        if batch.malformed:
            self.counts.unreadable += batch.malformed
            self.doubt("some of its events cannot be read")
