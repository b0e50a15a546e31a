"""What the dashboard counts. Every number is read from the metrics, so that it and Prometheus never disagree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from kvfleet.gateway.merging import MergedMetrics
from kvfleet.turns import Steps, at_once

__all__ = ["READ", "Tallies"]

_REQUESTS = "kvfleet_route_requests_total"
_LATENCY = "kvfleet_route_latency_seconds"
_TTFB = "kvfleet_time_to_first_byte_seconds"
_SELECTED = "kvfleet_model_selected_total"
_ATTEMPTS = "kvfleet_attempts_total"
_FALLBACKS = "kvfleet_fallback_triggered_total"
_AFFINITY = "kvfleet_cache_affinity_hits_total"
_ANSWERS = "kvfleet_answers_total"
_TOKENS = "kvfleet_tokens_total"
_COST = "kvfleet_cost_usd_total"
_BLOCKS = "kvfleet_policy_blocks_total"
_REFUSED = "kvfleet_admissions_refused_total"

READ = (
    _REQUESTS, _LATENCY, _TTFB, _SELECTED, _ATTEMPTS, _FALLBACKS, _AFFINITY, _ANSWERS, _TOKENS, _COST, _BLOCKS, _REFUSED
)  # fmt: skip
"""The metrics that are read, by their names in `kvfleet.telemetry.metrics.METRICS`."""

_HISTOGRAMS = (_LATENCY, _TTFB)
_SAMPLES = [
    *(name for name in READ if name not in _HISTOGRAMS),
    *(name + end for name in _HISTOGRAMS for end in ("_bucket", "_sum", "_count")),
]
_BY_MODEL = (_SELECTED, _ATTEMPTS, _TTFB + "_count", _TTFB + "_sum", _TOKENS, _COST)
_FAILED = ("error", "no_candidates")

Sample = tuple[Mapping[str, str], float]


@attrs.frozen
class Tallies:
    """The counters at one moment.

    Attributes:
        samples: Labels and value of every sample, by the sample's name.
    """

    samples: Mapping[str, list[Sample]]

    @classmethod
    def read(cls, registry: CollectorRegistry | MergedMetrics) -> Tallies:
        """Read the counters; whatever else the registry has is not asked."""
        return at_once(cls.read_steps(registry))

    @classmethod
    def read_steps(cls, registry: CollectorRegistry | MergedMetrics) -> Steps[Tallies]:
        """The same, family by family."""
        found: dict[str, list[Sample]] = defaultdict(list)
        families: Iterable[Metric] = registry.restricted_registry(_SAMPLES).collect()
        for family in families:
            for sample in family.samples:
                found[sample.name].append((sample.labels, sample.value))
            yield
        return cls(found)

    def total(self, name: str, **labels: str) -> float:
        """The sum of a counter's samples that have these labels."""
        return sum(
            value
            for found, value in self.samples.get(name, ())
            if all(found.get(key) == wanted for key, wanted in labels.items())
        )

    def counters(self) -> dict[str, Any]:
        """The totals since the gateway's start."""
        requests = self.total(_REQUESTS)
        errors = sum(self.total(_REQUESTS, status=status) for status in _FAILED)
        ended = self.total(_LATENCY + "_count")
        return {
            "total_requests": int(requests),
            "total_errors": int(errors),
            "total_refused": int(self.total(_REQUESTS, status="refused")),
            "total_cancelled": int(self.total(_REQUESTS, status="cancelled")),
            "total_fallbacks": int(self.total(_FALLBACKS)),
            "total_cache_hits": int(self.total(_ANSWERS, hit="true")),
            "total_affinity_hits": int(self.total(_AFFINITY)),
            "total_policy_blocks": int(self.total(_BLOCKS)),
            "total_cost_usd": self.total(_COST),
            "avg_latency_ms": self.total(_LATENCY + "_sum") / ended * 1000 if ended else 0.0,
            "error_rate": f"{errors / requests if requests else 0:.1%}",
        }

    def series(self) -> dict[str, Any]:
        """What charts are drawn from: totals that only grow, whose differences are rates."""
        return {
            "requests": self.total(_REQUESTS),
            "errors": sum(self.total(_REQUESTS, status=status) for status in _FAILED),
            "latency": self._histogram(_LATENCY),
            "ttfb": self._histogram(_TTFB),
            "tokens": {kind: self.total(_TOKENS, type=kind) for kind in ("prompt", "cached", "completion")},
        }

    def _histogram(self, name: str) -> dict[str, Any]:
        buckets: dict[str, float] = defaultdict(float)
        for labels, value in self.samples.get(name + "_bucket", ()):
            buckets[labels["le"]] += value
        return {
            "sum": self.total(name + "_sum"),
            "count": self.total(name + "_count"),
            # JSON knows no infinity: the last bound is null.
            "buckets": [[None if le == "+Inf" else float(le), value] for le, value in buckets.items()],
        }

    def by_model(self) -> dict[str, dict[str, Any]]:
        """The counters of each model that was chosen or called."""
        samples: dict[str, dict[str, list[Sample]]] = defaultdict(dict)
        for name in _BY_MODEL:
            for labels, value in self.samples.get(name, ()):
                samples[labels["model"]].setdefault(name, []).append((labels, value))
        return {model: Tallies(own).of(model) for model, own in samples.items() if _SELECTED in own or _ATTEMPTS in own}

    def of(self, model: str) -> dict[str, Any]:
        """The counters of one model."""
        attempts, first_bytes = self.total(_ATTEMPTS, model=model), self.total(_TTFB + "_count", model=model)
        tokens = {kind: int(self.total(_TOKENS, model=model, type=kind)) for kind in ("prompt", "cached", "completion")}
        return {
            "requests": int(self.total(_SELECTED, model=model)),
            "attempts": int(attempts),
            "errors": int(attempts - self.total(_ATTEMPTS, model=model, outcome="ok")),
            "avg_ttfb_ms": self.total(_TTFB + "_sum", model=model) / first_bytes * 1000 if first_bytes else None,
            **{f"{kind}_tokens": count for kind, count in tokens.items()},
            "cost_usd": self.total(_COST, model=model),
        }
