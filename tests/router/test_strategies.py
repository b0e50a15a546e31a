"""Strategies that choose by price, time, quality, rules and weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.config.schema import ModelConfig, RouteRuleConfig, ScoringWeights
from kvfleet.router.balancing import LeastRequestsStrategy, RandomStrategy, RoundRobinStrategy
from kvfleet.router.routes import RouteMatch
from kvfleet.router.scoring import Column, Ranking, ScoringContext, Unit
from kvfleet.router.semantic import PromptDomain
from kvfleet.router.strategies import (
    CheapCascadeStrategy,
    CostFirstStrategy,
    HybridScoreStrategy,
    LatencyFirstStrategy,
    QualityFirstStrategy,
    RulesStrategy,
    StaticStrategy,
    WeightedStrategy,
)

RULES = (
    RouteRuleConfig(name="coding", condition={"tags.domain": "coding"}, target_model="balanced", priority=2),
    RouteRuleConfig(name="secret", condition={"data_class": "confidential"}, target_model="premium", priority=1),
)
EVERY: list[Callable[[], Any]] = [
    HybridScoreStrategy,
    CostFirstStrategy,
    LatencyFirstStrategy,
    QualityFirstStrategy,
    CheapCascadeStrategy,
    lambda: StaticStrategy("balanced"),
    lambda: RulesStrategy(RULES),
    WeightedStrategy,
    RoundRobinStrategy,
    RandomStrategy,
    LeastRequestsStrategy,
]


def model(name: str, endpoint: str = "", **known: Any) -> ModelConfig:
    """A model, at an address of its own unless told otherwise."""
    return ModelConfig(name=name, endpoint=endpoint or f"http://{name}", **known)


PAGE = (
    model("balanced", quality_score=0.8, cost_per_1k_input_tokens=0.01, latency_p50_ms=400),
    model("cheap-fast", quality_score=0.6, cost_per_1k_input_tokens=0.001, latency_p50_ms=150),
    model("premium", quality_score=0.95, cost_per_1k_input_tokens=0.05, latency_p50_ms=350),
)
FLEET = tuple(
    model(name, f"http://{name}-{i}", weight=weight)
    for name, weight in (("balanced", 3.0), ("cheap-fast", 1.0), ("premium", 0.0))
    for i in range(3)
)


def names(ranking: Ranking) -> list[str]:
    """The models' names in rank order."""
    return [m.name for m in ranking.models]


def endpoints(ranking: Ranking) -> list[str]:
    """The replicas' addresses in rank order."""
    return [m.endpoint for m in ranking.models]


@pytest.mark.parametrize("make", EVERY)
@settings(deadline=None)
@given(count=st.integers(0, 12), seed=st.integers(0, 2**32), session=st.sampled_from(["", "s"]))
def test_every_candidate_stays_in_the_ranking(make: Callable[[], Any], count: int, seed: int, session: str) -> None:
    """A ranking is a permutation of the candidates, for any fleet: it is the fallback order too."""
    models = [FLEET[i % 9] if i < 9 else PAGE[i % 3] for i in range(count)]
    ranking = make().select(models, ScoringContext(seed=seed, session=session))
    assert sorted(m.id for m in ranking.models) == sorted(m.id for m in models)
    assert len(ranking.totals) == count


@pytest.mark.parametrize("make", EVERY)
def test_the_same_context_gives_the_same_ranking(make: Callable[[], Any]) -> None:
    """Simulated and live decisions agree: all chance comes from the seed, and a dry run moves nothing."""
    strategy = make()
    dry = ScoringContext(seed=77, dry_run=True)
    first = strategy.select(FLEET, dry)
    assert strategy.select(FLEET, dry).models == first.models
    assert strategy.select(FLEET, ScoringContext(seed=77)).models == first.models


@pytest.mark.parametrize("make", EVERY)
def test_the_page_calls_it_without_a_context(make: Callable[[], Any]) -> None:
    """`select(models)` alone works, and marks one candidate as selected."""
    scores = make().select(list(PAGE))
    assert [s.selected for s in scores] == [True, False, False]


