"""Runs the stages up to the choice. The only writer of stage spans.

The same code decides a live request and a simulated one. Mappings of a context (`facts`, `affinity`, `columns`) grow as
the stages run and are written here alone; a new context is made when the candidates change, which saves a microsecond
for every stage (`benchmarks/decision.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import attrs

from kvfleet.builtin.facts import PROMPT
from kvfleet.clock import Clock
from kvfleet.errors import AdmissionError, ContractError, NoCandidatesError, QuotaError, RouteError, StageError
from kvfleet.pipeline.stage import BoundStage, Pipeline
from kvfleet.plugin.contract import Affinity, Answer, Drop, Kind, Lease, Refusal, RoutingContext
from kvfleet.router.scoring import Column, Ranking, ScoringContext, Unit
from kvfleet.trace import names
from kvfleet.trace.spans import Span, Trace

__all__ = ["Decision"]


@attrs.define
class Decision:
    """One request on its way through the stages.

    Attributes:
        pipeline: What to run.
        ctx: The context so far.
        trace: Where the spans go.
        clock: For the spans' times.
        leases: What admissions reserved; the route releases them.
        excluded: Who was dropped, by which stage, and how.
        ranking: The choice, once made.
    """

    pipeline: Pipeline
    ctx: RoutingContext
    trace: Trace
    clock: Clock
    leases: list[Lease] = attrs.field(factory=list)
    excluded: list[tuple[BoundStage, Drop]] = attrs.field(factory=list)
    ranking: Ranking | None = None
    _ids: tuple[str, ...] = attrs.field(init=False, default=())

    async def run(self, select: BoundStage) -> Answer | None:
        """Run the stages and the choice; an answer if a stage had one, else `ranking` is set.

        Raises:
            RouteError: if nobody is left, the request is refused, or a stage fails that must not.
        """
        self._ids = tuple([c.id for c in self.ctx.candidates])
        if not self._ids:
            raise self._nobody_left()
        time_ns, spans = self.clock.time_ns, self.trace.spans
        for stage in self.pipeline.stages:
            span = Span(stage.span_name, time_ns(), 0, dict(stage.attributes))
            spans.append(span)
            try:
                step = _PURE.get(stage.kind)
                if step is not None:
                    step(self, stage, span)
                elif (answer := await _WAITING[stage.kind](self, stage, span)) is not None:
                    return answer
            except RouteError as error:
                span.fail(error.code)
                raise
            except Exception as error:  # noqa: BLE001 - the plugin border: whatever a stage raises is named after it
                self._failed(stage, span, error)
            finally:
                span.end_ns = time_ns()
        self._select(select)
        return None

    def _failed(self, stage: BoundStage, span: Span, error: Exception) -> None:
        """Record a stage's failure; go on only where the pipeline says so.

        The message of a foreign exception may hold content, so only its type reaches the trace.
        """
        what = str(error) if isinstance(error, ContractError) else type(error).__name__
        span.fail(what)
        span.attributes[names.ERROR_TYPE] = type(error).__name__
        if stage.skips:
            span.attributes[names.STAGE_SKIPPED] = True
            return
        brought_by = f" (from {stage.distribution})" if stage.distribution else ""
        raise StageError(f"stage {stage.key}{brought_by} failed: {what}", details={"stage": stage.key}) from error

    async def classify(self, stage: BoundStage, span: Span) -> None:
        """Add the facts found."""
        found = await stage.run(self.ctx)
        facts: dict[Any, Any] = self.ctx.facts  # type: ignore[assignment]
        for fact, value in found.items():
            facts[fact] = value
            shown = names.FACT_PREFIX + fact.name
            span.attributes[shown] = fact.describe(value)
            for detail, what in fact.details(value).items():
                span.attributes[f"{shown}.{detail}"] = what

    async def admit(self, stage: BoundStage, span: Span) -> None:
        """Keep the lease, or refuse the request."""
        got = await stage.run(self.ctx)
        span.attributes[names.ADMITTED] = granted = not isinstance(got, Refusal)
        if granted:
            self.leases.append(got)
            span.attributes.update(getattr(got, "attributes", ()))
            return
        span.attributes[names.REFUSAL] = got.reason
        if got.retry_after_s is not None:
            span.attributes[names.RETRY_AFTER_S] = got.retry_after_s
        refused = QuotaError if got.code == QuotaError.code else AdmissionError
        raise refused(got.reason, code=got.code or None, retry_after_s=got.retry_after_s, details={"stage": stage.key})

    async def answer(self, stage: BoundStage, span: Span) -> Answer | None:
        """The short-circuit answer, if there is one."""
        answer: Answer | None = await stage.run(self.ctx)
        span.attributes[names.ANSWERED] = answer is not None
        if answer is not None:
            span.attributes.update(answer.details)
        return answer

    def filter(self, stage: BoundStage, span: Span) -> None:
        """Drop whom the filter drops."""
        ctx, attributes = self.ctx, span.attributes
        drops = list(stage.run(ctx))
        before = len(ctx.candidates)
        attributes[names.CANDIDATES_IN] = before
        if not drops:
            attributes[names.CANDIDATES_OUT] = before
            return
        gone = {drop.candidate.id for drop in drops}
        keep = [i for i, one in enumerate(self._ids) if one not in gone]
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

    def _keep(self, keep: Sequence[int]) -> None:
        """Go on with some of the candidates, and with their part of every column."""
        ctx = self.ctx
        columns = {name: _part_of(column, keep) for name, column in ctx.columns.items()}
        self.ctx = attrs.evolve(ctx, candidates=tuple([ctx.candidates[i] for i in keep]), columns=columns)
        self._ids = tuple([self._ids[i] for i in keep])

    def affinity(self, stage: BoundStage, span: Span) -> None:
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
        span.attributes[names.SCORED] = ids
        span.attributes[names.SCORE_VALUES] = tuple(map(float, tokens))
        span.attributes[names.SCORE_MODES] = tuple([mode._value_ for mode in found.modes])

    def score(self, stage: BoundStage, span: Span) -> None:
        """Add a column, if it is sound."""
        column: Column = stage.run(self.ctx)
        ids, values = self._ids, column.values
        if len(values) != len(ids):
            raise ContractError(f"{stage.key} gave {len(values)} values for {len(ids)} candidates")
        if None in values:
            ids = tuple([one for one, value in zip(ids, values, strict=True) if value is not None])
            values = [value for value in values if value is not None]
        floats = tuple(map(float, values))  # type: ignore[arg-type]
        _check_values(stage, column.unit, floats)
        self.ctx.columns[stage.name] = column  # type: ignore[index]
        attributes = span.attributes
        attributes[names.SCORE_COLUMN] = stage.name
        attributes[names.SCORE_UNIT] = column.unit._value_
        attributes[names.SCORED] = ids
        attributes[names.SCORE_VALUES] = floats
        for name, parts in column.terms.items():
            attributes[names.TERM_PREFIX + name] = tuple(map(float, parts))

    def _select(self, stage: BoundStage) -> None:
        span = Span(stage.span_name, self.clock.time_ns(), 0, dict(stage.attributes))
        self.trace.spans.append(span)
        try:
            ranking = Ranking.of(self.ctx.candidates, stage.run(self.ctx.candidates, scoring_context(self.ctx)))
            self._check_ranking(stage, ranking)
            self.ranking = ranking
            _describe_ranking(span, ranking)
        except Exception as error:  # noqa: BLE001 - the plugin border
            self._failed(stage, span, error)
        finally:
            span.end_ns = self.clock.time_ns()

    def _check_ranking(self, stage: BoundStage, ranking: Ranking) -> None:
        ranked = {id(model) for model in ranking.models}
        if not ranked:
            raise ContractError(f"{stage.key} ranked nobody")
        if len(ranked) != len(ranking.models):
            raise ContractError(f"{stage.key} ranked a candidate twice")
        if not ranked.issubset({id(model) for model in self.ctx.candidates}):
            raise ContractError(f"{stage.key} ranked somebody who is not a candidate")

    def _nobody_left(self) -> NoCandidatesError:
        by_policy = bool(self.excluded) and all(stage.is_policy for stage, _ in self.excluded)
        details = {"excluded": exclusions(self.excluded)}
        who = "; ".join(f"{name}: {e['reason']} [{e['by']}]" for name, e in details["excluded"].items())
        message = f"no model may or can serve this request: {who}" if who else "no enabled model serves this request"
        if by_policy:
            return NoCandidatesError(message, status=403, code="policy_excluded_all", details=details)
        wait_s = _soonest_s([drop for _, drop in self.excluded])
        if any(getattr(stage.component, "limits_rates", False) for stage, _ in self.excluded):
            code = AdmissionError.code
            return NoCandidatesError(message, status=429, code=code, retry_after_s=wait_s, details=details)
        return NoCandidatesError(message, retry_after_s=wait_s, details=details)


# `.value` of an enum is a Python-level descriptor (0.4 µs); `_value_` is the same text.
_PURE: dict[Kind, Callable[[Decision, BoundStage, Span], None]] = {
    Kind.SCORE: Decision.score,
    Kind.FILTER: Decision.filter,
    Kind.AFFINITY: Decision.affinity,
}
_WAITING: dict[Kind, Callable[[Decision, BoundStage, Span], Awaitable[Answer | None]]] = {
    Kind.CLASSIFY: Decision.classify,
    Kind.ADMIT: Decision.admit,
    Kind.ANSWER: Decision.answer,
}


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


def _describe_ranking(span: Span, ranking: Ranking) -> None:
    attributes = span.attributes
    attributes[names.SCORED] = tuple([model.id for model in ranking.models])
    attributes[names.SCORE_VALUES] = tuple(map(float, ranking.totals))
    attributes[names.SCORE_UNIT] = ranking.unit._value_
    attributes[names.SELECT_MODE] = ranking.mode
    for name, values in ranking.terms.items():
        attributes[names.TERM_PREFIX + name] = tuple(map(float, values))
    for name, value in ranking.details.items():
        attributes[names.INSTEAD_PREFIX + name] = value
