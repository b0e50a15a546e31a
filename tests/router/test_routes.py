"""Routes of one's own, by words and by vectors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.router.lexical import middle_of, words_alike, words_vector
from kvfleet.router.routes import (
    NO_ROUTE,
    RouteExamples,
    RouteMatch,
    check_routes,
    embedded_routes,
    worded_routes,
)

ROUTES = {
    "billing": RouteExamples(examples=("I was charged twice", "Where can I download my invoice?", "Refund my payment")),
    "careers": RouteExamples(examples=("Are you hiring engineers?", "How do I apply for a job?")),
}


@pytest.mark.parametrize(
    ("text", "route"),
    [
        ("I would like my payment refunded", "billing"),
        ("where is the invoice for march", "billing"),
        ("I want to apply for the engineering job", "careers"),
        ("What is the capital of France?", NO_ROUTE),
        ("", NO_ROUTE),
    ],
)
def test_words_find_the_route(text: str, route: str) -> None:
    """Also other forms of a word; what is like nothing is on no route."""
    assert worded_routes(ROUTES).match(words_vector(text)).name == route


def test_a_match_tells_how_it_was_found() -> None:
    """Below the threshold the nearest route is told all the same."""
    space = worded_routes({"billing": RouteExamples(examples=("refund my payment",), words_threshold=0.9)})
    assert space.match(words_vector("refund my payment")) == RouteMatch("billing", 1.0, "billing", "words")
    near = space.match(words_vector("refund the order"))
    assert (near.name, near.nearest, near.method) == (NO_ROUTE, "billing", "words")
    assert 0 < near.similarity < 0.9


def test_vectors_find_the_route_by_example_and_middle() -> None:
    """The similarity is the mean of two cosines: with the nearest example, and with the middle of all."""
    routes = {"a": RouteExamples(examples=("1", "2"), threshold=0.8), "b": RouteExamples(examples=("3",))}
    space = embedded_routes(routes, {"a": [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)], "b": [(0.0, 0.0, 1.0)]})
    assert space.match((1.0, 0.0, 0.0)) == RouteMatch("a", round((1 + 0.5**0.5) / 2, 4), "a", "embeddings")
    assert space.match((0.6, 0.0, 0.8)).name == "b"
    assert space.match((-1.0, 0.0, 0.0)) == RouteMatch(NO_ROUTE, 0.0, "b", "embeddings")
    assert space.size == 3


@given(st.text(max_size=200), st.text(max_size=200))
def test_likeness_by_words_is_a_cosine(one: str, other: str) -> None:
    """Between 0 and 1, the same both ways, and 1 with itself."""
    first, second = words_vector(one), words_vector(other)
    assert 0 <= words_alike(first, second) <= 1
    assert words_alike(first, second) == pytest.approx(words_alike(second, first))
    assert not first or words_alike(first, first) == pytest.approx(1)
    assert words_alike(middle_of([first]), first) == pytest.approx(words_alike(first, first))


@pytest.mark.parametrize(
    ("routes", "what"),
    [
        ({}, "no route"),
        ({"none": RouteExamples(examples=("x",))}, "cannot be a route's name"),
        ({"two words": RouteExamples(examples=("x",))}, "cannot be a route's name"),
        (
            {"a": RouteExamples(examples=("Hi  there",)), "b": RouteExamples(examples=("hi there",))},
            "share the example",
        ),
        ({"a": RouteExamples(examples=(" ",))}, "empty example"),
        ({"a": RouteExamples(examples=tuple(map(str, range(1001))))}, "more than 1000"),
    ],
)
def test_routes_that_cannot_be_told_apart_are_refused(routes: dict[str, RouteExamples], what: str) -> None:
    """Before any request."""
    with pytest.raises(ValueError, match=what):
        check_routes(routes)
