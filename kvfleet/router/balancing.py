"""Strategies that only spread the load, replica by replica."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

import attrs
import xxhash

from kvfleet.config.fields import number
from kvfleet.config.schema import ModelConfig
from kvfleet.router.scoring import NO_COLUMNS, Ranking, ScoringContext, arranged, take_turns
from kvfleet.telemetry.load import FleetLoad, HasLoad

__all__ = [
    "ConsistentHashStrategy",
    "LeastRequestsStrategy",
    "PowerOfTwoStrategy",
    "RandomStrategy",
    "RoundRobinStrategy",
    "SessionStrategy",
]

_NEUTRAL = ScoringContext()
_MOST_CURSORS = 1024


@attrs.define
class RoundRobinStrategy:
    """Take the replicas in turn.

    What nginx does unless told otherwise (https://nginx.org/en/docs/http/load_balancing.html).

    Each set of candidates has a turn of its own, so that requests which not every replica can serve do not upset the
    turns of those which all can. A dry run shows whose turn it is and does not take it.
    """

    reads: ClassVar = NO_COLUMNS
    reads_affinity: ClassVar = False
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

    def inherit(self, before: RoundRobinStrategy) -> None:
        """Go on with the turns where they were before a reload."""
        self._cursors = before._cursors

    def _move(self, key: int, cursor: int) -> None:
        if key not in self._cursors and len(self._cursors) >= _MOST_CURSORS:
            del self._cursors[next(iter(self._cursors))]
        self._cursors[key] = cursor


@attrs.define
class RandomStrategy:
    """Choose any replica, each with the same chance.

    With round robin what most balancers offer, vllm-router among them (https://github.com/vllm-project/router).
    """

    reads: ClassVar = NO_COLUMNS
    reads_affinity: ClassVar = False
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

    reads: ClassVar = NO_COLUMNS
    reads_affinity: ClassVar = False
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


@attrs.define
class PowerOfTwoStrategy:
    """Draw two replicas and choose the one with fewer requests.

    "The power of two choices" (Mitzenmacher 2001): almost as even as the least loaded of all, and no herd.
    """

    reads: ClassVar = NO_COLUMNS
    reads_affinity: ClassVar = False
    _load: FleetLoad = attrs.field(init=False, factory=FleetLoad, repr=False, eq=False)

    def provision(self, services: HasLoad) -> None:
        """Use the fleet's load."""
        self._load = services.load

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the better of the two first, then the other, then the rest as drawn."""
        order = list(range(len(models)))
        (context or _NEUTRAL).random().shuffle(order)
        requests = [float(self._load.pending(model.id)) for model in models]
        if len(order) > 1 and requests[order[1]] < requests[order[0]]:
            order[:2] = order[1::-1]
        totals = [1 / (1 + count) for count in requests]
        return arranged(models, order, totals, terms={"requests": requests}, mode="two drawn")


@attrs.define
class ConsistentHashStrategy:
    """Give each conversation, or each beginning of a prompt, a replica of its own, unless that one has too much to do.

    Rendezvous hashing (Thaler and Ravishankar 1998): when a replica leaves, only what was its own moves. A replica that
    has `bounded_load` times the average of requests is passed over (consistent hashing with bounded loads, Mirrokni,
    Thorup and Zadimoghaddam 2018).
    """

    reads: ClassVar = NO_COLUMNS
    reads_affinity: ClassVar = False
    bounded_load: float = number(1.25, ge=1, doc="Most requests of a replica, as a multiple of the average.")
    _load: FleetLoad = attrs.field(init=False, factory=FleetLoad, repr=False, eq=False)

    def provision(self, services: HasLoad) -> None:
        """Use the fleet's load."""
        self._load = services.load

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the replicas by their hash, those with too much to do last."""
        context = context or _NEUTRAL
        key = context.session or _beginning(context)
        seed = xxhash.xxh3_64_intdigest(key.encode()) if key else context.seed
        weights = [xxhash.xxh3_64_intdigest(model.id.encode(), seed) / 2**64 for model in models]
        requests = [self._load.pending(model.id) for model in models]
        most = self.bounded_load * (sum(requests) + 1) / max(len(models), 1)
        is_over = [float(count + 1 > most) if most >= 1 else 0.0 for count in requests]
        order = sorted(range(len(models)), key=lambda i: (is_over[i], -weights[i]))
        return arranged(models, order, weights, terms={"over": is_over}, mode="hash")


def _beginning(context: ScoringContext) -> str:
    """What identifies a prompt's beginning: its first blocks, if somebody made them."""
    prompt = context.metadata.get("prompt")
    beginning = getattr(prompt, "beginning", "")
    return beginning if isinstance(beginning, str) else ""


@attrs.define
class SessionStrategy:
    """Keep each conversation where it began; a new one begins where the fewest requests are.

    llm-d's session affinity (https://github.com/llm-d/llm-d-router), as a strategy of its own.

    A conversation is known by the request's session, or else by its beginning. What is remembered is bounded, the
    oldest is forgotten first.
    """

    reads: ClassVar = NO_COLUMNS
    reads_affinity: ClassVar = False
    max_sessions: int = number(100_000, ge=1, doc="Most conversations remembered.")
    _load: FleetLoad = attrs.field(init=False, factory=FleetLoad, repr=False, eq=False)
    _homes: OrderedDict[str, str] = attrs.field(init=False, factory=OrderedDict, repr=False, eq=False)

    def provision(self, services: HasLoad) -> None:
        """Use the fleet's load."""
        self._load = services.load

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the conversation's replica first, then the others by their requests."""
        context = context or _NEUTRAL
        key = context.session or _beginning(context)
        home = self._homes.get(key) if key else None
        requests = [self._load.pending(model.id) for model in models]
        is_away = [float(model.id != home) for model in models]
        order = sorted(range(len(models)), key=lambda i: (is_away[i], requests[i]))
        if len(order) > 1:
            take_turns(order, context.seed, is_away, requests)
        if order and key and not context.dry_run:
            self._keep(key, models[order[0]].id)
        totals = [1 - away + away / (1 + count) / 2 for away, count in zip(is_away, requests, strict=True)]
        return arranged(models, order, totals, terms={"requests": requests}, mode="session" if home else "new session")

    def inherit(self, before: SessionStrategy) -> None:
        """Know the homes of sessions from before a reload."""
        self._homes = before._homes

    def _keep(self, key: str, replica: str) -> None:
        self._homes.pop(key, None)
        self._homes[key] = replica
        if len(self._homes) > self.max_sessions:
            self._homes.popitem(last=False)
