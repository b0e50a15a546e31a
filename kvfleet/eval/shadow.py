"""Shadow traffic: requests that were answered are sent to other models too, to see how these would have done."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import anyio
import attrs

from kvfleet.adapters.base import ChatRequest, ChatResponse, InferenceAdapter
from kvfleet.adapters.call import Call
from kvfleet.clock import Clock, SystemClock
from kvfleet.eval.asking import Asked, ask, call_for, similarity

__all__ = ["SHADOW_HEADER", "ShadowComparison", "ShadowResult", "ShadowTrafficManager", "is_sampled"]

SHADOW_HEADER = ("x-kvfleet-shadow", "1")
"""What marks a mirrored call, for engines and proxies that count or bill."""

_SCRAMBLE = 2_654_435_761  # odd, so that each seed has an image of its own (Knuth's multiplicative hashing)


def is_sampled(seed: int, share: float) -> bool:
    """True for so great a share of all 32-bit seeds; the same seed always gives the same.

    >>> round(sum(is_sampled(seed, 0.25) for seed in range(10_000)) / 10_000, 2)
    0.25
    """
    return (seed * _SCRAMBLE & 0xFFFFFFFF) < share * 0x1_0000_0000


@attrs.frozen
class ShadowResult:
    """How one shadow model did.

    Attributes:
        model: The model.
        response: Its answer; None if there was none, or outputs are not kept.
        error: Why there was none; empty if there was one.
        latency_ms: Milliseconds until its whole answer.
        completion_tokens: Length of its answer, if reported.
        similarity: How alike its answer is to the one given, 0 to 1; None if one of them is missing.
    """

    model: str
    response: ChatResponse | None = attrs.field(default=None, repr=False)
    error: str = ""
    latency_ms: float = 0.0
    completion_tokens: int | None = None
    similarity: float | None = None


@attrs.frozen
class ShadowComparison:
    """The answer that was given, beside those of the shadow models."""

    request_id: str
    primary_model: str
    primary_response: ChatResponse | None = attrs.field(repr=False)
    shadow_results: tuple[ShadowResult, ...] = ()

    def without_outputs(self) -> ShadowComparison:
        """The same without what was said."""
        results = tuple(attrs.evolve(result, response=None) for result in self.shadow_results)
        return attrs.evolve(self, primary_response=None, shadow_results=results)


@attrs.define
class ShadowTrafficManager:
    """Mirrors a share of requests to shadow models and compares; for Python programs that have adapters of their own.

    In a pipeline, `observe.shadow` does this under the pipeline's filters; this class applies no policy.

    Args:
        sample_rate: Share of requests to mirror, 0 to 1.
        shadow_models: Whom to ask, by name.
        log_outputs: Keep answers among the comparisons; False keeps measures only.
        enabled: False mirrors nothing.
        timeout_s: Longest wait for one shadow model's answer.
        most_results: Comparisons kept; the oldest go first.
        clock: For latencies.
        random: Draws the sample.

    >>> ShadowTrafficManager(sample_rate=1.0, shadow_models=["next"]).should_shadow()
    True
    """

    sample_rate: float = attrs.field(default=0.1, validator=[attrs.validators.ge(0), attrs.validators.le(1)])
    shadow_models: Sequence[str] = ()
    log_outputs: bool = True
    enabled: bool = True
    timeout_s: float = 30.0
    most_results: int = 1000
    clock: Clock = attrs.field(factory=SystemClock, repr=False)
    random: random.Random = attrs.field(factory=random.Random, repr=False)
    _comparisons: deque[ShadowComparison] = attrs.field(init=False, repr=False)
    _mirrored: int = attrs.field(init=False, default=0)
    _failed: int = attrs.field(init=False, default=0)

    @_comparisons.default
    def _make_comparisons(self) -> deque[ShadowComparison]:
        return deque(maxlen=self.most_results)

    def should_shadow(self) -> bool:
        """True for `sample_rate` of the requests."""
        return self.enabled and bool(self.shadow_models) and is_sampled(self.random.getrandbits(32), self.sample_rate)

    async def execute_shadow(
        self,
        request: ChatRequest,
        primary_model: str,
        primary_response: ChatResponse | None,
        adapters: Mapping[str, InferenceAdapter],
        request_id: str = "",
    ) -> ShadowComparison:
        """Ask every shadow model at once, and compare; a model that fails, or is too slow, is a result with an error.

        Args:
            request: What was asked.
            primary_model: Who answered.
            primary_response: The answer, to be compared with; None compares nothing but times.
            adapters: By model name.
            request_id: The request's identifier.
        """
        call = call_for(request, timeout_s=self.timeout_s, headers=(SHADOW_HEADER,))
        found = await self.mirror(call, {name: adapters.get(name) for name in self.shadow_models})
        results = tuple(_result(name, asked, primary_response) for name, asked in found.items())
        comparison = ShadowComparison(request_id, primary_model, primary_response, results)
        self._comparisons.append(comparison if self.log_outputs else comparison.without_outputs())
        return comparison

    async def mirror(self, call: Call, adapters: Mapping[str, InferenceAdapter | None]) -> dict[str, Asked]:
        """Make one call to each, at once; how it went for each, in their order."""
        found: dict[str, Asked] = dict.fromkeys(adapters, Asked())

        async def one(name: str, adapter: InferenceAdapter) -> None:
            found[name] = await ask(adapter, call, timeout_s=self.timeout_s, clock=self.clock)

        async with anyio.create_task_group() as group:
            for name, adapter in adapters.items():
                if adapter is None:
                    found[name] = Asked(error=f"no adapter for {name!r}", fault="connect")
                else:
                    group.start_soon(one, name, adapter)
        self._mirrored += len(found)
        self._failed += sum(asked.response is None for asked in found.values())
        return found

    def get_comparisons(self, limit: int | None = None) -> list[ShadowComparison]:
        """The last comparisons, the newest last."""
        kept = list(self._comparisons)
        return kept if limit is None else kept[max(len(kept) - limit, 0) :]

    @property
    def stats(self) -> dict[str, Any]:
        """Counts so far."""
        return {
            "enabled": self.enabled,
            "sample_rate": self.sample_rate,
            "shadow_models": list(self.shadow_models),
            "comparisons": len(self._comparisons),
            "mirrored": self._mirrored,
            "failed": self._failed,
        }

    def clear_results(self) -> None:
        """Forget the comparisons."""
        self._comparisons.clear()


def _result(name: str, asked: Asked, primary: ChatResponse | None) -> ShadowResult:
    response = asked.response
    return ShadowResult(
        model=name,
        response=response,
        error=asked.error,
        latency_ms=asked.latency_ms,
        completion_tokens=response.usage.completion_tokens if response and response.usage else None,
        similarity=similarity(primary.content, response.content) if primary and response else None,
    )
