"""What the conformance kit tries, by kind: each way to break a contract is named."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import pytest

from kvfleet.adapters.call import Reply
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import AttemptsExhaustedError, BadRequestError
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Affinity, Answer, CacheMode, Drop, Fact, Kind, Outcome, Refusal, RoutingContext
from kvfleet.router.scoring import Column, Ranking, ScoringContext, Unit, rank
from kvfleet.testing.conformance import check_component
from tests.testing.made import breaches, stage

WORDS: Fact[int] = Fact("words")
TEXT: Fact[str] = Fact("text")


class TestFilters:
    @pytest.mark.parametrize(
        ("run", "breach"),
        [
            (lambda s, ctx: list(ctx.candidates), "filter() must give Drop objects, not ModelConfig"),
            (lambda s, ctx: [Drop(ctx.candidates[0], " ")], "filter() drops without a reason"),
            (lambda s, ctx: [Drop(ctx.candidates[0], "x")] * 2, "filter() drops a candidate twice"),
            (
                lambda s, ctx: [Drop(ModelConfig(name="stranger"), "x")],
                "filter() drops somebody who is not a candidate",
            ),
            (
                lambda s, ctx: ctx.request.body.clear() or [],
                "filter() changes its input: the request's body",
            ),
            (lambda s, ctx: ctx.facts.update({WORDS: 1}) or [], "filter() changes its input: the facts"),
        ],
    )
    def test_each_breach_is_named(self, run: Any, breach: str) -> None:
        """Wrong types, no reason, twice, strangers, and changes to the input."""
        assert breach in breaches(stage("filter", run))

    def test_an_impure_filter_is_named(self) -> None:
        """A filter that drops somebody else the second time is not pure."""

        def run(self: Any, ctx: RoutingContext) -> list[Drop]:
            self.calls += 1
            return [Drop(ctx.candidates[self.calls % len(ctx.candidates)], "its turn")]

        assert breaches(stage("filter", run)) == (
            "filter() is not pure: the same context gives other drops the second time",
        )

    def test_a_filter_that_raises_is_named_with_the_request(self) -> None:
        """A filter that cannot take a request without messages says on which it failed."""

        def run(self: Any, ctx: RoutingContext) -> list[Drop]:
            ctx.request.body["messages"]
            return []

        assert breaches(stage("filter", run)) == (
            "filter() fails for a request for completion with 4 candidates: KeyError: 'messages'",
            "filter() fails for a request for embedding with 4 candidates: KeyError: 'messages'",
        )

    def test_a_request_may_be_refused_but_not_every_one(self) -> None:
        """A RouteError is a stage's right; a stage that uses it on every sample shows nothing of itself."""

        def no_text(self: Any, ctx: RoutingContext) -> list[Drop]:
            if "prompt" in ctx.request.body:
                raise BadRequestError("no plain prompts here")
            return []

        def nothing(self: Any, ctx: RoutingContext) -> list[Drop]:
            raise BadRequestError("not today")

        check_component(stage("filter", no_text))
        assert breaches(stage("filter", nothing)) == (
            "it refuses every sample request; give check_component options with which it lets one through",
        )


class TestScores:
    @pytest.mark.parametrize(
        ("column", "breach"),
        [
            (lambda n: [1.0] * n, "score() must give a Column, not list"),
            (lambda n: None, "score() must give a Column, not NoneType"),
            (lambda n: Column("s", [1.0] * n), "score() gives a column without a unit: 's' is not a Unit"),
            (
                lambda n: Column(Unit.SECONDS, [1.0]),
                "score() must give one value for each candidate, None for unknown",
            ),
            (
                lambda n: Column(Unit.SECONDS, [float("nan")] * n),
                "score() gives a value that is not a finite number; use None for unknown",
            ),
            (lambda n: Column(Unit.USD, [-1.0] * n), "score() gives a negative value in usd"),
            (lambda n: Column(Unit.UTILITY, [1.5] * n), "score() gives a utility above 1"),
            (
                lambda n: Column(Unit.UTILITY, [random.random() for _ in range(n)]),
                "score() is not pure: the same context gives another column the second time",
            ),
        ],
    )
    def test_each_breach_is_named(self, column: Any, breach: str) -> None:
        """Wrong type, unit, length, range, and chance."""
        assert breach in breaches(stage("score", lambda self, ctx: column(len(ctx.candidates))))

    def test_unknown_is_none(self) -> None:
        """None for what is not known is sound."""
        check_component(stage("score", lambda self, ctx: Column(Unit.SECONDS, [None] * len(ctx.candidates))))


