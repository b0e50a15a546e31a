"""Which engine each replica of a replayed pipeline has: presets, or numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from kvfleet.config.convert import structure
from kvfleet.config.findings import NOWHERE, Origin, did_you_mean
from kvfleet.config.findings import Path as Place
from kvfleet.config.schema import ModelConfig
from kvfleet.config.simulation import EngineOptions, SimulatedFleet
from kvfleet.config.yaml import parse_yaml
from kvfleet.errors import ConfigError
from kvfleet.sim.spec import EngineSpec

__all__ = ["PRESETS", "Preset", "check_names", "names_of", "read_fleet_description", "spec_of", "specs_of"]


@attrs.frozen(kw_only=True)
class Preset:
    """An engine by what it is: the model and the machine.

    Attributes:
        doc: In words.
        spec: Its pace; blocks are counted when a trace is known.
        cache_tokens: Tokens of its KV cache.
    """

    doc: str
    spec: EngineSpec
    cache_tokens: int


PRESETS: Mapping[str, Preset] = {
    "a100-8b": Preset(
        doc="A model of 8 billion parameters in bf16 on one A100 80 GB.",
        spec=EngineSpec(
            token_budget=2048,
            max_running=256,
            step_s=0.0105,
            prefill_s_per_token=1.03e-4,
            prefill_s_per_token_context=3.4e-9,
            decode_s_per_context_token=8.2e-8,
        ),
        cache_tokens=410_000,
    ),
    "h100-8b": Preset(
        doc="A model of 8 billion parameters in bf16 on one H100 80 GB.",
        spec=EngineSpec(
            token_budget=8192,
            max_running=512,
            step_s=0.0068,
            prefill_s_per_token=3.2e-5,
            prefill_s_per_token_context=1.1e-9,
            decode_s_per_context_token=4.9e-8,
        ),
        cache_tokens=410_000,
    ),
    "l4-8b": Preset(
        doc="A model of 8 billion parameters in bf16 on one L4 24 GB.",
        spec=EngineSpec(
            token_budget=2048,
            max_running=128,
            step_s=0.0677,
            prefill_s_per_token=2.64e-4,
            prefill_s_per_token_context=8.7e-9,
            decode_s_per_context_token=5.5e-7,
        ),
        cache_tokens=35_000,
    ),
    "h100x4-70b": Preset(
        doc="A model of 70 billion parameters in bf16 on four H100 80 GB.",
        spec=EngineSpec(
            token_budget=8192,
            max_running=512,
            step_s=0.0161,
            prefill_s_per_token=7.1e-5,
            prefill_s_per_token_context=1.3e-9,
            decode_s_per_context_token=3.1e-8,
        ),
        cache_tokens=420_000,
    ),
}
"""Engines by name.

Their paces are worked out from the machines' data sheets, not measured: half the peak of dense bf16 arithmetic for
prompts (2 operations for a parameter and a token; 4 * layers * width for a pair of tokens), four fifths of the memory's
bandwidth for answers (the weights once a step, the KV cache of each token looked back on) and 2.5 ms a step for all
else; the KV cache has what nine tenths of the memory leave. They are for comparing pipelines with each other.
"""


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
        "prefill_s_per_token_context": None if rate is None else 0.0,  # a rate that was given is the whole rate
    }
    return attrs.evolve(
        preset.spec,
        speed=options.speed,
        block_tokens=block_tokens,
        cache_blocks=max(cache_tokens // block_tokens, 1),
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
