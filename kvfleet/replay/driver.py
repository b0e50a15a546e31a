"""The replay: a trace sent through a pipeline and simulated engines, on a virtual clock.

The router is the live one. Each request takes the way a request to the gateway takes: the pipeline's stages, admission,
the choice, the execute stage with its retries and time limits, the books of load and health, the observers. Two things
differ: the replicas' adapters lead to simulated engines, and the facts of a prompt come from the trace, which has no
text.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs

from kvfleet.builtin.facts import PROMPT, PromptFacts
from kvfleet.builtin.tokens import TOKENS, PromptTokens
from kvfleet.config.origin import NOWHERE
from kvfleet.config.schema import FleetConfig
from kvfleet.config.simulation import SimulatedFleet
from kvfleet.errors import BackendError, RouteError
from kvfleet.pipeline.build import build
from kvfleet.pipeline.stage import BoundStage, Pipeline
from kvfleet.plugin.contract import Kind, RouteRequest, RoutingContext
from kvfleet.plugin.manager import ComponentTable
from kvfleet.registry.models import ModelRegistry
from kvfleet.replay.caches import PromptTeller, telling, watch
from kvfleet.replay.fleet import check_names, specs_of
from kvfleet.replay.hosts import EngineHost, SimulatedAdapter, engine_loads
from kvfleet.replay.least import least_ttft_s
from kvfleet.replay.measures import Served
from kvfleet.replay.prompts import traced_prompts
from kvfleet.replay.traces import RequestTrace, TracedRequest
from kvfleet.replay.variants import for_replay, told_prompts
from kvfleet.replay.virtual import START_S, VirtualClock, VirtualLoop
from kvfleet.runtime import Dispatch, Router
from kvfleet.sim.engine import Engine
from kvfleet.telemetry.cost import cost_usd

_NO_TOKENS = PromptTokens()

__all__ = ["Replay", "ReplayResult", "ReplayRouter"]

_BODY: Mapping[str, Any] = {"messages": (), "stream": True}


@attrs.frozen(kw_only=True)
class ReplayResult:
    """What came of a replay.

    Attributes:
        label: What the pipeline is called in tables.
        trace: What was replayed.
        served: How each request fared, in the trace's order.
        replicas: Every replica's id.
        preemptions: By replica.
        left_out: Stages of the pipeline that did not run because there is no text.
        is_closed_loop: True if turns of a session waited for the answer before them.
    """

    label: str
    trace: RequestTrace
    served: tuple[Served, ...] = attrs.field(repr=False)
    replicas: tuple[str, ...]
    preemptions: Mapping[str, int]
    left_out: tuple[str, ...]
    is_closed_loop: bool


class ReplayRouter(Router):
    """The live router, told the prompts' facts by whoever replays.

    Args:
        config: The fleet, as it is replayed.
        computes_all: False if the file has no `pipeline:`, so that only the scores are computed that are read.
        **options: Those of a `Router`.
    """

    facts: Mapping[str, PromptFacts] = {}  # by request id
    tokens: Callable[[str], PromptTokens] = staticmethod(lambda _: _NO_TOKENS)

    def __init__(self, config: FleetConfig, *, computes_all: bool, **options: Any) -> None:
        self._computes_all = computes_all
        super().__init__(config, **options)

    def _build(self, config: FleetConfig) -> Pipeline:
        return build(config, self.table, self.services, computes_all=self._computes_all)

    def prepare(self, request: RouteRequest, *, dry_run: bool = False) -> tuple[RoutingContext, BoundStage]:
        """As live, with what is known of the prompt."""
        ctx, select = super().prepare(request, dry_run=dry_run)
        found = self.facts.get(request.request_id)
        if found is not None:
            facts: dict[Any, Any] = ctx.facts  # type: ignore[assignment]  # a fresh mapping, which grows in place
            facts[PROMPT], facts[TOKENS] = found, self.tokens(request.request_id)
        return ctx, select


@attrs.define(kw_only=True)
class Replay:
    """One trace through one pipeline.

    Attributes:
        config: The pipeline and its replicas.
        trace: The requests.
        fleet: The replicas' engines; those of the configuration's `simulation:` if None.
        table: The components there are.
        seed: Of every random choice.
        speed: How many times faster requests come than in the trace; think times shrink alike.
        is_closed_loop: True to let turns of a session wait for the answer before them; False to send everything at its
            time; None to wait if the trace says for whom.
        tells: True to let every engine tell exactly what its cache holds, False to let none; None to let those whose
            model has `kv_events`.
        names_sessions: True to tell the pipeline which conversation a request belongs to, as clients that send a
            session header do.
        progress: Told after each request how many are done.
    """

    config: FleetConfig
    trace: RequestTrace
    fleet: SimulatedFleet | None = None
    table: ComponentTable
    seed: int = 0
    speed: float = attrs.field(default=1.0, validator=attrs.validators.gt(0))
    is_closed_loop: bool | None = None
    tells: bool | None = None
    names_sessions: bool = True
    progress: Callable[[int], None] | None = None
    clock: VirtualClock = attrs.field(init=False, factory=VirtualClock)
    router: ReplayRouter = attrs.field(init=False)
    hosts: dict[str, EngineHost] = attrs.field(init=False)
    served: list[Served] = attrs.field(init=False, factory=list)
    left_out: tuple[str, ...] = attrs.field(init=False, default=())
    _under_way: dict[str, TracedRequest] = attrs.field(init=False, factory=dict)
    _prompts: list[PromptFacts] = attrs.field(init=False, repr=False)
    _facts: dict[str, PromptFacts] = attrs.field(init=False, factory=dict)
    _done: int = attrs.field(init=False, default=0)
    _polls: int = attrs.field(init=False, default=0)
    _polling: asyncio.TimerHandle | None = attrs.field(init=False, default=None)
    _failure: BaseException | None = attrs.field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        """Build the router and the engines.

        Raises:
            ConfigError: with every finding of the pipeline.
        """
        config, self.left_out = for_replay(telling(self.config, self.tells), self.table)
        self.router = ReplayRouter(
            config,
            computes_all=bool(self.config.pipeline),
            table=told_prompts(self.table),
            clock=self.clock,
            polls=False,
            seed=self.seed,
            adapters=self._adapters(),
        )
        self.router.facts = self._facts
        looks_up = any(stage.kind is Kind.AFFINITY for stage in self.router.pipeline.stages)
        for model in self.router.models if looks_up else ():
            host = self.hosts[model.id]
            host.listen(watch(self.router.services.caches, model.id, host.engine.spec))
        names = {model.name for model in self.router.models if self.hosts[model.id].told is not None}
        if names:
            teller = PromptTeller(sorted(names), self.trace.block_tokens)
            self.router.tokens = lambda key: teller.tokens(self._under_way[key])
        self._prompts = traced_prompts(self.trace, names_sessions=self.names_sessions)

    def run(self, label: str = "") -> ReplayResult:
        """Replay it all, on an event loop of its own."""
        with _calm_collector(), asyncio.Runner(loop_factory=partial(VirtualLoop, self.clock)) as runner:
            try:
                runner.run(self._run())
            except asyncio.CancelledError:
                if self._failure is None:
                    raise
                raise self._failure from None
        return ReplayResult(
            label=label or self.config.fleet_name,
            trace=self.trace,
            served=tuple(self.served),
            replicas=tuple(self.hosts),
            preemptions={replica: host.engine.preemptions for replica, host in self.hosts.items()},
            left_out=self.left_out,
            is_closed_loop=self._waits,
        )

    # How

    @property
    def _waits(self) -> bool:
        return self.trace.has_sessions if self.is_closed_loop is None else self.is_closed_loop

    def _adapters(self) -> dict[str, SimulatedAdapter]:
        self.hosts = {}
        adapters = {}
        models = ModelRegistry.from_configs(self.config.models).replicas
        fleet = self.config.simulation if self.fleet is None else self.fleet
        is_own = self.fleet is None
        check_names(fleet, models, self.config.origin if is_own else NOWHERE, ("simulation",) if is_own else ())
        specs = specs_of(fleet, models, self.trace.block_tokens)
        for model in models:
            host = self.hosts[model.id] = EngineHost(Engine(specs[model.id], tells_all=False))
            adapters[model.id] = SimulatedAdapter(
                endpoint=model.endpoint, model_id=model.get_model_id(), host=host, traced=self._under_way
            )
        return adapters

    def _broke(self, loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        """Something failed in a timer, where nobody hears of it: end the replay with that."""
        if self._failure is None:
            self._failure = context.get("exception") or RuntimeError(str(context.get("message")))
            for task in asyncio.all_tasks(loop):
                task.cancel()

    async def _run(self) -> None:
        asyncio.get_running_loop().set_exception_handler(self._broke)
        engines = [host.engine.spec for host in self.hosts.values()]
        least = least_ttft_s(self.trace, engines, waits=self._waits)
        self.served = [Served(number=number, at_s=0.0, least_ttft_s=one) for number, one in enumerate(least)]
        async with self.router:
            self._poll(asyncio.get_running_loop(), self._endpoints())
            async with asyncio.TaskGroup() as group:
                await self._send(group)
            await self.router.settled()
            if self._polling is not None:
                self._polling.cancel()

    async def _send(self, group: asyncio.TaskGroup) -> None:
        """Send every request at its time, and each conversation by itself if its turns wait for each other."""
        for numbers in self._arrivals():
            wait_s = self.trace.requests[numbers[0]].at_s / self.speed + START_S - self.clock.now_s()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            group.create_task(self._one(numbers[0]) if len(numbers) == 1 else self._conversation(numbers))

    def _arrivals(self) -> list[list[int]]:
        """Requests by number: alone, or a conversation's together."""
        requests = self.trace.requests
        if not self._waits:
            return [[number] for number in range(len(requests))]
        groups: dict[str, list[int]] = {}
        found = []
        for number, request in enumerate(requests):
            if request.session and request.think_s is not None and request.session in groups:
                groups[request.session].append(number)
                continue
            group = [number]
            found.append(group)
            if request.session:
                groups[request.session] = group
        return found

    async def _conversation(self, numbers: Sequence[int]) -> None:
        for place, number in enumerate(numbers):
            if place:
                await asyncio.sleep((self.trace.requests[number].think_s or 0.0) / self.speed)
            await self._one(number)

    async def _one(self, number: int) -> None:
        traced, served, key = self.trace.requests[number], self.served[number], str(number)
        served.at_s = self.clock.now_s() - START_S
        self._under_way[key] = traced
        self._facts[key] = self._prompts[number]
        try:
            dispatch = await self.router.dispatch(self._request(key, traced))
            served.first_s = self.clock.now_s() - START_S
            await self._read(dispatch, served)
        except (RouteError, BackendError) as error:
            served.error = error.code if isinstance(error, RouteError) else error.kind.value
            if isinstance(error, RouteError) and error.trace is not None:
                served.attempts = sum(1 for span in error.trace.full if span.kind == "client")
        served.end_s = self.clock.now_s() - START_S
        del self._under_way[key], self._facts[key]
        self._done += 1
        if self.progress is not None:
            self.progress(self._done)

    def _request(self, key: str, traced: TracedRequest) -> RouteRequest:
        return RouteRequest(
            body=_BODY,
            model=traced.model,
            stream=True,
            request_id=key,
            tenant=traced.tenant,
            session=traced.session if self.names_sessions else "",
        )

    async def _read(self, dispatch: Dispatch, served: Served) -> None:
        answer = dispatch.answer
        served.attempts = sum(1 for span in dispatch.trace.full if span.kind == "client")
        if answer.reply.events is not None:
            async for _ in answer.reply.events:
                pass
        usage, model = answer.reply.tally.usage, answer.served_by
        served.replica = "" if model is None else model.id
        if usage is not None:
            served.prompt_tokens, served.output_tokens = usage.prompt_tokens, usage.completion_tokens
            served.cached_tokens = usage.cached_tokens or 0
            served.cost_usd = None if model is None else cost_usd(model, usage)

    def _poll(self, loop: asyncio.AbstractEventLoop, endpoints: Sequence[tuple[str, Sequence[EngineHost]]]) -> None:
        """Let the next engine tell its load; each has its turn as often as a gateway asks it."""
        endpoint, hosts = endpoints[self._polls % len(endpoints)]
        self.router.services.load.report(endpoint, engine_loads(hosts), loop.time())
        self._polls += 1
        pause_s = self.config.telemetry.load_poll_interval_seconds / len(endpoints)
        self._polling = loop.call_later(pause_s, self._poll, loop, endpoints)

    def _endpoints(self) -> list[tuple[str, list[EngineHost]]]:
        """The engines behind each endpoint; several, where models share one."""
        found: dict[str, list[EngineHost]] = {}
        for model in self.router.models:
            found.setdefault(model.endpoint, []).append(self.hosts[model.id])
        return list(found.items())


@contextlib.contextmanager
def _calm_collector() -> Iterator[None]:
    """Look for garbage seldom: a replay makes few cycles and holds a great trace, which takes a fifth of its time."""
    usual = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()
