"""The fleet's service level: how dear, how good and how fast answers are to be, and when to turn requests away."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import attrs

from kvfleet.builtin.facts import answer_tokens, prompt_tokens
from kvfleet.builtin.policy import price_drop
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.fields import number
from kvfleet.config.findings import Finding
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import ConfigError
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Drop, Kind, Outcome, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.telemetry.cost import Price, with_known_prices
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.reservations import ReplicaLoad
from kvfleet.trace import names
from kvfleet.trace.attributes import flag
from kvfleet.trace.attributes import number as number_in
from kvfleet.trace.spans import Span, Status

__all__ = ["OverloadFilter", "ServiceLevelFilter"]

_MOST_TIMES = 500
_MOST_REPLICAS = 16_384
_SLOW = 0.95
_READ_EVERY_S = 1.0
_SHORT_QUEUE = 8
"""Waiting requests that are no queue to speak of, however small the engine's batch."""


@attrs.define
class _Times:
    """A replica's last times to an answer."""

    times_ms: deque[tuple[float, float]] = attrs.field(factory=lambda: deque(maxlen=_MOST_TIMES), repr=False)
    slow_ms: float | None = None
    _read_s: float = float("-inf")

    def add(self, now_s: float, took_ms: float) -> None:
        """Learn one."""
        self.times_ms.append((now_s, took_ms))

    def p95_ms(self, now_s: float, window_s: float, least: int) -> float | None:
        """What 95 of 100 stay below, as of a second ago at most; None for too few in the window."""
        if now_s - self._read_s >= _READ_EVERY_S:
            self._read_s = now_s
            known = self.times_ms
            while known and known[0][0] < now_s - window_s:
                known.popleft()
            times = sorted(took_ms for _, took_ms in known)
            self.slow_ms = times[min(len(times) - 1, int(_SLOW * len(times)))] if len(times) >= least else None
        return self.slow_ms


@attrs.define(kw_only=True)
class ServiceLevelFilter:
    """Drop who would cost too much or is not good enough, and leave who is too slow to others.

    A limit that is absent does not hold. Price and quality hold in any case; a target that nobody meets who is left
    drops nobody. How slow a replica is, is measured: a whole answer's time, or a stream's to its first byte. With too
    few answers in the window it is what the model declares, so one that was too slow is tried again after a while.
    Stand this after `filter.health`, so that "somebody" means one who can serve the request.
    """

    target_p95_latency_ms: float | None = number(
        None, gt=0, unit="ms", doc="Time to an answer; who takes longer 5 times in 100 is left to others."
    )
    max_cost_per_request: float | None = number(
        None, gt=0, unit="usd", doc="Candidates with which the request may cost more are dropped."
    )
    min_quality_score: float | None = number(None, ge=0, le=1, doc="Models that are less good are dropped.")
    answer_tokens: int = number(
        1024, ge=0, unit="tokens", doc="Length taken for an answer where the request sets no `max_tokens`."
    )
    min_answers: int = number(20, ge=1, unit="answers", doc="Fewer than that are no measurement.")
    window_s: float = number(300.0, gt=0, unit="s", doc="Age from which on an answer does not count any more.")
    _times: dict[str, _Times] = attrs.field(init=False, factory=dict, repr=False, eq=False)
    _clock: Clock = attrs.field(init=False, factory=SystemClock, repr=False, eq=False)

    def provision(self, services: Services) -> None:
        """Use the fleet's clock.

        Raises:
            ConfigError: for models whose price nobody knows, if there is a limit.
        """
        self._clock = services.clock
        prices = [(model.name, Price.of(with_known_prices(model))) for model in services.models if model.enabled]
        unpriced = sorted({name for name, price in prices if price is None})
        if unpriced and self.max_cost_per_request is not None:
            what = f"nobody knows the price of {', '.join(unpriced)}, so max_cost_per_request would drop it always"
            remedy = "give it cost_per_1k_input_tokens and cost_per_1k_output_tokens, or set the limit to null"
            raise ConfigError([Finding(what, remedy, code="unknown-price")])

    def inherit(self, before: ServiceLevelFilter) -> None:
        """Know the times that were measured before a reload."""
        self._times = before._times

    def limit_usd(self, ctx: RoutingContext) -> float | None:  # noqa: ARG002 - the same for everybody
        """The most that a request may cost; None for no limit."""
        return self.max_cost_per_request

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        """The drops."""
        drops = list(self._beyond(ctx))
        if self.target_p95_latency_ms is None:
            return drops
        gone = {drop.candidate.id for drop in drops}
        rest = [model for model in ctx.candidates if model.id not in gone]
        late = list(self._late(rest, ctx.now_s, self.target_p95_latency_ms))
        return [*drops, *late] if len(late) < len(rest) else drops

    async def observe(self, outcome: Outcome) -> None:
        """Learn how long each replica took that answered."""
        if self.target_p95_latency_ms is None:
            return
        now_s, is_stream = self._clock.now_s(), flag(outcome.trace.route.attributes, names.STREAM)
        for span in outcome.trace.stages:
            replica = span.attributes.get(names.REPLICA)
            if isinstance(replica, str) and span.status is not Status.ERROR:
                self._learn(replica, now_s, _took_ms(span, is_stream))

    def state(self) -> Mapping[str, Any]:
        """By replica, what it was last found to take; those with too few answers are left out."""
        return {name: {"p95_ms": one.slow_ms} for name, one in self._times.items() if one.slow_ms is not None}

    def _learn(self, replica: str, now_s: float, took_ms: float) -> None:
        if replica not in self._times and len(self._times) >= _MOST_REPLICAS:
            del self._times[next(iter(self._times))]
        self._times.setdefault(replica, _Times()).add(now_s, took_ms)

    def _beyond(self, ctx: RoutingContext) -> Iterator[Drop]:
        """Who costs too much, or is not good enough."""
        least, most_usd = self.min_quality_score, self.max_cost_per_request
        tokens = (prompt_tokens(ctx), answer_tokens(ctx, self.answer_tokens)) if most_usd is not None else (0, 0)
        for model in ctx.candidates:
            if least is not None and model.quality_score < least:
                reason = f"its quality is {model.quality_score:g}, and {least:g} is the least"
                yield Drop(model, reason, "min_quality_score")
            elif most_usd is not None and (drop := price_drop(model, tokens, most_usd, "the limit")):
                yield drop

    def _late(self, models: Sequence[ModelConfig], now_s: float, target_ms: float) -> Iterator[Drop]:
        """Who takes longer than the target."""
        for model in models:
            known = self._times.get(model.id)
            found = None if known is None else known.p95_ms(now_s, self.window_s, self.min_answers)
            slow_ms = model.latency_p95_ms if found is None else found
            if slow_ms > target_ms:
                how = "is said to take" if found is None else "takes"
                reason = f"one of 20 answers {how} more than {slow_ms:.0f} ms, and the target is {target_ms:g}"
                yield Drop(model, reason, "target_p95_latency_ms")


