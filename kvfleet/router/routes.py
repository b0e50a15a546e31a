"""Routes of your own, each told by some examples of what people say.

A request's similarity to a route is the mean of two cosines: with the example that is most like it, and with the middle
of all examples. The route of the greatest similarity is the request's, if it reaches that route's threshold. Compared
are embeddings where an embedder is at hand, else words (`kvfleet.router.lexical`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Generic, TypeVar

import attrs

from kvfleet.config.fields import listing, number
from kvfleet.router.lexical import WordVector, middle_of, words_alike, words_vector
from kvfleet.router.vectors import Vector, cosine

__all__ = ["NO_ROUTE", "RouteExamples", "RouteMatch", "RouteSpace", "check_routes", "embedded_routes", "worded_routes"]

NO_ROUTE = "none"
"""The route of a request that is like no other."""

EMBEDDINGS, WORDS = "embeddings", "words"
_NAME = re.compile(r"[A-Za-z_][\w.-]{0,63}")
_MOST_EXAMPLES = 1000

V = TypeVar("V")


@attrs.frozen(kw_only=True)
class RouteExamples:
    """One route: what people say who are on it.

    With the usual thresholds most requests are placed rightly, or rightly nowhere, where half of them belong to no
    route (`benchmarks/routes.py`).
    """

    examples: tuple[str, ...] = listing(doc="Requests of this route, as people write them; five to ten are good.", ge=1)
    threshold: float = number(0.45, ge=0, le=1, doc="Least similarity where embeddings are compared.")
    words_threshold: float = number(0.25, ge=0, le=1, doc="Least similarity where words are compared: another scale.")


@attrs.frozen
class RouteMatch:
    """The route of a request.

    Attributes:
        name: The route; ``none`` if the request is like no other.
        similarity: With that route, or with the nearest one, 0..1.
        nearest: The nearest route, whether or not its threshold was reached.
        method: What was compared: ``embeddings`` or ``words``.
        degraded: Why words were compared although an embedder was to be asked; empty if not so.
    """

    name: str = NO_ROUTE
    similarity: float = 0.0
    nearest: str = ""
    method: str = WORDS
    degraded: str = ""


@attrs.frozen
class _Place(Generic[V]):
    """A route in a space of vectors."""

    name: str
    threshold: float
    examples: Sequence[V]
    middle: V


@attrs.frozen
class RouteSpace(Generic[V]):
    """Routes as vectors of one method."""

    method: str
    _alike: Callable[[V, V], float] = attrs.field(repr=False)
    _places: Sequence[_Place[V]] = attrs.field(repr=False)

    @property
    def size(self) -> int:
        """How many examples there are."""
        return sum(len(place.examples) for place in self._places)

    def match(self, vector: V) -> RouteMatch:
        """The route of a request."""
        near = [(self._similarity(vector, place), place) for place in self._places]
        similarity, place = max(near, key=lambda one: one[0])
        name = place.name if similarity >= place.threshold else NO_ROUTE
        return RouteMatch(name, round(max(0.0, similarity), 4), place.name, self.method)

    def _similarity(self, vector: V, place: _Place[V]) -> float:
        alike = self._alike
        return (max([alike(vector, example) for example in place.examples]) + alike(vector, place.middle)) / 2


def worded_routes(routes: Mapping[str, RouteExamples]) -> RouteSpace[WordVector]:
    """Routes by the words of their examples.

    >>> space = worded_routes({"refunds": RouteExamples(examples=("I want my money back", "refund my order"))})
    >>> space.match(words_vector("Can you refund the order?")).name
    'refunds'
    """
    vectors = {name: [words_vector(text) for text in route.examples] for name, route in routes.items()}
    return _space(WORDS, routes, vectors, words_alike, middle_of)


def embedded_routes(routes: Mapping[str, RouteExamples], vectors: Mapping[str, Sequence[Vector]]) -> RouteSpace[Vector]:
    """Routes by the unit vectors of their examples, which somebody has made."""
    return _space(EMBEDDINGS, routes, vectors, cosine, _middle)


def _space(
    method: str,
    routes: Mapping[str, RouteExamples],
    vectors: Mapping[str, Sequence[Any]],
    alike: Callable[[Any, Any], float],
    middle: Callable[[Sequence[Any]], Any],
) -> RouteSpace[Any]:
    least = attrgetter("threshold" if method == EMBEDDINGS else "words_threshold")
    places = [_Place(name, least(route), vectors[name], middle(vectors[name])) for name, route in routes.items()]
    return RouteSpace(method, alike, places)


def _middle(vectors: Sequence[Vector]) -> Vector:
    total = [sum(values) for values in zip(*vectors, strict=True)]
    length = math.sqrt(sum(value * value for value in total)) or 1.0
    return [value / length for value in total]


def check_routes(routes: Mapping[str, RouteExamples]) -> None:
    """Refuse routes that could not be told apart.

    Raises:
        ValueError: for none, a name that conditions cannot read, an example of two routes, or too many examples.
    """
    if not routes:
        raise ValueError("there is no route; add one with its examples")
    home: dict[str, str] = {}
    for name, route in routes.items():
        if not _NAME.fullmatch(name) or name == NO_ROUTE:
            raise ValueError(
                f"{name!r} cannot be a route's name: letters, digits, '.', '-' and '_', and not {NO_ROUTE!r}"
            )
        for example in route.examples:
            plain = " ".join(example.split()).casefold()
            if not plain:
                raise ValueError(f"the route {name!r} has an empty example")
            if home.setdefault(plain, name) != name:
                raise ValueError(f"the routes {home[plain]!r} and {name!r} share the example {example!r}")
    if sum(len(route.examples) for route in routes.values()) > _MOST_EXAMPLES:
        raise ValueError(f"there are more than {_MOST_EXAMPLES} examples; five to ten for each route are enough")
