"""The part of the vocabulary that describes simulated engines: what `kvfleet replay` puts behind a pipeline."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import attrs

from kvfleet.config.fields import choice, mapping, number, section

__all__ = ["PRESET_NAMES", "EngineOptions", "SimulatedFleet"]

PRESET_NAMES = ("h100-8b", "h200-8b", "a100-8b", "l4-8b", "h100x4-70b")
"""The engines there are numbers for, in `kvfleet.sim.presets`; the first is the usual one."""


@attrs.frozen(kw_only=True)
class EngineOptions:
    """One simulated engine: a preset, and what differs from it."""

    preset: str = choice(PRESET_NAMES[0], of=PRESET_NAMES, doc="The engine to begin with.")
    speed: float = number(1.0, gt=0, doc="How many times faster everything goes; 0.5 takes twice as long.")
    cache_tokens: int | None = number(None, ge=1, unit="tokens", doc="Size of the KV cache.")
    window_tokens: int = number(
        0, ge=0, unit="tokens", doc="Tokens that some of its layers look back on (sliding window); 0 for none."
    )
    window_cache_tokens: int = number(32_768, ge=1, unit="tokens", doc="Size of those layers' KV cache.")
    prefill_tokens_per_s: float | None = number(
        None, gt=0, unit="tokens/s", doc="Prompt tokens computed in a second, however long the prompt."
    )
    step_ms: float | None = number(None, gt=0, unit="ms", doc="Time that every step takes, whatever is in it.")
    token_budget: int | None = number(None, ge=1, unit="tokens", doc="Tokens computed in one step.")
    max_running: int | None = number(None, ge=1, doc="Requests in the batch.")
    max_waiting: int | None = number(
        None, ge=0, doc="Requests that may queue; one more is refused. No limit if absent."
    )
    context_tokens: int | None = number(None, ge=1, unit="tokens", doc="Longest prompt and answer together.")


@attrs.frozen(kw_only=True)
class SimulatedFleet:
    """The simulated engines of a fleet. Live traffic knows nothing of them."""

    default: EngineOptions = section(EngineOptions, doc="The engine of every replica that is not named below.")
    engines: Mapping[str, EngineOptions] = mapping(
        doc="Engines by replica (`model@endpoint`), by endpoint, or by model; the first of these that is named holds.",
        example={"llama@http://gpu-3:8000": {"speed": 0.5}},
    )

    def options_for(self, replica: str, endpoint: str, model: str) -> EngineOptions:
        """The engine of one replica."""
        for key in (replica, endpoint, model):
            if key in self.engines:
                return self.engines[key]
        return self.default

    def unknown(self, names: Collection[str]) -> tuple[str, ...]:
        """Keys of `engines` that are none of these names."""
        return tuple(key for key in self.engines if key not in names)

    def only(self, names: Iterable[str]) -> SimulatedFleet:
        """The same without engines of other names."""
        known = frozenset(names)
        return attrs.evolve(self, engines={key: one for key, one in self.engines.items() if key in known})
