"""Simulated engines where the route expects backends: an adapter for each replica, on the event loop's own time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import attrs

from kvfleet.adapters.base import EndpointHealth, EngineLoad, InferenceAdapter
from kvfleet.adapters.call import Call, Reply, Tally, Usage
from kvfleet.errors import BackendError, Fault
from kvfleet.replay.traces import TracedRequest
from kvfleet.sim.engine import Engine
from kvfleet.sim.events import Cleared, Finished, FirstToken, Job, Removed, Stored

__all__ = ["BlocksListener", "EngineHost", "SimulatedAdapter"]

_EVENT = b"data: {}\n\n"

BlocksListener = Callable[[Stored | Removed | Cleared], None]
"""Told what a replica's engine stored and forgot, as its KV events would tell."""


@attrs.define(eq=False)
class _Flight:
    """A request in an engine, and who waits for it."""

    job: Job
    first: asyncio.Future[None]
    done: asyncio.Future[None]


@attrs.define(eq=False)
class EngineHost:
    """Drives one engine by timers of the event loop it is used in.

    Attributes:
        engine: The engine.
        told: Told of blocks stored and forgotten; None if nobody asks.
    """

    engine: Engine
    told: BlocksListener | None = None
    _timer: asyncio.Handle | None = attrs.field(init=False, default=None)
    _is_due: bool = attrs.field(init=False, default=False)
    _idle: EngineLoad | None = attrs.field(init=False, default=None)  # what it says until there is work again

    def listen(self, told: BlocksListener | None) -> None:
        """Let somebody be told of blocks, or nobody."""
        self.told, self.engine.tells_all = told, told is not None

    def submit(self, job: Job) -> _Flight:
        """Hand a request to the engine.

        Raises:
            BackendError: if the engine refuses it.
        """
        loop = asyncio.get_running_loop()
        self._idle = None
        self.engine.submit(job, loop.time())
        flight = job.key = _Flight(job, loop.create_future(), loop.create_future())
        self._look_soon(loop)
        return flight

    def cancel(self, job: Job) -> None:
        """Take a request out, wherever it is; harmless if it is over."""
        loop = asyncio.get_running_loop()
        self.engine.cancel(job, loop.time())
        self._look_soon(loop)

    def load(self) -> EngineLoad:
        """What the engine says of itself now."""
        if self._idle is not None:
            return self._idle
        self._advance(asyncio.get_running_loop().time())
        load = self.engine.load()
        if self.engine.is_idle:
            self._idle = load
        return load

    def _look_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ask for the next moment once everything that happens in this one has: a step begins for all of it."""
        if not self._is_due:
            self._is_due = True
            loop.call_soon(self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_due = False
        self._advance(loop.time())
        if self._timer is not None:
            self._timer.cancel()
        self._set_timer(loop)

    def _wake(self, loop: asyncio.AbstractEventLoop, at_s: float) -> None:
        self._advance(max(at_s, loop.time()))
        self._set_timer(loop)

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        at_s = self.engine.next_s()
        self._timer = None if at_s is None else loop.call_at(at_s, self._wake, loop, at_s)

    def _advance(self, now_s: float) -> None:
        for event in self.engine.advance(now_s):
            kind = type(event)
            if kind is FirstToken:
                _set(event.job.key.first)  # type: ignore[union-attr]  # told by its type
            elif kind is Finished:
                _set(event.job.key.first)  # type: ignore[union-attr]
                _set(event.job.key.done)  # type: ignore[union-attr]
            elif self.told is not None and isinstance(event, Stored | Removed | Cleared):
                self.told(event)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@attrs.define(eq=False)
class _Events(AsyncIterator[bytes]):
    """The answer as a stream of one event, at its first token, and an end."""

    flight: _Flight
    tally: Tally
    _has_begun: bool = attrs.field(init=False, default=False)

    async def __anext__(self) -> bytes:
        flight = self.flight
        if not self._has_begun:
            self._has_begun = True
            await flight.first
            return _EVENT
        await flight.done
        job, tally = flight.job, self.tally
        tokens = job.prompt_tokens + job.output_tokens
        tally.usage = Usage(job.prompt_tokens, job.output_tokens, tokens, job.cached_tokens)
        tally.finish_reason, tally.is_complete = "stop", True
        raise StopAsyncIteration


@attrs.define(kw_only=True)
class SimulatedAdapter(InferenceAdapter):
    """A replica whose engine is simulated.

    Attributes:
        host: Its engine.
        traced: By request id, what of the trace is being asked.
    """

    host: EngineHost
    traced: Mapping[str, TracedRequest]

    async def send(self, call: Call) -> Reply:
        """Put the traced request to the engine.

        Raises:
            BackendError: if the engine refuses it, or the call is none of the trace's.
        """
        request = self.traced.get(_request_id(call))
        if request is None:
            raise BackendError(Fault.BAD_REQUEST, "a replay answers the trace's own requests alone", status=400)
        job = Job(request.blocks, request.prompt_tokens, request.output_tokens, request.answer_blocks)
        flight = self.host.submit(job)
        tally = Tally(model=self.model_id)

        async def close() -> None:
            self.host.cancel(job)

        return Reply(events=_Events(flight, tally), tally=tally, close=close)

    async def health_check(self) -> EndpointHealth:
        """It is always up."""
        return EndpointHealth(endpoint=self.endpoint, healthy=True, models=(self.model_id,))

    async def get_load(self) -> EngineLoad:
        """What the engine says of itself."""
        return self.host.load()


def _request_id(call: Call) -> str:
    return next((value for name, value in call.headers if name == "x-request-id"), "")


def engine_loads(hosts: Sequence[EngineHost]) -> EngineLoad:
    """What the engines behind one endpoint say together."""
    loads = [host.load() for host in hosts]
    if len(loads) == 1:
        return loads[0]
    return EngineLoad(
        running=sum(load.running or 0 for load in loads),
        waiting=sum(load.waiting or 0 for load in loads),
        kv_usage=max(load.kv_usage or 0.0 for load in loads),
    )
