"""What `check_component` tries, by kind: each check gives the breaches it found, one sentence each."""

from __future__ import annotations

import copy
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.adapters.call import Reply
from kvfleet.config.schema import ModelConfig, PolicyRule
from kvfleet.errors import BackendError, Fault, RouteError
from kvfleet.pipeline.engine import scoring_context
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import (
    Affinity,
    Answer,
    CacheMode,
    Drop,
    Fact,
    Kind,
    Lease,
    Outcome,
    Refusal,
    Rewrite,
    RoutingContext,
)
from kvfleet.plugin.judging import Grade, Submission
from kvfleet.policy.engine import PolicyContext
from kvfleet.router.scoring import Column, Ranking, ScoringContext, Unit
from kvfleet.testing.adapters import check_adapter
from kvfleet.testing.samples import sample_models, sample_outcome
from kvfleet.testing.submissions import NOT_ASKED, submissions
from kvfleet.testing.trial import FAILED, Breaches, Trial

__all__ = ["CHECKS"]


async def check_filter(trial: Trial) -> list[str]:
    """Only drops of candidates, each once and with a reason; the same each time."""
    out = Breaches()
    for ctx in await trial.contexts():
        stage = trial.fresh()
        first, second = (out.trying("filter()", ctx, _listed, stage.filter, ctx) for _ in range(2))
        if first is FAILED or second is FAILED:
            continue
        wrong = list(_wrong_drops(first, ctx))
        out.add(*wrong)
        if not wrong and [(d.candidate.id, d.reason, d.rule) for d in first] != [
            (d.candidate.id, d.reason, d.rule) for d in second
        ]:
            out.add("filter() is not pure: the same context gives other drops the second time")
    return out.all()


def _listed(work: Callable[..., Iterable[Any]], *args: Any) -> list[Any]:
    return list(work(*args))


def _wrong_drops(drops: Sequence[Any], ctx: RoutingContext) -> Iterable[str]:
    ids = {model.id for model in ctx.candidates}
    seen: set[str] = set()
    for drop in drops:
        if not isinstance(drop, Drop):
            yield f"filter() must give Drop objects, not {type(drop).__name__}"
            continue
        if drop.candidate.id not in ids:
            yield "filter() drops somebody who is not a candidate"
        if drop.candidate.id in seen:
            yield "filter() drops a candidate twice"
        seen.add(drop.candidate.id)
        if not str(drop.reason or "").strip():
            yield "filter() drops without a reason"


async def check_score(trial: Trial) -> list[str]:
    """One aligned column in its unit's range; the same each time."""
    out = Breaches()
    for ctx in await trial.contexts():
        stage = trial.fresh()
        first, second = (out.trying("score()", ctx, stage.score, ctx) for _ in range(2))
        if first is FAILED or second is FAILED:
            continue
        wrong = list(_wrong_column(first, len(ctx.candidates)))
        out.add(*wrong)
        if not wrong and list(first.values) != list(second.values):
            out.add("score() is not pure: the same context gives another column the second time")
    return out.all()


def _wrong_column(column: Any, count: int) -> Iterable[str]:
    if not isinstance(column, Column):
        yield f"score() must give a Column, not {type(column).__name__}"
        return
    unit: Any = column.unit
    if not isinstance(unit, Unit):
        yield f"score() gives a column without a unit: {unit!r} is not a Unit"
        return
    if len(column.values) != count:
        yield "score() must give one value for each candidate, None for unknown"
    known: list[Any] = [value for value in column.values if value is not None]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in known):
        yield "score() gives a value that is not a finite number; use None for unknown"
    elif any(value < 0 for value in known):
        yield f"score() gives a negative value in {column.unit.value}"
    elif column.unit is Unit.UTILITY and any(value > 1 for value in known):
        yield "score() gives a utility above 1"


async def check_affinity(trial: Trial) -> list[str]:
    """One non-negative expectation and one mode for each candidate; the same each time."""
    out = Breaches()
    for ctx in await trial.contexts():
        stage = trial.fresh()
        first, second = (out.trying("affinity()", ctx, stage.affinity, ctx) for _ in range(2))
        if first is FAILED or second is FAILED:
            continue
        wrong = list(_wrong_affinity(first, len(ctx.candidates)))
        out.add(*wrong)
        if not wrong and (list(first.tokens), list(first.modes)) != (list(second.tokens), list(second.modes)):
            out.add("affinity() is not pure: the same context gives other expectations the second time")
    return out.all()


