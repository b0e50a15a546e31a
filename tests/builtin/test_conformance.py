"""Every built-in stage keeps the contract a third party's must keep."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.manager import discover
from kvfleet.router.routes import RouteExamples
from kvfleet.testing.conformance import check_component

COMPONENTS = [
    c
    for kind in Kind
    if kind.is_stage or kind is Kind.JUDGE
    for c in discover(environ={}).of_kind(kind)
    if c.distribution == "kvfleet"
]
SAMPLES: dict[str, dict[str, Any]] = {
    "select.canary": {"canary": "small-8b"},
    "judge.model": {"model": "cloud"},
    "classify.routes": {"routes": {"billing": RouteExamples(examples=("I was charged twice", "Where is my invoice?"))}},
}
"""Options of those that have one without a default."""


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.key)
def test_it_keeps_its_contract(component: Component) -> None:
    """By the conformance kit that plugin authors use."""
    if component.key == "judge.json_schema":
        pytest.importorskip("jsonschema")
    check_component(component, **SAMPLES.get(component.key, {}))


def test_every_documented_name_is_there() -> None:
    """A pipeline may use any of these."""
    documented = (
        "classify.prompt classify.modality classify.pii admit.concurrency filter.policy filter.residency filter.tenant "
        "filter.capabilities filter.health answer.exact_cache affinity.prefix score.cost score.latency score.quality "
        "score.cache_affinity score.hardware_load score.compliance select.static select.weighted select.rules "
        "select.cost_first select.latency_first select.quality_first select.cheap_cascade select.hybrid_score "
        "select.round_robin select.random select.least_requests execute.fallback observe.metrics observe.log"
    )
    assert {c.key for c in COMPONENTS} >= set(documented.split())
