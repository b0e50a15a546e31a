"""The Prometheus metrics."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from kvfleet.adapters.base import EndpointHealth, EngineLoad
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import Fault
from kvfleet.telemetry.fleet_limits import FleetLimits
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.metric_table import METRICS
from kvfleet.telemetry.metrics import MetricsExporter
from kvfleet.telemetry.rate_limits import RateLimitTracker


def value(metrics: MetricsExporter, name: str, **labels: str) -> float | None:
    """One sample, or None."""
    return metrics.registry.get_sample_value(name, labels)


def test_the_documented_methods_write_the_documented_names() -> None:
    """Names and labels are those of the feature page."""
    metrics = MetricsExporter()
    metrics.record_route("hybrid_score", "llama-3-8b", 0.3, success=True)
    metrics.record_route("hybrid_score", "llama-3-8b", 0.3, success=False)
    metrics.record_fallback("llama-8b", "llama-70b")
    metrics.record_cache_hit("session")
    metrics.record_policy_block("pii_detection")
    metrics.record_shadow("next-gen")
    metrics.update_health("llama-8b", "http://gpu-1:8000", True, queue_depth=3, gpu_memory_pct=40.5)
    metrics.set_fleet_info("my-fleet", "hybrid_score", "1.0")
    where = {"model": "llama-8b", "endpoint": "http://gpu-1:8000"}
    assert value(metrics, "kvfleet_route_requests_total", strategy="hybrid_score", status="success") == 1
    assert value(metrics, "kvfleet_route_requests_total", strategy="hybrid_score", status="error") == 1
    assert value(metrics, "kvfleet_route_latency_seconds_count", strategy="hybrid_score") == 2
    assert value(metrics, "kvfleet_model_selected_total", model="llama-3-8b") == 2
    assert value(metrics, "kvfleet_fallback_triggered_total", from_model="llama-8b", to_model="llama-70b") == 1
    assert value(metrics, "kvfleet_cache_affinity_hits_total", type="session") == 1
    assert value(metrics, "kvfleet_policy_blocks_total", rule="pii_detection") == 1
    assert value(metrics, "kvfleet_shadow_requests_total", model="next-gen") == 1
    assert value(metrics, "kvfleet_model_health", **where) == 1
    assert value(metrics, "kvfleet_model_queue_depth", **where) == 3
    assert value(metrics, "kvfleet_model_gpu_memory_pct", **where) == 40.5
    assert value(metrics, "kvfleet_fleet_info", fleet="my-fleet", strategy="hybrid_score", version="1.0") == 1


def test_latency_buckets_reach_minutes() -> None:
    """A generation of four minutes is told from one of ten."""
    metrics = MetricsExporter()
    metrics.record_route("s", "m", 240.0)
    assert value(metrics, "kvfleet_route_latency_seconds_bucket", strategy="s", le="120.0") == 0
    assert value(metrics, "kvfleet_route_latency_seconds_bucket", strategy="s", le="300.0") == 1


def test_every_metric_of_the_table_is_rendered_and_no_other() -> None:
    """The table is the reference: what it names is there, with its type and labels."""
    metrics = MetricsExporter()
    for info in METRICS:
        if info.is_read:
            metrics.read(info.name, lambda: 1.0)
        elif info.type == "counter":
            metrics.count(info.name, *("x" for _ in info.labels))
        elif info.type == "histogram":
            metrics.observe(info.name, 1.0, *("x" for _ in info.labels))
    families = {f.name: f for f in text_string_to_metric_families(metrics.render().decode())}
    rendered = {name for name in families if not name.endswith("_created")}
    assert rendered == {info.name.removesuffix("_total") for info in METRICS}
    for info in METRICS:
        assert families[info.name.removesuffix("_total")].type == info.type


def test_names_carry_their_unit_and_kind() -> None:
    """Counters end in _total; every metric is kvfleet's."""
    for info in METRICS:
        assert info.name.startswith("kvfleet_")
        assert (info.type == "counter") == info.name.endswith("_total")
        assert (info.type == "histogram") == bool(info.buckets)
        assert info.doc.endswith(".")


def test_two_exporters_never_meet() -> None:
    """Each counts on its own registry, so two fleets in one process do not mix."""
    one, two = MetricsExporter(), MetricsExporter()
    one.record_cache_hit("prefix")
    assert value(one, "kvfleet_cache_affinity_hits_total", type="prefix") == 1
    assert value(two, "kvfleet_cache_affinity_hits_total", type="prefix") is None


def test_a_given_registry_is_used() -> None:
    """An application can show kvfleet's metrics among its own."""
    registry = CollectorRegistry()
    MetricsExporter(registry=registry).record_shadow("m")
    assert registry.get_sample_value("kvfleet_shadow_requests_total", {"model": "m"}) == 1


