"""Runs the stages up to the choice. The only writer of stage records.

The same code decides a live request and a simulated one. Mappings of a context (`facts`, `affinity`, `columns`) grow as
the stages run and are written here alone; a new context is made when the candidates change, which saves a microsecond
for every stage (`benchmarks/decision.py`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.builtin.facts import PROMPT
from kvfleet.clock import Clock
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import (
    AdmissionError,
    ContractError,
    ModelNotFoundError,
    NoCandidatesError,
    QuotaError,
    RouteError,
    StageError,
)
from kvfleet.pipeline.stage import BoundStage, Pipeline, Said
from kvfleet.plugin.contract import (
    Affinity,
    Answer,
    CacheMode,
    Drop,
    Fact,
    Filtered,
    Kind,
    Lease,
    Refusal,
    RoutingContext,
)
from kvfleet.router.scoring import Column, Ranking, ScoringContext, Unit
from kvfleet.trace import names
from kvfleet.trace.spans import AttributeValue, Span, Step, Trace

__all__ = ["Decision"]

# What a loop in Python would do, in C.
_step: Callable[[tuple[Any, ...]], Step] = functools.partial(tuple.__new__, Step)
_floats: Callable[[Iterable[float]], Iterator[float]] = functools.partial(map, float)
_id_of: Callable[[ModelConfig], str] = operator.attrgetter("id")
_ADMITTED = (names.ADMITTED,)
_WITH_REASONS = (names.SCORE_VALUES, names.SCORE_MODES, names.SCORE_REASONS)
_value_of: Callable[[CacheMode], str] = operator.attrgetter("_value_")


@attrs.define
class Decision:
    """One request on its way through the stages.

    Attributes:
        pipeline: What to run.
        ctx: The context so far.
        trace: Where the records go.
        clock: For the records' times.
        leases: What admissions reserved; the route releases them.
        excluded: Who was dropped, by which stage, and how.
        ranking: The choice, once made.
        given: A stage's own answer, once there is one.
    """

    pipeline: Pipeline
    ctx: RoutingContext
    trace: Trace
    clock: Clock
    leases: list[Lease] = attrs.field(factory=list)
    excluded: list[tuple[BoundStage, Drop]] = attrs.field(factory=list)
    ranking: Ranking | None = None
    given: Answer | None = None
    _ids: tuple[str, ...] = attrs.field(init=False, default=())
    _span: Span | None = attrs.field(init=False, default=None)

    async def run(self, select: BoundStage) -> Answer | None:
        """Run the stages and the choice; an answer if a stage had one, else `ranking` is set.

        Raises:
            RouteError: if nobody is left, the request is refused, or a stage fails that must not.
        """
        self._ids = self.pipeline.ids(self.ctx.candidates)
        if not self._ids:
            raise self._nobody_left()
        time_ns, append = self.clock.time_ns, self.trace.records.append
        end_ns = time_ns()
        for step, stage, waits in self.pipeline.plan(select, _STEPS):
            start_ns = end_ns
            try:
                said = await step(self, stage) if waits else step(self, stage)
                end_ns = time_ns()
            except RouteError as error:
                self._span_of(stage).fail(error.code)
                self._write(start_ns)
                raise
            except Exception as error:  # noqa: BLE001 - the plugin border: whatever a stage raises is named after it
                try:
                    self._failed(stage, error)
                finally:
                    end_ns = self._write(start_ns)
                continue
            if said is None:
                self._write(start_ns)
                if self.given is not None:
                    return self.given
            else:
                append(_step((*said, start_ns, end_ns)))
        return None

    # What goes another way than usual is recorded as a span, which can say anything

    def _span_of(self, stage: BoundStage) -> Span:
        """The span of the stage under way."""
        if self._span is None:
            self._span = stage.span()
        return self._span

    def _write(self, start_ns: int) -> int:
        """Write the span of a stage that began then; the time now."""
        span, self._span = self._span, None
        assert span is not None  # noqa: S101 - whoever calls has asked for it
        span.start_ns, span.end_ns = start_ns, self.clock.time_ns()
        self.trace.add(span)
        return span.end_ns

    def _failed(self, stage: BoundStage, error: Exception) -> None:
        """Record a stage's failure; go on only where the pipeline says so.

        The message of a foreign exception may hold content, so only its type reaches the trace.
        """
        what = str(error) if isinstance(error, ContractError) else type(error).__name__
        span = self._span_of(stage)
        span.fail(what)
        span.attributes[names.ERROR_TYPE] = type(error).__name__
        if stage.skips:
            span.attributes[names.STAGE_SKIPPED] = True
            return
        brought_by = f" (from {stage.distribution})" if stage.distribution else ""
        raise StageError(f"stage {stage.key}{brought_by} failed: {what}", details={"stage": stage.key}) from error

    # The stages, by kind: each gives what goes into the record of the usual case, or None if it made the span

    async def classify(self, stage: BoundStage) -> Said:
        """Add the facts found."""
        found: Mapping[Fact[Any], Any] = await stage.run(self.ctx)
        self.ctx.facts.update(found)  # type: ignore[attr-defined]
        shown: dict[str, AttributeValue] = {}
        for fact, value in found.items():
            shown[fact.attribute] = fact.describe(value)
            for detail, what in fact.details(value).items():
                shown[f"{fact.attribute}.{detail}"] = what
        return stage.shape(tuple(shown)), tuple(shown.values()), ()

    async def admit(self, stage: BoundStage) -> Said | None:
        """Keep the lease, or refuse the request."""
        got = await stage.run(self.ctx)
        if not isinstance(got, Refusal):
            self.leases.append(got)
            told = getattr(got, "attributes", None)
            if not told:
                return stage.shape(_ADMITTED), (True,), ()
            self._span_of(stage).attributes.update({names.ADMITTED: True, **told})
            if getattr(got, "waited_s", 0.0):  # what follows is decided by the fleet as it is now
                self.ctx = attrs.evolve(self.ctx, now_s=self.clock.now_s())
            return None
        attributes = self._span_of(stage).attributes
        attributes[names.ADMITTED] = False
        attributes[names.REFUSAL] = got.reason
        if got.retry_after_s is not None:
            attributes[names.RETRY_AFTER_S] = got.retry_after_s
        refused = QuotaError if got.code == QuotaError.code else AdmissionError
        raise refused(
            got.reason,
            status=got.status,
            code=got.code or None,
            retry_after_s=got.retry_after_s,
            details={"stage": stage.key},
        )

    async def answer(self, stage: BoundStage) -> None:
        """Take the short-circuit answer, if there is one."""
        self.given = answer = await stage.run(self.ctx)
        attributes = self._span_of(stage).attributes
        attributes[names.ANSWERED] = answer is not None
        if answer is not None:
            attributes.update(answer.details)

    def filter(self, stage: BoundStage) -> Said | None:
        """Drop whom the filter drops."""
        drops = stage.run(self.ctx)
        if drops and not isinstance(drops, list | tuple):
            drops = list(drops)
        before = len(self._ids)
        if drops.__class__ is Filtered:
            self._span_of(stage).attributes.update(drops.attributes)
        if not drops:
            if self._span is None:
                return stage.usual, (before, before), ()
            self._span.attributes |= {names.CANDIDATES_IN: before, names.CANDIDATES_OUT: before}
            return None
        gone = {drop.candidate.id for drop in drops}
        keep = [i for i, one in enumerate(self._ids) if one not in gone]
        attributes = self._span_of(stage).attributes
        attributes[names.CANDIDATES_IN] = before
        if len(keep) + len(gone) != before:
            strangers = sorted(gone.difference(self._ids))
            raise ContractError(f"{stage.key} dropped {strangers[0]!r}, which is not a candidate")
        attributes[names.CANDIDATES_OUT] = len(keep)
        attributes[names.DROPPED] = tuple([drop.candidate.id for drop in drops])
        attributes[names.DROPPED_REASONS] = tuple([drop.reason for drop in drops])
        attributes[names.DROPPED_RULES] = tuple([drop.rule for drop in drops])
        wait_s = _soonest_s(drops)
        if wait_s is not None:
            attributes[names.RETRY_AFTER_S] = wait_s
        self.excluded.extend([(stage, drop) for drop in drops])
        self._keep(keep)
        if not keep:
            raise self._nobody_left()
        return None

    def _keep(self, keep: Sequence[int]) -> None:
        """Go on with some of the candidates, and with their part of every column."""
        ctx = self.ctx
        columns = {name: _part_of(column, keep) for name, column in ctx.columns.items()}
        self.ctx = attrs.evolve(ctx, candidates=tuple([ctx.candidates[i] for i in keep]), columns=columns)
        self._ids = tuple([self._ids[i] for i in keep])

    def affinity(self, stage: BoundStage) -> Said:
        """Keep the greatest expectation of each candidate."""
        found: Affinity = stage.run(self.ctx)
        tokens, ids = found.tokens, self._ids
        if len(tokens) != len(ids) or len(found.modes) != len(ids):
            raise ContractError(f"{stage.key} gave {len(tokens)} expectations for {len(ids)} candidates")
        if tokens and min(tokens) < 0:
            raise ContractError(f"{stage.key} expects a negative number of tokens")
        known: dict[str, float] = self.ctx.affinity  # type: ignore[assignment]
        if any(tokens):
            for one, count in zip(ids, tokens, strict=True):
                if count > known.get(one, 0.0):
                    known[one] = count
        if found.returns:
            self.ctx.returns.update(found.returns)  # type: ignore[attr-defined]  # a fresh mapping, which grows in place
        modes = tuple(map(_value_of, found.modes))
        if not found.reasons:
            return stage.usual, (tuple(map(float, tokens)), modes), ids
        if len(found.reasons) != len(ids):
            raise ContractError(f"{stage.key} gave {len(found.reasons)} reasons for {len(ids)} candidates")
        return stage.shape(_WITH_REASONS, names.SCORED), (tuple(map(float, tokens)), modes, tuple(found.reasons)), ids

    def score(self, stage: BoundStage) -> Said | None:
        """Add a column, if it is sound."""
        ctx = self.ctx
        column: Column = stage.run(ctx)
        checked = stage.checked
        if column is not checked.column or self._ids is not checked.ids:
            checked.said = self._check(stage, column)
            checked.column, checked.ids = column, self._ids
        ctx.columns[stage.name] = column  # type: ignore[index]
        return checked.said

    def _check(self, stage: BoundStage, column: Column) -> Said:
        """What the record says of a column that is sound."""
        ids, values, unit = self._ids, column.values, column.unit
        if len(values) != len(ids):
            raise ContractError(f"{stage.key} gave {len(values)} values for {len(ids)} candidates")
        if None in values:
            ids = tuple([one for one, value in zip(ids, values, strict=True) if value is not None])
            values = [value for value in values if value is not None]
        floats = tuple(map(float, values))  # type: ignore[arg-type]
        _check_values(stage, unit, floats)
        return stage.usual, (stage.name, unit._value_, floats), ids

    def choose(self, stage: BoundStage) -> Said:
        """Rank the candidates."""
        ctx = self.ctx
        ranking = Ranking.of(ctx.candidates, stage.run(ctx.candidates, scoring_context(ctx)))
        _check_ranking(stage, ranking, ctx.candidates)
        self.ranking = ranking
        terms, details = ranking.terms, ranking.details
        values = (
            tuple(map(float, ranking.totals)),
            ranking.unit._value_,
            ranking.mode,
            *map(tuple, map(_floats, terms.values())),
            *details.values(),
        )
        return stage.shape_of_ranking(terms, details), values, tuple(map(_id_of, ranking.models))

    def _nobody_left(self) -> NoCandidatesError:
        by_policy = bool(self.excluded) and all(stage.is_policy for stage, _ in self.excluded)
        details = {"excluded": exclusions(self.excluded)}
        who = "; ".join(f"{name}: {e['reason']} [{e['by']}]" for name, e in details["excluded"].items())
        request = self.ctx.request
        nobody = f"no enabled model serves this request: {request.operation} for {request.model}"
        message = f"no model may or can serve this request: {who}" if who else nobody
        if by_policy:
            return NoCandidatesError(message, status=403, code="policy_excluded_all", details=details)
        if not self.excluded:  # an embedding model asked to chat, say
            return NoCandidatesError(message, status=404, code=ModelNotFoundError.code, details=details)
        if all(stage.is_policy or getattr(stage.component, "judges_request", False) for stage, _ in self.excluded):
            status, code = _lasting([drop for stage, drop in self.excluded if not stage.is_policy])
            return NoCandidatesError(message, status=status, code=code, details=details)
        wait_s = _soonest_s([drop for _, drop in self.excluded])
        if any(getattr(stage.component, "limits_rates", False) for stage, _ in self.excluded):
            code = AdmissionError.code
            return NoCandidatesError(message, status=429, code=code, retry_after_s=wait_s, details=details)
        return NoCandidatesError(message, retry_after_s=wait_s, details=details)


def _lasting(drops: Sequence[Drop]) -> tuple[int, str]:
    """Status and code where nobody can do what a request asks, and waiting does not help; clients know one by name."""
    if all(drop.rule == "context_window" for drop in drops):
        return 400, "context_length_exceeded"
    return 400, "no_capable_model"


# `.value` of an enum is a Python-level descriptor (0.4 µs); `_value_` is the same text.
_STEPS: Mapping[Kind, tuple[Callable[[Decision, BoundStage], Any], bool]] = {
    Kind.SCORE: (Decision.score, False),
    Kind.FILTER: (Decision.filter, False),
    Kind.AFFINITY: (Decision.affinity, False),
    Kind.SELECT: (Decision.choose, False),
    Kind.CLASSIFY: (Decision.classify, True),
    Kind.ADMIT: (Decision.admit, True),
    Kind.ANSWER: (Decision.answer, True),
}
"""What is done for a stage, by its kind, and whether that is to be awaited."""


def scoring_context(ctx: RoutingContext) -> ScoringContext:
    """What a strategy may know, from the context."""
    return ScoringContext(
        data_class=ctx.data_class,
        tenant_id=ctx.tenant,
        region=ctx.region,
        tags=ctx.request.tags,
        metadata={fact.name: value for fact, value in ctx.facts.items()},
        columns=ctx.columns,
        affinity=ctx.affinity,
        prompt_tokens=getattr(ctx.facts.get(PROMPT), "token_estimate", 0.0),
        session=ctx.request.session,
        now_s=ctx.now_s,
        seed=ctx.seed,
        dry_run=ctx.dry_run,
    )


def _part_of(column: Column, keep: Sequence[int]) -> Column:
    """A column of those candidates that stay."""
    terms = {name: [values[i] for i in keep] for name, values in column.terms.items()}
    return Column(column.unit, [column.values[i] for i in keep], terms)


def exclusions(excluded: Sequence[tuple[BoundStage, Drop]]) -> dict[str, dict[str, str]]:
    """Who was excluded by what, by model; told apart by number where a model's replicas fell to different causes."""
    found: dict[str, dict[str, str]] = {}
    for stage, drop in excluded:
        entry = {"by": stage.key, "rule": drop.rule, "reason": drop.reason}
        name, number = drop.candidate.name, 1
        while found.get(name, entry) != entry:
            number += 1
            name = f"{drop.candidate.name}#{number}"
        found[name] = entry
    return found


