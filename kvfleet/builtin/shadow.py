"""Shadow traffic in a pipeline: what is mirrored, to whom, and what is kept of it."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import anyio
import attrs

from kvfleet.adapters.call import Operation, Usage
from kvfleet.builtin.beside import Crew, permitted
from kvfleet.builtin.facts import prompt_of
from kvfleet.builtin.mirror import mirror
from kvfleet.config.fields import flag, listing, number, text
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import ComponentError, TraceError
from kvfleet.eval.asking import Asked, similarity, text_of_answer
from kvfleet.eval.shadow import is_sampled
from kvfleet.eval.shadow_store import FILE_NAME, ShadowRow, ShadowStore
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Drop, Kind, Outcome, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.registry.models import serves
from kvfleet.telemetry.cost import cost_usd
from kvfleet.trace import names
from kvfleet.trace.attributes import answering_attempts
from kvfleet.trace.spans import AttributeValue

__all__ = ["ShadowObserver", "ShadowOnlyFilter"]

log = logging.getLogger(__name__)

_MIRRORED = (Operation.CHAT, Operation.COMPLETION)
Judge = Callable[[str, str, str], Any]


@attrs.define
class ShadowOnlyFilter:
    """Drop models that only get mirrored requests, never live ones."""

    shadow_models: tuple[str, ...] = listing(doc="The models.", refers_to="model")
    only_live: ClassVar[bool] = True

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        """One drop for each replica of such a model."""
        reason = "gets mirrored requests only"
        return [Drop(model, reason) for model in ctx.candidates if model.name in self.shadow_models]


@attrs.frozen
class _Job:
    """One call to make: the outcome it is compared with, and whom to ask."""

    outcome: Outcome
    model: ModelConfig


@attrs.define(kw_only=True)
class ShadowObserver:
    """Send a share of the answered requests to other models too, and keep how these did.

    Mirroring begins when the answer is whole, so it delays none; calls in flight and waiting are bounded, and
    cancelled at close. A shadow model must pass every filter of the pipeline for the request, the policy above all,
    and the caller's list of allowed models; near a rate limit it gets none. A mirrored call carries the header
    ``x-kvfleet-shadow: 1``. It is charged to no tenant: what it costs is in the comparison and in a metric of its
    own.
    """

    shadow_models: tuple[str, ...] = listing(doc="Models to mirror to.", refers_to="model", ge=1)
    sample_rate: float = number(0.1, ge=0, le=1, doc="Share of the answered requests that is mirrored.")
    timeout_s: float = number(30.0, gt=0, unit="s", doc="Longest wait for a shadow model's whole answer.")
    max_concurrent: int = number(4, ge=1, unit="requests", doc="Most mirrored calls in flight.")
    max_queue: int = number(64, ge=0, unit="requests", doc="Most mirrored calls waiting; beyond that none is added.")
    log_outputs: bool = flag(doc="Keep prompts and answers with the comparisons. Off unless you need them.")
    compare_outputs: bool = flag(doc="Compute how alike the answers are.")
    judge: str = text(
        "",
        doc="A function that says how good the shadow's answer is, 0 to 1, from prompt, answer given and shadow's "
        "answer; as `module:function`. It may be async.",
        pattern=r"|[\w.]+:\w+",
        pattern_doc="a function, as `module:function`",
        example="my_judges:is_right",
    )
    path: str = text("", doc="The SQLite file of the comparisons; in the gateway's state directory if empty.")
    max_results: int = number(10_000, ge=1, doc="Most comparisons kept; the oldest go first.")
    _services: Services = attrs.field(init=False, factory=Services, repr=False, eq=False)
    _replicas: tuple[ModelConfig, ...] = attrs.field(init=False, default=(), repr=False, eq=False)
    _store: ShadowStore | None = attrs.field(init=False, default=None, repr=False, eq=False)
    _judge: Judge | None = attrs.field(init=False, default=None, repr=False, eq=False)
    _crew: Crew[_Job] = attrs.field(init=False, repr=False, eq=False)
    _counts: dict[str, int] = attrs.field(init=False, repr=False, eq=False)
    _has_warned: bool = attrs.field(init=False, default=False, repr=False, eq=False)

    @_crew.default
    def _make_crew(self) -> Crew[_Job]:
        return Crew(self._do, "kvfleet-shadow", self.max_concurrent, self.max_queue)

    @_counts.default
    def _no_counts(self) -> dict[str, int]:
        return dict.fromkeys(("mirrored", "failed", "excluded", "queue_full", "not_stored"), 0)

    @property
    def wants_content(self) -> bool:
        """True if answers are compared, judged or kept."""
        return bool(self.compare_outputs or self.log_outputs or self.judge)

    # Life

    def provision(self, services: Services) -> None:
        """Find the shadow models' replicas, the judge, and the place of the store.

        Raises:
            ComponentError: if there is no such judge.
        """
        self._services = services
        self._replicas = tuple(m for m in services.models if m.enabled and m.name in self.shadow_models)
        self._judge = _find_judge(self.judge) if self.judge else None
        folder = services.state_dir
        place = Path(self.path).expanduser() if self.path else folder / FILE_NAME if folder else None
        self._store = ShadowStore(place, self.max_results) if place is not None else None

    async def aclose(self) -> None:
        """Cancel what is under way; twice is safe."""
        await self._crew.aclose()
        if self._store is not None:
            await anyio.to_thread.run_sync(self._store.close)

    def state(self) -> Mapping[str, Any]:
        """What was mirrored, and what was not."""
        return {**self._counts, "waiting": self._crew.waiting, "in_flight": self._crew.at_work}

    async def settled(self) -> None:
        """Wait until nothing is under way."""
        await self._crew.settled()

    # The choice, as the route ends

    def mark(self, outcome: Outcome) -> Mapping[str, AttributeValue]:
        """Draw the sample, and ask the filters who may see the request."""
        ctx, served = outcome.context, outcome.served_by
        if served is None or not outcome.is_success or ctx.request.operation not in _MIRRORED:
            return {}
        if ctx.dry_run or not is_sampled(ctx.seed, self.sample_rate):
            return {}
        asked = [m for m in self._replicas if m.name != served.name and serves(m, ctx.request.operation)]
        chosen, drops = permitted(ctx, asked, self._services)
        if chosen and not self._crew.has_room_for(len(chosen)):
            drops += [("observe.shadow", Drop(model, "too many requests wait already")) for model in chosen]
            self._skip("queue_full", len(chosen))
            chosen = []
        return self._marks(chosen, drops)

    def _marks(self, chosen: list[ModelConfig], drops: list[tuple[str, Drop]]) -> Mapping[str, AttributeValue]:
        marks: dict[str, AttributeValue] = {}
        if chosen:
            marks[names.SHADOW_REPLICAS] = tuple([model.id for model in chosen])
        kept = {model.name for model in chosen}
        told = [f"{drop.candidate.name}: {drop.reason} [{by}]" for by, drop in drops if drop.candidate.name not in kept]
        if told:
            marks[names.SHADOW_EXCLUDED] = tuple(dict.fromkeys(told))
            filtered = sum(by != "observe.shadow" for by, _ in drops)
            if filtered:
                self._skip("excluded", filtered)
        return marks

    def _skip(self, reason: str, number_: int) -> None:
        self._counts[reason] += number_
        self._services.metrics.count("kvfleet_shadow_skipped_total", reason, by=number_)

    # The calls, once the answer has left

    async def observe(self, outcome: Outcome) -> None:
        """Begin to mirror, or queue it; returns at once."""
        chosen = outcome.trace.route.attributes.get(names.SHADOW_REPLICAS)
        if not isinstance(chosen, tuple):
            return
        self._crew.take([_Job(outcome, model) for model in self._replicas if model.id in chosen])

    async def _do(self, job: _Job) -> None:
        asked = await self._ask(job)
        row = await self._compare(job, asked)
        await self._keep(row)

    async def _ask(self, job: _Job) -> Asked:
        services, model = self._services, job.model
        services.metrics.record_shadow(model.name)
        self._counts["mirrored"] += 1
        asked: Asked | None = None
        try:
            asked = await mirror(job.outcome.context, model, services, self.timeout_s)
        finally:
            is_ok = asked is not None and asked.response is not None
            fault = "cancelled" if asked is None else asked.fault
            services.metrics.count("kvfleet_shadow_outcomes_total", model.name, fault)
            self._counts["failed"] += not is_ok
        return asked

    async def _compare(self, job: _Job, asked: Asked) -> ShadowRow:
        outcome, model, response = job.outcome, job.model, asked.response
        ctx, attributes = outcome.context, outcome.trace.route.attributes
        usage = response.usage if response is not None else None
        cost = _cost(model, usage)
        if cost is not None:
            self._services.metrics.count("kvfleet_shadow_cost_usd_total", model.name, by=cost)
        row = ShadowRow(
            at_s=self._services.clock.time_ns() / 1e9,
            fleet=str(attributes.get(names.FLEET, "")),
            request_id=ctx.request.request_id,
            trace_id=outcome.trace.trace_id,
            tenant=ctx.tenant,
            primary=outcome.served_by.name if outcome.served_by is not None else "",
            shadow=model.name,
            error=asked.error,
            primary_ms=_attempt_ms(outcome),
            shadow_ms=asked.latency_ms,
            primary_usd=outcome.cost_usd,
            shadow_usd=cost,
            primary_tokens=outcome.usage.completion_tokens if outcome.usage is not None else None,
            shadow_tokens=usage.completion_tokens if usage is not None else None,
        )
        if response is None or not outcome.content:
            return row
        return await self._compare_texts(row, ctx, text_of_answer(outcome.content), response.content)

    async def _compare_texts(self, row: ShadowRow, ctx: RoutingContext, given: str, other: str) -> ShadowRow:
        if self.compare_outputs:
            row = attrs.evolve(row, similarity=await anyio.to_thread.run_sync(similarity, given, other))
        prompt = prompt_of(ctx).text if self.log_outputs or self._judge else ""
        if self._judge is not None:
            row = attrs.evolve(row, judgement=await self._judged(self._judge, prompt, given, other))
        if self.log_outputs:
            row = attrs.evolve(row, prompt=prompt, primary_output=given, shadow_output=other)
        return row

    async def _judged(self, judge: Judge, prompt: str, given: str, other: str) -> float | None:
        """What the judge says; None, with a warning, if it fails or says something else than 0 to 1."""
        try:
            async with asyncio.timeout(self.timeout_s):
                if inspect.iscoroutinefunction(judge):
                    said = await judge(prompt, given, other)
                else:
                    said = await anyio.to_thread.run_sync(judge, prompt, given, other, abandon_on_cancel=True)
            value = float(said)
        except Exception as error:  # noqa: BLE001 - somebody else's function
            log.warning("judge failed judge=%s error=%s", self.judge, type(error).__name__)
            return None
        if not 0 <= value <= 1:
            log.warning("judge out of range judge=%s", self.judge)
            return None
        return value

    async def _keep(self, row: ShadowRow) -> None:
        if self._store is None:
            return
        try:
            await anyio.to_thread.run_sync(self._store.add, [row])
        except TraceError as error:
            self._counts["not_stored"] += 1
            if not self._has_warned:  # once: a full disk fails each time
                self._has_warned = True
                log.warning("shadow store failed error=%s", error)


def _find_judge(reference: str) -> Judge:
    module, _, name = reference.partition(":")
    try:
        found: Judge = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ComponentError(f"there is no judge {reference!r}; it must be an importable function") from error
    if not callable(found):
        raise ComponentError(f"the judge {reference!r} is no function")
    return found


def _cost(model: ModelConfig, usage: Usage | None) -> float | None:
    return None if usage is None else cost_usd(model, usage)


def _attempt_ms(outcome: Outcome) -> float:
    """What the call that answered took, without the decision and the attempts before it."""
    attempts = answering_attempts(outcome.trace.spans)
    return attempts[-1].duration_ms if attempts else outcome.duration_s * 1000


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """Shadow traffic."""
    yield Component(Kind.FILTER, "shadow_only", ShadowOnlyFilter, must_hold=True)
    yield Component(Kind.OBSERVE, "shadow", ShadowObserver)
