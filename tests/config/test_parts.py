"""Limits of the whole gateway, among its workers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvfleet.config.loader import load_config
from kvfleet.config.parts import part_of

FILE = {
    "models": [{"name": "m", "provider": "mock", "rpm": 100, "tpm": 1000}, {"name": "free", "provider": "mock"}],
    "rate_limits": {"default_rpm": 10},
    "gateway": {"max_concurrent": 8, "keys": {"ci": {"key": "k", "max_concurrent": 3}}},
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
    found = part_of(load_config(None, FILE, environ={}), 2)
    assert [(model.rpm, model.tpm) for model in found.models] == [(50, 500), (None, None)]
    assert (found.rate_limits.default_rpm, found.rate_limits.default_tpm) == (5, 0)
    assert (found.gateway.max_concurrent, found.gateway.keys["ci"].max_concurrent) == (4, 2)
    assert (found.overload.max_in_flight, found.overload.max_queue) == (3, 0)
    found = part_of(load_config(None, WRITTEN, environ={}), 2)
    assert found.pipeline[0].options == {"max_concurrent": 4, "max_per_tenant": 3, "keys": {"ci": 2}}
    assert found.pipeline[1].options == {"max_in_flight": 4, "max_wait_ms": 100}


def test_one_worker_has_all() -> None:
    """Nothing is changed for it."""
    config = load_config(None, FILE, environ={})
    assert part_of(config, 1) is config


@given(st.integers(0, 10**6), st.integers(2, 64))
def test_the_parts_are_the_whole_or_a_little_more(limit: int, workers: int) -> None:
    """Together at least the limit, and less than one more for each worker; none where there is none."""
    config = load_config(None, {**FILE, "gateway": {"max_concurrent": limit}}, environ={})
    together = part_of(config, workers).gateway.max_concurrent * workers
    assert limit <= together < limit + workers
