"""Routes of your own: `classify.routes`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import anyio.to_thread
import attrs

from kvfleet.builtin.facts import EMBEDDING, ROUTE, prompt_of
from kvfleet.config.fields import mapping
from kvfleet.errors import ComponentError
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Fact, Kind, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.router.embedding import EmbeddingError, Embeddings, PromptEmbedding
from kvfleet.router.lexical import WordVector, words_vector
from kvfleet.router.routes import (
    RouteExamples,
    RouteMatch,
    RouteSpace,
    check_routes,
    embedded_routes,
    worded_routes,
)
from kvfleet.router.semantic import beginning_and_end
from kvfleet.router.vectors import Vector

__all__ = ["RouteClassifier"]

_MOST_IN_LOOP = 64
"""A vector is compared with so many examples in about a millisecond; more are compared in a thread."""


@attrs.define(kw_only=True)
class RouteClassifier:
    """See which of your routes the user's last message is on, by examples of what people say.

    After `classify.embedding` meanings are compared. Without it, or where there is no vector, words are, and the trace
    says so.
    """

    routes: Mapping[str, RouteExamples] = mapping(
        doc="The routes by name, each with its examples.",
        example={"billing": {"examples": ["I was charged twice", "Where is my invoice?"]}},
    )
    _worded: RouteSpace[WordVector] = attrs.field(init=False, repr=False, eq=False)
    _embedded: RouteSpace[Vector] | None = attrs.field(init=False, default=None, repr=False, eq=False)
    _embeddings: Embeddings | None = attrs.field(init=False, default=None, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        """Check the routes, and place them by their words."""
        check_routes(self.routes)
        self._worded = worded_routes(self.routes)

    def provision(self, services: Services) -> None:
        """Find the embedder that an earlier stage brought, if one did."""
        self._embeddings = services.embeddings

    async def aopen(self) -> None:
        """Place the routes by their meaning.

        Raises:
            ComponentError: if the embedder cannot say what the examples mean.
        """
        if self._embeddings is None or self._embedded is not None:
            return
        texts = [example for route in self.routes.values() for example in route.examples]
        try:
            vectors = iter(await self._embeddings.all_vectors(texts))
        except EmbeddingError as error:
            raise ComponentError(f"classify.routes: the examples got no vectors: {error}") from error
        placed = {name: list(itertools.islice(vectors, len(route.examples))) for name, route in self.routes.items()}
        self._embedded = embedded_routes(self.routes, placed)

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        """Gives `ROUTE`."""
        embedding = ctx.fact_or_none(EMBEDDING)
        if embedding is not None and embedding.vector is not None and self._embedded is not None:
            return {ROUTE: await _match(self._embedded, embedding.vector)}
        vector = words_vector(beginning_and_end(prompt_of(ctx).question))
        found = await _match(self._worded, vector)
        return {ROUTE: attrs.evolve(found, degraded=_why(embedding))}


async def _match(space: RouteSpace[Any], vector: Any) -> RouteMatch:
    if space.size <= _MOST_IN_LOOP:
        return space.match(vector)
    return await anyio.to_thread.run_sync(space.match, vector)


def _why(embedding: PromptEmbedding | None) -> str:
    return "" if embedding is None else embedding.reason


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The stage."""
    yield Component(Kind.CLASSIFY, "routes", RouteClassifier, gives=(ROUTE,))