def test_a_disabled_exporter_does_nothing() -> None:
    """Every method is harmless, and nothing is shown."""
    metrics = MetricsExporter(enabled=False)
    metrics.record_route("s", "m", 1.0)
    metrics.observe("kvfleet_route_latency_seconds", 1.0, "s")
    metrics.update_health("m", "http://e", True)
    assert metrics.render() == b""
    assert metrics.start_server() == 9090


def test_an_unknown_name_is_an_error() -> None:
    """A misspelt metric is not counted in silence."""
    with pytest.raises(KeyError):
        MetricsExporter().count("kvfleet_typo_total")


def test_label_sets_are_bounded() -> None:
    """Beyond the bound new labels count as `other`, and none is lost."""
    metrics = MetricsExporter()
    for i in range(4100):
        metrics.record_shadow(f"m{i}")
    assert value(metrics, "kvfleet_shadow_requests_total", model="m0") == 1
    assert value(metrics, "kvfleet_shadow_requests_total", model="m4099") is None
    assert value(metrics, "kvfleet_shadow_requests_total", model="other") == 4


def test_the_watched_fleet_is_read_at_each_scrape() -> None:
    """Gauges show the state as it is when somebody looks."""
    clock = FrozenClock()
    model = ModelConfig(name="m", endpoint="http://e")
    health, load, metrics = HealthManager(failure_threshold=1, clock=clock), FleetLoad(clock), MetricsExporter()
    load.register([model])
    metrics.watch([model], health, load)
    where = {"model": "m", "endpoint": "http://e"}
    assert value(metrics, "kvfleet_breaker_state", **where) == 0
    assert value(metrics, "kvfleet_expected_ttfb_seconds", **where) is None
    load.first_byte(load.started(model.id), 0.25)
    load.report("http://e", EngineLoad(waiting=7, kv_usage=0.5), clock.now_s())
    health.update_health(EndpointHealth(endpoint="http://e", healthy=False))
    health.record_failure("http://e", Fault.TIMEOUT)
    assert value(metrics, "kvfleet_model_health", **where) == 0
    assert value(metrics, "kvfleet_breaker_state", **where) == 2
    assert value(metrics, "kvfleet_in_flight_requests", **where) == 1
    assert value(metrics, "kvfleet_model_queue_depth", **where) == 7
    assert value(metrics, "kvfleet_model_gpu_memory_pct", **where) == 50
    assert value(metrics, "kvfleet_expected_ttfb_seconds", **where) == 0.25
    clock.advance(60)
    assert value(metrics, "kvfleet_breaker_state", **where) == 1


def test_what_is_left_of_rate_limits_is_read_where_it_is_known() -> None:
    """A gauge for a replica that told of a limit, and none for one that did not."""
    clock = FrozenClock()
    told, silent = ModelConfig(name="m", endpoint="http://a"), ModelConfig(name="m", endpoint="http://b")
    limits, metrics = FleetLimits(RateLimitTracker(clock=clock)), MetricsExporter()
    metrics.watch([told, silent], HealthManager(clock=clock), FleetLoad(clock), limits)
    limits.begin(told.id).heard({"ratelimit": "limit=60, remaining=15, reset=60"})
    assert value(metrics, "kvfleet_rate_limit_capacity", model="m", endpoint="http://a") == 0.25
    assert value(metrics, "kvfleet_rate_limit_capacity", model="m", endpoint="http://b") is None


def test_tokens_are_counted_by_kind() -> None:
    """Cached tokens are a part of the prompt's, and counted beside them."""
    metrics = MetricsExporter()
    metrics.record_tokens("m", 100, 20, 64)
    metrics.record_tokens("m", 10, 1)
    assert value(metrics, "kvfleet_tokens_total", model="m", type="prompt") == 110
    assert value(metrics, "kvfleet_tokens_total", model="m", type="completion") == 21
    assert value(metrics, "kvfleet_tokens_total", model="m", type="cached") == 64


def test_a_server_of_its_own_answers_and_stops() -> None:
    """On loopback, on a free port if 0 is asked for; stopping twice is harmless."""
    metrics = MetricsExporter(port=0)
    metrics.record_cache_hit("session")
    port = metrics.start_server()
    try:
        assert metrics.start_server() == port
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert b'kvfleet_cache_affinity_hits_total{type="session"} 1.0' in answer.read()
    finally:
        metrics.stop_server()
        metrics.stop_server()


def test_a_counter_that_somebody_else_keeps_is_read_at_each_scrape() -> None:
    """What the trace store and the observers' queue drop is counted where it is dropped."""
    metrics, dropped = MetricsExporter(), [0]
    metrics.read("kvfleet_trace_store_dropped_total", lambda: dropped[0])
    dropped[0] = 3
    assert b"kvfleet_trace_store_dropped_total 3.0" in metrics.render()
