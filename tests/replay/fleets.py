"""Fleets and traces for the replay's tests."""

from __future__ import annotations

from typing import Any

from kvfleet.config.schema import FallbackConfig, FleetConfig, ModelConfig
from kvfleet.plugin.manager import ComponentTable, discover
from kvfleet.replay.driver import Replay
from kvfleet.replay.generate import AgentSessions, SharedPrefix
from kvfleet.replay.traces import RequestTrace

TABLE: ComponentTable = discover()


def fleet(replicas: int = 4, strategy: str = "hybrid_score", **options: Any) -> FleetConfig:
    """One model on some replicas, with patience."""
    first, *more = (f"http://engine-{i}:8000" for i in range(replicas))
    model = ModelConfig(name="m", provider="vllm", endpoint=first, replicas=tuple(more), timeout_seconds=3600)
    return FleetConfig(
        **{"models": (model,), "strategy": strategy, "fallback": FallbackConfig(timeout_ms=3_600_000)} | options
    )


def shared_prefix(requests: int = 200, seed: int = 1, **options: Any) -> RequestTrace:
    """Questions under a few system prompts."""
    return SharedPrefix(**{"requests": requests, "prompts": 5, "rate_per_s": 40.0} | options).generate(seed)


def sessions(count: int = 20, seed: int = 1, **options: Any) -> RequestTrace:
    """Conversations of agents."""
    return AgentSessions(**{"sessions": count, "turns": 4} | options).generate(seed)


def replayed(trace: RequestTrace, config: FleetConfig | None = None, **options: Any) -> Replay:
    """A replay, not run yet."""
    return Replay(config=config or fleet(), trace=trace, table=TABLE, **options)
