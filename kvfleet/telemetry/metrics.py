"""Prometheus metrics, on a registry of their own.

Counters and histograms are written as routes end; what is a state (health, load, breakers) is read from its owner when
somebody scrapes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from kvfleet.config.schema import ModelConfig
from kvfleet.telemetry.families import MOST_LABELS, Counters, Histogram, Histograms
from kvfleet.telemetry.fleet_gauges import FleetState, GaugeSource
from kvfleet.telemetry.fleet_limits import FleetLimits
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.metric_table import METRICS
from kvfleet.turns import Steps

__all__ = ["MetricsExporter"]


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
        self._state = FleetState()
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

    def read_ahead(self) -> Steps[None]:
        """Read the fleet's state for the next `render`, which may then be in another thread than its owners'."""
        return self._state.read_ahead()

    def succeed(self, before: MetricsExporter) -> None:
        """Show this one's state in the place of the one's before, and what nobody here reads from where it was."""
        self._state.kept = {**before._state.kept, **self._state.kept}
        self._state.told = before._state.told
        if self.enabled:
            self.registry.unregister(before._state)
            self.registry.register(self._state)

    def forget(self) -> None:
        """Read nothing any more: another one has succeeded this one, whose state's owners end."""
        state = self._state
        state.kept, state.told, state.counters, state.gauges = {}, {}, {}, {}

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