@pytest.mark.parametrize(
    ("strategy", "order"),
    [
        (CostFirstStrategy(), ["cheap-fast", "balanced", "premium"]),
        (LatencyFirstStrategy(), ["cheap-fast", "premium", "balanced"]),
        (QualityFirstStrategy(), ["premium", "balanced", "cheap-fast"]),
        (CheapCascadeStrategy(), ["cheap-fast", "balanced", "premium"]),
    ],
)
def test_each_dimension_decides_by_what_models_declare(strategy: Any, order: list[str]) -> None:
    """The cheapest, the fastest, the best come first, and the rest in that order."""
    assert names(strategy.select(PAGE)) == order


@pytest.mark.parametrize("cls", [CostFirstStrategy, LatencyFirstStrategy, QualityFirstStrategy])
def test_no_other_dimension_outweighs_the_one(cls: Any) -> None:
    """The least advantage decides against everything else."""
    unit = {"cost": Unit.USD, "latency": Unit.SECONDS, "quality": Unit.UTILITY}[cls.dimension]
    values = [0.999, 1.0] if unit.less_is_better else [1.0, 0.999]
    others = {"cost": Unit.USD, "latency": Unit.SECONDS, "quality": Unit.UTILITY, "cache_affinity": Unit.TOKENS}
    columns = {name: Column(kind, [1.0, 0.0] if kind.less_is_better else [0.0, 1.0]) for name, kind in others.items()}
    columns[cls.dimension] = Column(unit, values)
    models = (model("wins"), model("loses"))
    assert names(cls().select(models, ScoringContext(columns=columns))) == ["wins", "loses"]


def test_other_dimensions_break_ties() -> None:
    """Of two at one price, the faster and better is first."""
    models = (
        model("slow", cost_per_1k_input_tokens=0.01, latency_p50_ms=900),
        model("fast", cost_per_1k_input_tokens=0.01, latency_p50_ms=100),
        model("dear", cost_per_1k_input_tokens=0.02, latency_p50_ms=10),
    )
    assert names(CostFirstStrategy().select(models)) == ["fast", "slow", "dear"]


def test_an_unknown_price_is_last() -> None:
    """Unknown is not cheap."""
    models = (
        model("unknown"),
        model("dear", cost_per_1k_input_tokens=9.0),
        model("free", cost_per_1k_input_tokens=0.0),
    )
    assert names(CostFirstStrategy().select(models)) == ["free", "dear", "unknown"]
    assert names(CheapCascadeStrategy().select(models)) == ["free", "dear", "unknown"]


def test_a_cascade_exhausts_a_cheap_model_before_a_dear_one() -> None:
    """All replicas of the cheapest model come before the next; of two at one price the better is first."""
    models = (
        model("best", "http://b1", cost_per_1k_input_tokens=0.1, quality_score=0.9),
        model("small", "http://s1", cost_per_1k_input_tokens=0.01, quality_score=0.3),
        model("good", "http://g1", cost_per_1k_input_tokens=0.01, quality_score=0.7),
        model("small", "http://s2", cost_per_1k_input_tokens=0.01, quality_score=0.3),
    )
    assert names(CheapCascadeStrategy().select(models)) == ["good", "small", "small", "best"]


def test_hybrid_takes_its_weights() -> None:
    """Who weighs quality alone gets the best model."""
    weights = ScoringWeights(cost=0, latency=0, quality=1, cache_affinity=0)
    assert names(HybridScoreStrategy(weights).select(PAGE))[0] == "premium"


def test_hybrid_prefers_a_warm_replica_until_others_are_much_less_busy() -> None:
    """A cached prompt wins over a replica that is a little sooner, and loses against a queue."""
    models = (model("m", "http://cold"), model("m", "http://warm"))

    def chosen(cold_s: float, warm_s: float) -> str:
        columns = {
            "latency": Column(Unit.SECONDS, [cold_s, warm_s]),
            "cache_affinity": Column(Unit.TOKENS, [0.0, 900.0]),
        }
        return endpoints(HybridScoreStrategy().select(models, ScoringContext(columns=columns)))[0]

    assert chosen(0.20, 0.22) == "http://warm"
    assert chosen(0.20, 0.40) == "http://cold"


