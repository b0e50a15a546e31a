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
from kvfleet.telemetry.metric_table import METRIC_BY_NAME, METRICS, MetricInfo
from kvfleet.turns import Steps

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
    _ready: list[Metric] | None = attrs.field(init=False, default=None, repr=False)

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering does not read the state."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The families as `read_ahead` read them, once, or as they are now."""
        ready, self._ready = self._ready, None
        return self._families() if ready is None else iter(ready)

    def read_ahead(self) -> Steps[None]:
        """Read them for the next `collect`, family by family."""
        found = []
        for family in self._families():
            found.append(family)
            yield
        self._ready = found

    def _families(self) -> Iterator[Metric]:
        """One family for each gauge of the table, and for each counter that others keep."""
        for info in METRICS:
            if info.type == "gauge":
                yield self._gauge(info)
        for name, read in self.kept.items():
            yield CounterMetricFamily(name, METRIC_BY_NAME[name].doc, value=read())
        for name, read_all in self.counters.items():
            family = CounterMetricFamily(name, METRIC_BY_NAME[name].doc, labels=METRIC_BY_NAME[name].labels)
            for labels, value in read_all().items():
                family.add_metric(labels, value)
            yield family

    def _gauge(self, info: MetricInfo) -> Metric:
        name = info.name
        values: dict[tuple[str, ...], float] = {}
        read = _READ.get(name)
        if read is not None:
            known = [(model, read(self, model)) for model in self.models]
            values = {(model.name, model.endpoint): value for model, value in known if value is not None}
        values |= {(model, endpoint): value for (told, model, endpoint), value in self.told.items() if told == name}
        if name in self.gauges:
            values |= self.gauges[name]()
        if name == "kvfleet_fleet_info" and self.fleet is not None:
            values[self.fleet] = 1.0
        family = GaugeMetricFamily(name, info.doc, labels=info.labels)
        for labels, value in values.items():
            family.add_metric(labels, value)
        return family


# What is known of a replica: None if nothing is


def _health(state: FleetState, model: ModelConfig) -> float | None:
    return None if state.health is None else float(state.health.is_healthy(model.endpoint))


def _breaker(state: FleetState, model: ModelConfig) -> float | None:
    return None if state.health is None else _BREAKER[state.health.breaker_state(model.endpoint)]


def _share(state: FleetState, model: ModelConfig) -> float | None:
    return None if state.health is None else state.health.share_now(model.endpoint)


def _in_flight(state: FleetState, model: ModelConfig) -> float | None:
    return None if state.load is None else state.load.in_flight(model.id)


def _expected_ttfb_s(state: FleetState, model: ModelConfig) -> float | None:
    return None if state.load is None else state.load.expected_ttfb_s(model.id)


def _queued_tokens(state: FleetState, model: ModelConfig) -> float | None:
    known = None if state.load is None else state.load.of(model.id)
    return None if known is None else known.queued_tokens


def _prefill_rate(state: FleetState, model: ModelConfig) -> float | None:
    rates = None if state.load is None else state.load.rates(model.id)
    return 1 / rates.token_s if rates and rates.token_s else None


def _queue_depth(state: FleetState, model: ModelConfig) -> float | None:
    said = None if state.load is None else state.load.engine(model.endpoint)
    return None if said is None else said.waiting


def _memory_pct(state: FleetState, model: ModelConfig) -> float | None:
    said = None if state.load is None else state.load.engine(model.endpoint)
    return None if said is None or said.kv_usage is None else said.kv_usage * 100


def _rate_limit_left(state: FleetState, model: ModelConfig) -> float | None:
    limit = None if state.limits is None else state.limits.state(model.id)
    return None if limit is None else limit.capacity


_READ: Mapping[str, Callable[[FleetState, ModelConfig], float | None]] = {
    "kvfleet_model_health": _health,
    "kvfleet_breaker_state": _breaker,
    "kvfleet_replica_share": _share,
    "kvfleet_in_flight_requests": _in_flight,
    "kvfleet_expected_ttfb_seconds": _expected_ttfb_s,
    "kvfleet_queued_prompt_tokens": _queued_tokens,
    "kvfleet_prefill_tokens_per_second": _prefill_rate,
    "kvfleet_model_queue_depth": _queue_depth,
    "kvfleet_model_gpu_memory_pct": _memory_pct,
    "kvfleet_rate_limit_capacity": _rate_limit_left,
}
"""Who reads which gauge of the replicas."""
