"""Samples for the conformance kit: facts are found as a pipeline would find them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.adapters.call import Operation
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Fact, Kind, RouteRequest, RoutingContext
from kvfleet.plugin.manager import ComponentTable
from kvfleet.testing.samples import facts_for

FIRST: Fact[int] = Fact("first")
SECOND: Fact[int] = Fact("second")


@attrs.define
class First:
    """Give a number."""

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        return {FIRST: 1}


@attrs.define
class Second:
    """Give the next one."""

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        return {SECOND: ctx.fact(FIRST) + 1}


def table(*components: Component) -> ComponentTable:
    """A table of classifiers."""
    return ComponentTable(by_key={(c.kind, c.name): (c,) for c in components})


CONTEXT = RoutingContext(request=RouteRequest(operation=Operation.CHAT, body={}), candidates=())


async def test_a_classifier_gets_the_facts_it_needs() -> None:
    """A chain of classifiers runs in its order, whichever of its facts is asked for."""
    found = table(
        Component(Kind.CLASSIFY, "a_second", Second, needs=(FIRST,), gives=(SECOND,)),
        Component(Kind.CLASSIFY, "b_first", First, gives=(FIRST,)),
    )
    assert await facts_for((SECOND,), CONTEXT, found) == {FIRST: 1, SECOND: 2}


async def test_facts_nobody_can_give_are_absent() -> None:
    """A classifier whose own facts are missing, or that waits for itself by way of another, is left out."""
    alone = table(Component(Kind.CLASSIFY, "second", Second, needs=(FIRST,), gives=(SECOND,)))
    assert await facts_for((SECOND,), CONTEXT, alone) == {}
    circle = table(
        Component(Kind.CLASSIFY, "second", Second, needs=(FIRST,), gives=(SECOND,)),
        Component(Kind.CLASSIFY, "first", First, needs=(SECOND,), gives=(FIRST,)),
    )
    assert await facts_for((SECOND, FIRST), CONTEXT, circle) == {}


@attrs.define
class Particular:
    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        return {FIRST: 1}

    def __attrs_post_init__(self) -> None:
        raise ValueError("there is no default that would do")


async def test_a_classifier_that_cannot_be_without_options_gives_nothing() -> None:
    """Its fact is absent, and the author of what needs it is told so."""
    found = table(Component(Kind.CLASSIFY, "particular", Particular, gives=(FIRST,)))
    assert await facts_for((FIRST,), CONTEXT, found) == {}
