"""The conformance kit: a component that keeps its contract passes, and each way to break it is named."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import orjson
import pytest

from kvfleet.adapters.base import Call, EndpointHealth, InferenceAdapter, Reply
from kvfleet.adapters.mock import MockAdapter
from kvfleet.config.fields import mapping, number, secret, text
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import AttemptsExhaustedError, BadRequestError
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Affinity, Answer, CacheMode, Drop, Fact, Kind, Outcome, Refusal, RoutingContext
from kvfleet.plugin.manager import discover
from kvfleet.router.scoring import Column, Ranking, ScoringContext, Unit, rank
from kvfleet.testing.conformance import ConformanceError, check_component, kind_of

WORDS: Fact[int] = Fact("words")
TEXT: Fact[str] = Fact("text")


def breaches(component: Component | type, **sample: Any) -> tuple[str, ...]:
    """What the kit finds."""
    with pytest.raises(ConformanceError) as caught:
        check_component(component, **sample)
    return caught.value.breaches


BUILT_IN = [component for kind in Kind for component in discover().of_kind(kind) if component.distribution == "kvfleet"]


@attrs.frozen(kw_only=True)
class GoodFilter:
    """Drop the models of a region."""

    region: str = text("us-east-1", doc="The region to leave out.")

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        """Drop them."""
        return [Drop(c, f"runs in {self.region}") for c in ctx.candidates if c.region == self.region]


@attrs.define(kw_only=True)
class GoodClassifier:
    """Count the words of a request."""

    opened: int = attrs.field(init=False, default=0)

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        """Count."""
        return {WORDS: len(str(ctx.request.body).split())}

    async def aopen(self) -> None:
        self.opened += 1

    async def aclose(self) -> None:
        self.opened = 0

    def state(self) -> Mapping[str, Any]:
        return {"opened": self.opened}


@attrs.frozen
class NeedsWords:
    """Prefer the small model for short prompts."""

    def score(self, ctx: RoutingContext) -> Column:
        """By the number of words."""
        return Column(Unit.UTILITY, [min(1.0, 10 / (1 + ctx.fact(WORDS)))] * len(ctx.candidates))


class TestSound:
    def test_a_sound_component_passes(self) -> None:
        """A filter with a documented option, by its class and by its registration."""
        check_component(GoodFilter)
        check_component(GoodFilter, region="eu-west-1")
        check_component(Component(Kind.FILTER, "region", GoodFilter))

    def test_a_classifier_passes_with_what_it_gives(self) -> None:
        """The declared fact is found on every kind of request."""
        check_component(Component(Kind.CLASSIFY, "words", GoodClassifier, gives=(WORDS,)))

    def test_facts_may_be_given(self) -> None:
        """What no installed classifier gives, the author gives; without it the kit says so."""
        component = Component(Kind.SCORE, "words", NeedsWords, needs=(WORDS,))
        check_component(component, facts={WORDS: 12})
        assert breaches(component) == (
            "it needs the fact 'words', which no installed classifier gives; pass check_component facts={…: …}",
        )

    @pytest.mark.parametrize("component", BUILT_IN, ids=lambda component: component.key)
    def test_every_built_in_component_is_sound(self, component: Component) -> None:
        """What is asked of a third party holds for what comes with kvfleet."""
        check_component(component)

    async def test_it_may_be_called_in_an_async_test(self) -> None:
        """A running event loop does not disturb the kit."""
        check_component(GoodFilter)

    def test_the_mock_engine_is_a_sound_adapter(self) -> None:
        """An adapter that answers by itself keeps the shapes, streaming included."""
        check_component(MockAdapter, speed=1e9)

    def test_every_breach_is_in_the_message(self) -> None:
        """The error names the component and lists each breach on a line of its own."""
        with pytest.raises(ConformanceError) as caught:
            check_component(Undocumented)
        lines = str(caught.value).splitlines()
        assert lines[0] == "Undocumented breaks the contract of its kind:"
        assert len(lines) == 1 + len(caught.value.breaches) == 5


@attrs.frozen
class Undocumented:
    bare: int = 3
    _hidden: int = number(1, doc="Hidden.", ge=0)

    async def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        return []


class TestDeclaration:
    def test_what_is_undeclared_is_named_at_once(self) -> None:
        """No docstring, a verb that must not be async, options without a doc or with an underscore: all are named."""
        assert breaches(Undocumented) == (
            "it has no docstring; its first line is what `kvfleet components` shows",
            "filter() must not be async",
            "option 'bare' has no doc; make it with a function of kvfleet.config.fields, or init=False",
            "option 'hidden' must not begin with an underscore; state is init=False",
        )

    def test_a_class_without_a_verb_is_no_component(self) -> None:
        """The kit lists the verbs there are."""

        @attrs.frozen
        class Nothing:
            """Does nothing."""

        assert breaches(Nothing)[0].startswith("it has no verb; a component has one of classify(), admit(), filter()")

    def test_a_plain_class_is_no_component(self) -> None:
        """Options are attrs fields, so the class must be one of attrs."""

        class Plain:
            """Not attrs."""

        assert breaches(Plain) == ("it is not an attrs class; decorate it with @attrs.frozen or @attrs.define",)

    def test_the_kind_is_told_by_the_verb(self) -> None:
        """A filter that also observes is a filter; an adapter is one by its base class."""

        @attrs.frozen
        class Both(GoodFilter):
            """Filters and learns."""

            async def observe(self, outcome: Outcome) -> None:
                """Learn."""

        assert (kind_of(Both), kind_of(MockAdapter), kind_of(int)) == (Kind.FILTER, Kind.ADAPTER, None)
        check_component(Both)


class TestOptions:
    def test_a_required_option_needs_a_sample(self) -> None:
        """Without a default and without a sample the kit cannot make one; with a sample it can."""

        @attrs.frozen
        class Named(GoodFilter):
            """Needs a name."""

            name: str = text(doc="The name.")

        assert breaches(Named) == ("option 'name' has no default; give check_component a sample, as in name=…",)
        check_component(Named, name="x")

    def test_a_sample_for_nothing_is_named(self) -> None:
        """A misspelt sample is told, with what was probably meant."""
        assert breaches(GoodFilter, regoin="x") == ("there is no option 'regoin'; did you mean region?",)

    def test_a_default_must_be_in_its_own_range(self) -> None:
        """A default that the option's own bounds refuse is a breach."""

        @attrs.frozen
        class OutOfRange(GoodFilter):
            """Has a bad default."""

            share: float = number(2.0, le=1, doc="A share.")

        (breach,) = breaches(OutOfRange)
        assert breach.startswith("its own default or sample is refused: share:")

    def test_an_option_must_survive_yaml(self) -> None:
        """A converter that changes the value each time breaks the round trip."""

        @attrs.frozen
        class Growing(GoodFilter):
            """Changes what it is given."""

            words: Mapping[str, str] = mapping(doc="Words.")
            name: str = attrs.field(
                default="x", converter=lambda value: value + "!", metadata=attrs.fields(GoodFilter).region.metadata
            )

        assert breaches(Growing) == ("option 'name' is not the same after it was written as YAML and read back",)

    def test_a_secret_must_stay_one(self) -> None:
        """A state that shows the credential is a breach."""

        @attrs.frozen
        class Leaky(GoodFilter):
            """Shows its key."""

            key: str = secret(doc="The key.")

            def state(self) -> Mapping[str, Any]:
                return {"key": self.key}

        check_component(Leaky)
        assert breaches(Leaky, key="s3cret") == ("its repr or state shows a secret option",)


