"""How near a prompt is to what models are described to be good at."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs

from kvfleet.router.embedding import MINILM, Embedder, Embeddings, PromptEmbedding, find_embedder
from kvfleet.router.scoring import ScoringContext
from kvfleet.router.vectors import Vector, cosine

__all__ = ["Nearness"]

_FAR, _NEAR = 0.05, 0.35
"""Cosines of a prompt and a description that count as no match and as a full one (`benchmarks/routes.py`)."""


@attrs.define
class Nearness:
    """Compares prompts with descriptions by their vectors.

    In a pipeline the vectors come from the stage `classify.embedding`, and descriptions are learned as the router
    opens. A Python program that calls a strategy by itself has no such stage: then they are made on the spot.

    Args:
        embeddings: What makes vectors in a pipeline; None without one.
    """

    embeddings: Embeddings | None = None
    _learned: dict[str, Vector] = attrs.field(init=False, factory=dict, repr=False)
    _embedder: Embedder | None = attrs.field(init=False, default=None, repr=False)

    async def learn(self, descriptions: Mapping[str, str]) -> None:
        """Make the descriptions' vectors.

        Raises:
            EmbeddingError: if they cannot be made.
        """
        if self.embeddings is not None:
            vectors = await self.embeddings.all_vectors(list(descriptions.values()))
            self._learned = dict(zip(descriptions, vectors, strict=True))

    def of_prompt(
        self, descriptions: Mapping[str, str], context: ScoringContext, question_in: Callable[[ScoringContext], str]
    ) -> Mapping[str, float]:
        """By model, how near its description is to the prompt, 0..1; empty if the prompt has no vector."""
        vector = self._vector(context, descriptions, question_in)
        if vector is None:
            return {}
        return {name: _scaled(cosine(vector, known)) for name, known in self._learned.items()}

    def _vector(
        self, context: ScoringContext, descriptions: Mapping[str, str], question_in: Callable[[ScoringContext], str]
    ) -> Vector | None:
        given = context.metadata.get("embedding")
        if isinstance(given, PromptEmbedding):
            return given.vector if self._learned else None
        if self.embeddings is not None or "prompt" in context.metadata:
            return None
        return self._on_the_spot(descriptions, question_in(context))

    def _on_the_spot(self, descriptions: Mapping[str, str], text: str) -> Vector:
        """For a strategy used without a pipeline.

        Raises:
            ComponentError: if the embedder is not installed.
        """
        if self._embedder is None:
            self._embedder = find_embedder(MINILM)
            vectors = self._embedder.embed(list(descriptions.values()))
            self._learned = dict(zip(descriptions, vectors, strict=True))
        (vector,) = self._embedder.embed([text])
        return vector


def _scaled(nearness: float) -> float:
    return max(0.0, min(1.0, (nearness - _FAR) / (_NEAR - _FAR)))