class TestAffinity:
    @pytest.mark.parametrize(
        ("found", "breach"),
        [
            (lambda n: [0.0] * n, "affinity() must give an Affinity, not list"),
            (
                lambda n: Affinity([0.0], [CacheMode.NONE]),
                "affinity() must give one expectation and one mode for each candidate",
            ),
            (
                lambda n: Affinity([-1.0] * n, [CacheMode.NONE] * n),
                "affinity() must expect a finite number of tokens, at least 0",
            ),
            (
                lambda n: Affinity([1.0] * n, ["guess"] * n),
                "affinity() must say how each expectation is known, with a CacheMode",
            ),
            (
                lambda n: Affinity([random.random() for _ in range(n)], [CacheMode.EXACT] * n),
                "affinity() is not pure: the same context gives other expectations the second time",
            ),
        ],
    )
    def test_each_breach_is_named(self, found: Any, breach: str) -> None:
        """Wrong type, length, sign, mode, and chance."""
        assert breach in breaches(stage("affinity", lambda self, ctx: found(len(ctx.candidates))))


def _ranked(models: Sequence[ModelConfig]) -> Ranking:
    return rank(models, [model.quality_score for model in models])


def _sorts_in_place(self: Any, models: list[ModelConfig], context: ScoringContext | None = None) -> Ranking:
    models.sort(key=lambda model: model.id)
    models.reverse()
    return _ranked(models)


