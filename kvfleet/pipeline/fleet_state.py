"""What is known of a fleet, as plain data: for health checks, the dashboard and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvfleet.cache.kv_state import KVMode
from kvfleet.config.schema import FleetConfig, ModelConfig
from kvfleet.pipeline.stage import Pipeline
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Kind
from kvfleet.turns import Steps

__all__ = ["cache_mode", "fleet_state_steps", "replica_steps"]


def replica_steps(
    config: FleetConfig, models: Sequence[ModelConfig], pipeline: Pipeline, services: Services
) -> Steps[dict[str, Any]]:
    """What is known of the replicas alone, without asking anybody; holds no secret."""
    replicas = []
    for model in models:
        replicas.append(_replica_state(model, pipeline, services))
        yield
    return {
        "fleet": config.fleet_name,
        "pipeline": pipeline.hash,
        "strategy": pipeline.select.name,
        "replicas": replicas,
    }


def fleet_state_steps(
    config: FleetConfig, models: Sequence[ModelConfig], pipeline: Pipeline, services: Services, *, most: int | None
) -> Steps[dict[str, Any]]:
    """The same with rate limits, and what the components say of themselves: budgets, caches, what was learned.

    Args:
        config: The fleet's.
        models: Its replicas.
        pipeline: Its pipeline.
        services: Its services.
        most: Of long lists, such as the accounts of tenants, only so many; all if None.
    """
    found = yield from replica_steps(config, models, pipeline, services)
    stages = {}
    named = [one.strategy for one in config.aliases.values()]
    named += [one.strategy for one in config.tenants.values()]
    others = [pipeline.strategies[name] for name in named if name]
    for stage in (*pipeline.all_stages, *others):
        if most is not None and callable(brief := getattr(stage.component, "brief_state", None)):
            stages[stage.key] = dict(brief(most))
        elif callable(read := getattr(stage.component, "state", None)):
            stages[stage.key] = dict(read())
        yield
    return {**found, "rate_limits": services.limits.summary(), "stages": stages}


def _replica_state(model: ModelConfig, pipeline: Pipeline, services: Services) -> dict[str, Any]:
    health, load = services.health, services.load
    engine = load.engine(model.endpoint)
    limit = services.limits.state(model.id)
    mode, why = cache_mode(model, pipeline, services)
    return {
        "model": model.name,
        "endpoint": model.endpoint,
        "provider": model.provider,
        "enabled": model.enabled,
        "healthy": health.is_available(model.endpoint) and model.id not in health.unserved,
        "reason": health.unavailable_reason(model.endpoint) or health.unserved.get(model.id, ""),
        "breaker": health.breaker_state(model.endpoint),
        "share": health.share_now(model.endpoint),
        "panic": model.name in health.panicking,
        "in_flight": load.in_flight(model.id),
        "expected_ttfb_s": load.expected_ttfb_s(model.id),
        "running": engine.running if engine else None,
        "waiting": engine.waiting if engine else None,
        "kv_usage": engine.kv_usage if engine else None,
        "prefix_hit_rate": engine.prefix_hit_rate if engine else None,
        "rate_limit_left": limit.capacity if limit else None,
        "rate_limited_for_s": limit.wait_s if limit and limit.is_throttled else None,
        "cache_mode": mode,
        "cache_why": why,
    }


def cache_mode(model: ModelConfig, pipeline: Pipeline, services: Services) -> tuple[str, str]:
    """How a replica's KV cache is known: by its engine, by what went there, or not at all; and why no better."""
    told = services.caches.mode(model.id)
    if told is not None and told[0] in (KVMode.EXACT, KVMode.DEGRADED):
        return told[0], told[1]
    learns = any(stage.kind is Kind.AFFINITY for stage in pipeline.stages)
    mode = KVMode.APPROXIMATE if learns else KVMode.LOAD_ONLY
    return mode, told[1] if told is not None else ""