class TestLife:
    @pytest.mark.parametrize("method", ["provision", "aopen", "aclose"])
    def test_a_failing_lifecycle_is_named(self, method: str) -> None:
        """Whatever fails before the first request is told with the place."""

        @attrs.frozen
        class Failing(GoodFilter):
            """Fails early."""

        def fails(self: Any, services: Services) -> None:
            raise KeyError("gone")

        async def fails_later(self: Any) -> None:
            raise KeyError("gone")

        setattr(Failing, method, fails if method == "provision" else fails_later)
        where = {"provision": "it cannot be made and provisioned", "aopen": "aopen() fails"}
        assert breaches(Failing) == (f"{where.get(method, 'aclose() fails without aopen()')}: KeyError: 'gone'",)

    def test_closing_twice_must_be_safe(self) -> None:
        """The second aclose is tried too."""

        @attrs.define(slots=False)
        class Once(GoodClassifier):
            """Closes once."""

            closed: bool = attrs.field(init=False, default=False)

            async def aclose(self) -> None:
                if self.closed:
                    raise RuntimeError("closed already")
                self.closed = True

        assert breaches(Once) == ("aclose() fails the second time: RuntimeError: closed already",)

    @pytest.mark.parametrize(
        ("state", "breach"),
        [
            (["x"], "state() must give a mapping, not list"),
            ({"x": object()}, "state() must hold plain JSON types: Object of type object is not JSON serializable"),
            ({"x": "y" * 300_000}, "state() of a fresh component takes 300009 bytes; it must stay bounded"),
        ],
    )
    def test_the_state_is_plain_and_bounded(self, state: Any, breach: str) -> None:
        """A state that is no mapping, not JSON, or huge is a breach."""

        @attrs.frozen
        class Stateful(GoodFilter):
            """Has a state."""

            def state(self) -> Any:
                return state

        assert breaches(Stateful) == (breach,)