def _wrong_affinity(found: Any, count: int) -> Iterable[str]:
    if not isinstance(found, Affinity):
        yield f"affinity() must give an Affinity, not {type(found).__name__}"
        return
    if len(found.tokens) != count or len(found.modes) != count:
        yield "affinity() must give one expectation and one mode for each candidate"
    tokens: list[Any] = list(found.tokens)
    if not all(isinstance(t, int | float) and math.isfinite(t) and t >= 0 for t in tokens):
        yield "affinity() must expect a finite number of tokens, at least 0"
    if not all(isinstance(mode, CacheMode) for mode in found.modes):
        yield "affinity() must say how each expectation is known, with a CacheMode"
    if found.reasons and (len(found.reasons) != count or not all(isinstance(why, str) for why in found.reasons)):
        yield "affinity() must give one reason for each candidate, a text that may be empty, or none at all"


async def check_select(trial: Trial) -> list[str]:
    """A ranking of its input, repeatable by its seed; a dry run moves nothing."""
    out = Breaches()
    out.add(*_without_context(trial))
    for ctx in await trial.contexts():
        for size in sorted({0, 1, len(ctx.candidates)}):
            models, context = list(ctx.candidates[:size]), scoring_context(ctx)
            part = attrs.evolve(context, columns={n: Column(c.unit, c.values[:size]) for n, c in ctx.columns.items()})
            out.add(*_check_ranking(trial, out, ctx, models, part))
    return out.all()


def _without_context(trial: Trial) -> Iterable[str]:
    try:
        trial.fresh().select(list(sample_models()))
    except Exception as error:  # noqa: BLE001 - whatever a component raises is the breach
        yield f"select(models) must work without a context, with `context=None`: {type(error).__name__}: {error}"


def _check_ranking(
    trial: Trial, out: Breaches, ctx: RoutingContext, models: list[ModelConfig], context: ScoringContext
) -> Iterable[str]:
    dry = attrs.evolve(context, dry_run=True)

    def choose(stage: Any, how: ScoringContext) -> list[str] | None:
        given = list(models)
        ranked = out.trying("select()", ctx, lambda: Ranking.of(models, stage.select(given, how)))
        if given != models:
            out.add("select() changes the list of candidates it is given")
        if ranked is FAILED:
            return None
        out.add(*_wrong_ranking(ranked, models))
        return [model.id for model in ranked.models]

    one, other, careful = trial.fresh(), trial.fresh(), trial.fresh()
    live, again = choose(one, context), choose(other, context)
    rehearsed, repeated, after = choose(careful, dry), choose(careful, dry), choose(careful, context)
    if live is None or again is None:
        return
    if live != again:
        yield "select() is not repeatable: the same candidates and seed give another ranking; use context.random()"
    elif rehearsed != repeated or after != live:
        yield "select() moves its state in a dry run; leave it alone if context.dry_run"


def _wrong_ranking(ranking: Ranking, models: Sequence[ModelConfig]) -> Iterable[str]:
    ids = [model.id for model in ranking.models]
    if models and not ids:
        yield "select() ranks nobody; a ranking has at least one candidate"
    if len(set(ids)) != len(ids):
        yield "select() ranks a candidate twice"
    if not set(ids) <= {model.id for model in models}:
        yield "select() ranks somebody who is not a candidate"
    if not all(math.isfinite(total) for total in ranking.totals):
        yield "select() gives a total that is not a finite number"


async def check_classify(trial: Trial) -> list[str]:
    """The declared facts, all of them, each with a description that a trace may show."""
    out = Breaches()
    for ctx in await trial.contexts():
        stage = trial.fresh()
        found = await out.awaiting("classify()", ctx, stage.classify, ctx)
        if found is FAILED:
            continue
        if not isinstance(found, Mapping) or not all(isinstance(fact, Fact) for fact in found):
            out.add("classify() must give a mapping from facts to values")
            continue
        out.add(*_undeclared(trial.component, found))
        for fact, value in found.items():
            out.add(*_wrong_description(fact, value, ctx))
    return out.all()


def _undeclared(component: Component | None, found: Mapping[Fact[Any], Any]) -> Iterable[str]:
    if component is None:
        return
    if not component.gives:
        yield "a classifier declares the facts it gives: Component(…, gives=(FACT,))"
        return
    for fact in component.gives:
        if fact not in found:
            yield f"classify() declares the fact {fact.name!r} and does not always give it"
    for fact in found:
        if fact not in component.gives:
            yield f"classify() gives the fact {fact.name!r} without declaring it in `gives`"


