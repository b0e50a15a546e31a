"""Limits of the whole gateway, among its workers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvfleet.config.loader import load_config
from kvfleet.config.parts import part_of

FILE = {
    "models": [{"name": "m", "provider": "mock", "rpm": 100, "tpm": 1000}, {"name": "free", "provider": "mock"}],
    "rate_limits": {"default_rpm": 10},
    "gateway": {
        "max_concurrent": 8,
        "keys": {"ci": {"key": "k", "max_concurrent": 3}},
        "limits": {"max_connections": 101},
    },
    "overload": {"max_in_flight": 5, "max_queue": 0},
}
WRITTEN = {
    "models": [{"name": "m", "provider": "mock"}],
    "pipeline": [
        {"use": "admit.concurrency", "with": {"max_concurrent": 8, "max_per_tenant": 5, "keys": {"ci": 3}}},
        {"use": "admit.queue", "with": {"max_in_flight": 7, "max_wait_ms": 100}},
        "select",
        "execute",
    ],
}


def test_every_limit_that_a_worker_counts_is_parted() -> None:
    """Models', the provider's defaults, the gateway's, its keys', and those of a written pipeline; no limit stays none."""
    first, second = (part_of(load_config(None, FILE, environ={}), 2, number) for number in range(2))
    assert [(model.rpm, model.tpm) for model in first.models] == [(50, 500), (None, None)]
    assert (first.rate_limits.default_rpm, first.rate_limits.default_tpm) == (5, 0)
    assert (first.gateway.max_concurrent, first.gateway.limits.max_connections) == (4, 51)
    assert (second.gateway.max_concurrent, second.gateway.limits.max_connections) == (4, 50)
    assert [one.gateway.keys["ci"].max_concurrent for one in (first, second)] == [2, 1]
    assert [(one.overload.max_in_flight, one.overload.max_queue) for one in (first, second)] == [(3, 0), (2, 0)]
    first, second = (part_of(load_config(None, WRITTEN, environ={}), 2, number) for number in range(2))
    assert first.pipeline[0].options == {"max_concurrent": 4, "max_per_tenant": 3, "keys": {"ci": 2}}
    assert second.pipeline[0].options == {"max_concurrent": 4, "max_per_tenant": 2, "keys": {"ci": 1}}
    assert first.pipeline[1].options == {"max_in_flight": 4, "max_wait_ms": 100, "max_queue": 128}
    assert second.pipeline[1].options == {"max_in_flight": 3, "max_wait_ms": 100, "max_queue": 128}


def test_one_worker_has_all() -> None:
    """Nothing is changed for it."""
    config = load_config(None, FILE, environ={})
    assert part_of(config, 1, 0) is config


@given(st.integers(0, 10**6), st.integers(2, 64))
def test_the_parts_are_the_whole(limit: int, workers: int) -> None:
    """Together exactly what the file says, or one for each worker where it says less; none where there is none."""
    data = {**FILE, "gateway": {"max_concurrent": limit}, "overload": {"max_queue": limit}}
    found = [part_of(load_config(None, data, environ={}), workers, number) for number in range(workers)]
    assert sum(one.gateway.max_concurrent for one in found) == (max(limit, workers) if limit else 0)
    assert all(one.gateway.max_concurrent for one in found) == bool(limit)
    assert sum(one.overload.max_queue for one in found) == limit
