"""The build's checks of order and facts, by their exact words."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from kvfleet.config.origin import Origin
from kvfleet.config.schema import StageConfig
from kvfleet.pipeline.order import check_facts, check_order
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Fact, Kind
from kvfleet.plugin.manager import ComponentTable

COLOUR: Fact[str] = Fact("colour")


@attrs.define
class Anything:
    """Has every verb; does nothing."""

    classify: Any = None

    def admit(self) -> None: ...
    def answer(self) -> None: ...
    def filter(self) -> None: ...
    def affinity(self) -> None: ...
    def score(self) -> None: ...
    def select(self) -> None: ...
    def execute(self) -> None: ...
    def observe(self) -> None: ...


@attrs.define
class Classifies:
    """Has the classifier's verb alone."""

    def classify(self) -> None: ...


def component(key: str, **more: Any) -> Component:
    """A component called ``kind.name``."""
    kind, _, name = key.partition(".")
    return Component(Kind(kind), name, Classifies if kind == "classify" else Anything, **more)


def places(*entries: Component | tuple[Component, str]) -> list[tuple[Component, str, StageConfig]]:
    """Entries at the lines 10, 11, … of a file."""
    named = [entry if isinstance(entry, tuple) else (entry, entry.name) for entry in entries]
    return [(one, name, StageConfig(use=one.key, path=("pipeline", index))) for index, (one, name) in enumerate(named)]


ORIGIN = Origin("f.yaml", {("pipeline",): (9, 1), **{("pipeline", i): (10 + i, 5) for i in range(9)}})
HEALTH, SELECT, EXECUTE, LOG = (
    component(key) for key in ("filter.health", "select.weighted", "execute.fallback", "observe.log")
)
POLICY, CACHE = component("filter.policy", must_hold=True), component("answer.exact_cache")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([HEALTH, SELECT, EXECUTE, LOG], []),
        (
            [SELECT, HEALTH, EXECUTE],
            ["f.yaml:11:5: pipeline[1]: filter.health comes after select.weighted; move it before select.weighted"],
        ),
        (
            [SELECT, LOG, EXECUTE],
            ["f.yaml:12:5: pipeline[2]: execute.fallback comes after observe.log; move it before observe.log"],
        ),
        ([HEALTH, EXECUTE], ["f.yaml:9:1: pipeline: there is no select stage; add `- select`"]),
        ([SELECT], ["f.yaml:9:1: pipeline: there is no execute stage; add `- execute`"]),
        (
            [SELECT, (SELECT, "again"), EXECUTE],
            ["f.yaml:11:5: pipeline[1]: there is more than one select stage; keep one"],
        ),
        (
            [HEALTH, HEALTH, SELECT, EXECUTE],
            ["f.yaml:11:5: pipeline[1]: there are two filter stages called 'health'; give one a `name:`"],
        ),
        ([HEALTH, (HEALTH, "again"), SELECT, EXECUTE], []),
        (
            [CACHE, POLICY, SELECT, EXECUTE],
            [
                (
                    "f.yaml:11:5: pipeline[1]: filter.policy comes after answer.exact_cache, which could answer around "
                    "it; move it before answer.exact_cache"
                )
            ],
        ),
        ([POLICY, CACHE, SELECT, EXECUTE], []),
    ],
)
def test_order_findings(entries: list[Any], said: list[str]) -> None:
    """Each breach of the order is one finding at its entry, with the remedy."""
    assert [str(finding) for finding in check_order(places(*entries), ORIGIN)] == said


def test_what_could_not_be_read_is_not_missing() -> None:
    """An unknown select stage is one finding, not two."""
    assert check_order(places(HEALTH, EXECUTE), ORIGIN, complete=False) == []


@attrs.define
class Asks(Anything):
    """Needs a fact only with these options."""

    def required_facts(self) -> tuple[Fact[Any], ...]:
        return (COLOUR,)


def facts(*entries: tuple[Component, Any], table: ComponentTable | None = None) -> list[str]:
    """The findings about facts."""
    given = [
        (one, instance, StageConfig(use=one.key, path=("pipeline", index)))
        for index, (one, instance) in enumerate(entries)
    ]
    return [str(finding) for finding in check_facts(given, table or ComponentTable(), ORIGIN)]


def test_a_missing_fact_names_who_gives_it() -> None:
    """The remedy is the classifier to add."""
    paints = component("classify.paint", gives=(COLOUR,))
    table = ComponentTable((), {(Kind.CLASSIFY, "paint"): (paints,)})
    needs = component("filter.red", needs=(COLOUR,))
    assert facts((needs, Anything()), table=table) == [
        (
            "f.yaml:10:5: pipeline[0]: filter.red needs the fact 'colour', which no stage before it gives; "
            "put classify.paint before it"
        )
    ]
    assert facts((paints, Classifies()), (needs, Anything()), table=table) == []
    assert len(facts((needs, Anything()), (paints, Classifies()), table=table)) == 1


def test_options_may_need_a_fact() -> None:
    """A component's `required_facts` count like its declared needs; with no giver installed, the finding says so."""
    assert facts((component("filter.asks"), Asks())) == [
        (
            "f.yaml:10:5: pipeline[0]: filter.asks needs the fact 'colour', which no stage before it gives; "
            "no installed classifier gives it"
        )
    ]