def _wrong_description(fact: Fact[Any], value: Any, ctx: RoutingContext) -> Iterable[str]:
    try:
        shown = fact.describe(value)
    except Exception as error:  # noqa: BLE001 - whatever a component raises is the breach
        yield f"the fact {fact.name!r} cannot be described: {type(error).__name__}: {error}"
        return
    parts = shown if isinstance(shown, Sequence) and not isinstance(shown, str) else (shown,)
    if not all(isinstance(part, str | bool | int | float) for part in parts):
        yield f"the fact {fact.name!r} must be described by text, numbers, booleans or lists of one of these"
    elif any(text in str(part) for text in _prompt_texts(ctx) for part in parts):
        yield f"the description of the fact {fact.name!r} shows the prompt; it goes into traces"


def _prompt_texts(ctx: RoutingContext) -> list[str]:
    body = ctx.request.body
    contents = [message["content"] for message in body.get("messages", ())] + [body.get("prompt")]
    return [content for content in contents if isinstance(content, str)]


async def check_admit(trial: Trial) -> list[str]:
    """A lease that can be released, or a refusal with a reason; a dry run reserves nothing."""
    out = Breaches()
    for ctx in await trial.contexts():
        stage = trial.fresh()
        before = _state(stage)
        await out.awaiting("admit()", ctx, stage.admit, attrs.evolve(ctx, dry_run=True))
        if _state(stage) != before:
            out.add("admit() reserves something in a dry run")
        got = await out.awaiting("admit()", ctx, stage.admit, ctx)
        if isinstance(got, Refusal):
            out.add(*(["admit() refuses without a reason"] if not got.reason.strip() else []))
        elif isinstance(got, Lease):
            out.trying("the lease's release()", ctx, got.release, sample_outcome(ctx))
        elif got is not FAILED:
            out.add(f"admit() must give a Lease or a Refusal, not {type(got).__name__}")
    return out.all()


def _state(stage: Any) -> Any:
    return copy.deepcopy(dict(stage.state())) if callable(getattr(stage, "state", None)) else None


async def check_answer(trial: Trial) -> list[str]:
    """An answer with a body or events, or None."""
    out = Breaches()
    for ctx in await trial.contexts():
        stage = trial.fresh()
        got = await out.awaiting("answer()", ctx, stage.answer, ctx)
        if got is None or got is FAILED:
            continue
        if not isinstance(got, Answer):
            out.add(f"answer() must give an Answer or None, not {type(got).__name__}")
        elif not got.reply.body and got.reply.events is None:
            out.add("answer() gives an answer with neither a body nor events")
    return out.all()


@attrs.define
class _Attempts:
    """Attempts that fail so many times, and then work."""

    allowed: Sequence[ModelConfig]
    fault: Fault
    failures: int
    made: list[ModelConfig] = attrs.field(init=False, factory=list)

    async def __call__(
        self,
        candidate: ModelConfig,
        *,
        timeout_s: float | None = None,
        reason: str = "first",
        rewrite: Rewrite | None = None,
    ) -> Answer:
        self.made.append(candidate)
        if len(self.made) <= self.failures:
            raise BackendError(self.fault, f"tried on purpose, {reason}, {timeout_s} s")
        reply = Reply(body=b'{"choices":[]}')
        return Answer(reply if rewrite is None else rewrite.restore(reply), candidate)


async def check_execute(trial: Trial) -> list[str]:
    """The answer of an attempt with a ranked candidate, or a RouteError; it ends."""
    out = Breaches()
    for ctx in await trial.contexts():
        for fault in (Fault.CONNECT, Fault.RATE_LIMITED, Fault.TIMEOUT, Fault.BAD_REQUEST):
            for failures in (0, 1, 1000):
                attempt = _Attempts(ctx.candidates, fault, failures)
                out.add(*await _execute(trial.fresh(), ctx, attempt))
    return out.all()


async def _execute(stage: Any, ctx: RoutingContext, attempt: _Attempts) -> list[str]:
    ranking = Ranking(ctx.candidates, [1.0 - i / 10 for i in range(len(ctx.candidates))])
    try:
        answer = await stage.execute(ctx, ranking, attempt)
    except RouteError:
        return [] if attempt.failures else ["execute() raises a RouteError although the first attempt worked"]
    except Exception as error:  # noqa: BLE001 - whatever a component raises is the breach
        return [f"execute() must end in an answer or a RouteError, not in {type(error).__name__}: {error}"]
    wrong = [] if isinstance(answer, Answer) else [f"execute() must give an Answer, not {type(answer).__name__}"]
    if not {model.id for model in attempt.made} <= {model.id for model in ctx.candidates}:
        wrong.append("execute() tries somebody who is not in the ranking")
    return wrong


