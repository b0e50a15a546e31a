"""Execution: attempts in the ranking's order until one works."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.component import Component, Stability
from kvfleet.plugin.contract import Answer, Attempt, Kind, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.router.attempts import FallbackRules
from kvfleet.router.scoring import Ranking

__all__ = ["Fallback"]


@attrs.define(kw_only=True)
class Fallback(FallbackRules):
    """Try the ranked candidates in order until one answers.

    A fault of the request itself (a bad parameter, refused content) is not tried elsewhere; a prompt that is too long
    is tried only on models with a larger window. Nothing is tried again after the first byte.
    """

    async def execute(self, ctx: RoutingContext, ranking: Ranking, attempt: Attempt) -> Answer:
        """The first answer.

        Raises:
            AttemptsExhaustedError: if there is none.
        """

        async def one(candidate: ModelConfig, timeout_s: float | None, reason: str) -> Answer:
            return await attempt(candidate, timeout_s=timeout_s, reason=reason)

        return await self.first_answer(ranking.models, one, is_stream=ctx.request.stream)


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The execute component."""
    yield Component(Kind.EXECUTE, "fallback", Fallback, stability=Stability.STABLE)
