"""What is known of KV caches, for Prometheus: read from its owner at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvfleet.cache.knowledge import CacheKnowledge, Source
from kvfleet.cache.kv_state import KVMode
from kvfleet.config.schema import ModelConfig
from kvfleet.telemetry.metrics import MetricsExporter

__all__ = ["show_caches"]

_COUNTED = {
    "kvfleet_kv_events_total": "events",
    "kvfleet_kv_gaps_total": "gaps",
    "kvfleet_kv_replays_total": "replays",
    "kvfleet_kv_losses_total": "losses",
    "kvfleet_kv_restarts_total": "restarts",
    "kvfleet_kv_unreadable_total": "unreadable",
}


def show_caches(
    metrics: MetricsExporter,
    caches: CacheKnowledge,
    models: Sequence[ModelConfig],
    mode_of: Callable[[ModelConfig], str],
) -> None:
    """Let the scrapes see how each cache is known.

    Args:
        metrics: Where.
        caches: Of what.
        models: The fleet's replicas.
        mode_of: How a replica's cache is known, in a word.
    """

    def of_sources(read: Callable[[Source], float]) -> Callable[[], Mapping[tuple[str, ...], float]]:
        return lambda: {
            (model.name, model.endpoint): read(source)
            for model in models
            if (source := caches.source_of(model.id)) is not None
        }

    def counted(attribute: str) -> Callable[[Source], float]:
        return lambda source: sum(getattr(state.counts, attribute) for state in source.states)

    for name, attribute in _COUNTED.items():
        metrics.read_counter(name, of_sources(counted(attribute)))
    metrics.read_counter(
        "kvfleet_kv_orphans_total", of_sources(lambda source: sum(one.counts.orphans for one in source.blocks()))
    )
    metrics.read_gauge("kvfleet_kv_blocks", of_sources(lambda source: sum(len(one) for one in source.blocks())))
    metrics.read_gauge(
        "kvfleet_kv_lag_seconds",
        of_sources(lambda source: max((state.lag_s or 0.0 for state in source.states), default=0)),
    )
    metrics.read_gauge(
        "kvfleet_kv_mode",
        lambda: {
            (model.name, model.endpoint, mode): float(mode == known)
            for model, known in zip(models, map(mode_of, models), strict=True)
            for mode in KVMode
        },
    )
