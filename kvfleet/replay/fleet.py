"""Which engine each replica of a replayed pipeline has: presets, or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from kvfleet.config.convert import structure
from kvfleet.config.findings import Path as Place
from kvfleet.config.findings import did_you_mean
from kvfleet.config.origin import NOWHERE, Origin
from kvfleet.config.schema import ModelConfig
from kvfleet.config.simulation import EngineOptions, SimulatedFleet
from kvfleet.config.yaml import parse_yaml
from kvfleet.errors import ConfigError
from kvfleet.sim.presets import PRESETS
from kvfleet.sim.spec import EngineSpec

__all__ = ["check_names", "names_of", "read_fleet_description", "spec_of", "specs_of"]


def spec_of(options: EngineOptions, block_tokens: int) -> EngineSpec:
    """An engine, with blocks of a trace's size."""
    preset = PRESETS[options.preset]
    cache_tokens = preset.cache_tokens if options.cache_tokens is None else options.cache_tokens
    rate = options.prefill_tokens_per_s
    changes: dict[str, Any] = {
        "token_budget": options.token_budget,
        "max_running": options.max_running,
        "max_waiting": options.max_waiting,
        "context_tokens": options.context_tokens,
        "step_s": None if options.step_ms is None else options.step_ms / 1000,
        "prefill_s_per_token": None if rate is None else 1 / rate,
        # A rate that was given is the whole rate.
        "prefill_s_per_token_context": None if rate is None else 0.0,
        "hidden_tokens": None if rate is None else 0,
    }
    return attrs.evolve(
        preset.spec,
        speed=options.speed,
        block_tokens=block_tokens,
        cache_blocks=max(cache_tokens // block_tokens, 1),
        window_tokens=options.window_tokens,
        window_cache_blocks=max(options.window_cache_tokens // block_tokens, 1),
        **{name: value for name, value in changes.items() if value is not None},
    )


def specs_of(fleet: SimulatedFleet, models: Sequence[ModelConfig], block_tokens: int) -> dict[str, EngineSpec]:
    """By replica: its engine."""
    return {one.id: spec_of(fleet.options_for(one.id, one.endpoint, one.name), block_tokens) for one in models}


def check_names(
    fleet: SimulatedFleet, models: Sequence[ModelConfig], origin: Origin = NOWHERE, path: Place = ()
) -> None:
    """Refuse engines of nobody.

    Args:
        fleet: The description.
        models: The replicas there are.
        origin: The file it stands in, and
        path: where in it.

    Raises:
        ConfigError: naming them.
    """
    known = names_of(models)
    findings = [
        origin.finding(
            (*path, "engines", key),
            f"no replica, endpoint or model is called {key!r}",
            did_you_mean(key, known),
            code="unknown-engine",
        )
        for key in fleet.unknown(known)
    ]
    if findings:
        raise ConfigError(findings)


def names_of(models: Sequence[ModelConfig]) -> frozenset[str]:
    """What the engines of these replicas may be called by."""
    return frozenset(name for one in models for name in (one.id, one.endpoint, one.name))


def read_fleet_description(path: Path) -> SimulatedFleet:
    """Read a fleet description.

    Raises:
        ConfigError: with every finding.
        OSError: if the file cannot be read.
    """
    parsed = parse_yaml(path.read_text(encoding="utf-8"), file=str(path))
    if not parsed.is_yaml:
        raise ConfigError(parsed.findings)
    fleet, findings = structure(SimulatedFleet, {} if parsed.data is None else parsed.data, origin=parsed.origin)
    findings = [*parsed.findings, *findings]
    if fleet is None or findings:
        raise ConfigError(findings)
    return fleet
