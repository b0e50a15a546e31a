"""A simulated engine on a clock: its time passes, and whoever waits for tokens is woken when they are there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import anyio
import attrs

from kvfleet.adapters.base import EngineLoad
from kvfleet.clock import Clock
from kvfleet.sim.engine import Engine
from kvfleet.sim.events import Decoded, Event, Finished, FirstToken, Job

__all__ = ["LiveEngine", "Order"]

_ALL = 1 << 60
"""More tokens than any answer has."""


@attrs.define(eq=False)
class Order:
    """Jobs that are waited for together: the choices of one answer.

    Attributes:
        jobs: The jobs.
        is_cancelled: True once it was cancelled.
    """

    jobs: tuple[Job, ...]
    is_cancelled: bool = attrs.field(init=False, default=False)
    _tokens: dict[Job, int] = attrs.field(init=False, repr=False)
    # asyncio's own: a bell for each token costs a tenth of what anyio's event does.
    _bell: asyncio.Future[None] | None = attrs.field(init=False, default=None, repr=False)
    _wanted: int = attrs.field(init=False, default=0, repr=False)

    def __attrs_post_init__(self) -> None:
        self._tokens = dict.fromkeys(self.jobs, 0)

    def has(self, tokens: int) -> bool:
        """True if every job has so many tokens, or all it will get."""
        return min(self._tokens.values()) >= tokens

    @property
    def is_waiting(self) -> bool:
        """True if somebody waits for more than is there."""
        return self._bell is not None and not self.has(self._wanted)

    @property
    def wants_steps(self) -> bool:
        """True if somebody waits for a token, and not only for the end."""
        return self._wanted < _ALL

    def grow(self, job: Job, tokens: int) -> None:
        """A job has more tokens."""
        self._tokens[job] += tokens

    def end(self, job: Job) -> None:
        """A job gets no more tokens."""
        self._tokens[job] = _ALL

    def ring(self) -> None:
        """Wake who waits for it."""
        if self._bell is not None and not self._bell.done():
            self._bell.set_result(None)

    def ring_if_ready(self) -> None:
        """Wake who waits for it, if what is waited for is there."""
        if self._bell is not None and self.has(self._wanted):
            self.ring()

    async def rung(self, tokens: int) -> None:
        """Wait until it is woken, at the latest when so many tokens are there."""
        self._bell, self._wanted = asyncio.get_running_loop().create_future(), tokens
        try:
            await self._bell
        finally:
            self._bell = None


@attrs.define(eq=False)
class LiveEngine:
    """Lets an engine's time pass as a clock's does.

    There is no task in the background: of those who wait for tokens one sleeps until the step's end (if they all wait
    for ends, until the next of those) and tells the others. While nobody waits nothing needs to happen, and what the
    clock has passed is caught up with afterwards. A clock that stands still while its sleep returns is taken at the
    sleep's word.

    Args:
        engine: The engine.
        clock: What time it is.
        sleep: Sleeps for so many seconds of that clock.
        listener: Told of the engine's events as they happen.
        on_cancel: Told of jobs that were cancelled before they were over.
    """

    engine: Engine
    clock: Clock
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep
    listener: Callable[[Sequence[Event]], None] | None = None
    on_cancel: Callable[[Sequence[Job]], None] | None = None
    _orders: dict[Job, Order] = attrs.field(init=False, factory=dict, repr=False)
    _now: float = attrs.field(init=False, default=0.0)
    _is_led: bool = attrs.field(init=False, default=False)
    _long_sleep: anyio.CancelScope | None = attrs.field(init=False, default=None, repr=False)
    _following: dict[Order, None] = attrs.field(init=False, factory=dict, repr=False)

    def submit(self, jobs: Sequence[Job]) -> Order:
        """Take jobs into the queue; all of them or, if one is refused, none.

        Raises:
            BackendError: as `Engine.submit`.
        """
        now_s = self._time()
        self._wake_long_sleeper()
        order = Order(tuple(jobs))
        try:
            for job in jobs:
                self.engine.submit(job, now_s)
                self._orders[job] = order
        except BaseException:
            self.cancel(order)
            raise
        self._tell(self.engine.advance(now_s))
        return order

    async def tokens(self, order: Order, count: int) -> None:
        """Wait until each job of an order has so many tokens, or all it will get."""
        while not order.has(count):
            if not self._is_led:
                await self._lead(count)
                continue
            if count < _ALL:
                self._wake_long_sleeper()
            self._following[order] = None
            try:
                await order.rung(count)
            except BaseException:
                del self._following[order]
                self._hand_over()  # it may have been woken to lead
                raise
            del self._following[order]

    async def finished(self, order: Order) -> None:
        """Wait until the jobs of an order have all their tokens."""
        await self.tokens(order, _ALL)

    def cancel(self, order: Order) -> None:
        """Drop what is left of an order; safe if it is over."""
        now_s = self._time()
        self._wake_long_sleeper()
        dropped = [job for job in order.jobs if self._orders.pop(job, None) is not None]
        for job in dropped:
            order.is_cancelled = True
            self.engine.cancel(job, now_s)
            order.end(job)
        if dropped and self.on_cancel is not None:
            self.on_cancel(dropped)
        order.ring()
        self._tell(self.engine.advance(now_s))

    def load(self) -> EngineLoad:
        """The engine's load by now."""
        self._reach(self._time())
        self.engine.next_step_s()
        return self.engine.load()

    def set_speed(self, speed: float) -> None:
        """Go at another speed from the next step on."""
        now_s = self._time()
        self._wake_long_sleeper()
        self.engine.set_speed(speed, now_s)
        self._tell(self.engine.advance(now_s))

    def clear_cache(self) -> bool:
        """Forget all blocks; False, and nothing happens, while any are held."""
        now_s = self._time()
        self._reach(now_s)
        is_done = self.engine.clear_cache(now_s)
        self._tell(self.engine.advance(now_s))
        return is_done

    def _time(self) -> float:
        self._now = max(self._now, self.clock.now_s())
        return self._now

    async def _lead(self, count: int) -> None:
        """Sleep until something happens that anybody waits for, for everybody."""
        is_long = count >= _ALL and not any(order.wants_steps for order in self._following)
        end_s = self.engine.next_s() if is_long else self.engine.next_step_s()
        if end_s is None:
            raise RuntimeError("somebody waits for tokens of an engine that has nothing to do")
        self._is_led = True
        try:
            if is_long:
                await self._sleep_long(end_s)
            else:
                await self._sleep(end_s)
        finally:
            self._is_led = False
            self._hand_over()

    async def _sleep(self, end_s: float) -> None:
        await self.sleep(max(0.0, end_s - self._time()))
        self._now = max(self._now, end_s)
        self._reach(self._time())

    async def _sleep_long(self, end_s: float) -> None:
        """Sleep until a run ends, unless something comes between."""
        try:
            with anyio.CancelScope() as self._long_sleep:
                await self._sleep(end_s)
        finally:
            self._long_sleep = None

    def _wake_long_sleeper(self) -> None:
        if self._long_sleep is not None:
            self._long_sleep.cancel()

    def _hand_over(self) -> None:
        """Wake one who has to wait on, to lead."""
        if not self._is_led:
            for order in self._following:
                if order.is_waiting:
                    order.ring()
                    return

    def _reach(self, now_s: float) -> None:
        self._tell(self.engine.advance(now_s))

    def _tell(self, events: Sequence[Event]) -> None:
        if not events:
            return
        if self.listener is not None:
            self.listener(events)
        touched: dict[Order, None] = {}
        for event in events:
            match event:
                case Decoded(_, jobs, tokens):
                    self._grow(jobs, tokens, touched)
                case FirstToken(_, job):
                    self._grow((job,), 1, touched)
                case Finished(_, job) if job in self._orders:
                    order = self._orders.pop(job)
                    order.end(job)
                    touched[order] = None
                case _:
                    pass
        for order in touched:
            order.ring_if_ready()

    def _grow(self, jobs: Sequence[Job], tokens: int, touched: dict[Order, None]) -> None:
        for job in jobs:
            order = self._orders.get(job)
            if order is not None:
                order.grow(job, tokens)
                touched[order] = None