def _stage(verb: str, run: Any) -> type:
    """A component whose verb is `run`."""

    @attrs.define
    class Made:
        """Made for a test."""

        calls: int = attrs.field(init=False, default=0)

    setattr(Made, verb, run)
    return Made


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
        assert breach in breaches(_stage("filter", run))

    def test_an_impure_filter_is_named(self) -> None:
        """A filter that drops somebody else the second time is not pure."""

        def run(self: Any, ctx: RoutingContext) -> list[Drop]:
            self.calls += 1
            return [Drop(ctx.candidates[self.calls % len(ctx.candidates)], "its turn")]

        assert breaches(_stage("filter", run)) == (
            "filter() is not pure: the same context gives other drops the second time",
        )

    def test_a_filter_that_raises_is_named_with_the_request(self) -> None:
        """A filter that cannot take a request without messages says on which it failed."""

        def run(self: Any, ctx: RoutingContext) -> list[Drop]:
            ctx.request.body["messages"]
            return []

        assert breaches(_stage("filter", run)) == (
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

        check_component(_stage("filter", no_text))
        assert breaches(_stage("filter", nothing)) == (
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
        assert breach in breaches(_stage("score", lambda self, ctx: column(len(ctx.candidates))))

    def test_unknown_is_none(self) -> None:
        """None for what is not known is sound."""
        check_component(_stage("score", lambda self, ctx: Column(Unit.SECONDS, [None] * len(ctx.candidates))))


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
        assert breach in breaches(_stage("affinity", lambda self, ctx: found(len(ctx.candidates))))


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
        assert breach in breaches(_stage("select", run))

    def test_an_empty_list_must_be_survived(self) -> None:
        """A strategy that takes the first of nobody is named."""
        run = lambda self, models, context=None: Ranking([models[0], *models[1:]], [0.0] * len(models))  # noqa: E731
        assert any("IndexError" in breach for breach in breaches(_stage("select", run)))


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

        component = Component(Kind.CLASSIFY, "made", _stage("classify", run), gives=gives)
        assert breach in breaches(component)

    def test_a_description_must_not_show_the_prompt(self) -> None:
        """A fact whose description is the prompt would put it into every trace."""

        async def run(self: Any, ctx: RoutingContext) -> Any:
            return {TEXT: str(ctx.request.body)}

        component = Component(Kind.CLASSIFY, "made", _stage("classify", run), gives=(TEXT,))
        assert breaches(component) == ("the description of the fact 'text' shows the prompt; it goes into traces",)

    def test_a_description_must_be_an_attribute(self) -> None:
        """A description that fails, or is no plain value, is named."""

        async def run(self: Any, ctx: RoutingContext) -> Any:
            return {broken: 1, odd: 1}

        broken: Fact[int] = Fact("broken", lambda value: 1 // 0)
        odd: Fact[int] = Fact("odd", lambda value: [object()])  # type: ignore[list-item,return-value]
        component = Component(Kind.CLASSIFY, "made", _stage("classify", run), gives=(broken, odd))
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

        assert breaches(_stage("admit", run)) == (breach,)

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

        assert breaches(_stage("answer", run)) == (breach,)
        check_component(_stage("answer", nothing))

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

        (first, *_) = breaches(_stage("execute", careless))
        assert first.startswith("execute() must end in an answer or a RouteError, not in BackendError")
        check_component(_stage("execute", careful))

    def test_an_executor_stays_within_the_ranking(self) -> None:
        """Trying a stranger, giving something else, and failing for nothing are named."""

        async def strange(self: Any, ctx: RoutingContext, ranking: Ranking, attempt: Any) -> Any:
            try:
                return str(await attempt(ModelConfig(name="stranger")))
            except Exception as error:
                raise AttemptsExhaustedError("nobody answered") from error

        async def lazy(self: Any, ctx: RoutingContext, ranking: Ranking, attempt: Any) -> Answer:
            raise AttemptsExhaustedError("no mood")

        assert breaches(_stage("execute", strange)) == (
            "execute() must give an Answer, not str",
            "execute() tries somebody who is not in the ranking",
        )
        assert breaches(_stage("execute", lazy)) == ("execute() raises a RouteError although the first attempt worked",)

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
        assert breach in breaches(_stage("apply", lambda self, models, rule, context: found(models)))
        check_component(_stage("apply", lambda self, models, rule, context: []))

    def test_an_observer_takes_every_outcome(self) -> None:
        """One that takes a served request for granted is named, with the kind of request."""

        async def run(self: Any, outcome: Outcome) -> Any:
            return outcome.served_by.name  # type: ignore[union-attr]

        found = breaches(_stage("observe", run))
        assert "observe() must give nothing back" in found
        assert any("AttributeError" in breach for breach in found)


@attrs.define(kw_only=True)
class BadAdapter(InferenceAdapter):
    """Breaks what an adapter can break."""

    async def send(self, call: Call) -> Any:
        call.body["seen"] = True  # type: ignore[index]
        if call.stream:
            return Reply(events=_events())
        if call.operation == "chat":
            return Reply(body=b"hello")
        if call.operation == "completion":
            return Reply(body=orjson.dumps({"choices": []}))
        if call.operation == "embedding":
            return b"bytes"
        raise ValueError("no such thing")

    async def health_check(self) -> EndpointHealth:
        raise OSError("down")

    async def get_metrics(self) -> Any:
        return []

    async def list_models(self) -> Any:
        raise OSError("down")


async def _events() -> Any:
    yield b'data: {"choices":[]}\n\n'


class TestAdapters:
    def test_each_breach_is_named(self) -> None:
        """Bodies, streams, errors, health and control calls: all in one list."""
        assert breaches(BadAdapter) == (
            "send() for chat gives a body that is not JSON",
            "send() for chat changes the call's body",
            "send() for chat, streamed, ends without data: [DONE]",
            "send() for chat, streamed, changes the call's body",
            "send() for completion gives an answer without choices",
            "send() for completion changes the call's body",
            "send() for completion, streamed, ends without data: [DONE]",
            "send() for completion, streamed, changes the call's body",
            "send() for embedding must give a Reply, not bytes",
            "send() for embedding changes the call's body",
            "send() for rerank must end in an answer or a BackendError, not in ValueError: no such thing",
            "send() for rerank changes the call's body",
            "health_check() must never raise; it raises OSError: down",
            "list_models() may only raise BackendError, not OSError: down",
            "get_metrics() must give a Mapping, not list",
        )
