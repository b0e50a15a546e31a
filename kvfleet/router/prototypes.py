"""Domains as directions in an embedder's space.

A prototype is a direction and a bias; a prompt's domain is the one whose direction its vector follows most, and the
confidence is its share of the softmax. The combination adds what words and phrases say. Those that come with kvfleet
belong to the embedder ``minilm`` and were trained by ``benchmarks/domain_prototypes.py``.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
from collections.abc import Sequence
from operator import mul
from pathlib import Path
from typing import Any

import attrs
import orjson

from kvfleet.errors import ComponentError
from kvfleet.router.semantic import beginning_and_end, keyword_scores
from kvfleet.router.vectors import Vector

__all__ = ["VECTOR_SCALE", "Prototypes", "keyword_weights", "shipped_prototypes"]

VECTOR_SCALE = 8.0
"""Unit vectors times this are what prototypes are trained on."""
_MOST_KEYWORD_WEIGHT = 4.0
_FORMAT = 1


def keyword_weights(text: str) -> list[float]:
    """By domain, the weight of its words and phrases in a text, 0..4; in the order of the keyword tables."""
    scores = keyword_scores(beginning_and_end(text))
    return [min(score, _MOST_KEYWORD_WEIGHT) for score in scores.values()]


@attrs.frozen(kw_only=True)
class Prototypes:
    """Trained prototypes.

    Attributes:
        embedder: Whose vectors they speak of.
        domains: The domains, in the order of the rows.
        weights, biases: By vectors alone.
        combined_weights, combined_biases, keywords: By vectors and `keyword_weights` together.
    """

    embedder: str
    domains: Sequence[str]
    weights: Sequence[Sequence[float]] = attrs.field(repr=False)
    biases: Sequence[float] = attrs.field(repr=False)
    combined_weights: Sequence[Sequence[float]] = attrs.field(repr=False)
    combined_biases: Sequence[float] = attrs.field(repr=False)
    keywords: Sequence[Sequence[float]] = attrs.field(repr=False)

    def classify(self, vector: Vector, words: Sequence[float] | None = None) -> tuple[str, float]:
        """The domain of a prompt, and how sure that is, 0..1.

        Args:
            vector: Its unit vector.
            words: Its `keyword_weights`, to combine both; None for the vector alone.
        """
        if words is None:
            told = self._told(vector, self.weights, self.biases)
        else:
            told = self._told(vector, self.combined_weights, self.combined_biases)
            told = [one + sum(map(mul, row, words)) for one, row in zip(told, self.keywords, strict=True)]
        best = max(range(len(told)), key=told.__getitem__)
        share = 1 / sum(math.exp(one - told[best]) for one in told)
        return self.domains[best], round(share, 4)

    @staticmethod
    def _told(vector: Vector, weights: Sequence[Sequence[float]], biases: Sequence[float]) -> list[float]:
        return [VECTOR_SCALE * sum(map(mul, row, vector)) + bias for row, bias in zip(weights, biases, strict=True)]

    def to_json(self) -> bytes:
        """As a file keeps it."""
        plain: dict[str, Any] = {"format": _FORMAT, **attrs.asdict(self)}
        return orjson.dumps(plain) + b"\n"

    @classmethod
    def from_json(cls, content: bytes, place: str) -> Prototypes:
        """Read what `to_json` wrote.

        Raises:
            ComponentError: for anything else; it names the place.
        """
        try:
            plain = orjson.loads(content)
            found = cls(**{key: value for key, value in plain.items() if key != "format"})
            count = len(found.domains)
            rows = (found.weights, found.biases, found.combined_weights, found.combined_biases, found.keywords)
            is_whole = plain["format"] == _FORMAT and count > 1 and all(len(one) == count for one in rows)
        except (ValueError, KeyError, TypeError, AttributeError):
            is_whole = False
        if not is_whole:
            raise ComponentError(f"{place} holds no prototypes; train them with benchmarks/domain_prototypes.py")
        return found

    @classmethod
    def load(cls, path: Path) -> Prototypes:
        """Read a file.

        Raises:
            ComponentError: if it cannot be read, or holds something else.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ComponentError(f"the prototypes {path} cannot be read: {error.strerror}") from error
        return cls.from_json(content, str(path))


@functools.cache
def shipped_prototypes() -> Prototypes:
    """Those that come with kvfleet; read once, when first asked for."""
    content = (importlib.resources.files("kvfleet.router") / "data" / "domains_minilm.json").read_bytes()
    return Prototypes.from_json(content, "the file that comes with kvfleet")
