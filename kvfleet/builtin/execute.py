"""Execution: attempts in the ranking's order until one works."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import attrs

from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.plugin.component import Component, Services, Stability
from kvfleet.plugin.contract import Answer, Attempt, Kind, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.router.attempts import FallbackRules
from kvfleet.router.scoring import Ranking
from kvfleet.telemetry.fleet_limits import FleetLimits

__all__ = ["Fallback"]


@attrs.define(kw_only=True)
class Fallback(FallbackRules):
    """Try the ranked candidates in order until one answers.

    A fault of the request itself (a bad parameter, refused content) is not tried elsewhere; a prompt that is too long
    is tried only on models with a larger window. After a refusal for a rate limit, whoever it holds for too is tried
    last. Nothing is tried again after the first byte.
    """

    reads_answers: ClassVar[bool] = False
    _limits: FleetLimits = attrs.field(init=False, factory=FleetLimits, repr=False, eq=False)

    def provision(self, services: Services) -> None:
        """Use the fleet's limits."""
        self._limits = services.limits

    async def execute(self, ctx: RoutingContext, ranking: Ranking, attempt: Attempt) -> Answer:
        """The first answer.

        Raises:
            AttemptsExhaustedError: if there is none.
        """

        async def one(candidate: ModelConfig, timeout_s: float | None, reason: str) -> Answer:
            return await attempt(candidate, timeout_s=timeout_s, reason=reason)

        return await self.first_answer(ranking.models, one, is_stream=ctx.request.stream)

    def worth_trying(self, queue: list[ModelConfig], failed: ModelConfig, error: BackendError) -> list[ModelConfig]:
        """Who may still answer after this failure; those whom a refusal for a rate limit holds for too come last."""
        left = FallbackRules.worth_trying(self, queue, failed, error)
        if error.kind is not Fault.RATE_LIMITED:
            return left
        held = {model.id for model, _ in self._limits.held(left, self._limits.tracker.clock.now_s())}
        return sorted(left, key=lambda model: model.id in held)


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The execute component."""
    yield Component(Kind.EXECUTE, "fallback", Fallback, stability=Stability.STABLE)
