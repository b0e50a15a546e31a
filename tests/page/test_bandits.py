"""Bandit Strategies (Adaptive/Learned Routing)."""

from __future__ import annotations

import pytest

from tests.page.models import MODELS
from tests.page.printed import run, upto

EXAMPLE = """
from kvfleet.router.learned import (
    EpsilonGreedyStrategy,  # Simple explore/exploit
    UCB1Strategy,           # Upper Confidence Bound
    ThompsonSamplingStrategy,  # Bayesian sampling
    Exp3Strategy,           # Adversarial setting
    compute_reward,         # Reward from outcomes
)

# Epsilon-greedy: explores 10% of time, exploits 90%
strategy = EpsilonGreedyStrategy(epsilon=0.1, decay=0.999)
scores = strategy.select(models)
selected = next(s for s in scores if s.selected)

# After each request, update with observed reward
reward = compute_reward(
    latency_ms=350, quality_score=0.85, cost=0.001, success=True
)
strategy.update(selected.model_name, reward)
# Strategy automatically converges to best model over time

# UCB1: Mathematically optimal exploration-exploitation
strategy = UCB1Strategy(exploration_constant=1.41)

# Thompson Sampling: Bayesian approach, excellent convergence
strategy = ThompsonSamplingStrategy()

# Exp3: Works in adversarial/non-stationary environments
strategy = Exp3Strategy(gamma=0.1)
"""

STRATEGIES = {
    "epsilon_greedy": "# After each request",
    "ucb1": "# UCB1",
    "thompson_sampling": "# Thompson Sampling",
    "exp3": "# Exp3",
}
"""The paragraph after which `strategy` is which."""


async def test_the_example_selects_and_learns() -> None:
    """One model is selected, and the reward is booked to it."""
    ran = await run(MODELS + upto(EXAMPLE, "# After each request"))
    assert 0 < ran["reward"] <= 1
    arms = ran["strategy"].stats()["arms"]
    assert arms[ran["selected"].model_name]["pulls"] == 1
    assert sum(arm["pulls"] for arm in arms.values()) == 1


@pytest.mark.parametrize("name", STRATEGIES)
async def test_each_converges_to_the_best_model(name: str) -> None:
    """After a while most of its choices are the model that earns most, though it is declared the worst."""
    ran = await run(MODELS + upto(EXAMPLE, STRATEGIES[name]))
    strategy, models, context = ran["strategy"], ran["models"], ran["ScoringContext"]
    earns = {"cheap-fast": 0.9, "balanced": 0.5, "premium": 0.1}
    chosen = []
    for seed in range(1500):
        first = next(score for score in strategy.select(models, context(seed=seed)) if score.selected).model_name
        strategy.update(first, earns[first])
        chosen.append(first)
    assert chosen[-300:].count("cheap-fast") > 200
