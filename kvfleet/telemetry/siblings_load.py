"""What the other workers of a gateway have at each engine, counted as part of what the engine has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from kvfleet.adapters.base import EngineLoad
from kvfleet.config.schema import ModelConfig
from kvfleet.telemetry.load import FleetLoad

__all__ = ["Counts", "SiblingsLoad", "own_counts"]

_FORGET_S = 3.0
"""A worker that says nothing for so long has nothing in flight: it is gone."""

Counts = Mapping[str, tuple[int, int]]
"""By replica: requests whose answer has begun, and such that wait for it."""


@attrs.frozen
class _Base:
    """What an engine said itself, and what was in flight there at that moment, ours and the other workers'."""

    said: EngineLoad = EngineLoad()
    said_s: float = 0.0
    running: int = 0
    waiting: int = 0

    @property
    def counts(self) -> bool:
        """True if the engine counts its requests."""
        return self.said.running is not None or self.said.waiting is not None


_NOTHING_SAID = _Base()


@attrs.define
class SiblingsLoad:
    """Moves what engines are taken to have on by what the other workers did since, or tells it where they say nothing.

    The load of a replica is then known to all workers, as old as their news; it needs nothing of the hot path, because
    an engine's own account is counted already.
    """

    load: FleetLoad
    _told: dict[int, tuple[float, Counts]] = attrs.field(init=False, factory=dict, repr=False)
    _bases: dict[str, _Base] = attrs.field(init=False, factory=dict, repr=False)
    _mine: dict[str, tuple[EngineLoad, int, int]] = attrs.field(init=False, factory=dict, repr=False)

    def hear(self, number: int, counts: Counts, now_s: float) -> None:
        """What a worker has in flight."""
        self._told[number] = now_s, counts

    def apply(self, models: Iterable[ModelConfig], now_s: float) -> None:
        """Bring it to the load of these replicas."""
        for number in [one for one, (when_s, _) in self._told.items() if now_s - when_s > _FORGET_S]:
            del self._told[number]
        at: dict[str, list[str]] = {}
        for model in models:
            at.setdefault(model.endpoint, []).append(model.id)
        for endpoint, replicas in at.items():
            self._apply_at(endpoint, replicas, now_s)

    def others(self, replicas: Iterable[str]) -> tuple[int, int]:
        """What the other workers have at some replicas, together."""
        found = [counts[one] for _, counts in self._told.values() for one in replicas if one in counts]
        return sum(running for running, _ in found), sum(waiting for _, waiting in found)

    def _apply_at(self, endpoint: str, replicas: list[str], now_s: float) -> None:
        own, others = self._own(replicas), self.others(replicas)
        said, mine = self.load.engine(endpoint), self._mine.get(endpoint)
        if said is not None and (mine is None or said is not mine[0]):
            # The engine has spoken: it has counted everybody's.
            known = [found for one in replicas if (found := self.load.of(one)) is not None]
            queued = sum(one.reported_queue for one in known)
            began = sum(one.reported_in_flight for one in known) - queued
            age_s = self.load.age_s(endpoint, now_s) or 0.0
            self._bases[endpoint] = _Base(said, now_s - age_s, began + others[0], queued + others[1])
            mine = None
        base = self._bases.get(endpoint) or _NOTHING_SAID
        if base.counts:
            running = (base.said.running or 0) + own[0] + others[0] - base.running
            waiting = (base.said.waiting or 0) + own[1] + others[1] - base.waiting
        elif any(others) or mine is not None:
            running, waiting = own[0] + others[0], own[1] + others[1]
        else:
            return
        told = attrs.evolve(base.said, running=max(running, 0), waiting=max(waiting, 0))
        if mine is None or mine != (told, *own):
            self._mine[endpoint] = told, *own
            self.load.report(endpoint, told, now_s if base is _NOTHING_SAID else base.said_s)

    def _own(self, replicas: Iterable[str]) -> tuple[int, int]:
        known = [found for one in replicas if (found := self.load.of(one)) is not None]
        return sum(one.decoding for one in known), sum(len(one.prefilling) for one in known)


def own_counts(load: FleetLoad, models: Iterable[ModelConfig]) -> dict[str, tuple[int, int]]:
    """What is in flight here, of replicas where anything is."""
    known = {model.id: load.of(model.id) for model in models}
    return {one: (found.decoding, len(found.prefilling)) for one, found in known.items() if found and found.open}
