"""The engine runs the stages, checks what they return, and writes the record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import pytest

from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import AdmissionError, BadRequestError, NoCandidatesError, StageError
from kvfleet.pipeline.engine import Decision
from kvfleet.pipeline.stage import BoundStage, Pipeline
from kvfleet.plugin.contract import Affinity, CacheMode, Drop, Fact, Kind, Refusal, RouteRequest, RoutingContext
from kvfleet.router.scoring import Column, ModelScore, Ranking, ScoringContext, Unit, rank
from kvfleet.trace import names
from kvfleet.trace.spans import Span, Status, Trace

A, B, C = (ModelConfig(name=name, endpoint=f"http://{name}") for name in ("a", "b", "c"))
COLOUR: Fact[str] = Fact("colour")


@attrs.define
class Given:
    """Any stage: returns what it was given, or raises it."""

    result: Any = None
    seen: list[RoutingContext] = attrs.field(factory=list)

    def _give(self, ctx: RoutingContext) -> Any:
        self.seen.append(ctx)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result(ctx) if callable(self.result) else self.result

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        return self._give(ctx)  # type: ignore[no-any-return]

    async def admit(self, ctx: RoutingContext) -> Any:
        return self._give(ctx)

    async def answer(self, ctx: RoutingContext) -> Any:
        return self._give(ctx)

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        return self._give(ctx)  # type: ignore[no-any-return]

    def affinity(self, ctx: RoutingContext) -> Affinity:
        return self._give(ctx)  # type: ignore[no-any-return]

    def score(self, ctx: RoutingContext) -> Column:
        return self._give(ctx)  # type: ignore[no-any-return]

    async def execute(self, *_: Any) -> Any:
        raise AssertionError("a decision executes nothing")


@attrs.define
class AsTheyCome:
    """Ranks the candidates in their order, or as it is told."""

    result: Any = None
    seen: list[ScoringContext | None] = attrs.field(factory=list)

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Sequence[ModelScore]:
        self.seen.append(context)
        if self.result is not None:
            return self.result(models)  # type: ignore[no-any-return]
        return rank(models, [1.0 - i / 10 for i in range(len(models))])


def decide(
    *stages: BoundStage, strategy: AsTheyCome | None = None, candidates: tuple[ModelConfig, ...] = (A, B, C)
) -> tuple[Decision, BoundStage]:
    """A decision over some stages, and its choice."""
    select = BoundStage.bind(Kind.SELECT, "as_they_come", strategy or AsTheyCome())
    execute = BoundStage.bind(Kind.EXECUTE, "fallback", Given())
    pipeline = Pipeline(stages=stages, select=select, strategies={}, execute=execute)
    ctx = RoutingContext(request=RouteRequest(body={}), candidates=candidates, facts={}, affinity={}, columns={})
    clock = FrozenClock()
    return Decision(pipeline, ctx, Trace("0" * 32, [Span("kvfleet.route", clock.time_ns())]), clock), select


def stage(kind: Kind, result: Any = None, name: str = "one", **more: Any) -> BoundStage:
    """A stage that returns or raises `result`."""
    return BoundStage.bind(kind, name, Given(result), **more)


async def test_without_stages_the_strategy_ranks_all_candidates() -> None:
    """The choice sees every candidate, and its ranking is the decision's."""
    decision, select = decide()
    assert await decision.run(select) is None
    assert decision.ranking is not None
    assert decision.ranking.models == (A, B, C)


async def test_a_filter_drops_with_reason_and_rule() -> None:
    """What a filter drops is gone for the next stage, and the span says who, why and by which rule."""
    later = Given(())
    decision, select = decide(
        stage(Kind.FILTER, [Drop(B, "too far", "near-only")]), BoundStage.bind(Kind.FILTER, "two", later)
    )
    await decision.run(select)
    assert later.seen[0].candidates == (A, C)
    span = decision.trace.stages[0]
    assert span.name == "kvfleet.filter.one"
    assert span.attributes == {
        names.STAGE_KIND: "filter",
        names.STAGE_NAME: "one",
        names.CANDIDATES_IN: 3,
        names.CANDIDATES_OUT: 2,
        names.DROPPED: ("b@http://b",),
        names.DROPPED_REASONS: ("too far",),
        names.DROPPED_RULES: ("near-only",),
    }


