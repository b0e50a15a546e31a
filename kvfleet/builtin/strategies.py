"""The strategies as components; those that read facts say which."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs

from kvfleet.builtin.facts import DOMAIN, EMBEDDING, PROMPT, ROUTE
from kvfleet.plugin.component import Component, Stability
from kvfleet.plugin.contract import Fact, Kind
from kvfleet.plugin.spec import hookimpl
from kvfleet.router.balancing import (
    ConsistentHashStrategy,
    LeastRequestsStrategy,
    PowerOfTwoStrategy,
    RandomStrategy,
    RoundRobinStrategy,
    SessionStrategy,
)
from kvfleet.router.cache_aware import (
    BlockCostStrategy,
    LatencyProductStrategy,
    LeastLoadStrategy,
    LeastTokensStrategy,
    PrefixThresholdStrategy,
    WeightedPrefixStrategy,
)
from kvfleet.router.canary import CanaryStrategy
from kvfleet.router.expected import ExpectedLatencyStrategy
from kvfleet.router.learned import EpsilonGreedyStrategy, Exp3Strategy, ThompsonSamplingStrategy, UCB1Strategy
from kvfleet.router.quality import QualityThresholdStrategy
from kvfleet.router.semantic import DomainStrategy, SemanticStrategy
from kvfleet.router.slo import SLOStrategy
from kvfleet.router.strategies import (
    FACT_KEYS,
    CheapCascadeStrategy,
    CostFirstStrategy,
    HybridScoreStrategy,
    LatencyFirstStrategy,
    QualityFirstStrategy,
    RulesStrategy,
    StaticStrategy,
    WeightedStrategy,
)

__all__ = ["kvfleet_components"]


@attrs.define
class Rules(RulesStrategy):
    """Choose by rules: the first that holds puts its model first; without one, the weighted score decides.

    A rule's condition may name `data_class`, `tenant`, `domain`, `route` and `tags.X`; all it names must be equal. The
    domain and the route are the request's own tags of these names, or else what classifiers find. Any other key is
    read as a tag's name.
    """

    def required_facts(self) -> tuple[Fact[Any], ...]:
        """What the conditions read that a classifier has to find."""
        facts: dict[str, Fact[Any]] = dict(zip(FACT_KEYS, (DOMAIN, ROUTE), strict=True))
        named = {key for rule in self.rules for key in rule.condition}
        return tuple(facts[key] for key in FACT_KEYS if key in named)


@attrs.define
class Semantic(SemanticStrategy):
    """Choose the model made for what the prompt is about, and no stronger than it needs.

    If a model's tag `route` is the prompt's route, only such models match. Else a model matches by its tag `domain`, or
    by what its description is about: its domain, or with embeddings how near its meaning is to the prompt's. The total
    is 0.6 for the match (0.3 of that for no match) and 0.4 for a quality close to the prompt's complexity.
    """

    def required_facts(self) -> tuple[Fact[Any], ...]:
        """The vector, if meanings are to be compared."""
        return (EMBEDDING,) if self.use_embeddings else ()


_STRATEGIES: dict[str, type] = {
    "expected_latency": ExpectedLatencyStrategy,
    "hybrid_score": HybridScoreStrategy,
    "cost_first": CostFirstStrategy,
    "latency_first": LatencyFirstStrategy,
    "quality_first": QualityFirstStrategy,
    "cheap_cascade": CheapCascadeStrategy,
    "static": StaticStrategy,
    "rules": Rules,
    "weighted": WeightedStrategy,
    "round_robin": RoundRobinStrategy,
    "random": RandomStrategy,
    "least_requests": LeastRequestsStrategy,
    "least_tokens": LeastTokensStrategy,
    "least_load": LeastLoadStrategy,
    "power_of_two": PowerOfTwoStrategy,
    "consistent_hash": ConsistentHashStrategy,
    "session": SessionStrategy,
    "prefix_threshold": PrefixThresholdStrategy,
    "block_cost": BlockCostStrategy,
    "weighted_prefix": WeightedPrefixStrategy,
    "latency_product": LatencyProductStrategy,
}

_LEARNED: dict[str, tuple[type, tuple[str, ...]]] = {
    "epsilon_greedy": (EpsilonGreedyStrategy, ("bandit",)),
    "ucb1": (UCB1Strategy, ("learned",)),
    "thompson_sampling": (ThompsonSamplingStrategy, ("thompson",)),
    "exp3": (Exp3Strategy, ()),
}
"""Each with its other names."""


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The strategies."""
    for name, cls in _STRATEGIES.items():
        yield Component(Kind.SELECT, name, cls, stability=Stability.STABLE)
    for name, (cls, aliases) in _LEARNED.items():
        yield Component(Kind.SELECT, name, cls, aliases=aliases)
    yield Component(Kind.SELECT, "canary", CanaryStrategy)
    yield Component(Kind.SELECT, "slo", SLOStrategy)
    yield Component(Kind.SELECT, "quality_threshold", QualityThresholdStrategy, needs=(PROMPT,))
    yield Component(Kind.SELECT, "semantic", Semantic, needs=(DOMAIN,))
    yield Component(Kind.SELECT, "domain", DomainStrategy, needs=(DOMAIN,))
