"""Admission to a fleet that has no room: some wait, in a fair order, and the others are told when to come back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import attrs

from kvfleet.adapters.call import Usage
from kvfleet.builtin.facts import answer_tokens, prompt_tokens
from kvfleet.builtin.room import RoomFilter
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.overload import QueueOptions
from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Kind, Lease, Outcome, Refusal, RouteRequest, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.router.fair_queue import FairQueue, Waiting
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.metrics import MetricsExporter
from kvfleet.trace import names
from kvfleet.trace.spans import AttributeValue

__all__ = ["QueueAdmission"]

_WEIGHT_OF_NEW = 0.1
_SOON_S = 1.0
_MOST_PROMISES = 10_000
_LOOK_AGAIN_S = 0.1
_LONG_S = 60.0
"""A request with more time than that is not held against what engines are expected to take, unless it has to wait."""
_USUAL_ANSWER = 256
_MOST_TENANTS = 4096
_ANSWER_TOKENS_WEIGH = 2.0
"""A token that is written takes as much as two that are read (as in the virtual token counter's paper)."""
_DID_NOT_WAIT: Mapping[str, AttributeValue] = MappingProxyType({})


class _Nothing:
    """What a dry run reserves."""

    def release(self, outcome: Outcome) -> None:
        """Nothing to give back."""


_NOTHING = _Nothing()


@attrs.define(eq=False)
class _Place:
    """One request's place; given back once.

    Attributes:
        waited_s: How long it waited for it.
        attributes: What the trace says of that; empty for one that did not wait.
    """

    owner: QueueAdmission
    request: RouteRequest
    tenant: str = ""
    waited_s: float = 0.0
    attributes: Mapping[str, AttributeValue] = _DID_NOT_WAIT
    entry: Waiting[_Waiter] | None = None
    _is_released: bool = attrs.field(init=False, default=False)

    def release(self, outcome: Outcome) -> None:
        if not self._is_released:
            self._is_released = True
            self.owner.release(self, outcome)


@attrs.define(eq=False)
class _Waiter:
    """One that waits: it is told its place, or why there is none."""

    told: asyncio.Future[Refusal | None]
    candidates: Sequence[ModelConfig]
    request: RouteRequest


@attrs.define(eq=False)
class _Flow:
    """Who is in flight and who waits; it outlives a reload.

    Attributes:
        queue: Those that wait.
        let_in: Lets in the next ones, by the limits as they are now.
        in_flight: Those that have a place.
        on_the_way: Those of them that no replica's load counts yet.
        hold_s: How long a place is used.
        promised: When refused ones were told to come back, in seconds of the clock, as far as that is still to come.
        answers: Usual tokens of an answer, by tenant.
        timer: Looks for room again while anybody waits.
    """

    queue: FairQueue[_Waiter]
    let_in: Callable[[], None]
    in_flight: int = 0
    on_the_way: set[int] = attrs.field(factory=set)
    hold_s: float | None = None
    promised: deque[float] = attrs.field(factory=lambda: deque(maxlen=_MOST_PROMISES))
    answers: dict[str, float] = attrs.field(factory=dict)
    timer: asyncio.TimerHandle | None = None

    def turned_away(self, now_s: float) -> int:
        """Refused ones that are still to come back: who is back waits, or is refused anew, or never comes."""
        while self.promised and self.promised[0] <= now_s:
            self.promised.popleft()
        return len(self.promised)


@attrs.define(kw_only=True)
class QueueAdmission(QueueOptions):
    """Let in as many requests as the fleet can serve, and have some of the others wait for a moment.

    Those that wait go in order of priority, and among equals so that every tenant gets its share of the work. A request
    is refused at once if the queue is full, or if it would wait longer than it may or its own deadline allows; it is
    told when there should be room, by the rate at which requests end. A replica's breaker that opens takes its room
    away; where no breaker is closed one request tries, and the others wait for what comes of it. Stand this after the
    filters of policy and before those of health, so that these see the fleet as it is after the wait.
    """

    _clock: Clock = attrs.field(init=False, factory=SystemClock, repr=False, eq=False)
    _health: HealthManager = attrs.field(init=False, factory=HealthManager, repr=False, eq=False)
    _load: FleetLoad = attrs.field(init=False, factory=FleetLoad, repr=False, eq=False)
    _metrics: MetricsExporter = attrs.field(
        init=False, factory=lambda: MetricsExporter(enabled=False), repr=False, eq=False
    )
    _flow: _Flow = attrs.field(init=False, repr=False, eq=False)

    @_flow.default
    def _make_flow(self) -> _Flow:
        return _Flow(FairQueue(self.max_queue, self._weights), self._call_next)

    @property
    def _weights(self) -> Mapping[str, float]:
        return {name: share.weight for name, share in self.tenants.items()}

    def inherit(self, before: QueueAdmission) -> None:
        """Go on with those that were in flight or waited before a reload, under the limits as they are now."""
        self._flow = before._flow
        self._flow.let_in = self._call_next
        self._flow.queue.most, self._flow.queue.weights = self.max_queue, self._weights

    @property
    def reads_headers(self) -> tuple[str, ...]:
        """The request headers it looks at."""
        return (self.priority_header,) if self.priority_header else ()

    def provision(self, services: Services) -> None:
        """Use the fleet's health and load."""
        self._clock, self._metrics = services.clock, services.metrics
        self._health, self._load = services.health, services.load
        services.load.register(services.models)
        if services.metrics.enabled:
            services.metrics.read_gauge("kvfleet_queue_depth", self._depths)

    async def admit(self, ctx: RoutingContext) -> Lease | Refusal:
        """A place, at once or after a wait, or a refusal."""
        patience_s = ctx.request.patience_s
        is_short = patience_s is not None and patience_s < _LONG_S  # clients' libraries say ten minutes, unasked
        if is_short and self.refuse_late and (late := self._too_late(ctx, 0.0)) is not None:
            return late
        queue = self._flow.queue
        if not (queue.size and queue.holds(ctx.request.models)) and self._has_room(ctx.candidates, ctx.now_s):
            return _NOTHING if ctx.dry_run else self._let_in(ctx)
        return self._why_not_wait(ctx) or (_NOTHING if ctx.dry_run else await self._wait(ctx))

    def placed(self, ctx: RoutingContext, candidate: ModelConfig) -> None:  # noqa: ARG002 - wherever it goes
        """A request is at a replica now, where the load is about to count it."""
        self._flow.on_the_way.discard(id(ctx.request))
        if self._flow.queue.size:
            asyncio.get_running_loop().call_soon(self._flow.let_in)

    def release(self, place: _Place, outcome: Outcome) -> None:
        """Take a place back, learn how long it was used, and let the next ones in."""
        self._flow.in_flight -= 1
        self._flow.on_the_way.discard(id(place.request))
        held_s = outcome.duration_s - place.waited_s
        known = self._flow.hold_s
        self._flow.hold_s = held_s if known is None else known + _WEIGHT_OF_NEW * (held_s - known)
        if not self._flow.in_flight and not self._flow.queue.size:
            self._flow.promised.clear()
        if outcome.usage is not None:
            self._learn(place, outcome.usage)
        if self._flow.queue.size:
            self._flow.let_in()

    def state(self) -> Mapping[str, Any]:
        """How many are in flight and wait, and for how long a place is used."""
        return {
            "in_flight": self._flow.in_flight,
            "waiting": self._flow.queue.size,
            "turned_away": self._flow.turned_away(self._clock.now_s()),
            "hold_s": self._flow.hold_s or 0.0,
        }

    def _learn(self, place: _Place, usage: Usage) -> None:
        """Book what a request really took, and remember how long answers of its tenant are.

        What is booked at first must be near to that: were it far more, each end of an answer would give its own tenant
        so much back that the place went to the same tenant again.
        """
        took = usage.prompt_tokens + _ANSWER_TOKENS_WEIGH * usage.completion_tokens
        if place.entry is not None:
            self._flow.queue.correct(place.entry, took - place.entry.work)
        known, tokens = self._flow.answers, float(usage.completion_tokens)
        for whose in {"", place.tenant}:
            usual = known.pop(whose, tokens)
            known[whose] = usual + _WEIGHT_OF_NEW * (tokens - usual)
        if len(known) > _MOST_TENANTS:
            del known[next(iter(known))]

    def _work_of(self, ctx: RoutingContext) -> float:
        """What a request will take: tokens to read, and those to write, as far as one knows its tenant."""
        return prompt_tokens(ctx) + _ANSWER_TOKENS_WEIGH * self._answer_of(ctx, _USUAL_ANSWER)

    def _answer_of(self, ctx: RoutingContext, unknown: float) -> float:
        """How many tokens an answer will have: as those of its tenant, but no more than it asks for."""
        known = self._flow.answers
        return min(known.get(ctx.tenant, known.get("", unknown)), answer_tokens(ctx, 1 << 30))

    # Room

    def _has_room(self, candidates: Sequence[ModelConfig], now_s: float) -> bool:
        """True if one more may go to one of these; also if none of them may be called, which is not for us to say."""
        if self.max_in_flight and self._flow.in_flight >= self.max_in_flight:
            return False
        if self._health.has_ejected and (may_try := self._may_try(candidates, now_s)) is not None:
            return may_try
        return not self.max_in_flight_per_replica or self._has_place(candidates, now_s)

    def _may_try(self, candidates: Sequence[ModelConfig], now_s: float) -> bool | None:
        """Where no breaker is closed: whether one may go to try, or to be told that nobody may; else None.

        One at a time may try, and while he does the others have no room.
        """
        health = self._health
        if health.panicking or not all(one.endpoint in health.ejected for one in candidates):
            return None
        out = health.unavailable(now_s)
        if any(one.endpoint not in out for one in candidates):
            return not self._flow.on_the_way
        return not any(health.is_tried(one.endpoint, now_s) for one in candidates)

    def _has_place(self, candidates: Sequence[ModelConfig], now_s: float) -> bool:
        """True if a replica of these has less than its most in flight."""
        most = self.max_in_flight_per_replica
        out, pending = self._health.unavailable(now_s), self._load.pending
        if out:
            candidates = [one for one in candidates if one.endpoint not in out]
            if not candidates:
                return True
        if not self._flow.on_the_way:
            for one in candidates:  # noqa: SIM110 - a generator takes as long again as the usual first look
                if pending(one.id) < most:
                    return True
            return False
        return sum(max(most - pending(one.id), 0) for one in candidates) > len(self._flow.on_the_way)

    def _let_in(self, ctx: RoutingContext) -> _Place:
        self._flow.in_flight += 1
        self._flow.on_the_way.add(id(ctx.request))
        return _Place(self, ctx.request, ctx.tenant)

    def _call_next(self) -> None:
        """Let in those that wait, as long as there is room for any of them."""
        now_s = self._clock.now_s()
        while self._flow.queue.size:
            known: dict[Hashable, bool] = {}

            def has_room(one: Waiting[_Waiter], known: dict[Hashable, bool] = known) -> bool:
                if one.pool not in known:
                    known[one.pool] = self._has_room(one.item.candidates, now_s)
                return known[one.pool]

            one = self._flow.queue.next(has_room)
            if one is None:
                return
            if not one.item.told.done():  # else it is being cancelled, and has not run yet
                self._flow.in_flight += 1
                self._flow.on_the_way.add(id(one.item.request))
                one.item.told.set_result(None)

    def _look_again(self) -> None:
        """While anybody waits, look for room that no end of a request of ours tells of."""
        if self._flow.timer is None:
            self._flow.timer = asyncio.get_running_loop().call_later(_LOOK_AGAIN_S, self._looked)

    def _looked(self) -> None:
        self._flow.timer = None
        self._flow.let_in()
        if self._flow.queue.size:
            self._look_again()

    # Waiting

    async def _wait(self, ctx: RoutingContext) -> Lease | Refusal:
        tenant, priority = ctx.tenant, self._priority_of(ctx)
        since_s, ahead = self._clock.now_s(), self._flow.queue.ahead(tenant, priority)
        waiter = _Waiter(asyncio.get_running_loop().create_future(), ctx.candidates, ctx.request)
        entry = self._flow.queue.add(waiter, tenant, priority, self._work_of(ctx), ctx.request.models)
        self._look_again()
        try:
            async with asyncio.timeout(self.max_wait_ms / 1000):
                refusal = await waiter.told
        except TimeoutError:
            if self._flow.queue.remove(entry) or waiter.told.cancelled():
                waited = f"no place became free within {self.max_wait_ms / 1000:g} s"
                return self._refuse(ctx, "timeout", waited)
            refusal = waiter.told.result()
        except asyncio.CancelledError:
            if not self._flow.queue.remove(entry) and not waiter.told.cancelled() and waiter.told.result() is None:
                self._give_back(waiter)
            raise
        if refusal is not None:
            return refusal
        waited_s = self._clock.now_s() - since_s
        self._metrics.observe("kvfleet_queue_wait_seconds", waited_s, str(priority))
        told = {names.QUEUE_WAIT_S: waited_s, names.QUEUE_AHEAD: ahead, names.PRIORITY: priority}
        return _Place(self, waiter.request, tenant, waited_s, told, entry)

    def _give_back(self, waiter: _Waiter) -> None:
        """A place was given to a request that is gone."""
        self._flow.in_flight -= 1
        self._flow.on_the_way.discard(id(waiter.request))
        self._flow.let_in()

    def _why_not_wait(self, ctx: RoutingContext) -> Refusal | None:
        """Why a request may not wait; None, and a place in the queue, if it may."""
        tenant, priority = ctx.tenant, self._priority_of(ctx)
        room = self._flow.queue.room_for(tenant, priority)
        if room is False:
            return self._refuse(ctx, "full", "the fleet is at its limit, and as many wait as may")
        wait_s = self._wait_s(self._flow.queue.ahead(tenant, priority) + 1)
        if wait_s is not None and wait_s > self.max_wait_ms / 1000:
            return self._refuse(ctx, "wait", f"a place is expected to be free in {wait_s:.1f} s, which is too late")
        late = self._too_late(ctx, wait_s or 0.0) if self.refuse_late else None
        if late is None and isinstance(room, Waiting) and not ctx.dry_run:
            self._send_away(room)
        return late

    def _send_away(self, entry: Waiting[_Waiter]) -> None:
        """One that waits has to make room for one that comes before it."""
        self._flow.queue.remove(entry)
        self._metrics.count("kvfleet_queue_refusals_total", "displaced")
        said = "the queue is full, and others come first"
        if not entry.item.told.done():
            entry.item.told.set_result(self._turn_away(said))

    def _too_late(self, ctx: RoutingContext, wait_s: float) -> Refusal | None:
        """A refusal for a request whose answer is not expected in time; None for one that has the time."""
        patience_s = ctx.request.patience_s
        if patience_s is None:
            return None
        left_s = patience_s - (self._clock.now_s() - ctx.now_s)
        needs_s = wait_s + self._expected_s(ctx)
        if needs_s <= left_s:
            return None
        said = f"an answer is expected in {needs_s:.1f} s, and its deadline is in {left_s:.1f} s"
        return self._refuse(ctx, "deadline", said)

    def _expected_s(self, ctx: RoutingContext) -> float:
        """Seconds to a first byte, or to a whole answer, from the replica that is soonest; 0 if unknown."""
        known = [one for one in ctx.candidates if self._load.expected_ttfb_s(one.id) is not None]
        if not known or len(known) < len(ctx.candidates):
            return 0.0  # one that nobody has measured may be quick
        found = self._load.waits(known, prompt_tokens(ctx), (), self._clock.now_s())
        tokens = 0 if ctx.request.stream else self._answer_of(ctx, 0)
        return min(
            queue_s + prompt_s + step_s * tokens
            for queue_s, prompt_s, step_s in zip(found.queue_s, found.prompt_s, found.step_s, strict=True)
        )

    # Saying no

    def _wait_s(self, places: float) -> float | None:
        """Seconds until so many places have become free, by the rate at which they do; None before the first."""
        if self._flow.hold_s is None:
            return None
        return self._flow.hold_s * places / max(self._flow.in_flight, 1)

    def _refuse(self, ctx: RoutingContext, reason: str, said: str) -> Refusal:
        if ctx.dry_run:
            return self._refusal(said, self._back_in_s())
        self._metrics.count("kvfleet_queue_refusals_total", reason)
        return self._turn_away(said)

    def _turn_away(self, said: str) -> Refusal:
        back_in_s = self._back_in_s()
        self._flow.promised.append(self._clock.now_s() + back_in_s)
        return self._refusal(said, back_in_s)

    def _back_in_s(self) -> float:
        """Seconds until there should be a place for one more, after those that wait or are to return."""
        wait_s = self._wait_s(self._flow.queue.size + self._flow.turned_away(self._clock.now_s()) + 1)
        return max(wait_s or 0.0, _SOON_S)

    def _refusal(self, said: str, back_in_s: float) -> Refusal:
        return Refusal(reason=said, retry_after_s=back_in_s, code="overloaded", status=503)

    def _priority_of(self, ctx: RoutingContext) -> int:
        share = self.tenants.get(ctx.tenant)
        usual = self.priority if share is None else share.priority
        asked = ctx.request.condition_headers.get(self.priority_header.lower()) if self.priority_header else None
        if asked is None:
            return usual
        try:
            wanted = int(asked)
        except ValueError:
            return usual
        most = self.max_priority if share is None else share.max_priority
        return max(min(wanted, usual if most is None else most), -100)

    def _depths(self) -> dict[tuple[str, ...], float]:
        return {(str(priority),): depth for priority, depth in self._flow.queue.depths().items()}


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The queue, and what holds each replica to its part of those that were let in."""
    yield Component(Kind.ADMIT, "queue", QueueAdmission)
    yield Component(Kind.FILTER, "room", RoomFilter)