async def test_dropping_everybody_by_policy_is_forbidden() -> None:
    """403 if policy alone emptied the field, with who was excluded by what."""
    decision, select = decide(
        stage(Kind.FILTER, lambda ctx: [Drop(c, "private only", "pii") for c in ctx.candidates], is_policy=True)
    )
    with pytest.raises(NoCandidatesError) as raised:
        await decision.run(select)
    assert (raised.value.status, raised.value.code) == (403, "policy_excluded_all")
    assert raised.value.details["excluded"]["a"] == {"by": "filter.one", "rule": "pii", "reason": "private only"}


async def test_dropping_everybody_by_policy_and_health_is_unavailable() -> None:
    """503 if anything but policy had a part in it."""
    decision, select = decide(
        stage(Kind.FILTER, [Drop(A, "private only")], is_policy=True),
        stage(Kind.FILTER, [Drop(B, "down"), Drop(C, "down")], name="health"),
    )
    with pytest.raises(NoCandidatesError) as raised:
        await decision.run(select)
    assert raised.value.status == 503
    assert "b: down [filter.health]" in raised.value.message


class Judging(Given):
    """A filter by what a request asks for."""

    judges_request = True


@pytest.mark.parametrize(
    ("rules", "code"),
    [
        (("vision", "vision"), "no_capable_model"),
        (("vision", "context_window"), "no_capable_model"),
        (("context_window", "context_window"), "context_length_exceeded"),
    ],
)
async def test_what_nobody_can_do_is_the_callers_matter(rules: tuple[str, str], code: str) -> None:
    """400 if nobody can do it or may see it; a client that asks again would be told the same."""
    drops = [Drop(one, "cannot", rule) for one, rule in zip((B, C), rules, strict=True)]
    decision, select = decide(
        stage(Kind.FILTER, [Drop(A, "private only")], is_policy=True),
        BoundStage.bind(Kind.FILTER, "able", Judging(drops)),
    )
    with pytest.raises(NoCandidatesError) as raised:
        await decision.run(select)
    assert (raised.value.status, raised.value.code) == (400, code)


async def test_if_somebody_can_do_it_later_it_is_not_the_callers_matter() -> None:
    """503 if one that is able is down."""
    decision, select = decide(
        BoundStage.bind(Kind.FILTER, "able", Judging([Drop(A, "cannot"), Drop(B, "cannot")])),
        stage(Kind.FILTER, [Drop(C, "down", retry_after_s=3.0)], name="health"),
    )
    with pytest.raises(NoCandidatesError) as raised:
        await decision.run(select)
    assert (raised.value.status, raised.value.code, raised.value.retry_after_s) == (503, "no_candidates", 3.0)


class Limiting(Given):
    """A filter by rate limits."""

    limits_rates = True


async def test_if_rate_limits_had_a_part_in_it_the_caller_is_told_to_come_back() -> None:
    """429 with the shortest wait, whatever else excluded the others."""
    drops = [Drop(B, "full", retry_after_s=30.0), Drop(C, "full", retry_after_s=4.5)]
    decision, select = decide(
        stage(Kind.FILTER, [Drop(A, "private only")], is_policy=True),
        BoundStage.bind(Kind.FILTER, "full", Limiting(drops)),
    )
    with pytest.raises(NoCandidatesError) as raised:
        await decision.run(select)
    assert (raised.value.status, raised.value.code) == (429, "rate_limit_exceeded")
    assert raised.value.retry_after_s == 4.5


async def test_a_filter_cannot_drop_a_stranger() -> None:
    """A drop of somebody who is not a candidate is a breach of contract that names the stage and its distribution."""
    stranger = ModelConfig(name="z", endpoint="http://z")
    decision, select = decide(stage(Kind.FILTER, [Drop(stranger, "?")], distribution="kvfleet-odd"))
    with pytest.raises(StageError, match=r"filter.one \(from kvfleet-odd\) failed: .*'z@http://z', which is not"):
        await decision.run(select)


