"""Strategies that only spread the load, replica by replica."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

import attrs

from kvfleet.config.schema import ModelConfig
from kvfleet.router.scoring import Ranking, ScoringContext, arranged, take_turns
from kvfleet.telemetry.load import FleetLoad

__all__ = ["LeastRequestsStrategy", "RandomStrategy", "RoundRobinStrategy"]

_NEUTRAL = ScoringContext()
_MOST_CURSORS = 1024


class HasLoad(Protocol):
    """The part of the services that is used here."""

    @property
    def load(self) -> FleetLoad:
        """The fleet's load."""


@attrs.define
class RoundRobinStrategy:
    """Take the replicas in turn.

    Each set of candidates has a turn of its own, so that requests which not every replica can serve do not upset the
    turns of those which all can. A dry run shows whose turn it is and does not take it.
    """

    _cursors: dict[int, int] = attrs.field(init=False, factory=dict, repr=False, eq=False)

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the replicas from the one whose turn it is."""
        if not models:
            return Ranking((), ())
        key = hash(tuple([model.id for model in models]))
        cursor = self._cursors.get(key, 0) % len(models)
        if not (context or _NEUTRAL).dry_run:
            self._move(key, cursor + 1)
        share = 1 / len(models)
        turned = [*models[cursor:], *models[:cursor]]
        return Ranking(turned, [share] * len(turned), mode="round_robin")

    def _move(self, key: int, cursor: int) -> None:
        if key not in self._cursors and len(self._cursors) >= _MOST_CURSORS:
            del self._cursors[next(iter(self._cursors))]
        self._cursors[key] = cursor


@attrs.define
class RandomStrategy:
    """Choose any replica, each with the same chance."""

    _random: random.Random = attrs.field(init=False, factory=random.Random, repr=False, eq=False)

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the replicas at random: by the context's seed, or anew each time without a context."""
        draw = (context.random() if context is not None else self._random).random
        keys = [draw() for _ in models]
        order = sorted(range(len(models)), key=keys.__getitem__)
        share = 1 / max(len(models), 1)
        return arranged(models, order, [share] * len(models), mode="random")


@attrs.define
class LeastRequestsStrategy:
    """Choose the replica with the fewest requests, ours and those its engine tells of; equals take turns."""

    _load: FleetLoad = attrs.field(init=False, factory=FleetLoad, repr=False, eq=False)

    def provision(self, services: HasLoad) -> None:
        """Use the fleet's load."""
        self._load = services.load

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the replicas by their requests; the totals are 1 for an idle one, 1/2 for one with one request."""
        pending = self._load.pending
        counts = [pending(model.id) for model in models]
        order = sorted(range(len(models)), key=counts.__getitem__)
        if len(order) > 1:
            take_turns(order, (context or _NEUTRAL).seed, counts)
        totals = [1 / (1 + count) for count in counts]
        return arranged(models, order, totals, terms={"requests": counts})
