"""The conformance kit: a component that keeps its contract passes, and each way to break it is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import pytest

from kvfleet.adapters.mock import MockAdapter
from kvfleet.config.fields import mapping, number, secret, text
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Drop, Fact, Kind, Outcome, RoutingContext
from kvfleet.plugin.judging import Grade, Submission
from kvfleet.plugin.manager import discover
from kvfleet.router.routes import RouteExamples
from kvfleet.router.scoring import Column, Unit
from kvfleet.testing.conformance import ConformanceError, check_component, kind_of
from tests.testing.made import breaches

WORDS: Fact[int] = Fact("words")
TEXT: Fact[str] = Fact("text")


BUILT_IN = [component for kind in Kind for component in discover().of_kind(kind) if component.distribution == "kvfleet"]
SAMPLES: dict[str, dict[str, Any]] = {  # options that have no default, or none that does anything
    "select.canary": {"canary": "new"},
    "judge.model": {"model": "cloud"},
    "classify.routes": {"routes": {"billing": RouteExamples(examples=("I was charged twice", "Where is my invoice?"))}},
}


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
        if component.key == "judge.json_schema":
            pytest.importorskip("jsonschema")
        check_component(component, **SAMPLES.get(component.key, {}))

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


@attrs.frozen
class TellingJudge:
    """Trust everything, and say why with the answer itself."""

    async def grade(self, submission: Submission) -> Grade:
        """All of it."""
        return Grade(1.0, f"it says {submission.response.content}")


@attrs.frozen
class WrongJudge:
    """Give any number."""

    async def grade(self, submission: Submission) -> Any:
        """Ten."""
        return Grade(10.0, "")


def test_a_judge_that_tells_is_caught() -> None:
    """Reasons go into traces; scores are shares."""
    with pytest.raises(ConformanceError, match="shows content"):
        check_component(TellingJudge)
    with pytest.raises(ConformanceError) as caught:
        check_component(WrongJudge)
    assert "grade() gives a score that is not between 0 and 1; use None if it cannot tell" in str(caught.value)
    assert "grade() gives no reason" in str(caught.value)