async def test_facts_reach_later_stages_and_the_trace_shows_their_description() -> None:
    """A classifier's facts are there for the stages after it; the trace shows what `describe` allows."""
    hidden: Fact[str] = Fact("hidden", describe=len)
    later = Given(())
    decision, select = decide(
        stage(Kind.CLASSIFY, {COLOUR: "red", hidden: "secret"}), BoundStage.bind(Kind.FILTER, "two", later)
    )
    await decision.run(select)
    assert later.seen[0].fact(COLOUR) == "red"
    attributes = decision.trace.stages[0].attributes
    assert attributes["kvfleet.fact.colour"] == "red"
    assert attributes["kvfleet.fact.hidden"] == 6


async def test_an_undeclared_fact_is_a_breach_of_contract() -> None:
    """Reading a fact nobody gives fails with its name and the remedy."""
    decision, select = decide(stage(Kind.FILTER, lambda ctx: ctx.fact(COLOUR)))
    with pytest.raises(StageError, match="no stage before this one gives the fact 'colour'; declare it in `needs`"):
        await decision.run(select)


async def test_columns_follow_the_candidates_through_a_later_filter() -> None:
    """A column made before a drop stays aligned after it."""
    strategy = AsTheyCome()
    decision, select = decide(
        stage(Kind.SCORE, Column(Unit.USD, [1.0, 2.0, 3.0]), name="cost"),
        stage(Kind.FILTER, [Drop(A, "gone")]),
        strategy=strategy,
    )
    await decision.run(select)
    assert strategy.seen[0] is not None
    assert strategy.seen[0].columns["cost"] == Column(Unit.USD, [2.0, 3.0])


async def test_unknown_values_are_left_out_of_the_span() -> None:
    """A None in a column stays None for the strategy, and is absent from the record."""
    decision, select = decide(stage(Kind.SCORE, Column(Unit.USD, [1.0, None, 3.0]), name="cost"))
    await decision.run(select)
    attributes = decision.trace.stages[0].attributes
    assert attributes[names.SCORED] == ("a@http://a", "c@http://c")
    assert attributes[names.SCORE_VALUES] == (1.0, 3.0)
    assert attributes[names.SCORE_UNIT] == "usd"


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (Column(Unit.USD, [1.0]), "gave 1 values for 3 candidates"),
        (Column(Unit.SECONDS, [1.0, float("nan"), 1.0]), "a value that is not finite"),
        (Column(Unit.SECONDS, [1.0, float("inf"), 1.0]), "a value that is not finite"),
        (Column(Unit.USD, [1.0, -1.0, 1.0]), "gave -1 usd, below 0"),
        (Column(Unit.UTILITY, [1.0, 1.5, 1.0]), "gave a utility of 1.5, above 1"),
    ],
)
async def test_a_wrong_column_is_named_and_left_out_but_not_clamped(column: Column, said: str) -> None:
    """A scorer may be skipped by default; its breach is in the record and its column nowhere."""
    strategy = AsTheyCome()
    decision, select = decide(stage(Kind.SCORE, column, name="cost"), strategy=strategy)
    await decision.run(select)
    span = decision.trace.stages[0]
    assert said in span.message
    assert span.status is Status.ERROR
    assert span.attributes[names.STAGE_SKIPPED] is True
    assert strategy.seen[0] is not None
    assert not strategy.seen[0].columns


async def test_a_failing_scorer_fails_the_route_where_the_pipeline_says_so() -> None:
    """`on_error: fail` tightens what may be skipped."""
    decision, select = decide(stage(Kind.SCORE, ValueError("a secret"), skips=False))
    with pytest.raises(StageError, match=r"stage score.one failed: ValueError$"):
        await decision.run(select)


async def test_a_failing_policy_filter_fails_closed_and_hides_the_message() -> None:
    """A filter that raises ends the route; only the type of a foreign exception is shown, it may hold content."""
    decision, select = decide(stage(Kind.FILTER, KeyError("my prompt"), is_policy=True))
    with pytest.raises(StageError) as raised:
        await decision.run(select)
    assert "my prompt" not in str(raised.value)
    assert decision.trace.stages[0].attributes[names.ERROR_TYPE] == "KeyError"
    assert decision.ranking is None