# Static


def test_static_always_chooses_its_model() -> None:
    """The page's example; the others follow in their order."""
    assert names(StaticStrategy(default_model="premium").select(PAGE)) == ["premium", "balanced", "cheap-fast"]


@pytest.mark.parametrize("default", ["", "was dropped by a filter"])
def test_static_without_its_model_takes_the_first(default: str) -> None:
    """A model that is not there leaves the order as it is."""
    assert names(StaticStrategy(default).select(PAGE)) == ["balanced", "cheap-fast", "premium"]


def test_replicas_of_a_model_are_ordered_by_time_then_by_cache() -> None:
    """Within a model the soonest replica is first, and among equals the one that has the prompt."""
    models = [model("m", f"http://{i}") for i in range(4)]
    columns = {
        "latency": Column(Unit.SECONDS, [0.5, 0.2, 0.2, None]),
        "cache_affinity": Column(Unit.TOKENS, [900.0, 0.0, 100.0, 900.0]),
    }
    ranking = StaticStrategy("m").select(models, ScoringContext(columns=columns, seed=5))
    assert endpoints(ranking) == ["http://2", "http://1", "http://0", "http://3"]


def test_equal_replicas_of_the_chosen_model_take_turns() -> None:
    """Replicas are used, also by a strategy that only knows models."""
    first = Counter(endpoints(StaticStrategy("premium").select(FLEET, ScoringContext(seed=i)))[0] for i in range(30))
    assert first == {"http://premium-0": 10, "http://premium-1": 10, "http://premium-2": 10}


# Rules


def test_a_rule_that_holds_puts_its_model_first() -> None:
    """The page's example: a tag chooses the model, and the trace names the rule."""
    ranking = RulesStrategy(rules=list(RULES)).select(PAGE, ScoringContext(tags={"domain": "coding"}))
    assert names(ranking)[0] == "balanced"
    assert ranking.mode == "rule coding"


def test_rules_are_applied_by_priority() -> None:
    """If two hold, the one with the lower number is first and the other second."""
    context = ScoringContext(tags={"domain": "coding"}, data_class="confidential")
    ranking = RulesStrategy(RULES).select(PAGE, context)
    assert names(ranking) == ["premium", "balanced", "cheap-fast"]
    assert ranking.mode == "rule secret"


def test_without_a_rule_the_score_decides() -> None:
    """No match is not an error."""
    ranking = RulesStrategy(RULES).select(PAGE, ScoringContext(tags={"domain": "cooking"}))
    assert ranking.models == HybridScoreStrategy().select(PAGE).models
    assert ranking.mode == "exploit"


def test_all_conditions_of_a_rule_must_hold() -> None:
    """Tags, tenant and data class together; a bare key is a tag."""
    condition = {"domain": "coding", "tenant": "ml", "data_class": "public"}
    strategy = RulesStrategy((RouteRuleConfig(name="all", condition=condition, target_model="premium"),))
    right = {"tags": {"domain": "coding"}, "tenant_id": "ml", "data_class": "public"}
    assert strategy.select(PAGE, ScoringContext(**right)).mode == "rule all"  # type: ignore[arg-type]
    for change in ({"tags": {}}, {"tenant_id": ""}, {"data_class": "internal"}):
        context = ScoringContext(**{**right, **change})  # type: ignore[arg-type]
        assert strategy.select(PAGE, context).mode == "exploit"


def test_rules_read_what_classifiers_found() -> None:
    """The domain and the route; a tag of the request's own of that name goes before what was found."""
    rules = (
        RouteRuleConfig(name="bills", condition={"route": "billing"}, target_model="premium", priority=1),
        RouteRuleConfig(name="code", condition={"domain": "coding"}, target_model="balanced", priority=2),
    )
    found = {"route": RouteMatch("billing", 0.7, "billing"), "domain": PromptDomain("coding")}
    strategy = RulesStrategy(rules)
    assert names(strategy.select(PAGE, ScoringContext(metadata=found)))[:2] == ["premium", "balanced"]
    tagged = ScoringContext(metadata=found, tags={"route": "careers"})
    assert strategy.select(PAGE, tagged).mode == "rule code"
    assert strategy.select(PAGE, ScoringContext(metadata={"route": RouteMatch()})).mode == "exploit"


