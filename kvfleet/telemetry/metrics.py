"""Prometheus metrics, on a registry of their own.

Every name stands in one table, `METRICS`, from which the reference page is made. Counters and histograms are written
as routes end; what is a state (health, load, breakers) is read from its owner when somebody scrapes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from kvfleet.config.schema import ModelConfig
from kvfleet.telemetry.families import MOST_LABELS, Counters, Histogram, Histograms
from kvfleet.telemetry.fleet_limits import FleetLimits
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.load import FleetLoad

__all__ = ["METRICS", "MetricInfo", "MetricsExporter"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_OVERHEAD = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_BREAKER = {"closed": 0.0, "half_open": 1.0, "open": 2.0}


@attrs.frozen
class MetricInfo:
    """One metric: its name as scraped, its type, labels, meaning, and a histogram's buckets.

    `is_read` marks a counter that somebody else keeps and that is read at each scrape.
    """

    name: str
    type: str
    labels: tuple[str, ...]
    doc: str
    buckets: tuple[float, ...] = ()
    is_read: bool = False


METRICS: tuple[MetricInfo, ...] = (
    MetricInfo("kvfleet_route_requests_total", "counter", ("strategy", "status"), "Requests, by how they ended."),
    MetricInfo(
        "kvfleet_route_latency_seconds", "histogram", ("strategy",), "From a request's start to its end.", _SECONDS
    ),
    MetricInfo(
        "kvfleet_decision_seconds", "histogram", ("strategy",), "What the stages before the call took.", _OVERHEAD
    ),
    MetricInfo(
        "kvfleet_time_to_first_byte_seconds", "histogram", ("model",), "From a request's start to its answer.", _SECONDS
    ),
    MetricInfo("kvfleet_model_selected_total", "counter", ("model",), "Decisions for a model."),
    MetricInfo("kvfleet_attempts_total", "counter", ("model", "outcome"), "Backend calls: `ok`, or the fault."),
    MetricInfo(
        "kvfleet_rate_limited_total",
        "counter",
        ("model", "endpoint"),
        "Calls that a backend refused, asking to wait: 429, or 503 with `Retry-After`.",
    ),
    MetricInfo(
        "kvfleet_fallback_triggered_total", "counter", ("from_model", "to_model"), "Moves to the next candidate."
    ),
    MetricInfo(
        "kvfleet_stream_breaks_total",
        "counter",
        ("model", "then"),
        "Streams that broke where others might go on: `continued`, or why not.",
    ),
    MetricInfo(
        "kvfleet_retries_refused_total",
        "counter",
        ("model", "budget"),
        "Retries not made because the budget of the `model` or the `fleet` was used up.",
    ),
    MetricInfo(
        "kvfleet_escalations_total",
        "counter",
        ("from_model", "to_model"),
        "Moves on for an answer that was not trusted.",
    ),
    MetricInfo(
        "kvfleet_confidence", "histogram", ("model",), "How far judges trusted a model's answers, 0..1.", _SHARES
    ),
    MetricInfo(
        "kvfleet_cache_affinity_hits_total", "counter", ("type",), "Requests sent where their prompt was known to be."
    ),
    MetricInfo(
        "kvfleet_canary_requests_total", "counter", ("model", "side", "outcome"), "What a canary is compared by."
    ),
    MetricInfo("kvfleet_canary_changes_total", "counter", ("model", "to"), "Steps, promotions and rollbacks."),
    MetricInfo(
        "kvfleet_prompt_tokens_missing_total", "counter", ("model",), "Prompts compared by bytes for want of tokens."
    ),
    MetricInfo(
        "kvfleet_prompt_tokens_miscounted_total", "counter", ("model",), "Prompts of which the engine counted others."
    ),
    MetricInfo("kvfleet_answers_total", "counter", ("stage", "hit"), "Lookups of stages that may answer at once."),
    MetricInfo("kvfleet_answer_hits_total", "counter", ("stage", "match"), "Answers from memory: `exact`, or `near`."),
    MetricInfo(
        "kvfleet_answer_saved_tokens_total", "counter", ("stage", "type"), "Tokens that no backend read or wrote."
    ),
    MetricInfo("kvfleet_answer_saved_usd_total", "counter", ("stage",), "What those answers had cost, where known."),
    MetricInfo(
        "kvfleet_embeddings_total",
        "counter",
        ("result",),
        "Prompts' vectors: made, remembered, or why not.",
    ),
    MetricInfo("kvfleet_tokens_total", "counter", ("model", "type"), "Tokens: prompt, cached (of those), completion."),
    MetricInfo("kvfleet_cost_usd_total", "counter", ("model",), "What answers cost, where prices are known."),
    MetricInfo("kvfleet_policy_blocks_total", "counter", ("rule",), "Candidates dropped by a policy rule."),
    MetricInfo("kvfleet_drops_total", "counter", ("stage", "rule"), "Candidates dropped."),
    MetricInfo("kvfleet_stage_failures_total", "counter", ("stage", "skipped"), "Stages that failed."),
    MetricInfo("kvfleet_admissions_refused_total", "counter", ("stage",), "Requests refused before any backend."),
    MetricInfo("kvfleet_queue_depth", "gauge", ("priority",), "Requests that wait for a place in the gateway."),
    MetricInfo(
        "kvfleet_queue_wait_seconds", "histogram", ("priority",), "How long those waited that got one.", _SECONDS
    ),
    MetricInfo(
        "kvfleet_queue_refusals_total",
        "counter",
        ("reason",),
        "Requests that got none: `full`, `wait` or `deadline` (it would take too long), `timeout`, `displaced`.",
    ),
    MetricInfo("kvfleet_budget_spend_usd_total", "counter", ("account",), "What was booked to a budget."),
    MetricInfo("kvfleet_budget_refusals_total", "counter", ("account", "code"), "Requests a budget refused."),
    MetricInfo("kvfleet_budget_alerts_total", "counter", ("account",), "Months in which a budget reached its alert."),
    MetricInfo("kvfleet_shadow_requests_total", "counter", ("model",), "Requests mirrored to a model."),
    MetricInfo("kvfleet_shadow_outcomes_total", "counter", ("model", "outcome"), "Mirrored calls: `ok`, or the fault."),
    MetricInfo(
        "kvfleet_shadow_skipped_total",
        "counter",
        ("reason",),
        "Sampled requests not mirrored: a filter, or a full queue.",
    ),
    MetricInfo("kvfleet_shadow_cost_usd_total", "counter", ("model",), "What mirrored calls cost; on nobody's budget."),
    MetricInfo(
        "kvfleet_reward", "histogram", ("strategy", "model"), "Rewards that a learned strategy took, 0..1.", _SHARES
    ),
    MetricInfo("kvfleet_feedback_total", "counter", ("model",), "Answers that somebody rated."),
    MetricInfo(
        "kvfleet_judge_grade", "histogram", ("model",), "How good judges found a model's answers, 0..1.", _SHARES
    ),
    MetricInfo(
        "kvfleet_judge_outcomes_total", "counter", ("outcome",), "Sampled answers: `graded`, `unknown`, `queue_full`."
    ),
    MetricInfo("kvfleet_judge_cost_usd_total", "counter", ("model",), "What judges' calls cost; on nobody's budget."),
    MetricInfo(
        "kvfleet_event_loop_lag_seconds",
        "histogram",
        (),
        "How late the event loop was: what one request's work makes others wait.",
        _OVERHEAD,
    ),
    MetricInfo(
        "kvfleet_trace_store_dropped_total", "counter", (), "Traces the local store could not take.", is_read=True
    ),
    MetricInfo(
        "kvfleet_observers_dropped_total", "counter", (), "Outcomes the observers' queue could not take.", is_read=True
    ),
    MetricInfo(
        "kvfleet_kv_events_total", "counter", ("model", "endpoint"), "Events of an engine's KV cache.", is_read=True
    ),
    MetricInfo(
        "kvfleet_kv_gaps_total", "counter", ("model", "endpoint"), "Times that such events were missing.", is_read=True
    ),
    MetricInfo(
        "kvfleet_kv_replays_total",
        "counter",
        ("model", "endpoint"),
        "Times that they were asked for again.",
        is_read=True,
    ),
    MetricInfo(
        "kvfleet_kv_losses_total",
        "counter",
        ("model", "endpoint"),
        "Times that all that was known of a cache was given up.",
        is_read=True,
    ),
    MetricInfo(
        "kvfleet_kv_restarts_total",
        "counter",
        ("model", "endpoint"),
        "Restarts of an engine, by its events.",
        is_read=True,
    ),
    MetricInfo(
        "kvfleet_kv_orphans_total",
        "counter",
        ("model", "endpoint"),
        "Blocks told of whose beginning is not known.",
        is_read=True,
    ),
    MetricInfo(
        "kvfleet_kv_unreadable_total", "counter", ("model", "endpoint"), "Events that could not be read.", is_read=True
    ),
    MetricInfo("kvfleet_kv_mode", "gauge", ("model", "endpoint", "mode"), "1 for how the KV cache is known, else 0."),
    MetricInfo("kvfleet_kv_lag_seconds", "gauge", ("model", "endpoint"), "Age of the last event when it was read."),
    MetricInfo("kvfleet_kv_blocks", "gauge", ("model", "endpoint"), "Blocks known to be in the KV cache."),
    MetricInfo("kvfleet_model_health", "gauge", ("model", "endpoint"), "1 if the replica is healthy, else 0."),
    MetricInfo(
        "kvfleet_breaker_state", "gauge", ("model", "endpoint"), "Circuit breaker: 0 closed, 1 half-open, 2 open."
    ),
    MetricInfo(
        "kvfleet_replica_share",
        "gauge",
        ("model", "endpoint"),
        "What the replica is to get of its usual share, 0..1: 0 with an open breaker, below 1 in a slow start.",
    ),
    MetricInfo(
        "kvfleet_ejections_total",
        "counter",
        ("endpoint", "cause"),
        "Breakers opened: for `calls`, `checks`, `success_rate` or `latency`; `overflow` if too many were open.",
        is_read=True,
    ),
    MetricInfo(
        "kvfleet_panic_routes_total", "counter", ("model",), "Requests while too few of its replicas were well."
    ),
    MetricInfo("kvfleet_in_flight_requests", "gauge", ("model", "endpoint"), "Our requests at the replica."),
    MetricInfo("kvfleet_model_queue_depth", "gauge", ("model", "endpoint"), "Requests waiting in the engine."),
    MetricInfo(
        "kvfleet_model_gpu_memory_pct", "gauge", ("model", "endpoint"), "Share of the engine's KV cache in use, 0..100."
    ),
    MetricInfo("kvfleet_expected_ttfb_seconds", "gauge", ("model", "endpoint"), "Expected time to a first byte, now."),
    MetricInfo(
        "kvfleet_queued_prompt_tokens",
        "gauge",
        ("model", "endpoint"),
        "Prompt tokens that our requests there wait for.",
    ),
    MetricInfo(
        "kvfleet_prefill_tokens_per_second", "gauge", ("model", "endpoint"), "Learned pace of reading a prompt."
    ),
    MetricInfo(
        "kvfleet_cache_trust", "gauge", ("model", "endpoint"), "Share of expected cached tokens that came true, 0..1."
    ),
    MetricInfo(
        "kvfleet_cache_prediction_error_tokens",
        "gauge",
        ("model", "endpoint"),
        "Mean difference between the cached tokens that were expected and those the engine reported.",
    ),
    MetricInfo(
        "kvfleet_cache_trust_alarm", "gauge", ("model", "endpoint"), "1 while too few expectations come true, else 0."
    ),
    MetricInfo(
        "kvfleet_rate_limit_capacity",
        "gauge",
        ("model", "endpoint"),
        "Share of the tightest rate limit that is left, 0..1; 0 in a cooldown, absent where no limit is known.",
    ),
    MetricInfo("kvfleet_fleet_info", "gauge", ("fleet", "strategy", "version"), "Always 1; its labels tell."),
)
"""Every metric, in the order of the reference page."""

GaugeSource = Callable[[], Mapping[tuple[str, ...], float]]
"""Gives a gauge's values, by its labels."""

