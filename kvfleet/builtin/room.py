"""Each replica held to as many requests as it may have."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from kvfleet.config.fields import number
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Drop, RoutingContext
from kvfleet.telemetry.load import FleetLoad

__all__ = ["RoomFilter"]


@attrs.define(kw_only=True)
class RoomFilter:
    """Drop replicas that have as many requests as they may, as long as another has room.

    `admit.queue` lets in as many as all replicas may have together; this holds each to its own part of them, whoever
    the strategy would rather have. Stand it after the filters of health and rate limits, so that another is one that
    may be called. If nobody has room, nobody is dropped: who was let in is answered.
    """

    max_in_flight_per_replica: int = number(
        0,
        ge=0,
        unit="requests",
        doc="Most for each replica, those of others that its engine counts included; no limit if 0.",
    )
    _load: FleetLoad = attrs.field(init=False, factory=FleetLoad, repr=False, eq=False)

    def provision(self, services: Services) -> None:
        """Use the fleet's load."""
        self._load = services.load
        services.load.also(services.models)

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        """The drops."""
        most, pending = self.max_in_flight_per_replica, self._load.pending
        if not most:
            return ()
        full = [model for model in ctx.candidates if pending(model.id) >= most]
        if len(full) == len(ctx.candidates):
            return ()
        return [Drop(model, f"it has {most} requests, as many as it may", "in_flight") for model in full]