def _took_ms(span: Span, is_stream: bool) -> float:
    first_s = number_in(span.attributes, names.TTFB_S) if is_stream else None
    return span.duration_ms if first_s is None else first_s * 1000


@attrs.define(kw_only=True)
class OverloadFilter:
    """Drop replicas whose engines have as much to do as they can; if that is everybody, the request is turned away.

    An engine's load is the share of its KV cache in use, or its queue in relation to what it works on, whichever is
    greater: at 1 the cache is full, or as many wait as are served. An engine that reports neither is never dropped;
    what a provider allows is the business of `filter.rate_limits`. A request that is turned away gets a 429 that says
    when to come back: after the time of a usual answer there.
    """

    load_shed_threshold: float = number(0.9, gt=0, le=1, doc="Load from which on an engine gets no more requests.")
    limits_rates: ClassVar[bool] = True  # if nobody is left because of it, that is a 429
    _load: FleetLoad = attrs.field(init=False, factory=FleetLoad, repr=False, eq=False)

    def provision(self, services: Services) -> None:
        """Use the fleet's load."""
        self._load = services.load
        services.load.also(services.models)

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        """One drop for each replica that is too busy."""
        drops = []
        for model in ctx.candidates:
            known = self._load.of(model.id)
            if known is None or known.reported is None:
                continue
            load, what = _load_of(known)
            if load >= self.load_shed_threshold:
                reason = f"its engine has {load:.0%} of what it can do: {what}"
                wait_s = max(known.duration_s or known.declared_s, 1.0)
                drops.append(Drop(model, reason, "load_shed_threshold", retry_after_s=wait_s))
        return drops


def _load_of(known: ReplicaLoad) -> tuple[float, str]:
    """How much of what it can do an engine does, and by what one sees it."""
    usage, waiting = known.kv_usage or 0.0, known.waiting
    running = known.pending - waiting
    queue = waiting / max(running, _SHORT_QUEUE)
    if usage >= queue:
        return usage, f"{min(usage, 1):.0%} of its KV cache is in use"
    return queue, f"{waiting} requests wait beside {running} that it works on"


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The filters of the service level."""
    yield Component(Kind.FILTER, "service_level", ServiceLevelFilter)
    yield Component(Kind.FILTER, "overload", OverloadFilter)
