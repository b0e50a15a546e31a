"""Engines that tell what their caches hold, in a replay."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import attrs
import pytest

from kvfleet.config.caching import KVEventsConfig
from kvfleet.config.expand import expand
from kvfleet.config.schema import CacheAffinityConfig, FleetConfig
from kvfleet.config.simulation import EngineOptions, SimulatedFleet
from kvfleet.plugin.contract import RouteRequest
from kvfleet.runtime import Dispatch
from kvfleet.trace import names
from kvfleet.trace.spans import Trace
from tests.replay.fleets import fleet, replayed, shared_prefix

SMALL = SimulatedFleet(default=EngineOptions(cache_tokens=40_000))


def expectations(config: FleetConfig, tells: bool | None, simulated: SimulatedFleet = SMALL) -> dict[str, list[float]]:
    """By how many tokens the expectation for the served replica was wrong, by how its cache was known.

    The pipeline is written out, so that what nobody reads is found out too.
    """
    config = attrs.evolve(config, pipeline=expand(config))
    run = replayed(shared_prefix(300, prompts=40, rate_per_s=4.0), config, fleet=simulated, tells=tells)
    traces: dict[str, Trace] = {}
    dispatch = run.router.dispatch

    async def listening(request: RouteRequest, **options: Any) -> Dispatch:
        dispatched = await dispatch(request, **options)
        traces[request.request_id] = dispatched.trace
        return dispatched

    run.router.dispatch = listening  # type: ignore[method-assign]
    errors: dict[str, list[float]] = defaultdict(list)
    for one in run.run().served:
        span = next(span for span in traces[str(one.number)].stages if span.name == "kvfleet.affinity.prefix")
        ids, tokens, known = (span.attributes[key] for key in (names.SCORED, names.SCORE_VALUES, names.SCORE_MODES))
        assert isinstance(ids, tuple)
        assert isinstance(tokens, tuple)
        assert isinstance(known, tuple)
        place = ids.index(one.replica)
        errors[str(known[place])].append(float(tokens[place]) - one.cached_tokens)
    return errors


def right(errors: list[float]) -> float:
    """Share of expectations that were right to the token."""
    return sum(abs(error) < 1 for error in errors) / len(errors)


@pytest.fixture
def config() -> FleetConfig:
    """A fleet that counts on any part of a prompt."""
    return fleet(2, "round_robin", cache_affinity=CacheAffinityConfig(min_affinity_score=0.0))


def test_what_engines_tell_is_what_they_then_find_in_their_caches(config: FleetConfig) -> None:
    """Small caches forget all the time, and the expectations are right but for the few that time overtakes."""
    errors = expectations(config, tells=True)
    assert len(errors["exact"]) > 200  # the others: prompts under way, and homes of beginnings that nobody holds
    assert "observed" not in errors
    assert right(errors["exact"]) > 0.95


def test_so_it_is_with_hybrid_models(config: FleetConfig) -> None:
    """Whose layers with a sliding window forget by themselves, so that less is found than full attention has."""
    options = attrs.evolve(SMALL.default, window_tokens=1025, window_cache_tokens=6_000)
    errors = expectations(config, tells=True, simulated=SimulatedFleet(default=options))
    assert len(errors["exact"]) > 100
    assert right(errors["exact"]) > 0.95


def test_without_their_word_expectations_are_learned(config: FleetConfig) -> None:
    """And less often right."""
    errors = expectations(config, tells=None)
    assert "exact" not in errors
    assert right(errors["observed"]) < 0.95


def test_a_model_with_kv_events_tells_unless_it_is_kept_from_it(config: FleetConfig) -> None:
    """As the fleet file says, by default."""
    models = tuple(attrs.evolve(model, kv_events=KVEventsConfig()) for model in config.models)
    config = attrs.evolve(config, models=models)
    assert len(expectations(config, tells=None)["exact"]) > 200
    assert "exact" not in expectations(config, tells=False)
