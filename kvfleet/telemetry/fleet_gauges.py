"""The fleet's state as metrics: what is not counted but is so, read from its owner when somebody scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvfleet.config.schema import ModelConfig
from kvfleet.telemetry.fleet_limits import FleetLimits
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.metric_table import METRIC_BY_NAME, METRICS

__all__ = ["FleetState", "GaugeSource"]

_BREAKER = {"closed": 0.0, "half_open": 1.0, "open": 2.0}
GaugeSource = Callable[[], Mapping[tuple[str, ...], float]]
"""Gives a gauge's values, by its labels."""


@attrs.define(eq=False)
class FleetState(Collector):
    """Gauges, and counters that others keep, read from their owners at each scrape.

    Attributes:
        health, load, limits: What is known of the replicas; None for nothing.
        models: The replicas shown.
        told: What somebody has said of a replica, by metric, model and endpoint; goes before what is known.
        fleet: Its name, its strategy, and kvfleet's version.
        kept, counters, gauges: By metric, who tells its value, or its values by labels.
    """

    health: HealthManager | None = None
    load: FleetLoad | None = None
    limits: FleetLimits | None = None
    models: Sequence[ModelConfig] = ()
    told: dict[tuple[str, str, str], float] = attrs.field(factory=dict)
    fleet: tuple[str, str, str] | None = None
    kept: dict[str, Callable[[], float]] = attrs.field(factory=dict)
    counters: dict[str, GaugeSource] = attrs.field(factory=dict)
    gauges: dict[str, GaugeSource] = attrs.field(factory=dict)

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering does not read the state."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """One family for each gauge of the table."""
        families = {i.name: GaugeMetricFamily(i.name, i.doc, labels=i.labels) for i in METRICS if i.type == "gauge"}
        for (name, model, endpoint), value in {**self._read(), **self.told}.items():
            families[name].add_metric((model, endpoint), value)
        for name, read_all in self.gauges.items():
            for labels, value in read_all().items():
                families[name].add_metric(labels, value)
        if self.fleet is not None:
            families["kvfleet_fleet_info"].add_metric(self.fleet, 1.0)
        yield from families.values()
        for name, read in self.kept.items():
            yield CounterMetricFamily(name, METRIC_BY_NAME[name].doc, value=read())
        for name, read_all in self.counters.items():
            family = CounterMetricFamily(name, METRIC_BY_NAME[name].doc, labels=METRIC_BY_NAME[name].labels)
            for labels, value in read_all().items():
                family.add_metric(labels, value)
            yield family

    def _read(self) -> dict[tuple[str, str, str], float]:
        found: dict[tuple[str, str, str], float] = {}
        for model in self.models:
            for name, value in self._of(model).items():
                if value is not None:
                    found[name, model.name, model.endpoint] = value
        return found

    def _of(self, model: ModelConfig) -> Mapping[str, float | None]:
        found: dict[str, float | None] = {}
        if self.health is not None:
            found["kvfleet_model_health"] = float(self.health.is_healthy(model.endpoint))
            found["kvfleet_breaker_state"] = _BREAKER[self.health.breaker_state(model.endpoint)]
            found["kvfleet_replica_share"] = self.health.share_now(model.endpoint)
        if self.load is not None:
            said = self.load.engine(model.endpoint)
            found["kvfleet_in_flight_requests"] = self.load.in_flight(model.id)
            found["kvfleet_expected_ttfb_seconds"] = self.load.expected_ttfb_s(model.id)
            known, rates = self.load.of(model.id), self.load.rates(model.id)
            found["kvfleet_queued_prompt_tokens"] = None if known is None else known.queued_tokens
            found["kvfleet_prefill_tokens_per_second"] = 1 / rates.token_s if rates and rates.token_s else None
            if said is not None:
                found["kvfleet_model_queue_depth"] = said.waiting
                found["kvfleet_model_gpu_memory_pct"] = None if said.kv_usage is None else said.kv_usage * 100
        if self.limits is not None and (limit := self.limits.state(model.id)) is not None:
            found["kvfleet_rate_limit_capacity"] = limit.capacity
        return found
