"""Which engine each replica of a replayed pipeline has: presets, or numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from kvfleet.config.convert import structure
from kvfleet.config.fields import choice, mapping, number, section
from kvfleet.config.schema import ModelConfig
from kvfleet.config.yaml import parse_yaml
from kvfleet.errors import ConfigError
from kvfleet.sim.spec import EngineSpec

__all__ = ["DEFAULT_PRESET", "PRESETS", "EngineOptions", "SimulatedFleet", "read_fleet_description"]


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


DEFAULT_PRESET = "h100-8b"

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


@attrs.frozen(kw_only=True)
class EngineOptions:
    """One engine: a preset, and what differs from it."""

    preset: str = choice(DEFAULT_PRESET, of=tuple(PRESETS), doc="The engine to begin with.")
    speed: float = number(1.0, gt=0, doc="How many times faster everything goes; 0.5 takes twice as long.")
    cache_tokens: int | None = number(None, ge=1, unit="tokens", doc="Size of the KV cache.")
    prefill_tokens_per_s: float | None = number(None, gt=0, unit="tokens/s", doc="Prompt tokens computed in a second.")
    step_ms: float | None = number(None, gt=0, unit="ms", doc="Time that every step takes, whatever is in it.")
    token_budget: int | None = number(None, ge=1, unit="tokens", doc="Tokens computed in one step.")
    max_running: int | None = number(None, ge=1, doc="Requests in the batch.")
    max_waiting: int | None = number(
        None, ge=0, doc="Requests that may queue; one more is refused. No limit if absent."
    )
    context_tokens: int | None = number(None, ge=1, unit="tokens", doc="Longest prompt and answer together.")

    def spec(self, block_tokens: int) -> EngineSpec:
        """The engine, with blocks of a trace's size."""
        preset = PRESETS[self.preset]
        cache_tokens = preset.cache_tokens if self.cache_tokens is None else self.cache_tokens
        changes: dict[str, Any] = {
            "token_budget": self.token_budget,
            "max_running": self.max_running,
            "max_waiting": self.max_waiting,
            "context_tokens": self.context_tokens,
            "step_s": None if self.step_ms is None else self.step_ms / 1000,
            "prefill_s_per_token": None if self.prefill_tokens_per_s is None else 1 / self.prefill_tokens_per_s,
        }
        given = {name: value for name, value in changes.items() if value is not None}
        if "prefill_s_per_token" in given:  # a rate that was given is the whole rate
            given["prefill_s_per_token_context"] = 0.0
        return attrs.evolve(
            preset.spec,
            speed=self.speed,
            block_tokens=block_tokens,
            cache_blocks=max(cache_tokens // block_tokens, 1),
            **given,
        )


@attrs.frozen(kw_only=True)
class SimulatedFleet:
    """The engines of a fleet."""

    default: EngineOptions = section(EngineOptions, doc="The engine of every replica that is not named below.")
    engines: Mapping[str, EngineOptions] = mapping(
        doc="Engines by replica (`model@endpoint`), by endpoint, or by model; the first of these that is named holds.",
        example={"llama@http://gpu-3:8000": {"speed": 0.5}},
    )

    def options_for(self, model: ModelConfig) -> EngineOptions:
        """The engine of one replica."""
        for key in (model.id, model.endpoint, model.name):
            if key in self.engines:
                return self.engines[key]
        return self.default


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