def _turns(self: Any, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
    self.calls += 1
    turn = self.calls % len(models) if models else 0
    return Ranking([*models[turn:], *models[:turn]], [0.0] * len(models))


def _at_random(self: Any, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
    return rank(models, [random.random() for _ in models])


_NO_CONTEXT = (
    "select(models) must work without a context, with `context=None`: "
    "TypeError: TestSelect.<lambda>() missing 1 required positional argument: 'context'"
)


class TestSelect:
    @pytest.mark.parametrize(
        ("run", "breach"),
        [
            (
                lambda self, models, context=None: Ranking([], []),
                "select() ranks nobody; a ranking has at least one candidate",
            ),
            (
                lambda self, models, context=None: Ranking(models[:1] * 2, [1.0] * len(models[:1] * 2)),
                "select() ranks a candidate twice",
            ),
            (
                lambda self, models, context=None: Ranking([ModelConfig(name="stranger")], [1.0]),
                "select() ranks somebody who is not a candidate",
            ),
            (
                lambda self, models, context=None: rank(models, [float("inf")] * len(models)),
                "select() gives a total that is not a finite number",
            ),
            (
                lambda self, models, context: _ranked(models),
                _NO_CONTEXT,
            ),
            (_sorts_in_place, "select() changes the list of candidates it is given"),
            (_turns, "select() moves its state in a dry run; leave it alone if context.dry_run"),
            (
                _at_random,
                "select() is not repeatable: the same candidates and seed give another ranking; use context.random()",
            ),
        ],
    )
    def test_each_breach_is_named(self, run: Any, breach: str) -> None:
        """Nobody, twice, strangers, infinities, no default context, changes, dry runs, chance."""
        assert breach in breaches(stage("select", run))

    def test_an_empty_list_must_be_survived(self) -> None:
        """A strategy that takes the first of nobody is named."""
        run = lambda self, models, context=None: Ranking([models[0], *models[1:]], [0.0] * len(models))  # noqa: E731
        assert any("IndexError" in breach for breach in breaches(stage("select", run)))


class TestClassify:
    @pytest.mark.parametrize(
        ("found", "gives", "breach"),
        [
            ({WORDS: 1}, (), "a classifier declares the facts it gives: Component(…, gives=(FACT,))"),
            ({}, (WORDS,), "classify() declares the fact 'words' and does not always give it"),
            (
                {WORDS: 1, TEXT: "x"},
                (WORDS,),
                "classify() gives the fact 'text' without declaring it in `gives`",
            ),
            ({"words": 1}, (WORDS,), "classify() must give a mapping from facts to values"),
        ],
    )
    def test_each_breach_is_named(self, found: Any, gives: tuple[Fact[Any], ...], breach: str) -> None:
        """Undeclared, missing, surplus facts, and what is no fact."""

        async def run(self: Any, ctx: RoutingContext) -> Any:
            return found

        component = Component(Kind.CLASSIFY, "made", stage("classify", run), gives=gives)
        assert breach in breaches(component)

    def test_a_description_must_not_show_the_prompt(self) -> None:
        """A fact whose description is the prompt would put it into every trace."""

        async def run(self: Any, ctx: RoutingContext) -> Any:
            return {TEXT: str(ctx.request.body)}

        component = Component(Kind.CLASSIFY, "made", stage("classify", run), gives=(TEXT,))
        assert breaches(component) == ("the description of the fact 'text' shows the prompt; it goes into traces",)

    def test_a_description_must_be_an_attribute(self) -> None:
        """A description that fails, or is no plain value, is named."""

        async def run(self: Any, ctx: RoutingContext) -> Any:
            return {broken: 1, odd: 1}

        broken: Fact[int] = Fact("broken", lambda value: 1 // 0)
        odd: Fact[int] = Fact("odd", lambda value: [object()])  # type: ignore[list-item,return-value]
        component = Component(Kind.CLASSIFY, "made", stage("classify", run), gives=(broken, odd))
        assert breaches(component) == (
            "the fact 'broken' cannot be described: ZeroDivisionError: integer division or modulo by zero",
            "the fact 'odd' must be described by text, numbers, booleans or lists of one of these",
        )


@attrs.define
class _Lease:
    """A lease for tests."""

    owner: Any

    def release(self, outcome: Outcome) -> None:
        self.owner.calls -= 1


class TestTheOthers:
    def test_a_dry_run_must_reserve_nothing(self) -> None:
        """An admission that counts a simulated request is named; one that does not is sound."""

        @attrs.define
        class Counts:
            """Counts requests."""

            calls: int = attrs.field(init=False, default=0)
            careless: bool = attrs.field(init=False, default=True)

            async def admit(self, ctx: RoutingContext) -> _Lease:
                """Count one."""
                if self.careless or not ctx.dry_run:
                    self.calls += 1
                return _Lease(self)

            def state(self) -> Mapping[str, Any]:
                return {"calls": self.calls}

        @attrs.define
        class Careful(Counts):
            """Counts live requests."""

            careless: bool = attrs.field(init=False, default=False)

        assert breaches(Counts) == ("admit() reserves something in a dry run",)
        check_component(Careful)

    @pytest.mark.parametrize(
        ("got", "breach"),
        [
            (None, "admit() must give a Lease or a Refusal, not NoneType"),
            (Refusal(reason=""), "admit() refuses without a reason"),
        ],
    )
    def test_an_admission_is_a_lease_or_a_refusal(self, got: Any, breach: str) -> None:
        """Nothing, and a refusal without a reason, are named."""

        async def run(self: Any, ctx: RoutingContext) -> Any:
            return got

        assert breaches(stage("admit", run)) == (breach,)

    @pytest.mark.parametrize(
        ("got", "breach"),
        [
            ("yes", "answer() must give an Answer or None, not str"),
            (Answer(Reply()), "answer() gives an answer with neither a body nor events"),
        ],
    )
    def test_an_answer_has_content(self, got: Any, breach: str) -> None:
        """A wrong type and an empty reply are named; None is sound."""

        async def run(self: Any, ctx: RoutingContext) -> Any:
            return got

        async def nothing(self: Any, ctx: RoutingContext) -> None:
            return None

        assert breaches(stage("answer", run)) == (breach,)
        check_component(stage("answer", nothing))

    def test_an_executor_ends_in_an_answer_or_a_route_error(self) -> None:
        """One that lets a backend's error through is named; one that gives up properly is sound."""

        async def careless(self: Any, ctx: RoutingContext, ranking: Ranking, attempt: Any) -> Answer:
            answer: Answer = await attempt(ranking.models[0])
            return answer

        async def careful(self: Any, ctx: RoutingContext, ranking: Ranking, attempt: Any) -> Answer:
            try:
                return await careless(self, ctx, ranking, attempt)
            except Exception as error:
                raise AttemptsExhaustedError("nobody answered") from error

        (first, *_) = breaches(stage("execute", careless))
        assert first.startswith("execute() must end in an answer or a RouteError, not in BackendError")
        check_component(stage("execute", careful))

    def test_an_executor_stays_within_the_ranking(self) -> None:
        """Trying a stranger, giving something else, and failing for nothing are named."""

        async def strange(self: Any, ctx: RoutingContext, ranking: Ranking, attempt: Any) -> Any:
            try:
                return str(await attempt(ModelConfig(name="stranger")))
            except Exception as error:
                raise AttemptsExhaustedError("nobody answered") from error

        async def lazy(self: Any, ctx: RoutingContext, ranking: Ranking, attempt: Any) -> Answer:
            raise AttemptsExhaustedError("no mood")

        assert breaches(stage("execute", strange)) == (
            "execute() must give an Answer, not str",
            "execute() tries somebody who is not in the ranking",
        )
        assert breaches(stage("execute", lazy)) == ("execute() raises a RouteError although the first attempt worked",)

    @pytest.mark.parametrize(
        ("found", "breach"),
        [
            (lambda models: models, "apply() must give pairs of a candidate and a reason"),
            (lambda models: [(models[0], "")], "apply() excludes without a reason"),
            (
                lambda models: [(ModelConfig(name="stranger"), "x")],
                "apply() excludes somebody who is not a candidate",
            ),
            (
                lambda models: [(models[0], f"{random.random()}")],
                "apply() is not pure: it excludes others the second time",
            ),
        ],
    )
    def test_an_action_excludes_candidates_with_reasons(self, found: Any, breach: str) -> None:
        """Bare candidates, no reason, strangers, and chance are named; an action that excludes nobody is sound."""
        assert breach in breaches(stage("apply", lambda self, models, rule, context: found(models)))
        check_component(stage("apply", lambda self, models, rule, context: []))

    def test_an_observer_takes_every_outcome(self) -> None:
        """One that takes a served request for granted is named, with the kind of request."""

        async def run(self: Any, outcome: Outcome) -> Any:
            return outcome.served_by.name  # type: ignore[union-attr]

        found = breaches(stage("observe", run))
        assert "observe() must give nothing back" in found
        assert any("AttributeError" in breach for breach in found)
