"""What a fleet's components are given to work with: made anew, or from the router whose place is taken."""

from __future__ import annotations

from collections.abc import Sequence

from kvfleet.cache.knowledge import CacheKnowledge
from kvfleet.clock import Clock
from kvfleet.config.schema import FleetConfig, ModelConfig
from kvfleet.plugin.component import Services
from kvfleet.telemetry.fleet_limits import FleetLimits
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.metrics import MetricsExporter
from kvfleet.telemetry.rate_limits import RateLimitTracker

__all__ = ["services_of"]


def services_of(
    config: FleetConfig, models: tuple[ModelConfig, ...], clock: Clock, before: Services | None = None
) -> Services:
    """The services of a fleet.

    Args:
        config: The fleet.
        models: Its replicas.
        clock: The time.
        before: Those of the router that is to be succeeded: its health, its load and its counts go on. Limits and
            caches are taken over later, in one step (`Router.take_over`).
    """
    counts = None if before is None else before.metrics
    services = Services(
        clock=clock,
        fleet=config.fleet_name,
        models=models,
        health=HealthManager.of(config.health, models, clock) if before is None else before.health,
        load=FleetLoad(clock) if before is None else before.load,
        limits=_limits_of(config, models, clock),
        caches=CacheKnowledge(clock),
        metrics=MetricsExporter(enabled=config.telemetry.prometheus_enabled, before=counts),
    )
    services.caches.register(models)
    return services


def _limits_of(config: FleetConfig, models: Sequence[ModelConfig], clock: Clock) -> FleetLimits:
    """The fleet's rate limits, of which only what is configured is known."""
    section = config.rate_limits
    limits = FleetLimits(
        RateLimitTracker(
            section.default_rpm, section.default_tpm, section.throttle_threshold, section.cooldown_seconds, clock=clock
        )
    )
    limits.register(models)
    return limits
