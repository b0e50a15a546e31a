"""Virtual time: an event loop that never waits, because its clock jumps to whatever is due next.

Everything that asks the loop to wake it later (`asyncio.sleep`, `anyio.sleep`, `asyncio.timeout`) works as ever, so the
code of a live route runs unchanged, its time limits and retries included. Nothing here opens a socket.
"""

# ruff: noqa: SLF001 - handles and loop are two halves of one thing here, as in asyncio itself

from __future__ import annotations

import asyncio
import heapq
import itertools
import selectors
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Any, TypeVarTuple

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
    _told: tuple[float, int] = attrs.field(init=False, default=(-1.0, 0))

    def time_ns(self) -> int:
        """Unix time in nanoseconds; worked out once for each moment, of which a request asks for each several times."""
        at_s, found = self._told
        if at_s != self.seconds:
            found = super().time_ns()
            self._told = self.seconds, found
        return found


class _Handle(asyncio.TimerHandle):
    """What is to be done, at once or at a time.

    The base's asks its loop, in Python, whether it debugs, when it is made and when it is cancelled, and is itself
    asked whether it was, and called to run: a third of what a loop costs that never waits. No debugging here.
    """

    __slots__ = ()

    _callback: Callable[..., object] | None  # these are the base's
    _args: Any
    _context: Context
    _loop: VirtualLoop
    _cancelled: bool
    _scheduled: bool
    _when: float

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: VirtualLoop,
        context: Context | None,
        *,
        scheduled: bool,
    ) -> None:
        self._when, self._callback, self._args, self._loop = when, callback, args, loop
        self._context = copy_context() if context is None else context
        self._scheduled, self._cancelled = scheduled, False
        self._source_traceback = self._repr = None

    def cancel(self) -> None:
        """Do not do it."""
        if not self._cancelled:
            self._cancelled = True
            self._callback = self._args = None
            if self._scheduled:
                self._loop.forget_one()


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

    _ready: deque[Any]  # of handles, these and the base's; it is the base's own
    _selector: selectors.BaseSelector
    _stopping: bool
    _process_events: Callable[[object], None]

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self._timers: list[tuple[float, int, _Handle]] = []
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
        handle = _Handle(when, callback, args, self, context, scheduled=True)
        heapq.heappush(self._timers, (when, next(self._order), handle))
        return handle

    def call_later(
        self, delay: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Call something after a while."""
        when = self.clock.seconds + delay
        handle = _Handle(when, callback, args, self, context, scheduled=True)
        heapq.heappush(self._timers, (when, next(self._order), handle))
        return handle

    def call_soon(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Call something next."""
        handle = _Handle(0.0, callback, args, self, context, scheduled=False)
        self._ready.append(handle)
        return handle

    def forget_one(self) -> None:
        """A timer was cancelled. Drop those that nobody waits for once they are the most: time limits mostly are."""
        self._cancelled += 1
        if self._cancelled > _FEW and 2 * self._cancelled > len(self._timers):
            self._timers = [timer for timer in self._timers if not timer[2]._cancelled]
            heapq.heapify(self._timers)
            self._cancelled = 0

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
                if handle._cancelled:
                    continue
                try:
                    handle._context.run(handle._callback, *handle._args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:  # noqa: BLE001 - the border of the loop, as in the one this is made of
                    what = f"exception in callback {handle._callback!r}"
                    self.call_exception_handler({"message": what, "exception": error, "handle": handle})
            if self._stopping:
                return
        self._process_events(self._selector.select(0))

    def _jump(self) -> bool:
        """Make ready what is due next, and move the clock on to that; False if nothing is."""
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
            self._cancelled -= 1
        if not timers:
            return False
        now_s = self.clock.seconds = max(self.clock.seconds, timers[0][0])
        while timers and timers[0][0] <= now_s:
            handle = heapq.heappop(timers)[2]
            if handle._cancelled:
                self._cancelled -= 1
            else:
                handle._scheduled = False  # it is no timer any more
                self._ready.append(handle)
        return True
