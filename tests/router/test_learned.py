"""Strategies that learn which model answers best."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.config.schema import ModelConfig
from kvfleet.router.chances import chances_to_be_best
from kvfleet.router.learned import (
    ArmStats,
    EpsilonGreedyStrategy,
    Exp3Strategy,
    LearnedStrategy,
    ThompsonSamplingStrategy,
    UCB1Strategy,
    compute_reward,
)
from kvfleet.router.scoring import ScoringContext

EVERY: list[type[LearnedStrategy]] = [
    EpsilonGreedyStrategy,
    UCB1Strategy,
    ThompsonSamplingStrategy,
    Exp3Strategy,
]


def model(name: str, endpoint: str = "", quality_score: float = 0.5) -> ModelConfig:
    """A model, at an address of its own unless told otherwise."""
    return ModelConfig(name=name, endpoint=endpoint or f"http://{name}", quality_score=quality_score)


MODELS = (model("good", quality_score=0.4), model("fair", quality_score=0.9), model("poor", quality_score=0.5))
REWARDS = {"good": 0.9, "fair": 0.5, "poor": 0.1}


def seeded(seed: int, *, dry_run: bool = False) -> ScoringContext:
    """A decision of its own."""
    return ScoringContext(seed=seed, dry_run=dry_run)


def teach(strategy: LearnedStrategy, rounds: int) -> Counter[str]:
    """Choose and be rewarded so often; who was chosen."""
    chosen: Counter[str] = Counter()
    for seed in range(1, rounds + 1):
        first = strategy.select(MODELS, seeded(seed))[0].model_name
        strategy.update(first, REWARDS[first])
        chosen[first] += 1
    return chosen


def propensities(strategy: LearnedStrategy, seed: int = 1) -> dict[str, float]:
    """The chance of each model, as the ranking has it."""
    ranking = strategy.select(MODELS, seeded(seed, dry_run=True))
    return {m.name: chance for m, chance in zip(ranking.models, ranking.terms["propensity"], strict=True)}


def test_the_page_s_example() -> None:
    """Epsilon-greedy as the documentation has it: select, reward, update."""
    strategy = EpsilonGreedyStrategy(epsilon=0.1, decay=0.999)
    scores = strategy.select(MODELS)
    selected = next(s for s in scores if s.selected)
    reward = compute_reward(latency_ms=350, quality_score=0.85, cost=0.001, success=True)
    strategy.update(selected.model_name, reward)
    assert reward == pytest.approx(0.855)
    assert strategy.stats()["arms"][selected.model_name]["mean_reward"] == pytest.approx(0.855)
    assert UCB1Strategy(exploration_constant=1.41).select(MODELS)
    assert ThompsonSamplingStrategy().select(MODELS)
    assert Exp3Strategy(gamma=0.1).select(MODELS)


@pytest.mark.parametrize(
    ("given_", "reward"),
    [
        ({"latency_ms": 0, "quality_score": 1, "cost": 0}, 1.0),
        ({"latency_ms": 2000, "quality_score": 0, "cost": 0.01}, 0.0),
        ({"latency_ms": 1e9, "quality_score": 0, "cost": 5}, 0.0),
        ({"latency_ms": 1000, "quality_score": 0.5, "cost": 0.005}, 0.5),
        ({"latency_ms": 1000, "quality_score": 0.5, "cost": None}, 0.5),
        ({"latency_ms": 1000, "quality_score": 1, "cost": 0, "target_latency_ms": 4000}, 0.9),
        ({"latency_ms": 0, "quality_score": 1, "cost": 0, "success": False}, 0.0),
    ],
)
def test_a_reward_weighs_time_quality_and_price(given_: dict[str, float], reward: float) -> None:
    """Four tenths, three and three; nothing for a failure; an unknown price leaves the others their share."""
    assert compute_reward(**given_) == pytest.approx(reward)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", EVERY)
def test_it_finds_the_best_model(make: type[LearnedStrategy]) -> None:
    """After a thousand answers most requests go to the model that earns most, whatever was declared."""
    chosen = teach(make(), 1000)
    assert chosen.most_common(1)[0][0] == "good"
    assert chosen["good"] > 600
    assert propensities(make_taught(make))["good"] > 0.5


def make_taught(make: type[LearnedStrategy]) -> LearnedStrategy:
    """A strategy after a thousand answers."""
    strategy = make()
    teach(strategy, 1000)
    return strategy


@pytest.mark.parametrize("make", EVERY)
def test_a_million_rewards_leave_it_sane(make: type[LearnedStrategy]) -> None:
    """Means, chances and weights are finite and right after a million updates, and a new model is still tried."""
    strategy = make()
    strategy.select(MODELS, seeded(1))
    for i in range(1_000_000):
        strategy.update("good" if i & 3 else "poor", 0.9 if i & 3 else 0.1)
    arms = strategy.stats()["arms"]
    assert arms["good"]["mean_reward"] == pytest.approx(0.9)
    assert arms["good"]["variance"] == pytest.approx(0.0, abs=1e-9)
    chances = propensities(strategy)
    assert math.isclose(sum(chances.values()), 1.0)
    assert all(0 <= chance <= 1 for chance in chances.values())
    assert chances["fair"] > 0


@pytest.mark.parametrize("make", EVERY)
@settings(deadline=None, max_examples=40)
@given(
    rewards=st.lists(st.tuples(st.sampled_from(["good", "fair", "poor"]), st.floats(0, 1)), max_size=40),
    least=st.integers(0, 3),
    most=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_propensities_are_a_distribution_within_the_guard_rail(
    make: Callable[..., LearnedStrategy], rewards: list[tuple[str, float]], least: int, most: float, seed: int
) -> None:
    """They sum to 1; all but the best known model share what may be explored; every candidate stays in the ranking."""
    strategy = make(min_samples=least, max_exploration=most)
    for name, reward in rewards:
        strategy.update(name, reward)
    chances = propensities(strategy, seed)
    assert math.isclose(sum(chances.values()), 1.0)
    assert 1 - max(chances.values()) <= most + 1e-9
    ranking = strategy.select(MODELS, seeded(seed, dry_run=True))
    assert ranking.mode in ("exploit", "explore")
    assert sorted(m.name for m in ranking.models) == ["fair", "good", "poor"]


@pytest.mark.parametrize("make", EVERY)
def test_the_propensity_is_how_often_a_model_is_chosen(make: type[LearnedStrategy]) -> None:
    """Over many seeds each model comes first as often as its recorded chance says."""
    strategy = make(min_samples=2)
    for name, reward in (("good", 0.6), ("good", 0.5), ("fair", 0.5), ("fair", 0.4), ("poor", 0.5), ("poor", 0.5)):
        strategy.update(name, reward)
    chances = propensities(strategy)
    firsts = Counter(strategy.select(MODELS, seeded(seed, dry_run=True))[0].model_name for seed in range(1, 4001))
    for name, chance in chances.items():
        assert firsts[name] / 4000 == pytest.approx(chance, abs=0.03)


@pytest.mark.parametrize("make", EVERY)
def test_exploration_is_bounded(make: type[LearnedStrategy]) -> None:
    """With `max_exploration` at 0.1 nine requests in ten go to the best known model, from the first one on."""
    strategy = make(max_exploration=0.1, min_samples=5)
    assert propensities(strategy) == pytest.approx({"fair": 0.9, "good": 0.05, "poor": 0.05})  # the best declared
    for _ in range(5):
        strategy.update("good", 0.9)
    if make is Exp3Strategy:
        return  # what makes its best is a weight that grew by a choice
    assert propensities(strategy) == pytest.approx({"good": 0.9, "fair": 0.05, "poor": 0.05})
    modes = Counter(strategy.select(MODELS, seeded(seed, dry_run=True)).mode for seed in range(1, 2001))
    assert modes["explore"] / 2000 == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("make", EVERY)
def test_every_model_gets_its_samples_first(make: type[LearnedStrategy]) -> None:
    """Until each model has `min_samples` rewards, only those that are short of them are chosen."""
    strategy = make(min_samples=3)
    for _ in range(3):
        strategy.update("good", 1.0)
    assert propensities(strategy) == pytest.approx({"good": 0.0, "fair": 0.5, "poor": 0.5})


@pytest.mark.parametrize("make", EVERY)
def test_a_dry_run_moves_nothing(make: type[LearnedStrategy]) -> None:
    """However often it is rehearsed, the choice stays the same."""
    strategy = make()
    before = strategy.stats(), propensities(strategy)
    first = [strategy.select(MODELS, seeded(5, dry_run=True))[0].model_name for _ in range(50)]
    assert len(set(first)) == 1
    assert (strategy.stats(), propensities(strategy)) == before


@pytest.mark.parametrize("make", EVERY)
def test_it_chooses_only_among_those_it_is_given(make: type[LearnedStrategy]) -> None:
    """A model that a filter dropped is not in the ranking, however good it was."""
    strategy = make_taught(make)
    for seed in range(1, 200):
        assert {m.name for m in strategy.select(MODELS[1:], seeded(seed)).models} == {"fair", "poor"}
    assert len(strategy.select((), seeded(1))) == 0


@pytest.mark.parametrize("make", EVERY)
def test_arms_are_models_not_replicas(make: type[LearnedStrategy]) -> None:
    """Two replicas share an arm and a propensity, and stand together in the ranking."""
    models = [model("a", "http://a1"), model("b"), model("a", "http://a2")]
    ranking = make().select(models, seeded(3))
    names = [m.name for m in ranking.models]
    assert names in (["a", "a", "b"], ["b", "a", "a"])
    assert ranking.terms["propensity"] == pytest.approx([0.5, 0.5, 0.5])


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("reward", [-0.1, 1.1, math.nan])
def test_a_reward_out_of_range_is_refused(make: type[LearnedStrategy], reward: float) -> None:
    """Nothing is clamped in silence."""
    with pytest.raises(ValueError, match="a reward must be between 0 and 1"):
        make().update("good", reward)


def test_epsilon_decays_to_its_floor() -> None:
    """Each reward makes exploration rarer, down to the least share."""
    strategy = EpsilonGreedyStrategy(epsilon=0.5, decay=0.5, min_epsilon=0.1)
    shown = [strategy.stats()["epsilon"]]
    for _ in range(4):
        strategy.update("good", 0.5)
        shown.append(strategy.stats()["epsilon"])
    assert shown == [0.5, 0.25, 0.125, 0.1, 0.1]


def test_ucb_spreads_a_burst() -> None:
    """Choices without a reward yet count as made, so that the uncertain model is not chosen for a whole burst."""
    strategy = UCB1Strategy()
    for name in ("good", "fair", "poor"):
        for _ in range(10):
            strategy.update(name, 0.5)
    firsts = Counter(strategy.select(MODELS, seeded(seed))[0].model_name for seed in range(1, 31))
    assert min(firsts[name] for name in ("good", "fair", "poor")) >= 9


def test_exp3_follows_a_change() -> None:
    """When the best model turns bad, the weights move to another one."""
    strategy = Exp3Strategy(gamma=0.2)
    teach(strategy, 500)
    assert propensities(strategy)["good"] > 0.5
    for seed in range(1, 3000):
        first = strategy.select(MODELS, seeded(seed))[0].model_name
        strategy.update(first, 1.0 if first == "poor" else 0.0)
    assert propensities(strategy)["poor"] > 0.5


def test_the_chance_to_be_best_follows_the_beliefs() -> None:
    """Equal beliefs share; a clearly better one takes nearly all; beyond sixteen only the most promising count."""
    assert chances_to_be_best([(0.5, 0.1)] * 4) == pytest.approx([0.25] * 4)
    assert chances_to_be_best([(0.9, 0.01), (0.5, 0.01)]) == pytest.approx([1.0, 0.0], abs=1e-6)
    many = chances_to_be_best([(0.5, 0.01)] * 20 + [(0.9, 0.01)])
    assert many[-1] == pytest.approx(1.0, abs=1e-6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0, 1))
def test_a_corrected_reward_is_as_if_it_had_been_right_at_once(rewards: list[float], better: float) -> None:
    """Mean and variance after a correction are those of the corrected rewards."""
    arm, wanted = ArmStats(), ArmStats()
    for i, reward in enumerate(rewards):
        arm.add(reward)
        wanted.add(better if i == 0 else reward)
    arm.correct(rewards[0], better)
    assert arm.mean_reward == pytest.approx(wanted.mean_reward, abs=1e-9)
    assert arm.variance == pytest.approx(wanted.variance, abs=1e-9)


def test_ratings_replace_the_declared_quality_by_and_by() -> None:
    """Without a rating the declared quality counts; five ratings weigh as much; a second rating replaces the first."""
    arm = ArmStats()
    assert arm.quality(0.8) == 0.8
    for _ in range(5):
        arm.rate(0.2)
    assert arm.quality(0.8) == pytest.approx(0.5)
    arm.rate(0.7, instead_of=0.2)
    assert arm.ratings == 5
    assert arm.mean_rating == pytest.approx(0.3)
