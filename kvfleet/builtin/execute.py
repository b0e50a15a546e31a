"""Execution: attempts in the ranking's order until one works."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping

import attrs

from kvfleet.builtin.continuing import Continued
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.fields import flag, number
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.plugin.component import Component, Services, Stability
from kvfleet.plugin.contract import Answer, Attempt, Kind, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.router.attempts import FallbackRules
from kvfleet.router.retry_budget import RetryBudget
from kvfleet.router.scoring import Ranking
from kvfleet.router.tries import Tries
from kvfleet.telemetry.fleet_limits import FleetLimits
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.metrics import MetricsExporter
from kvfleet.trace import names

__all__ = ["Fallback"]


@attrs.define(kw_only=True)
class Fallback(FallbackRules):
    """Try the ranked candidates in order until one answers.

    A fault of the request itself (a bad parameter, refused content) is not tried elsewhere; a prompt that is too long
    is tried only on models with a larger window. After a refusal for a rate limit, whoever it holds for too is tried
    last. Once nobody else is left, a replica that had not kept silent is asked again, after a wait. Every attempt
    beyond a request's first is paid from a budget. After the first byte nothing is tried again, but another replica may
    go on with a stream.
    """

    retry_ratio: float = number(
        0.2, ge=0, le=10, doc="Retries for each request of the last ten seconds: of its model, and of the fleet."
    )
    min_retries_per_second: float = number(
        3.0, ge=0, doc="Retries that are granted in any case, to each model and to the fleet."
    )
    continue_streams: bool = flag(
        doc="Have another replica of the same model go on with a stream that breaks off. It is not done with tools, "
        "log probabilities, several choices or a format to keep, nor with engines that cannot; a comment in the stream "
        "says that it was."
    )
    _limits: FleetLimits = attrs.field(init=False, factory=FleetLimits, repr=False, eq=False)
    _health: HealthManager = attrs.field(init=False, factory=HealthManager, repr=False, eq=False)
    _metrics: MetricsExporter | None = attrs.field(init=False, default=None, repr=False, eq=False)
    _clock: Clock = attrs.field(init=False, factory=SystemClock, repr=False, eq=False)
    _services: Services = attrs.field(init=False, factory=Services, repr=False, eq=False)
    _budget: RetryBudget = attrs.field(init=False, repr=False, eq=False)

    @_budget.default
    def _own_budget(self) -> RetryBudget:
        return RetryBudget(self.retry_ratio, self.min_retries_per_second)

    def provision(self, services: Services) -> None:
        """Use the fleet's limits, its health and its clock."""
        self._limits, self._health, self._metrics = services.limits, services.health, services.metrics
        self._clock, self._services = services.clock, services
        self._budget = RetryBudget(self.retry_ratio, self.min_retries_per_second, services.clock)

    def inherit(self, before: Fallback) -> None:
        """Go on with the budget of the pipeline before a reload."""
        self._budget.inherit(before.budget)

    async def execute(self, ctx: RoutingContext, ranking: Ranking, attempt: Attempt) -> Answer:
        """The first answer.

        Raises:
            RouteError: if there is none.
        """
        first, is_stream = ranking.models[0], ctx.request.stream
        self._budget.asked(first.name)
        try:
            answer = await attempt(first, timeout_s=self.timeout_s(first, is_stream=is_stream), reason="first")
        except BackendError as error:  # until here all is as cheap as it can be: nearly every request ends here
            answer = await self._next(ctx, ranking, attempt, error)
        if self.continue_streams and answer.reply.events is not None:
            return self._continued(ctx, ranking, attempt, answer)
        return answer

    async def _next(self, ctx: RoutingContext, ranking: Ranking, attempt: Attempt, failed: BackendError) -> Answer:
        """The answer of somebody else, or of the same replica a moment later."""

        async def one(candidate: ModelConfig, timeout_s: float | None, reason: str) -> Answer:
            return await attempt(candidate, timeout_s=timeout_s, reason=reason)

        tries = self._tries(ctx, ranking)
        try:
            answer = await tries.next_answer(one, ranking.models[0], failed, is_stream=ctx.request.stream)
        finally:
            self._note(tries)
        answer.details = {**answer.details, names.RETRIES_LEFT: self._left(tries)}
        return answer

    def _continued(self, ctx: RoutingContext, ranking: Ranking, attempt: Attempt, answer: Answer) -> Answer:
        """The same answer, but that others of its model may go on with it."""
        writer = answer.served_by
        if writer is None:
            return answer
        most = self.max_attempts
        others = [model for model in ranking.models if model.name == writer.name and model.id != writer.id]

        def may_call(model: ModelConfig) -> str:
            nonlocal most
            most -= 1
            if most <= 0:
                return "max_attempts"
            if not self._health.is_available(model.endpoint):
                return "unavailable"
            whose = self._budget.take(model.name)
            return f"{whose}_budget" if whose else ""

        def told(then: str) -> None:
            if self._metrics is not None:
                self._metrics.count("kvfleet_stream_breaks_total", writer.name, then)

        return Continued(
            request=ctx.request,
            first=answer,
            attempt=attempt,
            others=others,
            adapters=self._services.adapters,
            timeout_s=self.timeout_s(writer, is_stream=True),
            may_call=may_call,
            told=told,
        ).answer()

    @property
    def reads_answers(self) -> bool:
        """True if it has to know what a stream said."""
        return self.continue_streams

    @property
    def budget(self) -> RetryBudget:
        """What retries are paid from."""
        return self._budget

    def _tries(self, ctx: RoutingContext, ranking: Ranking) -> Tries:
        patience_s = ctx.request.patience_s
        return Tries(
            rules=self,
            ranked=ranking.models,
            budget=self._budget,
            by_s=math.inf if patience_s is None else ctx.now_s + patience_s,
            reserves=lambda: self._reserves(ctx, ranking),
            clock=self._clock,
            chance=random.Random(ctx.seed).random,  # noqa: S311 - the jitter of a wait
        )

    def _reserves(self, ctx: RoutingContext, ranking: Ranking) -> list[ModelConfig]:
        """Replicas that `filter.rate_limits` left out only because others were free, and that nothing else excludes."""
        ranked = {model.id for model in ranking.models}
        chosen = {model.name for model in ranking.models}
        others = [one for one in self._services.models if one.name in chosen and one.id not in ranked]
        now_s = self._clock.now_s()
        spared = [model for model, hold in self._limits.held(others, now_s) if not hold.is_closed(now_s)]
        if not spared:
            return []
        dropped = {drop.candidate.id for _, drop in self._services.excluded(ctx, spared)}
        return [model for model in spared if model.id not in dropped]

    def worth_trying(self, queue: list[ModelConfig], failed: ModelConfig, error: BackendError) -> list[ModelConfig]:
        """Who may still answer after this failure; those whom a refusal for a rate limit holds for too come last."""
        left = FallbackRules.worth_trying(self, queue, failed, error)
        if error.kind is not Fault.RATE_LIMITED:
            return left
        held = {model.id for model, _ in self._limits.held(left, self._limits.tracker.clock.now_s())}
        return sorted(left, key=lambda model: model.id in held)

    def may_repeat(self, failed: ModelConfig) -> bool:
        """True if a replica that failed may be asked again: as often as its model says, unless its breaker opened."""
        return FallbackRules.may_repeat(self, failed) and self._health.is_available(failed.endpoint)

    def state(self) -> Mapping[str, float]:
        """Retries that are left to the fleet."""
        return {"retries_left": round(self._budget.left(), 1)}

    def _left(self, tries: Tries) -> float:
        """Retries left to a request's model, and to the fleet: the fewer of both."""
        return min(self._budget.left(tries.faults[0][0].name), self._budget.left())

    def _note(self, tries: Tries) -> None:
        if tries.stopped in ("model_budget", "fleet_budget") and self._metrics is not None:
            model, whose = tries.faults[0][0].name, tries.stopped.removesuffix("_budget")
            self._metrics.count("kvfleet_retries_refused_total", model, whose)


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The execute component."""
    yield Component(Kind.EXECUTE, "fallback", Fallback, stability=Stability.STABLE)
