"""Strategies that learn from outcomes which model answers best: epsilon-greedy, UCB1, Thompson sampling and Exp3.

Their arms are models; the replicas of a model are ranked by expected time. Each strategy says with which probability it
wants each model, guard rails bound how far that may go from the best known one, and the choice is drawn from what
remains. So the probability of every choice, its propensity, is known exactly and stands in the ranking: recorded
decisions can be evaluated off-policy. A strategy sees only the candidates that the filters left, so it never explores
into a policy's drop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from kvfleet.config.fields import number
from kvfleet.router.arms import ArmStats
from kvfleet.router.chances import among, chances_to_be_best
from kvfleet.router.learner import MOST_ARMS, LearnedRanking, LearnedStrategy
from kvfleet.router.learning import compute_reward

__all__ = [
    "ArmStats",
    "EpsilonGreedyStrategy",
    "Exp3Strategy",
    "LearnedRanking",
    "LearnedStrategy",
    "ThompsonSamplingStrategy",
    "UCB1Strategy",
    "compute_reward",
]

_MOST_PENDING = 1000
_WIDEST = 50.0
"""Exp3 keeps the logarithms of its weights within this, so that whoever was bad can still become good."""


@attrs.define
class EpsilonGreedyStrategy(LearnedStrategy):
    """Mostly choose the model with the best mean reward, and sometimes any; the less often, the more is known."""

    name = "epsilon_greedy"

    epsilon: float = number(0.1, ge=0, le=1, doc="Share of requests that go to any model, at the start.")
    decay: float = number(0.999, gt=0, le=1, doc="What the share is multiplied by with each reward.")
    min_epsilon: float = number(0.01, ge=0, le=1, doc="The share never falls below this.")
    _epsilon: float = attrs.field(init=False, repr=False, eq=False)

    @_epsilon.default
    def _start(self) -> float:
        return self.epsilon

    def _chances(self, names: Sequence[str], arms: Sequence[ArmStats]) -> list[float]:  # noqa: ARG002 - means suffice
        top = max(arm.mean_reward for arm in arms)
        best = among([i for i, arm in enumerate(arms) if arm.mean_reward == top], len(arms))
        return [self._epsilon / len(arms) + (1 - self._epsilon) * chance for chance in best]

    def _learn(self, name: str, reward: float, chance: float | None, count: int) -> None:
        super()._learn(name, reward, chance, count)
        floor = min(self.min_epsilon, self.epsilon)
        self._epsilon = max(floor, self._epsilon * self.decay)

    def _more(self) -> dict[str, Any]:
        return {"epsilon": self._epsilon}

    def _restore(self, more: Mapping[str, Any]) -> None:
        self._epsilon = min(float(more.get("epsilon", self.epsilon)), self.epsilon)


@attrs.define
class UCB1Strategy(LearnedStrategy):
    """Choose the model with the greatest upper confidence bound of its reward (Auer, Cesa-Bianchi and Fischer 2002).

    A choice counts as made before its reward is there, so that a burst does not all go to one model.
    """

    name = "ucb1"

    exploration_constant: float = number(1.41, ge=0, doc="How much uncertainty counts; the square root of 2 in theory.")
    _pending: dict[str, int] = attrs.field(init=False, factory=dict, repr=False, eq=False)

    def _chances(self, names: Sequence[str], arms: Sequence[ArmStats]) -> list[float]:
        pulls = [arm.pulls + self._pending.get(name, 0) for name, arm in zip(names, arms, strict=True)]
        whole = math.log(max(sum(pulls), 1))
        bounds = [
            arm.mean_reward + self.exploration_constant * math.sqrt(whole / n) if n else math.inf
            for arm, n in zip(arms, pulls, strict=True)
        ]
        top = max(bounds)
        return among([i for i, bound in enumerate(bounds) if bound == top], len(arms))

    def _choose(self, names: Sequence[str], chances: Sequence[float], chosen: int) -> None:  # noqa: ARG002 - counted alike
        name = names[chosen]
        if len(self._pending) < MOST_ARMS:
            self._pending[name] = min(self._pending.get(name, 0) + 1, _MOST_PENDING)

    def _settle(self, name: str) -> None:
        left = self._pending.pop(name, 0) - 1
        if left > 0:
            self._pending[name] = left


@attrs.define
class ThompsonSamplingStrategy(LearnedStrategy):
    """Choose each model with the probability that it is the best, by what its rewards let one believe (Thompson 1933).

    A model's belief is a Beta distribution to which each reward adds its share of a success. The probability of being
    the best is computed from the beliefs' means and deviations, not sampled, so that it is the choice's propensity.
    """

    name = "thompson_sampling"

    prior_alpha: float = number(1.0, gt=0, doc="Successes supposed before the first reward.")
    prior_beta: float = number(1.0, gt=0, doc="Failures supposed before the first reward.")
    _known: dict[tuple[str, ...], list[float]] = attrs.field(init=False, factory=dict, repr=False, eq=False)

    def _chances(self, names: Sequence[str], arms: Sequence[ArmStats]) -> list[float]:
        key = tuple(names)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= MOST_ARMS:
                self._known.clear()
            found = self._known[key] = chances_to_be_best([self._belief(arm) for arm in arms])
        return found

    def _belief(self, arm: ArmStats) -> tuple[float, float]:
        """Mean and standard deviation."""
        alpha = self.prior_alpha + arm.pulls * arm.mean_reward
        beta = self.prior_beta + arm.pulls * (1 - arm.mean_reward)
        whole = alpha + beta
        return alpha / whole, math.sqrt(alpha * beta / (whole * whole * (whole + 1)))

    def _learned(self, *_: object) -> None:
        self._known.clear()


@attrs.define
class Exp3Strategy(LearnedStrategy):
    """Choose by exponential weights, which hold where rewards change, even on purpose (Auer et al. 2002).

    Each reward counts inversely to the probability of its choice; a model that answered as a fallback was not chosen,
    and its reward counts in its mean alone.
    """

    name = "exp3"

    gamma: float = number(0.1, gt=0, le=1, doc="Share of requests spread evenly, and how fast weights move.")
    _weights: dict[str, float] = attrs.field(init=False, factory=dict, repr=False, eq=False)
    _last: dict[str, tuple[float, int]] = attrs.field(init=False, factory=dict, repr=False, eq=False)

    def _chances(self, names: Sequence[str], arms: Sequence[ArmStats]) -> list[float]:  # noqa: ARG002 - weights suffice
        logs = [self._weights.get(name, 0.0) for name in names]  # a model nobody knows begins beside the best
        highest = max(logs)
        weights = [math.exp(one - highest) for one in logs]
        whole = sum(weights)
        return [(1 - self.gamma) * weight / whole + self.gamma / len(names) for weight in weights]

    def _value(self, name: str, arm: ArmStats) -> float:  # noqa: ARG002 - weights say more than means
        return self._weights.get(name, 0.0)

    def _choose(self, names: Sequence[str], chances: Sequence[float], chosen: int) -> None:
        if len(self._weights) < MOST_ARMS:
            for name in names:
                self._weights.setdefault(name, 0.0)
        if len(self._last) < MOST_ARMS or names[chosen] in self._last:
            self._last[names[chosen]] = chances[chosen], len(names)

    def update(self, model_name: str, reward: float) -> None:
        """Learn the reward of a model's answer, by the probability with which `select` chose it last.

        Raises:
            ValueError: if the reward is not between 0 and 1.
        """
        self._learn(model_name, reward, *self._last.get(model_name, (1.0, max(len(self._weights), 1))))

    def _learned(self, name: str, change: float, chance: float | None, count: int) -> None:
        if chance is None:
            return
        weights = self._weights
        weights[name] = weights.get(name, 0.0) + self.gamma * change / (chance * count)
        highest = max(weights.values())
        for one in weights:
            weights[one] = max(weights[one] - highest, -_WIDEST)

    def _forget(self, name: str) -> None:
        del self._arms[name]
        self._weights.pop(name, None)

    def _more(self) -> dict[str, Any]:
        return {"log_weights": dict(self._weights)}

    def _restore(self, more: Mapping[str, Any]) -> None:
        kept = more.get("log_weights", {})
        self._weights = {str(name): min(float(weight), 0.0) for name, weight in kept.items()}
