"""`Router`: a fleet, its pipeline, and the four things one does with them: open, route, simulate, close."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import anyio
import anyio.to_thread

from kvfleet.adapters.base import (
    EndpointHealth,
    InferenceAdapter,
)
from kvfleet.adapters.connections import Connections
from kvfleet.background import until_cancelled
from kvfleet.builtin.facts import PROMPT, PromptFacts
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.expand import default_data_class
from kvfleet.config.schema import FleetConfig, ModelConfig
from kvfleet.pipeline.build import build, build_adapters
from kvfleet.pipeline.conversations import Conversations
from kvfleet.pipeline.dispatched import Dispatch, RouteStream
from kvfleet.pipeline.fleet_state import cache_mode, fleet_state_steps, replica_steps
from kvfleet.pipeline.observing import Observing
from kvfleet.pipeline.provision import services_of
from kvfleet.pipeline.rating import Ratings
from kvfleet.pipeline.rehearsal import Rehearsal
from kvfleet.pipeline.resolve import Names
from kvfleet.pipeline.route import Route
from kvfleet.pipeline.stage import BoundStage, Pipeline
from kvfleet.pipeline.succession import Turn, inherit, inherit_ahead
from kvfleet.pipeline.watching import Watching
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Outcome, RouteRequest, RoutingContext
from kvfleet.plugin.manager import ComponentTable, discover
from kvfleet.policy.shared_minutes import SharedMinute
from kvfleet.registry.models import ModelRegistry
from kvfleet.telemetry.kv_metrics import show_caches
from kvfleet.telemetry.loop_lag import LoopLag
from kvfleet.trace.explanation import Explanation, TraceSink
from kvfleet.trace.otel import Bridge, OwnBridge
from kvfleet.trace.spans import Span, SpanKind
from kvfleet.turns import Steps, at_once, in_turns

__all__ = ["Dispatch", "RouteStream", "Router"]

_version = cache(version)


class Router(Conversations):
    """A fleet and its pipeline.

    Args:
        config: The fleet.
        table: The components there are; discovered among the installed plugins if None.
        clock: The time; injected by tests.
        adapters: Adapters to use instead of those the configuration describes, by replica id.
        sinks: Where finished traces go, beside the OpenTelemetry export.
        bridge: How live spans are made; by default they are kvfleet's own, without the OpenTelemetry SDK.
        polls: False to leave health and load unpolled, as tests do.
        state_dir: Where components keep what outlives the process; None to keep nothing.
        before: The router whose place this one is to take; see `successor`.
        news: Tells the gateway's other workers something of a stage, named by its key; None where there are none.
        minutes: Gives the last minute of a budget, by name, as all these workers have it; None where there are none.

    Raises:
        ConfigError: with every finding, if the pipeline cannot be built.

    Nothing connects before `open`; `route` and the others open on first use. A router belongs to one event loop.
    """

    def __init__(
        self,
        config: FleetConfig,
        *,
        table: ComponentTable | None = None,
        clock: Clock | None = None,
        adapters: Mapping[str, InferenceAdapter] | None = None,
        sinks: Sequence[TraceSink] = (),
        bridge: Bridge | None = None,
        polls: bool = True,
        seed: int | None = None,
        state_dir: Path | None = None,
        before: Router | None = None,
        news: Callable[[str, bytes], None] | None = None,
        minutes: Callable[[str], SharedMinute] | None = None,
    ) -> None:
        self.config = config
        self.table = discover() if table is None else table
        self.clock: Clock = clock or SystemClock()
        self.registry = ModelRegistry.from_configs(config.models)
        self.models: tuple[ModelConfig, ...] = self.registry.replicas
        self.services: Services = services_of(config, self.models, self.clock, before.services if before else None)
        self.services.find, self.services.state_dir, self.services.minutes = self.table.get, state_dir, minutes
        if news is not None:
            self.services.news = self._publish
        self.pipeline: Pipeline = self._build(config)
        self._ratings = Ratings(self.pipeline.components, self.services.metrics)
        self.services.rate, self.services.annotate = self._ratings.rate, self._annotate
        self._wants_content = any(getattr(one, "wants_content", False) for one in self.pipeline.components)
        self.services.metrics.set_fleet_info(config.fleet_name, self.pipeline.select.name, _version("kvfleet"))
        modes = partial(cache_mode, pipeline=self.pipeline, services=self.services)
        show_caches(self.services.metrics, self.services.caches, self.models, lambda model: modes(model)[0])
        self.connections: Connections = Connections() if before is None else before.connections
        if before is None:
            self.connections.event_bytes = config.gateway.limits.max_event_bytes
        given = {**({} if before is None else before.unchanged(self.models)), **(adapters or {})}
        own = [model for model in self.models if model.id not in given]
        built = build_adapters(config, self.table, own, connections=self.connections)
        self.adapters: dict[str, InferenceAdapter] = {**built, **given}
        self.services.adapters = self.adapters
        self._watching = Watching(config, self.adapters, self.services)
        self.sinks = tuple(sinks)
        self.bridge: Bridge = bridge or OwnBridge()
        self._polls = polls
        self._random = random.Random(seed)  # noqa: S311 - seeds of decisions, not secrets
        self._names = Names(config, self.registry, self.pipeline)
        self._default_data_class = default_data_class(config)
        self._rehearsal = Rehearsal(
            prepare=lambda request: self.prepare(request, dry_run=True),
            pipeline=self.pipeline,
            adapters=self.adapters,
            clock=self.clock,
            fleet=config.fleet_name,
            random=self._random,
        )
        self._observing = Observing(
            observers=(*self.pipeline.observe, *self.pipeline.listeners), finished=self._finished
        )
        self.services.metrics.read("kvfleet_observers_dropped_total", lambda: self._observing.dropped)
        self._background: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._is_closed = False
        self._given, self._state_dir, self._news = dict(adapters or {}), state_dir, news
        self._keys = {id(stage.component): stage.key for stage in self.pipeline.all_stages}
        self._lent: frozenset[int] = frozenset(map(id, (self.connections, *given.values()))) if before else frozenset()
        self._turn = Turn()
        self.lag: LoopLag | None = LoopLag(self.services.metrics) if before is None and polls else None
        if before is None:
            self._turn.begin()

    # Life ------------------------------------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Open the components and begin to watch the fleet; twice is harmless."""
        if self._background is None and not self._is_closed:
            started = asyncio.Event()
            self._background = asyncio.create_task(self._live(started), name="kvfleet-router")
            waiting = asyncio.create_task(started.wait())
            await asyncio.wait({waiting, self._background}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if self._background.done():
                await self._background
        return self

    async def aclose(self) -> None:
        """End the background work and close every component and connection; twice is harmless."""
        self._is_closed = True
        self._stop.set()
        if self.lag is not None:
            self.lag.stop()
        if self._background is not None:
            task, self._background = self._background, None
            try:
                await task
            finally:
                self._watching.caches.close()
        await self._observing.drain()
        for component in reversed(self.pipeline.components):
            if callable(close := getattr(component, "aclose", None)):
                await close()
        for adapter in self.adapters.values():
            if id(adapter) not in self._lent:
                await adapter.aclose()
        if id(self.connections) not in self._lent:
            await self.connections.aclose()

    async def retire(self) -> None:
        """Close this one, which another has taken over from, and let go of everything.

        Who knows each other here forms a ring, and the garbage collector would look for long through a large fleet
        before it found it: without it, the memory of one is free when the next is built.
        """
        await self.aclose()
        self.services.metrics.forget()
        self.services.let_go()
        parts = [*self.pipeline.components, *self.config.tenants.values(), *self.models, *vars(self).values()]
        vars(self).clear()
        await in_turns(_let_go_of(parts))

    async def close(self) -> None:
        """The documented name of `aclose`."""
        await self.aclose()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _live(self, started: asyncio.Event) -> None:
        """The router's background work, in one task group with one owner."""
        for component in self.pipeline.components:
            if callable(aopen := getattr(component, "aopen", None)):
                await aopen()
        if self.lag is not None:
            self.lag.start()
        async with anyio.create_task_group() as group:
            group.start_soon(until_cancelled, self._observing.run)
            if self._polls:
                group.start_soon(until_cancelled, self._turn.take, self._watching.run)
            started.set()
            await self._stop.wait()
            group.cancel_scope.cancel()

    async def settled(self) -> None:
        """Wait until the observers of every finished route have run."""
        await self._observing.settled()

    # Changing --------------------------------------------------------------------------------------------------------

    def successor(self, config: FleetConfig) -> Router:
        """A router for a changed configuration, beside this one, which goes on; `open` and `take_over` come next.

        Replicas that are as they were keep their adapter and its connections. Until `take_over` nothing is shared that
        this one would notice, and ``aclose`` takes it back.

        Raises:
            ConfigError: with every finding, if the pipeline cannot be built.
        """
        return Router(
            config,
            table=self.table,
            clock=self.clock,
            adapters=self._given,
            sinks=self.sinks,
            bridge=self.bridge,
            polls=self._polls,
            state_dir=self._state_dir,
            before=self,
            news=self._news,
            minutes=self.services.minutes,
        )

    def unchanged(self, models: Sequence[ModelConfig]) -> dict[str, InferenceAdapter]:
        """The adapters, by replica, of those of these that are replicas here too, and in no way different."""
        known = {model.id: model for model in self.models}
        return {model.id: self.adapters[model.id] for model in models if known.get(model.id) == model}

    def take_over_ahead(self, before: Router) -> Steps[None]:
        """Find out, in steps, what would take too long within `take_over`; the router before goes on, unchanged."""
        return inherit_ahead(self.pipeline, before.pipeline)

    def take_over(self, before: Router) -> None:
        """Go on where the router before is, in one step; it has been asked its last, and answers what it has begun.

        What both know of is kept: load and reservations, health, limits, caches, and whatever stages hand on. Nobody
        may be watching the engines any more: see `stop_watching`.
        """
        self.services.limits.inherit(before.services.limits)
        self.services.caches.inherit(before.services.caches)
        self._watching.caches.inherit(before._watching.caches)
        before._observing.tell_instead(inherit(self.pipeline, before.pipeline))
        self._observing.dropped += before._observing.dropped
        self.services.load.also(self.models)
        self.services.health.change(self.config.health, self.models)
        self.services.metrics.succeed(before.services.metrics)
        self.connections.event_bytes = self.config.gateway.limits.max_event_bytes
        self._lent, before._lent = before._lent, self._lent
        self.lag, before.lag = before.lag, None
        self._turn.begin()

    def _publish(self, component: Any, payload: bytes) -> None:
        if self._news is not None:
            self._news(self._keys[id(component)], payload)

    def hear(self, stage: str, payload: bytes) -> None:
        """Have a stage take in what the same one of another worker tells; nothing if there is none here.

        Args:
            stage: Its key, as in ``affinity.prefix``.
            payload: What it tells, in its own words.
        """
        for one in self.pipeline.all_stages:
            if one.key == stage and callable(take := getattr(one.component, "hear", None)):
                take(payload)

    async def stop_watching(self) -> None:
        """Ask the engines no more, and listen to none."""
        await self._turn.end()

    def forget_others(self) -> None:
        """Forget the replicas of routers before, once the last of these is closed."""
        self.services.load.register(self.models)
        self.services.health.retain(model.endpoint for model in self.models)

    # Requests --------------------------------------------------------------------------------------------------------

    async def dispatch(self, request: RouteRequest, *, kind: SpanKind = SpanKind.INTERNAL) -> Dispatch:
        """Route one request.

        For a stream, ``answer.reply.events`` must be read to its end or ``answer.reply.close()`` called.

        Raises:
            RouteError: with ``.trace``, if there is no answer.
        """
        if self._background is None:
            await self.open()
        ctx, select = self.prepare(request)
        if request.is_large:
            await self._lay_out(ctx)
        route = Route(
            pipeline=self.pipeline,
            ctx=ctx,
            select=select,
            adapters=self.adapters,
            services=self.services,
            bridge=self.bridge,
            clock=self.clock,
            fleet=self.config.fleet_name,
            kind=kind,
            closed=self._closed,
            keeps_content=self.config.telemetry.capture_content,
            wants_content=self._wants_content,
        )
        answer = await route.run()
        return Dispatch(answer, route.trace)

    async def simulate_request(self, request: RouteRequest) -> Explanation:
        """Decide as for a live request, with the same code, and call nobody.

        Raises:
            RouteError: if the request itself is wrong. Nobody being left is not raised: the explanation says so.
        """
        if self._background is None:
            await self.open()
        return await self._rehearsal.explain(request)

    async def count_tokens(self, request: RouteRequest) -> tuple[int, bool]:
        """About how many tokens a request's prompt has; and True if an engine counted them.

        Raises:
            RouteError: if the request is wrong, or nobody may serve it.
        """
        if self._background is None:
            await self.open()
        return await self._rehearsal.count_tokens(request)

    def feedback(self, request_id: str, score: float) -> str:
        """Tell the strategies that learn how good an answer was; gives the model that gave it.

        Args:
            request_id: The identifier of the answered request, or of its trace.
            score: 0, useless, to 1, perfect.

        Raises:
            RouteError: 404 if no strategy that learns remembers the request.
            ValueError: if the score is not between 0 and 1.
        """
        return self._ratings.feedback(request_id, score)

    def _annotate(self, outcome: Outcome, span: Span) -> None:
        """Add a span to a finished route's record."""
        outcome.trace.add(span)
        for sink in self.sinks:
            if callable(amend := getattr(sink, "amend", None)):
                amend(outcome.trace, span)
        self.bridge.add_late(outcome.traceparent, span)

    # State -----------------------------------------------------------------------------------------------------------

    async def health_check_all(self) -> dict[str, EndpointHealth]:
        """Check every endpoint now; what is found also counts for routing."""
        await self._watching.collector.check_health()
        found = {m.endpoint: self.services.health.get_health(m.endpoint) for m in self.models}
        return {endpoint: health for endpoint, health in found.items() if health is not None}

    def replica_states(self) -> dict[str, Any]:
        """What of that is known of the replicas, which is soon said."""
        return at_once(self.replica_steps())

    def replica_steps(self) -> Steps[dict[str, Any]]:
        """The same in steps."""
        return replica_steps(self.config, self.models, self.pipeline, self.services)

    def state(self) -> dict[str, Any]:
        """What is known of the fleet and the components, without asking anybody; holds no secret."""
        return at_once(self.state_steps())

    def state_steps(self, most: int | None = None) -> Steps[dict[str, Any]]:
        """The same in steps; with `most`, only the first so many of long lists, such as the accounts of tenants."""
        state = yield from fleet_state_steps(self.config, self.models, self.pipeline, self.services, most=most)
        return {**state, "observers_dropped": self._observing.dropped}

    # Watching --------------------------------------------------------------------------------------------------------

    def add_sink(self, sink: TraceSink) -> None:
        """Send finished traces there too, from now on; twice is as good as once."""
        self.remove_sink(sink)
        self.sinks = (*self.sinks, sink)

    def remove_sink(self, sink: TraceSink) -> None:
        """Send no more traces there; harmless if none were."""
        self.sinks = tuple(one for one in self.sinks if one is not sink)

    # Inside ----------------------------------------------------------------------------------------------------------

    def _build(self, config: FleetConfig) -> Pipeline:
        return build(config, self.table, self.services)

    def prepare(self, request: RouteRequest, *, dry_run: bool = False) -> tuple[RoutingContext, BoundStage]:
        """Resolve names and defaults: who may answer, by which strategy.

        Raises:
            RouteError: if the request names what does not exist.
        """
        request = self._names.resolve(request)
        tenant = self.config.tenants.get(request.tenant)
        ctx = RoutingContext(
            request=request,
            candidates=self._names.candidates(request),
            data_class=request.data_class or self._default_data_class,
            tenant=request.tenant,
            region=request.region or (tenant.region if tenant else ""),
            facts={},
            affinity={},
            columns={},
            now_s=self.clock.now_s(),
            seed=self._random.getrandbits(32) if request.seed is None else request.seed,
            dry_run=dry_run,
        )
        return ctx, self._names.strategy(request.strategy)

    async def _lay_out(self, ctx: RoutingContext) -> None:
        """Have a large prompt made ready for those stages that would take long over it, before it is their turn."""
        facts = await anyio.to_thread.run_sync(PromptFacts.of, ctx.request)
        ctx.facts[PROMPT] = facts  # type: ignore[index]  # a fresh mapping, which grows in place
        for stage in self.pipeline.stages:
            if callable(lay_out := getattr(stage.component, "lay_out", None)):
                ctx.facts[PROMPT] = await lay_out(ctx)  # type: ignore[index]  # a fresh mapping, which grows in place

    def _closed(self, outcome: Outcome) -> None:
        for sink in self.sinks:
            sink.write(outcome.trace)
        self._observing.put(outcome)

    def _finished(self, outcome: Outcome) -> None:
        self.table.route_finished(outcome)


def _let_go_of(parts: list[Any]) -> Steps[None]:
    """One after the other: to free all of a large fleet at once would take tens of milliseconds."""
    while parts:
        parts.pop()
        yield