def test_a_rule_for_a_model_that_is_not_there_does_not_hold() -> None:
    """If policy has dropped the target, the score decides among the others."""
    ranking = RulesStrategy(RULES).select(PAGE[1:], ScoringContext(tags={"domain": "coding"}))
    assert ranking.mode == "exploit"


# Weighted


def share(strategy: WeightedStrategy, models: tuple[ModelConfig, ...], draws: int = 4000) -> dict[str, float]:
    """How often each model came first, as a share."""
    first = Counter(names(strategy.select(models, ScoringContext(seed=seed)))[0] for seed in range(draws))
    return {name: count / draws for name, count in first.items()}


def test_weighted_respects_the_models_weights() -> None:
    """Three to one, however many replicas each has, and nothing for a weight of 0."""
    assert share(WeightedStrategy(), FLEET[:7]) == {
        "balanced": pytest.approx(0.75, abs=0.03),
        "cheap-fast": pytest.approx(0.25, abs=0.03),
    }


def test_weighted_takes_its_own_weights() -> None:
    """One in twenty goes to the canary; who is not named gets nothing."""
    strategy = WeightedStrategy(weights={"balanced": 0.95, "premium": 0.05})
    assert share(strategy, PAGE) == {
        "balanced": pytest.approx(0.95, abs=0.02),
        "premium": pytest.approx(0.05, abs=0.02),
    }


def test_weights_of_nothing_are_equal() -> None:
    """If all weigh 0, somebody must still answer."""
    found = share(WeightedStrategy(weights={"nobody": 1.0}), PAGE)
    assert found == {m.name: pytest.approx(1 / 3, abs=0.04) for m in PAGE}


def test_a_conversation_stays_with_its_model() -> None:
    """A session is drawn once; different sessions are drawn by weight."""
    strategy = WeightedStrategy()
    for i in range(20):
        context = [ScoringContext(session=f"s{i}", seed=seed) for seed in range(20)]
        assert len({names(strategy.select(FLEET, c))[0] for c in context}) == 1
    first = Counter(names(strategy.select(FLEET, ScoringContext(session=f"s{i}")))[0] for i in range(2000))
    assert first["balanced"] / 2000 == pytest.approx(0.75, abs=0.04)


def test_when_a_model_leaves_only_its_conversations_move() -> None:
    """Rendezvous hashing: the others keep theirs."""
    strategy = WeightedStrategy()
    models = tuple(model(f"m{i}") for i in range(5))
    for i in range(300):
        context = ScoringContext(session=f"s{i}")
        before = names(strategy.select(models, context))
        after = names(strategy.select(models[1:], context))
        assert after == [name for name in before if name != "m0"]


def test_stickiness_can_be_switched_off() -> None:
    """With `sticky: none`, a session is drawn anew each time."""
    strategy = WeightedStrategy(sticky="none")
    drawn = {names(strategy.select(FLEET, ScoringContext(session="s", seed=seed)))[0] for seed in range(50)}
    assert drawn == {"balanced", "cheap-fast"}


def test_without_a_context_weighted_draws_anew() -> None:
    """A library's user who gives no seed does not get the same model for ever."""
    strategy = WeightedStrategy()
    assert {names(strategy.select(FLEET))[0] for _ in range(200)} == {"balanced", "cheap-fast"}


def test_a_split_may_stick_to_tenants_and_be_drawn_anew() -> None:
    """All of a tenant's requests are on one side; another salt puts other tenants there."""
    models = (model("a"), model("b"))
    sides = [
        [
            names(
                WeightedStrategy(sticky="tenant", salt=salt).select(models, ScoringContext(tenant_id=f"t{i}", seed=s))
            )[0]
            for i in range(200)
        ]
        for salt, s in (("x", 1), ("x", 2), ("y", 1))
    ]
    assert sides[0] == sides[1]
    assert sides[0] != sides[2]
    assert 60 < sides[0].count("a") < 140
