"""The chance that the weaker of two models answers a prompt as well as the stronger one would.

A logistic model over the prompt's words (hashed to 4096 places, each word once, their weights shared out over the
square root of their number) and nine figures of its shape. The weights that come with kvfleet were trained by
``benchmarks/quality_threshold.py`` on recorded outcomes of two models over MMLU (Hendrycks et al. 2021, from RouteLLM,
Ong et al. 2024, arXiv:2406.18665). The task, and the measures of ``docs/how-to/semantic.md``, are RouteLLM's; the model
is not: it needs no embedding and no second model, and takes about 0.1 ms.
"""

from __future__ import annotations

import bisect
import functools
import importlib.resources
import itertools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import orjson

from kvfleet.errors import ComponentError

__all__ = ["FIGURES", "PLACES", "Sufficiency", "figures_of", "places_of", "shipped_sufficiency"]

PLACES = 4096
"""How many places words are hashed to."""
FIGURES = ("length", "digits", "signs", "questions", "word_length", "variety", "lines", "capitals", "foreign")
"""The names of the figures of a prompt's shape."""

_FORMAT = 1
_WORDS_SCALE = 3.0
_MOST_CHARACTERS = 8000
"""Of a longer prompt the first and the last half of so many count."""
_WORD = re.compile(r"[a-z]+|\d|[^\w\s]")
_LETTERS = re.compile(r"[a-z]+")
_SIGNS = re.compile(r"[-+*/=^<>()\[\]{}|\\_$]")
_DIGIT = re.compile(r"[0-9]")
_CAPITAL = re.compile(r"[A-Z]")
_FOREIGN = re.compile(r"[^\x00-\x7f]")


def places_of(text: str) -> list[int]:
    """The places of a prompt's words, digits and marks, in order, each once."""
    return sorted({zlib.crc32(word.encode()) % PLACES for word in _WORD.findall(_read(text).lower())})


def figures_of(text: str) -> tuple[float, ...]:
    """The figures of a prompt's shape, in the order of `FIGURES`; each 0 to about 3."""
    text = _read(text)
    size = max(len(text), 1)
    words = _LETTERS.findall(text.lower())
    count = max(len(words), 1)
    return (
        math.log1p(len(text)) / 8,
        min(len(_DIGIT.findall(text)) / size * 8, 2),
        min(len(_SIGNS.findall(text)) / size * 8, 2),
        min(text.count("?"), 3) / 3,
        min(sum(map(len, words)) / count / 8, 3),
        len(set(words)) / count,
        min(text.count("\n"), 20) / 20,
        min(len(_CAPITAL.findall(text)) / size * 8, 3),
        min(len(_FOREIGN.findall(text)) / size * 8, 3),
    )


def _read(text: str) -> str:
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]}\n{text[-half:]}"


@attrs.frozen(kw_only=True)
class Sufficiency:
    """A trained model, and what its training knows of thresholds.

    Attributes:
        bias, words, figures: The weights of nothing, of each place, and of each figure.
        shares: The least chance among the prompts of each hundredth, least first: of 100 prompts as in the training,
            so many are below the entry of that number.
        recovered: The share of the quality between the two models that is recovered if that many hundredths of the
            prompts, those of the least chance, go to the stronger one; from 0 to 100 hundredths.
        name: What it was trained on.
    """

    bias: float
    words: Sequence[float] = attrs.field(repr=False)
    figures: Sequence[float] = attrs.field(repr=False)
    shares: Sequence[float] = attrs.field(repr=False)
    recovered: Sequence[float] = attrs.field(repr=False)
    name: str = ""

    def chance(self, text: str) -> float:
        """The chance that the weaker model suffices, 0..1: that it is right, or the stronger one is not either."""
        places = places_of(text)
        told = sum(map(self.words.__getitem__, places)) * (_WORDS_SCALE / math.sqrt(len(places) or 1))
        told += sum(weight * figure for weight, figure in zip(self.figures, figures_of(text), strict=True))
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, self.bias + told))))

    def share_for(self, quality: float) -> float:
        """The least share of calls to the stronger model that recovers so much of the quality between the two.

        Args:
            quality: 0, that of the weaker model, to 1, that of the stronger one.

        On prompts as in the training; nobody knows of others.
        """
        # A better share than 1 is possible: a few answers of the weaker model are the better ones.
        best = list(itertools.accumulate(self.recovered, max))
        return bisect.bisect_left(best, min(quality, best[-1])) / (len(best) - 1)

    def threshold_for(self, share: float) -> float:
        """The chance below which that share of the training's prompts lies; 0 for none of any, 1 for all."""
        if not 0 < share < 1:
            return float(share >= 1)
        place = share * (len(self.shares) - 1)
        low = min(int(place), len(self.shares) - 2)
        return self.shares[low] + (place - low) * (self.shares[low + 1] - self.shares[low])

    def to_json(self) -> bytes:
        """As a file keeps it."""
        plain: dict[str, Any] = {"format": _FORMAT, **attrs.asdict(self)}
        return orjson.dumps(plain) + b"\n"

    @classmethod
    def from_json(cls, content: bytes, place: str) -> Sufficiency:
        """Read what `to_json` wrote.

        Raises:
            ComponentError: for anything else; it names the place.
        """
        try:
            plain: Mapping[str, Any] = orjson.loads(content)
            found = cls(**{key: value for key, value in plain.items() if key != "format"})
            sizes = (plain["format"], len(found.words), len(found.figures))
            is_whole = sizes == (_FORMAT, PLACES, len(FIGURES)) and min(len(found.shares), len(found.recovered)) > 1
        except (ValueError, KeyError, TypeError, AttributeError):
            is_whole = False
        if not is_whole:
            remedy = "train one with benchmarks/quality_threshold.py"
            raise ComponentError(f"{place} holds no trained model of sufficiency; {remedy}")
        return found

    @classmethod
    def load(cls, path: Path) -> Sufficiency:
        """Read a file.

        Raises:
            ComponentError: if it cannot be read, or holds something else.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ComponentError(f"the trained model {path} cannot be read: {error.strerror}") from error
        return cls.from_json(content, str(path))


@functools.cache
def shipped_sufficiency() -> Sufficiency:
    """The one that comes with kvfleet; read once, when first asked for."""
    content = (importlib.resources.files("kvfleet.router") / "data" / "sufficiency.json").read_bytes()
    return Sufficiency.from_json(content, "the file that comes with kvfleet")