async def check_observe(trial: Trial) -> list[str]:
    """Takes every kind of outcome, and gives nothing back."""
    out = Breaches()
    for ctx in await trial.contexts():
        stage = trial.fresh()
        for outcome in _outcomes(ctx):
            got = await out.awaiting("observe()", ctx, stage.observe, outcome)
            if got not in (None, FAILED):
                out.add("observe() must give nothing back")
    return out.all()


def _outcomes(ctx: RoutingContext) -> list[Outcome]:
    ranking = Ranking(ctx.candidates, [1.0] * len(ctx.candidates))
    return [
        sample_outcome(ctx, ranking=ranking),
        sample_outcome(ctx, served_by=None),
        sample_outcome(ctx, served_by=None, ranking=ranking, ttfb_s=None, error=RouteError("failed on purpose")),
    ]


async def check_action(trial: Trial) -> list[str]:
    """Excludes candidates, each with a reason; the same each time."""
    out = Breaches()
    for ctx in await trial.contexts():
        for targets in ((), (ctx.candidates[0].name,)):
            rule = PolicyRule(name="sample", condition="always", action="sample", target_models=targets)
            context = PolicyContext(data_class=ctx.data_class, tenant_id=ctx.tenant, tags=ctx.request.tags)
            action = trial.fresh()
            first, second = (
                out.trying("apply()", ctx, _listed, action.apply, ctx.candidates, rule, context) for _ in range(2)
            )
            if first is not FAILED:
                out.add(*_wrong_exclusions(first, ctx))
                out.add(*(["apply() is not pure: it excludes others the second time"] if first != second else []))
    return out.all()


def _wrong_exclusions(found: Sequence[Any], ctx: RoutingContext) -> Iterable[str]:
    for pair in found:
        if not isinstance(pair, tuple) or len(pair) != 2:
            yield "apply() must give pairs of a candidate and a reason"
        elif pair[0] not in ctx.candidates:
            yield "apply() excludes somebody who is not a candidate"
        elif not str(pair[1] or "").strip():
            yield "apply() excludes without a reason"


async def check_judge(trial: Trial) -> list[str]:
    """A grade with a reason that shows no content, also where it may not ask, or the answer is only a beginning."""
    out = Breaches()
    for ctx in await trial.contexts():
        for submission in submissions(ctx):
            stage = trial.fresh()
            try:
                grade = await stage.grade(submission)
            except BackendError as error:
                out.add(*([] if error.message == NOT_ASKED else [f"grade() fails: {error}"]))
            except Exception as error:  # noqa: BLE001 - whatever a component raises is the breach
                out.add(f"grade() fails: {type(error).__name__}: {error}")
            else:
                out.add(*_wrong_grade(grade, submission))
    return out.all()


def _wrong_grade(grade: Any, submission: Submission) -> Iterable[str]:
    if not isinstance(grade, Grade):
        yield f"grade() must give a Grade, not {type(grade).__name__}"
        return
    if grade.score is not None and not 0 <= grade.score <= 1:
        yield "grade() gives a score that is not between 0 and 1; use None if it cannot tell"
    if not grade.reason.strip():
        yield "grade() gives no reason"
    texts = [*_prompt_texts(submission.ctx), submission.response.content]
    if any(len(text) > 8 and text in grade.reason for text in texts):
        yield "the reason of grade() shows content; it goes into traces"


def _also_observing(check: Callable[[Trial], Awaitable[list[str]]]) -> Callable[[Trial], Awaitable[list[str]]]:
    """A check that also tries `observe`, if the component has one."""

    async def both(trial: Trial) -> list[str]:
        missing = await trial.missing()
        if missing:
            return missing
        breaches = await check(trial)
        if callable(getattr(trial.fresh(), "observe", None)):
            breaches += await check_observe(trial)
        return breaches

    return both


CHECKS: Mapping[Kind, Callable[[Trial], Awaitable[list[str]]]] = {
    **{
        kind: _also_observing(check)
        for kind, check in {
            Kind.CLASSIFY: check_classify,
            Kind.ADMIT: check_admit,
            Kind.FILTER: check_filter,
            Kind.ANSWER: check_answer,
            Kind.AFFINITY: check_affinity,
            Kind.SCORE: check_score,
            Kind.SELECT: check_select,
            Kind.EXECUTE: check_execute,
        }.items()
    },
    Kind.OBSERVE: check_observe,
    Kind.ACTION: check_action,
    Kind.JUDGE: check_judge,
    Kind.ADAPTER: check_adapter,
}
