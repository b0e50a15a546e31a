"""Execution that asks another model where an answer cannot be trusted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from kvfleet.adapters.call import Operation
from kvfleet.builtin.escalation import Escalation, EscalationRules
from kvfleet.builtin.panel import Panel
from kvfleet.builtin.redact import Redacted
from kvfleet.config.fields import flag, listing
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Answer, Attempt, Kind, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.policy.pii import PIIDetector
from kvfleet.router.scoring import Ranking

__all__ = ["Escalating"]

_JUDGED = (Operation.CHAT, Operation.COMPLETION)


@attrs.define(kw_only=True)
class Escalating(EscalationRules):
    """Ask the first of the ranking, have its answer judged, and ask the next model if it cannot be trusted.

    What fails is tried elsewhere as by `execute.fallback`. Everybody asked has passed the same filters; nobody is asked
    once the attempts, the request's deadline, or what one request may cost are used up. Then the best answer so far is
    given, the later one of equals. Every answer is paid for. A stream is held back until it is decided on.
    """

    judges: tuple[Any, ...] = listing(
        ("signs", "logprobs"),
        ge=1,
        doc="Who judges; the lowest verdict counts. Each a name, or a mapping with `use` and `with`.",
        example=["signs", {"use": "model", "with": {"model": "house-70b"}}],
    )
    redact: bool = flag(doc="Take personal data out of what models get that are not private, as `execute.redacting`.")
    _panel: Panel = attrs.field(init=False, factory=Panel, repr=False, eq=False)
    _services: Services = attrs.field(init=False, factory=Services, repr=False, eq=False)
    _detector: PIIDetector = attrs.field(init=False, factory=PIIDetector, repr=False, eq=False)
    _tells_nothing: set[str] = attrs.field(init=False, factory=set, repr=False, eq=False)
    _counts: dict[str, int] = attrs.field(init=False, repr=False, eq=False)

    @_counts.default
    def _no_counts(self) -> dict[str, int]:
        return dict.fromkeys(("judged", "unknown", "escalated"), 0)

    def provision(self, services: Services) -> None:
        """Make the judges.

        Raises:
            ConfigError: for judges there are not, and their options.
        """
        EscalationRules.provision(self, services)
        self._services = services
        self._panel = Panel.read(self.judges, services)

    def most_usd(self, costs: Mapping[str, float]) -> float:
        """The most a route may cost, from what one answer of each model may: as many answers as may be made."""
        dearest = sorted(costs.values(), reverse=True)[: self.max_attempts]
        return sum(dearest) * (1 + self._panel.answers_each)

    async def execute(self, ctx: RoutingContext, ranking: Ranking, attempt: Attempt) -> Answer:
        """The first answer that is trusted, or the best.

        Raises:
            AttemptsExhaustedError: if there is none.
        """
        calls = Redacted(ctx.request, attempt, self._detector) if self.redact else attempt
        models = list(self.order(ranking.models))
        if ctx.request.operation not in _JUDGED or len({model.name for model in models}) < 2:
            # Nobody could answer instead, so there is nothing to judge for.
            return await EscalationRules.execute(self, ctx, ranking, calls)
        escalation = Escalation(
            rules=self,
            panel=self._panel,
            services=self._services,
            ctx=ctx,
            attempt=calls,
            tells_nothing=self._tells_nothing,
        )
        answer = await escalation.run(ranking.models)
        self._count(escalation)
        return answer

    def _count(self, escalation: Escalation) -> None:
        judged = escalation.judged
        self._counts["judged"] += len(judged)
        self._counts["unknown"] += sum(held.grade.score is None for held in judged)
        self._counts["escalated"] += max(len(judged) - 1, 0)

    def state(self) -> Mapping[str, int]:
        """Answers judged, those of which nobody could tell, and those after which another model answered too."""
        return dict(self._counts)


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The execute component that escalates."""
    yield Component(Kind.EXECUTE, "escalate", Escalating)