def _soonest_s(drops: Sequence[Drop]) -> float | None:
    """Seconds until the first of the dropped may be a candidate again; None if nobody knows."""
    waits = [drop.retry_after_s for drop in drops if drop.retry_after_s is not None]
    return min(waits) if waits else None


def _check_values(stage: BoundStage, unit: Unit, values: Sequence[float]) -> None:
    """Refuse what is not finite or out of its unit's range; nothing is clamped in silence."""
    if not values:
        return
    total = sum(values)
    if total - total != 0:  # NaN or infinite, found without a Python loop
        raise ContractError(f"{stage.key} gave a value that is not finite")
    if min(values) < 0:
        raise ContractError(f"{stage.key} gave {min(values):g} {unit}, below 0")
    if unit is Unit.UTILITY and max(values) > 1:
        raise ContractError(f"{stage.key} gave a utility of {max(values):g}, above 1")


def _check_ranking(stage: BoundStage, ranking: Ranking, candidates: Sequence[ModelConfig]) -> None:
    ranked = set(map(id, ranking.models))
    if not ranked:
        raise ContractError(f"{stage.key} ranked nobody")
    if len(ranked) != len(ranking.models):
        raise ContractError(f"{stage.key} ranked a candidate twice")
    if not ranked.issubset(map(id, candidates)):
        raise ContractError(f"{stage.key} ranked somebody who is not a candidate")
