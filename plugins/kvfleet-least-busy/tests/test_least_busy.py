"""The strategy: who is chosen, and that it is found."""

from __future__ import annotations

import pytest
from kvfleet_least_busy import LeastBusy, kvfleet_components

from kvfleet.adapters.base import EngineLoad
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.manager import discover
from kvfleet.telemetry.load import FleetLoad
from kvfleet.testing.conformance import check_component

A, B, C = (ModelConfig(name=name, endpoint=f"http://{name}:8000", provider="vllm") for name in "abc")


@pytest.fixture
def load() -> FleetLoad:
    """The load of three idle replicas."""
    made = FleetLoad(clock=FrozenClock())
    made.register([A, B, C])
    return made


def strategy(load: FleetLoad, **options: float) -> LeastBusy:
    """The strategy, wired as the router wires it."""
    made = LeastBusy(**options)
    made.provision(Services(load=load))
    return made


def test_it_keeps_its_contract() -> None:
    """Options, lifecycle, and what a strategy returns are as the engine needs them."""
    check_component(*kvfleet_components())


def test_idle_replicas_keep_their_order(load: FleetLoad) -> None:
    """Without any load the first of the file is chosen, and all score 1."""
    ranking = strategy(load).select([A, B, C])
    assert ranking.models == (A, B, C)
    assert ranking.totals == (1.0, 1.0, 1.0)


def test_the_one_with_the_fewest_requests_is_first(load: FleetLoad) -> None:
    """Our own requests in flight count."""
    for busy in (A, A, B):
        load.started(busy.id)
    ranking = strategy(load).select([A, B, C])
    assert [model.name for model in ranking.models] == ["c", "b", "a"]
    assert list(ranking.terms["requests"]) == [0, 1, 2]


def test_a_queue_counts_more_than_a_batch(load: FleetLoad) -> None:
    """Three requests of which two wait weigh more than four that run."""
    load.report(A.endpoint, EngineLoad(running=1, waiting=2), 1000.0)
    load.report(B.endpoint, EngineLoad(running=4, waiting=0), 1000.0)
    assert strategy(load, queue_weight=2.0).select([A, B]).models[0] is B
    assert strategy(load, queue_weight=1.0).select([A, B]).models[0] is A


def test_it_works_before_it_is_wired() -> None:
    """A strategy used by hand, without a router, ranks everybody alike."""
    assert LeastBusy().select([B, A]).models == (B, A)


def test_kvfleet_finds_it() -> None:
    """The installed distribution brings the strategy under its name."""
    component = discover(environ={}).get(Kind.SELECT, "least_busy")
    assert (component.cls, component.distribution) == (LeastBusy, "kvfleet-least-busy")
