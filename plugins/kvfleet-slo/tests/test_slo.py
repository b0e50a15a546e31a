"""The classifier, the filter, and that they are found."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from kvfleet_slo import LATENCY_TARGET, LatencyTarget, TargetClassifier, TargetFilter, kvfleet_components

from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BadRequestError
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Kind, RouteRequest, RoutingContext
from kvfleet.plugin.manager import discover
from kvfleet.telemetry.load import FleetLoad
from kvfleet.testing.conformance import check_component

FAST = ModelConfig(name="fast", endpoint="http://fast:8000", provider="vllm", latency_p50_ms=100)
SLOW = ModelConfig(name="slow", endpoint="http://slow:8000", provider="vllm", latency_p50_ms=900)


def context(**request: Any) -> RoutingContext:
    """A request on its way, with both replicas still in the race."""
    return RoutingContext(request=RouteRequest(body={}, **request), candidates=(FAST, SLOW), now_s=1000.0)


def classify(classifier: TargetClassifier, **request: Any) -> LatencyTarget:
    """What the classifier finds."""
    return asyncio.run(classifier.classify(context(**request)))[LATENCY_TARGET]


def drops(stage: TargetFilter, seconds: float | None, load: FleetLoad | None = None) -> dict[str, str]:
    """Who is dropped, and why."""
    stage.provision(Services(load=load or FleetLoad(clock=FrozenClock())))
    ctx = context()
    ctx.facts[LATENCY_TARGET] = LatencyTarget(seconds, "tag")  # type: ignore[index]
    return {drop.candidate.name: drop.reason for drop in stage.filter(ctx)}


@pytest.mark.parametrize("component", list(kvfleet_components()), ids=lambda component: component.key)
def test_each_keeps_its_contract(component: Component) -> None:
    """Options, lifecycle, and what a stage returns are as the engine needs them."""
    check_component(component)


def test_a_tag_names_the_target() -> None:
    """The tag wins over the header."""
    found = classify(
        TargetClassifier(), tags={"latency_target_ms": "250"}, condition_headers={"x-latency-target-ms": "900"}
    )
    assert found == LatencyTarget(0.25, "tag")


def test_a_header_names_the_target() -> None:
    """The header's name in the options may be written in any case."""
    stage = TargetClassifier(header="X-Wait-MS")
    assert classify(stage, condition_headers={"x-wait-ms": "40"}) == LatencyTarget(0.04, "header")


def test_a_request_that_names_none_gets_the_default() -> None:
    """Without a default there is no target, and the trace says so."""
    assert classify(TargetClassifier(default_ms=2000)) == LatencyTarget(2.0, "default")
    none = classify(TargetClassifier())
    assert none == LatencyTarget(None, "none")
    assert LATENCY_TARGET.describe(none) == "none"
    assert LATENCY_TARGET.describe(LatencyTarget(0.25, "tag")) == "250 ms (tag)"


@pytest.mark.parametrize("value", ["soon", "0", "-3", "inf", "nan"])
def test_what_is_not_a_time_is_the_callers_mistake(value: str) -> None:
    """A wrong target is answered with 400, and not taken for none."""
    with pytest.raises(BadRequestError, match="positive number of milliseconds"):
        classify(TargetClassifier(), tags={"latency_target_ms": value})


def test_the_late_are_dropped_with_their_time() -> None:
    """The reason says what was expected and what was asked."""
    assert drops(TargetFilter(), 0.5) == {"slow": "expected in 1012 ms, target 500 ms"}


def test_no_target_drops_nobody() -> None:
    """A request that does not mind keeps every candidate."""
    assert drops(TargetFilter(), None) == {}


def test_the_margin_keeps_some_of_the_target_free() -> None:
    """A replica that would take 1012 of 1100 ms is late at a margin of 0.8."""
    assert drops(TargetFilter(margin=0.8), 1.1) == {"slow": "expected in 1012 ms, target 1100 ms"}
    assert drops(TargetFilter(), 1.1) == {}


def test_if_all_are_late_the_fastest_may_stay() -> None:
    """By default somebody is left; with keep_fastest off nobody is."""
    assert set(drops(TargetFilter(), 0.01)) == {"slow"}
    assert set(drops(TargetFilter(keep_fastest=False), 0.01)) == {"slow", "fast"}


def test_what_was_learned_replaces_what_was_declared() -> None:
    """A replica that proved slower than declared is late, one that proved faster is not."""
    load = FleetLoad(clock=FrozenClock())
    load.register([FAST, SLOW])
    for model, seconds in ((FAST, 3.0), (SLOW, 0.2)) * 10:
        one = load.started(model.id)
        load.first_byte(one, seconds)
        load.finished(one, seconds, ok=True)
    assert set(drops(TargetFilter(), 1.0, load)) == {"fast"}


def test_kvfleet_finds_both() -> None:
    """The installed distribution brings both stages, bound by the fact."""
    table = discover(environ={})
    assert table.get(Kind.CLASSIFY, "slo").gives == (LATENCY_TARGET,)
    assert table.get(Kind.FILTER, "slo").needs == (LATENCY_TARGET,)
