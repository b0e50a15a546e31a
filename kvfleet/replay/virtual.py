"""Virtual time: an event loop that never waits, because its clock jumps to whatever is due next.

Everything that asks the loop to wake it later (`asyncio.sleep`, `anyio.sleep`, `asyncio.timeout`) works as ever, so the
code of a live route runs unchanged, its time limits and retries included. Nothing here opens a socket.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import selectors
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import TypeVarTuple

import attrs

from kvfleet.clock import FrozenClock

__all__ = ["VirtualClock", "VirtualLoop"]

_Ts = TypeVarTuple("_Ts")

START_S = 1000.0
"""Where a virtual clock begins; not 0, because 0 stands for never in places."""

_AT_ONCE = 256
"""How often something is done before the system is asked whether a thread has brought anything."""
_FEW = 64
"""Cancelled timers that are not worth a clean-up."""


@attrs.define
class VirtualClock(FrozenClock):
    """The clock that a `VirtualLoop` moves; whoever else holds it reads the same time."""

    seconds: float = START_S


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a `VirtualClock`.

    Its timers are kept apart from those of the loop it is made of, which compares each with many others in Python, and
    asks the system for news before every one: half of what a replay's events cost.

    >>> loop = VirtualLoop(VirtualClock())
    >>> loop.run_until_complete(asyncio.sleep(3600))
    >>> loop.time()
    4600.0
    >>> loop.close()
    """

    _ready: deque[asyncio.Handle]  # these are the base's
    _selector: selectors.BaseSelector
    _stopping: bool
    _process_events: Callable[[object], None]

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = itertools.count()
        self._cancelled = 0
        super().__init__(selectors.DefaultSelector())

    def time(self) -> float:
        """The virtual time, in seconds."""
        return self.clock.seconds

    def call_at(
        self, when: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Call something at a time; of two at the same, the one that was asked for first goes first."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        handle._scheduled = True  # type: ignore[attr-defined]  # noqa: SLF001 - so that it tells us if it is cancelled
        heapq.heappush(self._timers, (when, next(self._order), handle))
        return handle

    def call_later(
        self, delay: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Call something after a while."""
        return self.call_at(self.clock.seconds + delay, callback, *args, context=context)

    def call_soon(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Call something next."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Drop timers that nobody waits for once they are the most: time limits are mostly cancelled."""
        self._cancelled += handle._scheduled  # type: ignore[attr-defined]  # noqa: SLF001 - False once it was due
        if self._cancelled > _FEW and 2 * self._cancelled > len(self._timers):
            self._timers = [timer for timer in self._timers if not timer[2].cancelled()]
            heapq.heapify(self._timers)
            self._cancelled = 1  # this one, which is not marked yet

    def _run_once(self) -> None:
        """Do what is ready, or else what is due next, some hundred times; `run_forever` repeats this.

        Real waiting is left for one case: nothing is due ever, so that only a thread can still bring work.
        """
        ready = self._ready
        for _ in range(_AT_ONCE):
            if not ready and not self._jump():
                super()._run_once()  # type: ignore[misc]  # which has no timers, and waits
                return
            for _ in range(len(ready)):
                handle = ready.popleft()
                if not handle.cancelled():
                    handle._run()  # noqa: SLF001 - as the loop this is made of does
            if self._stopping:
                return
        self._process_events(self._selector.select(0))

    def _jump(self) -> bool:
        """Make ready what is due next, and move the clock on to that; False if nothing is."""
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
            self._cancelled -= 1
        if not timers:
            return False
        now_s = self.clock.seconds = max(self.clock.seconds, timers[0][0])
        while timers and timers[0][0] <= now_s:
            handle = heapq.heappop(timers)[2]
            if handle.cancelled():
                self._cancelled -= 1
            else:
                handle._scheduled = False  # type: ignore[attr-defined]  # noqa: SLF001 - it is no timer any more
                self._ready.append(handle)
        return True
