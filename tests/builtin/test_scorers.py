"""The columns."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.adapters.base import EngineLoad
from kvfleet.adapters.call import Operation
from kvfleet.builtin.facts import prompt_tokens
from kvfleet.builtin.scorers import (
    CacheAffinityScorer,
    CapacityScorer,
    ComplianceScorer,
    CostScorer,
    HardwareLoadScorer,
    LatencyScorer,
    QualityScorer,
)
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.component import Services
from kvfleet.router.scoring import Column, Unit
from kvfleet.telemetry.fleet_limits import FleetLimits
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.rate_limits import RateLimitTracker
from kvfleet.telemetry.reservations import Work
from tests.builtin.making import context, model, user

TALK = [user("x" * 4000)]
PRICED = model("priced", cost_per_1k_input_tokens=0.01, cost_per_1k_output_tokens=0.02)
FREE = model("free", cost_per_1k_input_tokens=0.0, cost_per_1k_output_tokens=0.0)
HALF = model("half", cost_per_1k_input_tokens=0.01)
UNKNOWN = model("unknown", cost_per_1k_output_tokens=0.02)


def services(*models: ModelConfig) -> Services:
    """Services of a fleet on a frozen clock."""
    clock = FrozenClock()
    return Services(clock=clock, models=models, load=FleetLoad(clock))


def costs(models: tuple[ModelConfig, ...], *, known: bool = True, **ctx: Any) -> Column:
    """The cost column for a prompt of 1,000 tokens."""
    scorer = CostScorer()
    if known:
        scorer.provision(services(*models))
    return scorer.score(context(models, TALK, **ctx))


@pytest.mark.parametrize("known", [True, False])
def test_cost_is_of_this_prompt_and_its_answer(known: bool) -> None:
    """1,000 prompt tokens and, without `max_tokens`, the usual 256; what is unknown stays unknown."""
    column = costs((PRICED, FREE, HALF, UNKNOWN), known=known)
    assert column.unit is Unit.USD
    assert list(column.values) == [pytest.approx(0.01512), 0.0, pytest.approx(0.01256), None]


def test_max_tokens_is_what_an_answer_may_cost() -> None:
    """Under either of its names."""
    assert list(costs((PRICED,), body={"max_tokens": 1000}).values) == [pytest.approx(0.03)]
    assert list(costs((PRICED,), body={"max_completion_tokens": 500}).values) == [pytest.approx(0.02)]


def test_an_embedding_has_no_answer_to_pay() -> None:
    """Only the prompt counts."""
    scorer = CostScorer()
    scorer.provision(services(PRICED))
    ctx = context((PRICED,), operation=Operation.EMBEDDING, body={"input": "x" * 4000})
    assert list(scorer.score(ctx).values) == [pytest.approx(0.01)]


def test_pictures_cost_prompt_tokens() -> None:
    """765 tokens each."""
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}
    scorer = CostScorer(answer_tokens=0)
    scorer.provision(services(PRICED))
    assert list(scorer.score(context((PRICED,), [picture])).values) == [pytest.approx(0.00765)]


def test_cost_needs_no_classifier() -> None:
    """Without one, the prompt is measured on the spot."""
    assert list(costs((PRICED,), facts=False).values) == [pytest.approx(0.01512)]


# Latency


A, B = model("m", "http://a", latency_p50_ms=200), model("m", "http://b", latency_p50_ms=200)


def latency(fleet: Services, **ctx: Any) -> list[float]:
    """The latency column over A and B."""
    scorer = LatencyScorer()
    scorer.provision(fleet)
    column = scorer.score(context((A, B), TALK, now_s=fleet.clock.now_s(), **ctx))
    assert column.unit is Unit.SECONDS
    return [pytest.approx(value) for value in column.values]


def test_latency_is_declared_until_it_is_measured() -> None:
    """Then it is what was measured, of all replicas of the model; and where a queue is, more."""
    fleet, work = services(A, B), Work(prompt_tokens(context((A, B), TALK)))
    assert latency(fleet) == [0.225, 0.225]
    for _ in range(8):
        one = fleet.load.started(A.id, work)
        fleet.load.first_byte(one, 0.8)
        fleet.load.finished(one, 1.0, True)
    known, alike = (float(value.expected) for value in latency(fleet))
    assert known == alike == pytest.approx(0.8, rel=0.1)
    fleet.load.started(A.id)
    assert float(latency(fleet)[0].expected) > known


def measured() -> Services:
    """A fleet that reads 8,000 tokens in a second."""
    fleet = services(A, B)
    fleet.load.register((A, B))
    for tokens in (1000, 8000, 2000, 4000) * 8:
        one = fleet.load.started(A.id, Work(tokens))
        fleet.load.first_byte(one, tokens / 8000)
        fleet.load.finished(one, tokens / 8000, True)
    return fleet


def test_a_cached_prompt_is_answered_sooner() -> None:
    """By the time its cached tokens would take; more than there are save no more than all."""
    fleet = measured()
    column = LatencyScorer()
    column.provision(fleet)
    prompt = [user("x" * 32_000)]

    def seconds(**affinity: float) -> list[float]:
        known = {f"m@http://{key}": tokens for key, tokens in affinity.items()}
        return [float(v or 0) for v in column.score(context((A, B), prompt, affinity=known)).values]

    nothing, half, all_, more = seconds()[0], seconds(a=4000.0)[0], seconds(a=8000.0)[0], seconds(a=32_000.0)[0]
    assert nothing == pytest.approx(1.0, rel=0.1)
    assert (nothing - half, nothing - all_) == pytest.approx((0.5, 1.0), rel=0.1)
    assert more == all_


def test_the_terms_say_how_a_time_comes_about() -> None:
    """Queue, own prompt, what the cache saves, steps of decoding, who would be held up, memory."""
    fleet = measured()
    scorer = LatencyScorer()
    scorer.provision(fleet)
    fleet.load.started(A.id, Work(8000))
    column = scorer.score(context((A, B), [user("x" * 32_000)], affinity={B.id: 4000.0}, now_s=fleet.clock.now_s()))
    assert list(column.terms) == [
        "queue_s", "prompt_s", "saved_s", "returns_s", "later_s", "step_s", "step_each_s", "decoding", "delayed_s",
        "usage", "pending", "answer_tokens",
    ]  # fmt: skip
    assert column.terms["pending"] == [1.0, 0.0]
    assert column.terms["queue_s"] == pytest.approx([1.0, 0.0], rel=0.1)
    assert column.terms["saved_s"] == pytest.approx([0.0, 0.5], rel=0.1)
    assert [q + p for q, p in zip(column.terms["queue_s"], column.terms["prompt_s"], strict=True)] == column.values


def test_a_stranger_has_its_declared_latency() -> None:
    """A candidate that is not of the fleet, as in a test, is no error."""
    scorer = LatencyScorer()
    values = scorer.score(context((A, model("x", latency_p50_ms=800)), TALK)).values
    assert list(values) == [pytest.approx(0.225), pytest.approx(0.9)]


# The others


def test_quality_is_declared() -> None:
    """As a utility."""
    models = (model("a", quality_score=0.9), model("b"))
    assert QualityScorer().score(context(models)) == Column(Unit.UTILITY, [0.9, 0.5])


def test_cache_affinity_is_in_tokens() -> None:
    """What the affinity stages expect; nothing where they expect nothing."""
    assert CacheAffinityScorer().score(context((A, B), affinity={B.id: 64.0})) == Column(Unit.TOKENS, [0.0, 64.0])


def test_hardware_load_is_free_capacity() -> None:
    """Requests and KV cache fill a replica; one that nobody registered is unknown."""
    fleet = services(A, B)
    scorer = HardwareLoadScorer()
    scorer.provision(fleet)
    for _ in range(8):
        fleet.load.started(A.id)
    fleet.load.report("http://b", EngineLoad(kv_usage=0.75), fleet.clock.now_s())
    column = scorer.score(context((A, B, model("x")), now_s=fleet.clock.now_s()))
    assert column == Column(Unit.UTILITY, [0.5, 0.25, None])


def test_compliance_is_clearance_for_the_data_class() -> None:
    """1 or 0."""
    models = (model("a", allowed_data_classes=("public",)), model("b"))
    ctx = context(models, data_class="confidential")
    assert ComplianceScorer().score(ctx) == Column(Unit.UTILITY, [0.0, 1.0])


def test_capacity_is_what_is_left_of_the_tightest_limit() -> None:
    """1 where nothing is known of any."""
    clock = FrozenClock()
    limits = FleetLimits(RateLimitTracker(clock=clock))
    limits.begin(B.id).heard({"ratelimit": "limit=100, remaining=25, reset=30"})
    scorer = CapacityScorer()
    scorer.provision(Services(clock=clock, models=(A, B), limits=limits))
    assert scorer.score(context((A, B), now_s=clock.now_s())) == Column(Unit.UTILITY, [1.0, 0.25])
