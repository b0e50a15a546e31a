"""The strategies, which need no glue, as components."""

from __future__ import annotations

from collections.abc import Iterable

from kvfleet.builtin.facts import DOMAIN
from kvfleet.plugin.component import Component, Stability
from kvfleet.plugin.contract import Kind
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
from kvfleet.router.semantic import DomainStrategy, SemanticStrategy
from kvfleet.router.slo import SLOStrategy
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

__all__ = ["kvfleet_components"]

_STRATEGIES: dict[str, type] = {
    "expected_latency": ExpectedLatencyStrategy,
    "hybrid_score": HybridScoreStrategy,
    "cost_first": CostFirstStrategy,
    "latency_first": LatencyFirstStrategy,
    "quality_first": QualityFirstStrategy,
    "cheap_cascade": CheapCascadeStrategy,
    "static": StaticStrategy,
    "rules": RulesStrategy,
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
    yield Component(Kind.SELECT, "semantic", SemanticStrategy, needs=(DOMAIN,))
    yield Component(Kind.SELECT, "domain", DomainStrategy, needs=(DOMAIN,))