async def test_affinity_keeps_the_greatest_expectation() -> None:
    """Two affinity stages do not take from each other."""
    modes = [CacheMode.APPROXIMATE, CacheMode.NONE, CacheMode.NONE]
    decision, select = decide(
        stage(Kind.AFFINITY, Affinity([100, 0, 0], modes)),
        stage(Kind.AFFINITY, Affinity([10, 20, 0], modes), name="two"),
    )
    await decision.run(select)
    assert decision.ctx.affinity == {"a@http://a": 100, "b@http://b": 20}
    assert decision.trace.stages[0].attributes[names.SCORE_MODES] == ("approximate", "none", "none")


async def test_affinity_says_why_it_knows_no_better() -> None:
    """The record has a reason for each candidate where a stage gives any, and no such attribute else."""
    modes = [CacheMode.DEGRADED, CacheMode.EXACT, CacheMode.NONE]
    decision, select = decide(
        stage(Kind.AFFINITY, Affinity([9, 9, 0], modes, reasons=("degraded: lost", "", ""))),
        stage(Kind.AFFINITY, Affinity([9, 9, 0], modes), name="two"),
    )
    await decision.run(select)
    first, second = (span.attributes for span in decision.trace.stages[:2])
    assert first[names.SCORE_REASONS] == ("degraded: lost", "", "")
    assert first[names.SCORED] == ("a@http://a", "b@http://b", "c@http://c")
    assert names.SCORE_REASONS not in second


async def test_affinity_gives_as_many_reasons_as_there_are_candidates() -> None:
    """A reason too few is a breach of the contract, which a stage that may be skipped is skipped for."""
    decision, select = decide(stage(Kind.AFFINITY, Affinity([0, 0, 0], [CacheMode.NONE] * 3, reasons=("lost",))))
    await decision.run(select)
    assert "1 reasons for 3 candidates" in decision.trace.stages[0].message


async def test_a_refusal_ends_the_route_with_its_reason_and_wait() -> None:
    """An admission refused is a 429 that says when to come back."""
    decision, select = decide(stage(Kind.ADMIT, Refusal(reason="too many at once", retry_after_s=2.5)))
    with pytest.raises(AdmissionError, match="too many at once") as raised:
        await decision.run(select)
    assert raised.value.retry_after_s == 2.5
    assert decision.trace.stages[0].attributes[names.ADMITTED] is False


async def test_a_stage_may_refuse_with_an_error_of_its_own() -> None:
    """A RouteError raised by a stage goes to the caller as it is."""
    decision, select = decide(stage(Kind.CLASSIFY, BadRequestError("speak louder", code="too_quiet")))
    with pytest.raises(BadRequestError, match="speak louder"):
        await decision.run(select)
    assert decision.trace.stages[0].message == "too_quiet"


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda models: [], "ranked nobody"),
        (lambda models: Ranking([models[0], models[0]], [1, 1]), "ranked a candidate twice"),
        (lambda models: Ranking([ModelConfig(name="z", endpoint="http://z")], [1]), "ranked somebody who is not"),
        (lambda models: [ModelScore("z", "http://z", 1.0)], "ValueError"),
    ],
)
async def test_a_wrong_ranking_fails_the_route(result: Any, said: str) -> None:
    """There is no route without a choice, so a broken one cannot be skipped."""
    decision, select = decide(strategy=AsTheyCome(result))
    with pytest.raises(StageError, match=said):
        await decision.run(select)


async def test_a_list_of_scores_is_a_ranking_too() -> None:
    """A strategy may return what the feature page shows: a list of `ModelScore`."""
    decision, select = decide(
        strategy=AsTheyCome(lambda models: [ModelScore(m.name, m.endpoint, 0.5) for m in reversed(models)])
    )
    await decision.run(select)
    assert decision.ranking is not None
    assert decision.ranking.models == (C, B, A)


async def test_nobody_to_begin_with_is_an_error_that_says_so() -> None:
    """An empty field is not a policy matter; nobody does what is asked, now or later."""
    decision, select = decide(candidates=())
    with pytest.raises(NoCandidatesError, match="no enabled model serves this request: chat for auto") as raised:
        await decision.run(select)
    assert (raised.value.status, raised.value.code) == (404, "model_not_found")
