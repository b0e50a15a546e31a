"""What a router does beside its requests: it asks the engines, listens to them, and looks at its own event loop."""

from __future__ import annotations

from collections.abc import Mapping

import anyio
import attrs

from kvfleet.adapters.base import InferenceAdapter
from kvfleet.background import until_cancelled
from kvfleet.config.schema import FleetConfig
from kvfleet.plugin.component import Services
from kvfleet.telemetry.collector import Collector
from kvfleet.telemetry.kv_watch import CacheWatch
from kvfleet.telemetry.outliers import Outliers

__all__ = ["Watching"]


@attrs.define
class Watching:
    """Watches one fleet.

    Attributes:
        collector: Asks the engines for their health and their load.
        caches: Listens to what engines tell of their caches.
    """

    config: FleetConfig
    adapters: Mapping[str, InferenceAdapter]
    services: Services
    collector: Collector = attrs.field(init=False)
    caches: CacheWatch = attrs.field(init=False)

    @collector.default
    def _make_collector(self) -> Collector:
        telemetry = self.config.telemetry
        return Collector(
            self.adapters,
            self.services.health,
            self.services.load,
            clock=self.services.clock,
            health_interval_s=telemetry.health_check_interval_seconds,
            load_interval_s=telemetry.load_poll_interval_seconds,
        )

    @caches.default
    def _make_caches(self) -> CacheWatch:
        return CacheWatch(self.services.caches, self.adapters, self.services.load)

    async def run(self) -> None:
        """Ask and listen until cancelled."""
        services = self.services
        async with anyio.create_task_group() as group:
            outliers = Outliers(services.health, services.load, self.config.health.outlier_detection)
            group.start_soon(until_cancelled, self.collector.run)
            group.start_soon(until_cancelled, outliers.run)
            group.start_soon(until_cancelled, self.caches.run)
