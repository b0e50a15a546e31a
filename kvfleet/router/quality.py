"""The weaker model where it suffices, the stronger one where it does not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from kvfleet.config.fields import number, text
from kvfleet.config.schema import ModelConfig
from kvfleet.router.replicas import Replicas
from kvfleet.router.scoring import Ranking, ScoringContext, arranged
from kvfleet.router.semantic import question_in
from kvfleet.router.sufficiency import Sufficiency, shipped_sufficiency

__all__ = ["QualityThresholdStrategy"]

_NEUTRAL = ScoringContext()
_USUAL_QUALITY = 0.8
_BINS = 256
_FIRST_COUNTS = 200.0
"""How many requests the training's distribution counts for, before a fleet has seen its own."""
_FORGETTING = 1.0005
"""Each request counts so much more than the one before: half of what counts is of the last 1,400."""
_HEAVIEST = 1e9


@attrs.define
class _Traffic:
    """The chances of recent requests as a histogram in which the older count less."""

    counts: list[float]
    newest: float = 1.0

    @classmethod
    def as_in(cls, model: Sufficiency) -> _Traffic:
        """As the training's prompts were."""
        counts = [0.0] * _BINS
        steps = len(model.shares) - 1
        for low, high in itertools.pairwise(model.shares):
            counts[_bin((low + high) / 2)] += _FIRST_COUNTS / steps
        return cls(counts)

    def add(self, chance: float) -> None:
        """Count one request."""
        self.newest *= _FORGETTING
        self.counts[_bin(chance)] += self.newest
        if self.newest > _HEAVIEST:
            self.counts = [count / self.newest for count in self.counts]
            self.newest = 1.0

    def below(self, share: float) -> float:
        """The chance below which that share of the requests lies."""
        left = share * sum(self.counts)
        for place, count in enumerate(self.counts):
            if count >= left:
                return (place + (left / count if count else 0.0)) / _BINS
            left -= count
        return 1.0


def _bin(chance: float) -> int:
    return min(int(chance * _BINS), _BINS - 1)


@attrs.define(kw_only=True)
class QualityThresholdStrategy:
    """Send a prompt to the weaker model if that will probably do, and to the stronger one if not.

    The chance is predicted from the prompt's last question alone, before anybody is called. Say what you want in one of
    three ways: a threshold of the chance, a share of calls that may go to the stronger model (it follows your own
    traffic), or the share of the quality between the two that is to be kept (as on the prompts of the training). All
    other models stay in the ranking by their quality, from the side chosen.
    """

    threshold: float | None = number(None, ge=0, le=1, doc="Least chance at which the weaker model gets the prompt.")
    strong_share: float | None = number(None, ge=0, le=1, doc="Share of requests for the stronger model.")
    quality: float | None = number(
        None, ge=0, le=1, doc="Share of the quality between the two models to keep; 0.8 if nothing is said."
    )
    weak: str = text("", doc="The weaker model; the one of the least quality if empty.", refers_to="model")
    strong: str = text("", doc="The stronger model; the one of the greatest quality if empty.", refers_to="model")
    weights: str = text(
        "",
        doc="A file of weights trained on outcomes of your own by `benchmarks/quality_threshold.py`.",
        example="weights.json",
    )
    _model: Sufficiency = attrs.field(init=False, factory=shipped_sufficiency, repr=False, eq=False)
    _traffic: _Traffic = attrs.field(init=False, repr=False, eq=False)
    _fixed: float | None = attrs.field(init=False, default=None, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        """Check that one thing is wanted.

        Raises:
            ValueError: for two, or for one model that is to be both.
        """
        said = [name for name in ("threshold", "strong_share", "quality") if getattr(self, name) is not None]
        if len(said) > 1:
            raise ValueError(f"{' and '.join(said)} exclude each other: keep one")
        if self.weak and self.weak == self.strong:
            raise ValueError("the weaker model cannot be the stronger one too")
        self._ready()

    def _ready(self) -> None:
        """Work out the threshold, where it does not follow the traffic."""
        self._traffic = _Traffic.as_in(self._model)
        if self.threshold is not None:
            self._fixed = self.threshold
        elif self.strong_share is None:
            quality = _USUAL_QUALITY if self.quality is None else self.quality
            self._fixed = self._model.threshold_for(self._model.share_for(quality))

    def provision(self, services: Any) -> None:  # noqa: ARG002 - the contract's signature
        """Read the weights, if a file is named.

        Raises:
            ComponentError: if it cannot be read, or holds something else.
        """
        if self.weights:
            self._model = Sufficiency.load(Path(self.weights).expanduser())
            self._ready()

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank models from the weaker one upwards, or from the stronger one downwards."""
        context = context or _NEUTRAL
        chance = self._model.chance(question_in(context))
        threshold = self._threshold(chance, dry_run=context.dry_run)
        suffices = chance >= threshold
        replicas = Replicas.of(models, context)
        names = self._order(models, suffices=suffices)
        places = {name: place for place, name in enumerate(names)}
        totals = [1 - places[model.name] / len(names) for model in models]
        terms = {"chance": [chance] * len(models), "threshold": [threshold] * len(models)}
        mode = "the weaker model suffices" if suffices else "the stronger model is needed"
        return arranged(models, replicas.order(names), totals, terms=terms, mode=mode)

    def _threshold(self, chance: float, *, dry_run: bool) -> float:
        if self._fixed is not None:
            return self._fixed
        assert self.strong_share is not None  # noqa: S101 - else it is fixed
        threshold = self._traffic.below(self.strong_share)
        if not dry_run:
            self._traffic.add(chance)
        return threshold

    def _order(self, models: Sequence[ModelConfig], *, suffices: bool) -> list[str]:
        """The models' names from the side chosen."""
        quality: dict[str, float] = {}
        for model in models:
            quality.setdefault(model.name, model.quality_score)
        names = sorted(quality, key=quality.__getitem__, reverse=not suffices)
        pair = (self.weak, self.strong) if suffices else (self.strong, self.weak)
        named = [name for name in pair if name in quality]
        return named + [name for name in names if name not in named]

    def state(self) -> dict[str, float]:
        """The threshold in force."""
        share = 0.0 if self.strong_share is None else self.strong_share
        return {"threshold": self._traffic.below(share) if self._fixed is None else self._fixed}
