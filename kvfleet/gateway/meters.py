"""What the gateway itself counts, beside the routes: plain numbers, read when Prometheus asks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import attrs
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from kvfleet.gateway.exchange import Exchange
from kvfleet.telemetry.metric_table import MetricInfo

__all__ = ["GATEWAY_METRICS", "Meters"]

GATEWAY_METRICS = (
    MetricInfo("kvfleet_gateway_responses_total", "counter", ("route", "status"), "HTTP answers, by path template."),
    MetricInfo("kvfleet_gateway_clients_left_total", "counter", (), "Clients that left before their answer's end."),
    MetricInfo("kvfleet_gateway_in_flight_requests", "gauge", (), "HTTP requests being answered."),
    MetricInfo("kvfleet_config_reload_total", "counter", ("result",), "Reloads of the fleet file: `ok` or `refused`."),
    MetricInfo(
        "kvfleet_config_last_reload_success_timestamp_seconds",
        "gauge",
        (),
        "When the configuration that serves was loaded, in Unix time.",
    ),
)
"""The gateway's own metrics; those of routes are in `kvfleet.telemetry.metrics`."""


@attrs.define(eq=False)
class Meters(Collector):
    """Counts answers by route and status (both bounded by the route table), departures, and what is in flight."""

    responses: Counter[tuple[str, int]] = attrs.field(factory=Counter)
    left: int = 0
    in_flight: int = 0
    reloads: Counter[str] = attrs.field(factory=lambda: Counter({"ok": 0, "refused": 0}))
    loaded_s: float = attrs.field(factory=time.time)

    def departed(self, exchange: Exchange) -> None:
        """The client of a request has left."""
        self.left += 1
        exchange.status = exchange.status or 499

    def describe(self) -> Iterator[Metric]:
        """The names, so that two collectors cannot both have them."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """One family for each metric of the table."""
        responses, left, in_flight, reloads, loaded = GATEWAY_METRICS
        answers = CounterMetricFamily(responses.name, responses.doc, labels=responses.labels)
        for (route, status), count in sorted(self.responses.items()):
            answers.add_metric((route, str(status)), count)
        yield answers
        yield CounterMetricFamily(left.name, left.doc, value=self.left)
        yield GaugeMetricFamily(in_flight.name, in_flight.doc, value=self.in_flight)
        results = CounterMetricFamily(reloads.name, reloads.doc, labels=reloads.labels)
        for result, count in self.reloads.items():
            results.add_metric((result,), count)
        yield results
        yield GaugeMetricFamily(loaded.name, loaded.doc, value=self.loaded_s)
