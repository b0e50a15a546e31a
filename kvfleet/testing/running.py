"""Runs a pipeline's test through the real engine: fake backends, a frozen clock, a fixed seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.adapters.base import EndpointHealth, EngineLoad
from kvfleet.adapters.call import Call, Operation
from kvfleet.adapters.limit_headers import ToldQuota
from kvfleet.clock import FrozenClock
from kvfleet.config.findings import Path
from kvfleet.config.schema import FleetConfig, ModelConfig
from kvfleet.errors import BackendError, Fault, RouteError
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Kind, RouteRequest
from kvfleet.plugin.manager import ComponentTable
from kvfleet.registry.models import ModelRegistry
from kvfleet.router.scoring import ModelScore, Ranking, ScoringContext
from kvfleet.runtime import Router
from kvfleet.testing.expecting import Mismatch, Seen, is_meant, mismatches
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.testing.vocabulary import BackendGiven, Case, CaseRequest, Expected, Given, RateLimitGiven, Turn
from kvfleet.trace.explanation import Explanation

__all__ = ["Failure", "request_of", "run_case"]


@attrs.frozen
class Failure:
    """A case that did not hold.

    Attributes:
        path: Where the turn stands in the case; empty for a case without turns.
        mismatches: What was not as expected.
        summary: The explanation of the request that went wrong, in words.
        repetition: Which repetition it was, from 1; 0 for a share of all of them.
    """

    path: Path
    mismatches: tuple[Mismatch, ...]
    summary: str
    repetition: int = 1


async def run_case(config: FleetConfig, case: Case, table: ComponentTable) -> Failure | None:
    """Run one case; None if everything held.

    Raises:
        ConfigError: if the pipeline cannot be built.
    """
    world = _World(ModelRegistry.from_configs(config.models).replicas)
    if case.given.select or any(turn.given.select for turn in case.turns):
        table = world.steering.table(table)
    router = Router(config, table=table, clock=world.clock, adapters=world.adapters, polls=False, seed=case.seed)
    async with router:
        world.give(router, case.given)
        for path, turn in _turns(case):
            world.clock.advance(turn.after_s)
            world.give(router, turn.given)
            failure = await _repeat(router, path, turn, case.repeat)
            if failure is not None:
                return failure
    return None


def _turns(case: Case) -> list[tuple[Path, Turn]]:
    if case.turns:
        return [(("turns", index), turn) for index, turn in enumerate(case.turns)]
    return [((), Turn(request=case.request, expect=case.expect))]


async def _repeat(router: Router, path: Path, turn: Turn, times: int) -> Failure | None:
    request = request_of(turn.request)
    served: Counter[str] = Counter()
    seen = Seen(explanation=None)
    for number in range(1, times + 1):
        seen = await _ask(router, request)
        served[seen.served_replica] += 1
        wrong = tuple(mismatches(turn.expect, seen))
        if wrong:
            return Failure(path, wrong, _summary(seen), number)
    wrong = tuple(_wrong_shares(turn.expect, served, times))
    return Failure(path, wrong, _summary(seen), 0) if wrong else None


def _wrong_shares(expect: Expected, served: Mapping[str, int], times: int) -> list[Mismatch]:
    wrong = []
    for target, share in expect.share.items():
        low, high = share.between[0], share.between[-1]
        got = sum(count for replica, count in served.items() if is_meant(target, replica)) / times
        if not low <= got <= high:
            wrong.append(Mismatch(("share", target), f"{low:g} to {high:g}", f"{got:g}"))
    return wrong


def _summary(seen: Seen) -> str:
    if seen.explanation is not None:
        return seen.explanation.summary()
    return f"Refused before a route began: {seen.error}" if seen.error else ""


async def _ask(router: Router, request: RouteRequest) -> Seen:
    """Send the request, read the answer to its end, and wait until everybody has learned from it."""
    try:
        dispatch = await router.dispatch(request)
    except RouteError as error:
        await router.settled()
        explanation = None if error.trace is None else Explanation(error.trace)
        return Seen(explanation=explanation, error=error, status=error.status)
    events = dispatch.answer.reply.events
    if events is not None:
        try:
            async for _ in events:
                pass
        except BackendError:
            pass  # the trace says how the stream broke off
        await dispatch.answer.reply.close()
    await router.settled()
    return Seen(explanation=dispatch.explanation, status=dispatch.answer.reply.status)


def request_of(asked: CaseRequest) -> RouteRequest:
    """The request of a test, as the pipeline takes it."""
    operation = Operation(asked.operation)
    body = {"model": asked.model, **_content(asked, operation), **asked.body}
    if asked.stream:
        body["stream"] = True
    return RouteRequest(
        operation=operation,
        body=body,
        model=str(body["model"]),
        models=frozenset(asked.models) or None,
        strategy=asked.strategy,
        is_override=bool(asked.strategy),
        stream=bool(body.get("stream")),
        tenant=asked.tenant,
        key=asked.key,
        data_class=asked.data_class,
        region=asked.region,
        session=asked.session,
        tags=asked.tags,
        condition_headers={name.lower(): value for name, value in asked.headers.items()},
        timeout_s=None if asked.timeout_ms is None else asked.timeout_ms / 1000,
    )


def _content(asked: CaseRequest, operation: Operation) -> dict[str, Any]:
    if asked.messages:
        return {"messages": list(asked.messages)}
    if not asked.prompt:
        return {}
    if operation is Operation.CHAT:
        return {"messages": [{"role": "user", "content": asked.prompt}]}
    if operation is Operation.RERANK:
        return {"query": asked.prompt, "documents": [asked.prompt]}
    return {"prompt" if operation is Operation.COMPLETION else "input": asked.prompt}


class _World:
    """The backends of one case, and the clock they share with the router."""

    def __init__(self, replicas: Sequence[ModelConfig]) -> None:
        self.clock = FrozenClock()
        self.steering = _Steering()
        self.replicas = replicas
        self.adapters = {model.id: self._adapter(model) for model in replicas}
        self._given: dict[str, BackendGiven] = {}
        self._calls: Counter[str] = Counter()

    def give(self, router: Router, given: Given) -> None:
        """Change what the test says is different now."""
        for target, backend in given.backends.items():
            self._given[target] = backend
            for model in self._meant(target):
                self._calls[model.id] = 0
        for target, state in given.health.items():
            self._set_health(router, target, is_up=state == "up")
        for target, load in given.load.items():
            reported = EngineLoad(running=load.running, waiting=load.waiting, kv_usage=load.kv_usage)
            for model in self._meant(target):
                router.services.load.report(model.endpoint, reported, self.clock.now_s())
        for target, said in given.rate_limits.items():
            for model in self._meant(target):
                self._limit(router, model, said)
        self.steering.wanted = given.select or self.steering.wanted

    def _meant(self, target: str) -> list[ModelConfig]:
        return [model for model in self.replicas if is_meant(target, model.id)]

    def _set_health(self, router: Router, target: str, *, is_up: bool) -> None:
        health = router.services.health
        for endpoint in {model.endpoint for model in self._meant(target)}:
            for _ in range(health.failure_threshold):
                health.update_health(EndpointHealth(endpoint=endpoint, healthy=is_up))

    def _limit(self, router: Router, model: ModelConfig, said: RateLimitGiven) -> None:
        limits, now_s = router.services.limits, self.clock.now_s()
        key = limits.key(model.id)
        entry = limits.tracker.of(key)
        entry.learn(_quotas(said), now_s)
        if said.retry_after_s is not None:
            entry.refuse(now_s, said.retry_after_s, limits.tracker.cooldown_seconds)
        limits.tracker.changed(key, entry)

    def _adapter(self, model: ModelConfig) -> FakeAdapter:
        def script(_: Call) -> FakeReply:
            return self._reply(model)

        return FakeAdapter(endpoint=model.endpoint, model_id=model.get_model_id(), script=script, time=self.clock)

    def _reply(self, model: ModelConfig) -> FakeReply:
        given = self._given.get(model.id) or self._given.get(model.name) or BackendGiven()
        self._calls[model.id] += 1
        has_failed_enough = given.fail_times is not None and self._calls[model.id] > given.fail_times
        return FakeReply(
            text=given.reply or "This is a test's answer.",
            fail=Fault(given.fail) if given.fail and not has_failed_enough else None,
            status=given.status,
            fail_after=given.fail_after,
            latency_s=given.latency_ms / 1000,
            cached_tokens=given.cached_tokens,
            retry_after_s=given.retry_after_s,
            headers={name.lower(): value for name, value in given.headers.items()},
            token_probability=given.token_probability,
        )


def _quotas(said: RateLimitGiven) -> Iterator[ToldQuota]:
    """What was said, as windows of time."""
    for name, left, limit in (
        ("requests", said.requests_left, said.requests_limit),
        ("tokens", said.tokens_left, said.tokens_limit),
    ):
        if left is not None:
            yield ToldQuota(
                name=name, remaining=left, limit=limit, reset_s=said.resets_in_s, counts_tokens=name == "tokens"
            )


@attrs.define
class _Steering:
    """Who is to be first in every ranking; nobody in particular if empty."""

    wanted: str = ""

    def table(self, table: ComponentTable) -> ComponentTable:
        """The components, with every strategy obeying."""
        found: dict[tuple[Kind, str], tuple[Component, ...]] = {(c.kind, c.name): (c,) for c in table.components}
        found |= {(one[0].kind, one[0].name): one for one in table.conflicts}
        found |= {(one.kind, one.name): (self._steered(one),) for one in table.of_kind(Kind.SELECT)}
        return attrs.evolve(table, by_key=found)

    def _steered(self, component: Component) -> Component:
        def select(
            strategy: Any, models: Sequence[ModelConfig], context: ScoringContext | None = None
        ) -> Sequence[ModelScore]:
            ranking: Sequence[ModelScore] = component.cls.select(strategy, models, context)
            return self._first(Ranking.of(models, ranking)) if self.wanted else ranking

        return attrs.evolve(component, cls=type(component.cls.__name__, (component.cls,), {"select": select}))

    def _first(self, ranking: Ranking) -> Ranking:
        order = sorted(range(len(ranking.models)), key=lambda i: not is_meant(self.wanted, ranking.models[i].id))
        return Ranking(
            [ranking.models[i] for i in order],
            [ranking.totals[i] for i in order],
            unit=ranking.unit,
            terms={name: [values[i] for i in order] for name, values in ranking.terms.items()},
            mode="forced",
        )
