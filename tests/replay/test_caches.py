"""Engines that tell what their caches hold, in a replay."""

from __future__ import annotations

from collections import Counter
from typing import Any

import attrs
import pytest

from kvfleet.config.caching import KVEventsConfig
from kvfleet.config.schema import CacheAffinityConfig, FleetConfig
from kvfleet.config.simulation import EngineOptions, SimulatedFleet
from kvfleet.plugin.contract import RouteRequest
from kvfleet.runtime import Dispatch
from kvfleet.trace import names
from kvfleet.trace.spans import Trace
from tests.replay.fleets import fleet, replayed, shared_prefix

SMALL = SimulatedFleet(default=EngineOptions(cache_tokens=40_000))


def expectations(config: FleetConfig, tells: bool | None) -> tuple[Counter[str], list[float]]:
    """How the served replica's cache was known for each request, and by how many tokens the expectation was wrong."""
    run = replayed(shared_prefix(300, prompts=40, rate_per_s=4.0), config, fleet=SMALL, tells=tells)
    traces: dict[str, Trace] = {}
    dispatch = run.router.dispatch

    async def listening(request: RouteRequest, **options: Any) -> Dispatch:
        dispatched = await dispatch(request, **options)
        traces[request.request_id] = dispatched.trace
        return dispatched

    run.router.dispatch = listening  # type: ignore[method-assign]
    modes: Counter[str] = Counter()
    errors: list[float] = []
    for one in run.run().served:
        span = next(span for span in traces[str(one.number)].stages if span.name == "kvfleet.affinity.prefix")
        ids, tokens, known = (span.attributes[key] for key in (names.SCORED, names.SCORE_VALUES, names.SCORE_MODES))
        assert isinstance(ids, tuple)
        assert isinstance(tokens, tuple)
        assert isinstance(known, tuple)
        place = ids.index(one.replica)
        modes[str(known[place])] += 1
        errors.append(float(tokens[place]) - one.cached_tokens)
    return modes, errors


@pytest.fixture
def config() -> FleetConfig:
    """A fleet that counts on any part of a prompt."""
    return fleet(2, "round_robin", cache_affinity=CacheAffinityConfig(min_affinity_score=0.0))


def test_what_engines_tell_is_what_they_then_find_in_their_caches(config: FleetConfig) -> None:
    """Small caches forget all the time, and every expectation is right but those that time overtakes."""
    modes, errors = expectations(config, tells=True)
    assert modes["exact"] > 200  # the others: prompts under way, and homes of beginnings that nobody holds
    assert not modes["observed"]
    assert sum(abs(error) <= 1 for error in errors) >= 295


def test_without_their_word_expectations_are_learned(config: FleetConfig) -> None:
    """And sometimes wrong."""
    modes, errors = expectations(config, tells=None)
    assert modes["exact"] == 0
    assert sum(abs(error) <= 1 for error in errors) < 285


def test_a_model_with_kv_events_tells_unless_it_is_kept_from_it(config: FleetConfig) -> None:
    """As the fleet file says, by default."""
    models = tuple(attrs.evolve(model, kv_events=KVEventsConfig()) for model in config.models)
    config = attrs.evolve(config, models=models)
    assert expectations(config, tells=None)[0]["exact"] > 200
    assert expectations(config, tells=False)[0]["exact"] == 0
