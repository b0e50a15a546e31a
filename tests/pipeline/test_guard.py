"""The filters, asked about models beside the route; and observers that write into the route's record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import attrs
import pytest

from kvfleet.config.schema import FleetConfig, ModelConfig, StageConfig
from kvfleet.pipeline.guard import Guard
from kvfleet.pipeline.stage import BoundStage
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Drop, Kind, Outcome, RouteRequest, RoutingContext
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter
from kvfleet.trace import names

A, B, C = (ModelConfig(name=name, endpoint=f"http://{name}") for name in "abc")
CTX = RoutingContext(request=RouteRequest(body={}), candidates=(A,))
TABLE = discover()


@attrs.define
class Out:
    """Drops one model, and keeps whom it was asked about."""

    name: str
    asked: list[str] = attrs.field(factory=list)

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        self.asked += [model.name for model in ctx.candidates]
        return [Drop(model, "out") for model in ctx.candidates if model.name == self.name]


@attrs.define
class LiveOnly(Out):
    """The same, of live answers alone."""

    only_live: ClassVar[bool] = True


@attrs.define
class Broken:
    """Fails."""

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        raise RuntimeError("broken")


def bound(component: Any, name: str, *, skips: bool = False) -> BoundStage:
    """A filter in its place."""
    return BoundStage.bind(Kind.FILTER, name, component, skips=skips)


def test_each_filter_is_asked_about_those_that_are_left() -> None:
    """In order, with the models in the candidates' place; each drop comes with its stage."""
    first, second = Out("a"), Out("b")
    found = Guard((bound(first, "one"), bound(second, "two")))(CTX, [A, B, C])
    assert [(by, drop.candidate.name, drop.reason) for by, drop in found] == [
        ("filter.one", "a", "out"),
        ("filter.two", "b", "out"),
    ]
    assert second.asked == ["b", "c"]


def test_nobody_left_ends_it() -> None:
    """Filters need not bear an empty list."""
    second = Out("b")
    Guard((bound(Out("a"), "one"), bound(second, "two")))(CTX, [A])
    assert second.asked == []


def test_a_filter_of_live_answers_is_not_asked() -> None:
    """What keeps a shadow model out of routing does not keep it from being a shadow."""
    assert Guard((bound(LiveOnly("a"), "one"),))(CTX, [A]) == []


@pytest.mark.parametrize(("skips", "out"), [(False, ["a", "b"]), (True, [])])
def test_a_filter_that_fails_excludes_everybody_unless_it_may_be_skipped(skips: bool, out: list[str]) -> None:
    """As it would end the route, or be passed over there."""
    found = Guard((bound(Broken(), "one", skips=skips),))(CTX, [A, B])
    assert [drop.candidate.name for _, drop in found] == out


def test_without_a_pipeline_everybody_is_excluded() -> None:
    """Services that nobody filled in allow nothing."""
    assert [drop.candidate for _, drop in Services().excluded(CTX, [A, B])] == [A, B]


@attrs.define
class Marks:
    """Writes into the route's record, or fails to."""

    fails: bool = False

    def mark(self, outcome: Outcome) -> Mapping[str, Any]:
        if self.fails:
            raise RuntimeError("broken")
        return {names.SHADOW_REPLICAS: ("x@y",)}

    async def observe(self, outcome: Outcome) -> None:
        """Nothing more."""


@pytest.mark.parametrize("fails", [False, True])
async def test_an_observer_can_mark_the_route_and_cannot_spoil_it(fails: bool) -> None:
    """The attribute is there when the answer is; a failure costs the attribute alone."""
    component = Component(Kind.OBSERVE, "marks", Marks)
    table = attrs.evolve(TABLE, by_key={**TABLE._by_key, (Kind.OBSERVE, "marks"): (component,)})
    stages = (StageConfig(use="select.static"), StageConfig(use="execute"))
    config = FleetConfig(models=(A,), pipeline=(*stages, StageConfig(use="observe.marks", options={"fails": fails})))
    async with Router(config, table=table, adapters={A.id: FakeAdapter(model_id="a")}, polls=False) as router:
        dispatched = await router.dispatch(RouteRequest(body={"messages": [{"role": "user", "content": "Hi"}]}))
    assert (names.SHADOW_REPLICAS in dispatched.trace.route.attributes) is not fails
    assert dispatched.explanation.outcome == "answered"
