"""The cheapest that meets the target."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.config.schema import ModelConfig
from kvfleet.router.scoring import Column, ScoringContext, Unit
from kvfleet.router.slo import ServiceTarget, SLOStrategy


def model(name: str, cost: float | None, latency_ms: float, quality: float) -> ModelConfig:
    """A model as it is declared."""
    return ModelConfig(
        name=name,
        endpoint=f"http://{name}",
        cost_per_1k_input_tokens=cost,
        latency_p50_ms=latency_ms,
        quality_score=quality,
    )


CHEAP, MIDDLE, DEAR = model("cheap", 0.1, 200, 0.5), model("middle", 0.5, 900, 0.8), model("dear", 2.0, 600, 0.9)
UNPRICED = model("unpriced", None, 100, 0.95)
MODELS = (DEAR, UNPRICED, CHEAP, MIDDLE)


def ranked(strategy: SLOStrategy, tenant: str = "", **context: Any) -> list[str]:
    """The models, best first."""
    return [m.name for m in strategy.select(MODELS, ScoringContext(tenant_id=tenant, **context)).models]


@pytest.mark.parametrize(
    ("target", "order"),
    [
        ({}, ["cheap", "middle", "dear", "unpriced"]),
        ({"min_quality": 0.7}, ["middle", "dear", "unpriced", "cheap"]),
        ({"min_quality": 0.75, "max_latency_ms": 700}, ["dear", "unpriced", "middle", "cheap"]),
        ({"min_quality": 0.92}, ["unpriced", "dear", "middle", "cheap"]),
    ],
)
def test_those_that_meet_it_by_price_then_the_closest(target: dict[str, float], order: list[str]) -> None:
    """An unknown price is the last of those that meet it: unknown is not free."""
    assert ranked(SLOStrategy(**target)) == order


def test_each_tenant_has_its_own_target() -> None:
    """The others have the usual one."""
    strategy = SLOStrategy(tenants={"premium": ServiceTarget(min_quality=0.85)})
    assert ranked(strategy, "premium")[0] == "dear"
    assert ranked(strategy, "somebody")[0] == "cheap"


def test_what_is_measured_counts_more_than_what_is_declared() -> None:
    """A cheap model that has become slow hands over."""
    slow = {"latency": Column(Unit.SECONDS, [0.6, 0.1, 5.0, 0.9])}
    assert ranked(SLOStrategy(max_latency_ms=1000))[0] == "cheap"
    assert ranked(SLOStrategy(max_latency_ms=1000), columns=slow)[0] == "middle"


def test_an_unknown_time_meets_no_target() -> None:
    """It is not taken for no time at all."""
    unknown = {"latency": Column(Unit.SECONDS, [0.6, 0.1, None, 0.9])}
    assert ranked(SLOStrategy(max_latency_ms=1000), columns=unknown)[0] == "middle"


def test_the_decision_says_whether_the_target_is_met() -> None:
    """By its mode, and for each candidate by a term."""
    met = SLOStrategy(min_quality=0.85).select(MODELS)
    assert (met.mode, list(met.terms["meets_target"])) == ("meets the target", [1.0, 1.0, 0.0, 0.0])
    assert SLOStrategy(min_quality=1.0).select(MODELS).mode == "closest to the target"


def test_equals_take_turns() -> None:
    """Replicas of one model do not all wait for the first."""
    twins = tuple(ModelConfig(name="m", endpoint=f"http://{i}") for i in range(2))
    firsts = {SLOStrategy().select(twins, ScoringContext(seed=seed)).models[0].endpoint for seed in range(4)}
    assert len(firsts) == 2


@given(
    st.lists(st.tuples(st.none() | st.floats(0, 10), st.floats(1, 10_000), st.floats(0, 1)), min_size=1, max_size=6),
    st.none() | st.floats(1, 10_000),
    st.none() | st.floats(0, 1),
)
def test_nobody_that_meets_it_comes_after_one_that_does_not(
    known: list[tuple[float | None, float, float]], latency: float | None, quality: float | None
) -> None:
    """Every candidate is ranked once, and totals fall with the ranks of both groups."""
    models = [model(f"m{i}", *what) for i, what in enumerate(known)]
    ranking = SLOStrategy(max_latency_ms=latency, min_quality=quality).select(models)
    assert sorted(m.name for m in ranking.models) == sorted(m.name for m in models)
    meets = list(ranking.terms["meets_target"]) if len(models) > 1 else [1.0]
    assert meets == sorted(meets, reverse=True)
    assert all(0 <= total <= 1 for total in ranking.totals)
