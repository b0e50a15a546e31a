"""Grades of answers that have left: drawn as a sample, given by judges, and taught to the strategies that learn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import attrs

from kvfleet.adapters.base import ChatResponse
from kvfleet.adapters.call import Operation
from kvfleet.builtin.beside import Crew, judging_replica
from kvfleet.builtin.held import response_in
from kvfleet.builtin.mirror import mirror
from kvfleet.builtin.panel import Panel
from kvfleet.config.fields import flag, listing, number
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.eval.shadow import is_sampled
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Kind, Outcome, RoutingContext
from kvfleet.plugin.judging import Grade, Submission
from kvfleet.plugin.spec import hookimpl
from kvfleet.telemetry.cost import cost_usd
from kvfleet.trace import names
from kvfleet.trace.spans import AttributeValue, Span, Status

__all__ = ["JudgeObserver"]

_JUDGED = (Operation.CHAT, Operation.COMPLETION)
_MOST_SHOWN = 50


@attrs.define(kw_only=True)
class JudgeObserver:
    """Have a share of the answers graded once they have left, and teach the grades to strategies that learn.

    A grade counts like a rating by `POST /v1/feedback`, and replaces none. Judges that are models of the fleet get a
    request only if every filter lets them, through the pipeline's execute stage, so that redaction holds for them.
    Their calls are bounded, cancelled at close, marked with the header ``x-kvfleet-judge: 1`` and charged to no tenant.
    """

    wants_content: ClassVar[bool] = True

    judges: tuple[Any, ...] = listing(
        ("signs",),
        ge=1,
        doc="Who judges; the lowest verdict counts. Each a name, or a mapping with `use` and `with`.",
        example=[{"use": "model", "with": {"model": "house-70b"}}],
    )
    sample_rate: float = number(0.1, ge=0, le=1, doc="Share of the answers that is graded.")
    teaches: bool = flag(True, doc="Teach the grades to the strategies that learn.")
    timeout_s: float = number(30.0, gt=0, unit="s", doc="Longest wait for one call of a judge's.")
    max_concurrent: int = number(4, ge=1, unit="answers", doc="Most answers being graded.")
    max_queue: int = number(64, ge=0, unit="answers", doc="Most answers waiting; beyond that none is added.")
    _services: Services = attrs.field(init=False, factory=Services, repr=False, eq=False)
    _panel: Panel = attrs.field(init=False, factory=Panel, repr=False, eq=False)
    _crew: Crew[Outcome] = attrs.field(init=False, repr=False, eq=False)
    _counts: dict[str, int] = attrs.field(init=False, repr=False, eq=False)
    _last: deque[dict[str, Any]] = attrs.field(
        init=False, factory=lambda: deque(maxlen=_MOST_SHOWN), repr=False, eq=False
    )

    @_crew.default
    def _make_crew(self) -> Crew[Outcome]:
        return Crew(self._do, "kvfleet-judge", self.max_concurrent, self.max_queue)

    @_counts.default
    def _no_counts(self) -> dict[str, int]:
        return dict.fromkeys(("graded", "unknown", "queue_full", "taught"), 0)

    def provision(self, services: Services) -> None:
        """Make the judges.

        Raises:
            ConfigError: for judges there are not, and their options.
        """
        self._services = services
        self._panel = Panel.read(self.judges, services)

    async def aclose(self) -> None:
        """Cancel what is under way; twice is safe."""
        await self._crew.aclose()

    async def settled(self) -> None:
        """Wait until nothing is under way."""
        await self._crew.settled()

    def state(self) -> Mapping[str, Any]:
        """What was graded, and the last grades: who answered, how good it was, and which judge said so."""
        return {
            **self._counts,
            "waiting": self._crew.waiting,
            "in_flight": self._crew.at_work,
            "last": list(self._last),
        }

    def mark(self, outcome: Outcome) -> Mapping[str, AttributeValue]:
        """Draw the sample, as the route ends."""
        ctx = outcome.context
        is_fit = outcome.served_by is not None and outcome.is_success and ctx.request.operation in _JUDGED
        if not is_fit or ctx.dry_run or not is_sampled(ctx.seed, self.sample_rate):
            return {}
        if not self._crew.has_room_for(1):
            self._note("queue_full")
            return {}
        return {names.JUDGE_SAMPLED: True}

    async def observe(self, outcome: Outcome) -> None:
        """Begin to grade, or queue it; returns at once."""
        if outcome.trace.route.attributes.get(names.JUDGE_SAMPLED) is True:
            self._crew.take([outcome])

    async def _do(self, outcome: Outcome) -> None:
        span = Span(f"{names.STAGE_PREFIX}{Kind.OBSERVE}.judge", self._services.clock.time_ns())
        span.attributes = {names.STAGE_KIND: str(Kind.OBSERVE), names.STAGE_NAME: "judge"}
        grade = await self._grade(outcome)
        span.attributes[names.GRADE_REASON] = grade.reason
        span.end_ns, span.status = self._services.clock.time_ns(), Status.OK
        if grade.score is None:
            self._note("unknown")
        else:
            span.attributes[names.GRADE] = float(grade.score)
            span.attributes[names.GRADE_TAUGHT] = self._teach(outcome, grade.score)
        self._services.annotate(outcome, span)

    async def _grade(self, outcome: Outcome) -> Grade:
        served, response = outcome.served_by, response_in(outcome.content)
        if served is None or response is None:
            return Grade(None, "the answer was not kept")  # a stream of more than a megabyte
        asking = _Asking(outcome.context, served, self._services, self.timeout_s)
        submission = Submission(ctx=outcome.context, model=served, response=response, ask=asking)
        return await self._panel.grade(submission)

    def _teach(self, outcome: Outcome, score: float) -> bool:
        """Show the grade, and teach it; True if somebody has learned it."""
        request_id, served = outcome.context.request.request_id, outcome.served_by
        model = served.name if served is not None else ""
        self._note("graded")
        self._services.metrics.observe("kvfleet_judge_grade", score, model)
        shown = {"request_id": request_id, "trace_id": outcome.trace.trace_id, "model": model, "score": score}
        self._last.appendleft(shown)
        is_taught = self.teaches and self._services.rate(request_id, score) is not None
        self._counts["taught"] += is_taught
        return is_taught

    def _note(self, what: str) -> None:
        self._counts[what] += 1
        self._services.metrics.count("kvfleet_judge_outcomes_total", what)


@attrs.define
class _Asking:
    """Makes a judge's calls, beside the route of the answer in question."""

    ctx: RoutingContext
    served: ModelConfig
    services: Services
    timeout_s: float

    async def __call__(self, body: Mapping[str, Any], *, model: str = "") -> ChatResponse:
        """See `kvfleet.plugin.judging.Ask`."""
        request = self.ctx.request
        replica = judging_replica(model, self.ctx, self.services) if model else self.served
        ctx = attrs.evolve(self.ctx, request=attrs.evolve(request, body=body, raw=b"", stream=False))
        found = await mirror(ctx, replica, self.services, self.timeout_s, mark="judge")
        if found.response is None:
            raise BackendError(Fault(found.fault), found.error)
        usage = found.response.usage
        cost = None if usage is None else cost_usd(replica, usage)
        if cost is not None:
            self.services.metrics.count("kvfleet_judge_cost_usd_total", replica.name, by=cost)
        return found.response


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The observer that has answers graded."""
    yield Component(Kind.OBSERVE, "judge", JudgeObserver)
