"""The metrics of several workers as one: what one scrape has to say of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import attrs
import orjson
from prometheus_client import CollectorRegistry, Metric, generate_latest

__all__ = ["MergedMetrics", "dumped"]

_ADDED = frozenset({"kvfleet_gateway_in_flight_requests", "kvfleet_in_flight_requests", "kvfleet_queued_prompt_tokens"})
_LEAST = frozenset(
    {"kvfleet_model_health", "kvfleet_cache_trust", "kvfleet_config_last_reload_success_timestamp_seconds"}
)
_MEAN = frozenset(
    {
        "kvfleet_expected_ttfb_seconds",
        "kvfleet_prefill_tokens_per_second",
        "kvfleet_cache_prediction_error_tokens",
    }
)
_HEARD_BY_ALL = "kvfleet_kv_"
"""What every worker hears of the same engine, and what would be counted once for each of them."""

Label = tuple[tuple[str, str], ...]


def dumped(registry: CollectorRegistry) -> bytes:
    """What a registry shows, as JSON."""
    return orjson.dumps(
        [
            [m.name, m.documentation, m.type, [[s.name, s.labels, s.value] for s in m.samples]]
            for m in registry.collect()
        ]
    )


@attrs.frozen
class MergedMetrics:
    """A registry made of the dumps of several.

    Counters and histograms are added. Of gauges, what is in flight is added; of states that may differ the worst is
    shown, of measured times the mean.
    """

    families: Sequence[Metric]

    @classmethod
    def of(cls, dumps: Iterable[bytes]) -> Self:
        """All of them together."""
        told: dict[str, tuple[str, str]] = {}
        values: dict[str, dict[tuple[str, Label], list[float]]] = {}
        for dump in dumps:
            for name, doc, kind, samples in orjson.loads(dump):
                told.setdefault(name, (doc, kind))
                known = values.setdefault(name, {})
                for sample, labels, value in samples:
                    key = (sample, tuple(labels.items()))
                    known.setdefault(key, []).append(math.nan if value is None else value)
        return cls([_family(name, *told[name], values[name]) for name in told])

    def collect(self) -> Iterator[Metric]:
        """The families."""
        yield from self.families

    def restricted_registry(self, names: Iterable[str]) -> MergedMetrics:
        """Only the families with samples of these names."""
        wanted = frozenset(names)
        return MergedMetrics([one for one in self.families if any(s.name in wanted for s in one.samples)])

    def render(self) -> bytes:
        """In Prometheus' text format."""
        registry: Any = self  # only `collect` is asked of it
        return generate_latest(registry)


def _family(name: str, doc: str, kind: str, values: dict[tuple[str, Label], list[float]]) -> Metric:
    family, combine = Metric(name, doc, kind), _rule(name, kind)
    for (sample, labels), found in values.items():
        family.add_sample(sample, dict(labels), combine(found))
    return family


def _rule(name: str, kind: str) -> Callable[[list[float]], float]:
    if name.startswith(_HEARD_BY_ALL):
        return max
    if kind != "gauge" or name in _ADDED:
        return math.fsum
    if name in _LEAST:
        return min
    return _mean if name in _MEAN else max


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