_BY_NAME = {info.name: info for info in METRICS}


@attrs.define(eq=False)
class _State(Collector):
    """The gauges, read from their owners at each scrape."""

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
            yield CounterMetricFamily(name, _BY_NAME[name].doc, value=read())
        for name, read_all in self.counters.items():
            family = CounterMetricFamily(name, _BY_NAME[name].doc, labels=_BY_NAME[name].labels)
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


class MetricsExporter:
    """Counts what happens, and shows it to Prometheus.

    Args:
        port: Port of a metrics server of its own, if `start_server` is called.
        enabled: False makes every method do nothing.
        registry: Where the metrics are registered; a new one if None, so that two exporters never meet.
        before: An exporter whose counts go on, in its registry; its state is shown until `succeed`.
    """

    def __init__(
        self,
        port: int = 9090,
        enabled: bool = True,
        registry: CollectorRegistry | None = None,
        *,
        before: MetricsExporter | None = None,
    ) -> None:
        self._state = _State()
        self._server: tuple[Any, threading.Thread] | None = None
        if before is not None:
            self._count_on(before)
            return
        self.port = port
        self.enabled = enabled
        self.registry = registry if registry is not None else CollectorRegistry()
        kept = [info for info in METRICS if enabled and not info.is_read]
        self._counters = {i.name: Counters(i.name, i.doc, i.labels) for i in kept if i.type == "counter"}
        self._histograms = {
            i.name: Histograms(i.name, i.doc, i.labels, i.buckets) for i in kept if i.type == "histogram"
        }
        if enabled:
            for family in (*self._counters.values(), *self._histograms.values(), self._state):
                self.registry.register(family)

    def _count_on(self, before: MetricsExporter) -> None:
        self.port, self.enabled, self.registry = before.port, before.enabled, before.registry
        self._counters, self._histograms = before._counters, before._histograms

    # Showing

    content_type = CONTENT_TYPE_LATEST

    def render(self) -> bytes:
        """Everything, in Prometheus' text format; `content_type` is its type."""
        return generate_latest(self.registry)

    def succeed(self, before: MetricsExporter) -> None:
        """Show this one's state in the place of the one's before, and what nobody here reads from where it was."""
        self._state.kept = {**before._state.kept, **self._state.kept}
        self._state.told = before._state.told
        if self.enabled:
            self.registry.unregister(before._state)
            self.registry.register(self._state)

    def start_server(self, host: str = "127.0.0.1", instead: Collector | None = None) -> int:
        """Serve ``/metrics`` on a port of its own, from a thread; the port it got (of use if `port` is 0).

        `instead` is shown in the place of this exporter's own metrics.

        Does nothing but return the port if it is running or the exporter is disabled.

        Raises:
            OSError: if the port is taken.
        """
        if self.enabled and self._server is None:
            shown = self.registry
            if instead is not None:
                shown = CollectorRegistry()
                shown.register(instead)
            self._server = start_http_server(self.port, addr=host, registry=shown)
            self.port = self._server[0].server_port
        return self.port

    def stop_server(self) -> None:
        """Stop it; safe twice."""
        if self._server is not None:
            (server, thread), self._server = self._server, None
            server.shutdown()
            server.server_close()
            thread.join()

    def watch(
        self,
        models: Sequence[ModelConfig],
        health: HealthManager,
        load: FleetLoad,
        limits: FleetLimits | None = None,
    ) -> None:
        """Show the state of these replicas from now on, instead of any shown before."""
        self._state.models, self._state.health, self._state.load = tuple(models), health, load
        self._state.limits = limits
        if self.enabled:
            self.read_counter("kvfleet_ejections_total", lambda: dict(health.ejections))

    # Counting

    def count(self, name: str, *labels: str, by: float = 1.0) -> None:
        """Raise a counter of the table by its full name, its labels in the table's order."""
        if self.enabled:
            self._counters[name].add(labels, by)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add a value to a histogram of the table."""
        if self.enabled:
            self._histograms[name].add(labels, value)

    def counter(self, name: str, *labels: str) -> list[float]:
        """A counter of the table with these labels, as a list of one number to raise: for what counts every request."""
        return self._counters[name].cell(labels) if self.enabled else [0.0]

    def histogram(self, name: str, *labels: str) -> Histogram:
        """A histogram of the table with these labels, to add to: for what measures every request."""
        return self._histograms[name].cell(labels) if self.enabled else Histogram(())

    def record_route(
        self, strategy: str, model: str, latency_seconds: float, success: bool = True, *, status: str = ""
    ) -> None:
        """A route ended.

        Args:
            strategy: Its strategy.
            model: The model chosen; empty if there was none.
            latency_seconds: From its start to its end.
            success: True if the caller got a whole answer.
            status: A more telling word than ``success`` or ``error``.
        """
        self.count("kvfleet_route_requests_total", strategy, status or ("success" if success else "error"))
        self.observe("kvfleet_route_latency_seconds", latency_seconds, strategy)
        if model:
            self.count("kvfleet_model_selected_total", model)

    def record_attempt(self, model: str, outcome: str) -> None:
        """A backend call ended: ``ok``, or the fault."""
        self.count("kvfleet_attempts_total", model, outcome)

    def record_fallback(self, from_model: str, to_model: str) -> None:
        """After a failed attempt, another candidate was tried."""
        self.count("kvfleet_fallback_triggered_total", from_model, to_model)

    def record_cache_hit(self, affinity_type: str = "session") -> None:
        """A request was sent where its prompt is known to be: by its ``session`` or its ``prefix``."""
        self.count("kvfleet_cache_affinity_hits_total", affinity_type)

    def record_policy_block(self, rule: str) -> None:
        """A policy rule dropped a candidate."""
        self.count("kvfleet_policy_blocks_total", rule)

    def record_shadow(self, model: str) -> None:
        """A request was mirrored to a model."""
        self.count("kvfleet_shadow_requests_total", model)

    def record_tokens(self, model: str, prompt: int, completion: int, cached: int | None = None) -> None:
        """An answer's tokens; `prompt` includes the cached ones."""
        self.count("kvfleet_tokens_total", model, "prompt", by=prompt)
        self.count("kvfleet_tokens_total", model, "completion", by=completion)
        if cached:
            self.count("kvfleet_tokens_total", model, "cached", by=cached)

    def update_health(
        self,
        model: str,
        endpoint: str,
        healthy: bool,
        queue_depth: float | None = None,
        gpu_memory_pct: float | None = None,
    ) -> None:
        """Show this of a replica, whatever a watched state says of it."""
        told = self._state.told
        if len(told) >= MOST_LABELS:
            told.clear()
        told["kvfleet_model_health", model, endpoint] = float(healthy)
        if queue_depth is not None:
            told["kvfleet_model_queue_depth", model, endpoint] = queue_depth
        if gpu_memory_pct is not None:
            told["kvfleet_model_gpu_memory_pct", model, endpoint] = gpu_memory_pct

    def read(self, name: str, kept: Callable[[], float]) -> None:
        """Show a counter that somebody else keeps; it is read at each scrape."""
        self._state.kept[name] = kept

    def read_counter(self, name: str, read_all: GaugeSource) -> None:
        """The same for one with labels: its values by them."""
        self._state.counters[name] = read_all

    def read_gauge(self, name: str, read_all: GaugeSource) -> None:
        """Show a gauge that somebody else keeps: its values by their labels, read at each scrape."""
        self._state.gauges[name] = read_all

    def set_fleet_info(self, fleet: str = "", strategy: str = "", version: str = "") -> None:
        """Name the fleet, its strategy and kvfleet's version."""
        self._state.fleet = (fleet, strategy, version)
