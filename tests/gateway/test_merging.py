"""The metrics of several workers as one."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from kvfleet.config.schema import ModelConfig
from kvfleet.gateway.merging import MergedMetrics, dumped
from kvfleet.gateway.meters import GATEWAY_METRICS, Meters
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.metric_table import METRICS
from kvfleet.telemetry.metrics import MetricsExporter


def exporter(requests: int, *, in_flight: int = 0, healthy: bool = True) -> MetricsExporter:
    """One worker's metrics."""
    metrics = MetricsExporter()
    for _ in range(requests):
        metrics.record_route("hybrid", "llama", 0.2)
    metrics.update_health("llama", "http://gpu", healthy, queue_depth=in_flight)
    metrics.set_fleet_info("house", "hybrid", "1")
    meters = Meters()
    meters.in_flight = in_flight
    metrics.registry.register(meters)
    return metrics


def merged(*exporters: MetricsExporter) -> MergedMetrics:
    """All of them."""
    return MergedMetrics.of(dumped(one.registry) for one in exporters)


def values(text: str) -> dict[str, float]:
    """Every sample of a text, by its name and labels."""
    return {
        f"{sample.name}{sorted(sample.labels.values())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_one_is_as_it_was() -> None:
    """The text of one worker's merged metrics is that of its own."""
    one = exporter(3, in_flight=2)
    assert values(merged(one).render().decode()) == values(one.render().decode())


def test_counts_are_added_and_states_are_the_worst() -> None:
    """Counters and histograms are the sum, requests in flight too; one that finds a replica ill is believed."""
    found = values(merged(exporter(3, in_flight=2), exporter(4, in_flight=1, healthy=False)).render().decode())
    assert found["kvfleet_route_requests_total['hybrid', 'success']"] == 7
    assert found["kvfleet_route_latency_seconds_count['hybrid']"] == 7
    assert found["kvfleet_route_latency_seconds_bucket['0.25', 'hybrid']"] == 7
    assert found["kvfleet_gateway_in_flight_requests[]"] == 3
    assert found["kvfleet_model_health['http://gpu', 'llama']"] == 0
    assert found["kvfleet_model_queue_depth['http://gpu', 'llama']"] == 2
    assert found["kvfleet_fleet_info['1', 'house', 'hybrid']"] == 1


def test_nothing_of_the_table_is_lost() -> None:
    """Every metric keeps its name, type and help."""
    one = exporter(1)
    one.watch([ModelConfig(name="m", endpoint="http://m")], HealthManager(), FleetLoad())
    wanted = {line for line in one.render().decode().splitlines() if line.startswith("#")}
    assert {line for line in merged(one, one).render().decode().splitlines() if line.startswith("#")} == wanted
    assert len(wanted) > len(METRICS) + len(GATEWAY_METRICS)
