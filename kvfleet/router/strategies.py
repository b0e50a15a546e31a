"""Strategies that choose by what is known of models: their price, time, quality, weight, or rules about them.

Every candidate stays in the ranking, which is the fallback order too. Strategies that reason by model (`static`,
`rules`, `weighted`, `cheap_cascade`) rank models, and the replicas within a model by expected time; the others rank
replicas. Strategies that only spread the load are in `kvfleet.router.balancing`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import attrs
import xxhash

from kvfleet.config.fields import choice, listing, mapping, section, text
from kvfleet.config.schema import ModelConfig, RouteRuleConfig, ScoringWeights
from kvfleet.router.replicas import Replicas, column_of
from kvfleet.router.scoring import Ranking, ScoringContext, ScoringEngine, arranged, take_turns, utilities

__all__ = [
    "FACT_KEYS",
    "CheapCascadeStrategy",
    "CostFirstStrategy",
    "HybridScoreStrategy",
    "LatencyFirstStrategy",
    "QualityFirstStrategy",
    "RulesStrategy",
    "StaticStrategy",
    "WeightedStrategy",
]

_NEUTRAL = ScoringContext()

FACT_KEYS = ("domain", "route")
"""What a rule's condition may name that a classifier finds, where the request has no tag of that name."""


@attrs.define
class HybridScoreStrategy:
    """Weigh price, time, quality, cache, load and clearance against each other."""

    weights: ScoringWeights = section(ScoringWeights, doc="How much each dimension counts.")
    _engine: ScoringEngine = attrs.field(init=False, repr=False, eq=False)

    @_engine.default
    def _make_engine(self) -> ScoringEngine:
        return ScoringEngine(self.weights)

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank by the weighted sum of utilities."""
        return self._engine.score_candidates(models, context)


@attrs.define
class _DimensionFirst:
    """One dimension decides; the weighted sum of the others breaks its ties."""

    dimension: ClassVar[str] = ""
    _engine: ScoringEngine = attrs.field(init=False, repr=False, eq=False)

    @_engine.default
    def _make_engine(self) -> ScoringEngine:
        return ScoringEngine(ScoringWeights(**{self.dimension: 0.0}))

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank by one dimension."""
        context = context or _NEUTRAL
        column = column_of(self.dimension, models, context)
        values = utilities(column)
        order = list(range(len(models)))
        has_ties = len(set(values)) < len(values)
        ties = self._engine.totals(models, context)[1] if has_ties else ()
        if has_ties:
            order.sort(key=ties.__getitem__, reverse=True)
        order.sort(key=values.__getitem__, reverse=True)  # stable, so the ties stay sorted
        if None in column.values:
            order.sort(key=lambda i: column.values[i] is None)
        if has_ties:
            take_turns(order, context.seed, values, ties, [model.name for model in models])
        return arranged(models, order, values, terms={self.dimension: values})


@attrs.define
class CostFirstStrategy(_DimensionFirst):
    """Choose the cheapest; everything else only breaks ties."""

    dimension = "cost"


@attrs.define
class LatencyFirstStrategy(_DimensionFirst):
    """Choose whoever is expected to answer soonest; everything else only breaks ties."""

    dimension = "latency"


@attrs.define
class QualityFirstStrategy(_DimensionFirst):
    """Choose the best model; everything else only breaks ties."""

    dimension = "quality"


@attrs.define
class CheapCascadeStrategy:
    """Try the cheapest model first, and a dearer one only after a failure."""

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank models from cheap to dear; of two at one price the better is first, and an unknown price is last."""
        context = context or _NEUTRAL
        column = column_of("cost", models, context)
        cost = utilities(column)
        replicas = Replicas.of(models, context)
        is_known = [value is not None for value in column.values]
        keys = list(zip(is_known, cost, [model.quality_score for model in models], strict=True))
        best = {name: max([keys[i] for i in at]) for name, at in replicas.groups.items()}
        names = sorted(best, key=best.__getitem__, reverse=True)
        return arranged(models, replicas.order(names), cost, terms={"cost": cost}, mode="cascade")


@attrs.define
class StaticStrategy:
    """Always choose one model; the others follow in their order, as fallbacks."""

    default_model: str = text("", doc="The model; the first candidate's if empty or not there.", refers_to="model")

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the default model's replicas first."""
        replicas = Replicas.of(models, context or _NEUTRAL)
        names = list(replicas.groups)
        if self.default_model in replicas.groups:
            names.remove(self.default_model)
            names.insert(0, self.default_model)
        totals = [float(model.name == names[0]) for model in models]
        return arranged(models, replicas.order(names), totals)


Condition = Callable[[ScoringContext], bool]


@attrs.frozen
class _Rule:
    """A rule made ready."""

    mode: str
    target: str
    conditions: tuple[Condition, ...]

    def holds(self, context: ScoringContext) -> bool:
        return all(condition(context) for condition in self.conditions)


@attrs.define
class RulesStrategy:
    """Choose by rules: the first that holds puts its model first; without one, the weighted score decides.

    A rule's condition may name `data_class`, `tenant`, `domain`, `route` and `tags.X`; all it names must be equal. The
    domain and the route are the request's own tags of these names, or else what classifiers find. Any other key is
    read as a tag's name.
    """

    rules: Sequence[RouteRuleConfig] = listing((), doc="The rules, applied by priority.")
    weights: ScoringWeights = section(ScoringWeights, doc="The weighted score of those whom no rule puts first.")
    _ready: tuple[_Rule, ...] = attrs.field(init=False, repr=False, eq=False)
    _engine: ScoringEngine = attrs.field(init=False, repr=False, eq=False)

    @_ready.default
    def _make_ready(self) -> tuple[_Rule, ...]:
        return tuple(
            _Rule(f"rule {rule.name}", rule.target_model, tuple(_condition(*item) for item in rule.condition.items()))
            for rule in sorted(self.rules, key=lambda rule: rule.priority)
        )

    @_engine.default
    def _make_engine(self) -> ScoringEngine:
        return ScoringEngine(self.weights)

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the models of the rules that hold first, in the rules' order, then all others by score."""
        context = context or _NEUTRAL
        there = {model.name for model in models}
        holding = [rule for rule in self._ready if rule.target in there and rule.holds(context)]
        if not holding:
            return self._engine.score_candidates(models, context)
        terms, scores = self._engine.totals(models, context)
        targets = dict.fromkeys([rule.target for rule in holding])
        chosen = Replicas.of(models, context, only=targets).order(list(targets))
        others = [i for i, model in enumerate(models) if model.name not in targets]
        others.sort(key=scores.__getitem__, reverse=True)
        return arranged(models, chosen + others, scores, terms=terms, mode=holding[0].mode)


def _condition(key: str, wanted: str) -> Condition:
    if key == "data_class":
        return lambda context: context.data_class == wanted
    if key in ("tenant", "tenant_id"):
        return lambda context: context.tenant_id == wanted
    if key in FACT_KEYS:
        return lambda context: (context.tags.get(key) or _named(context.metadata.get(key))) == wanted
    tag = key.removeprefix("tags.")
    return lambda context: context.tags.get(tag) == wanted


def _named(fact: object) -> str:
    """What a classifier's fact says in one word: the domain, or the name of the route."""
    return str(getattr(fact, "domain", None) or getattr(fact, "name", ""))


@attrs.define
class WeightedStrategy:
    """Give each model its share of the requests; a conversation (or a tenant) stays with its model.

    The order of the others is drawn by the same weights (weighted rendezvous hashing, Schindelhauer and Schomaker
    2005), so when a model leaves, only its own conversations move. A model of weight 0 is chosen only if all are.
    """

    weights: Mapping[str, float] = mapping(
        doc="Share by model, and 0 for those not named; the models' own `weight` if empty.",
        refers_to="model",
        example={"llama-70b": 0.95, "llama-70b-v2": 0.05},
    )
    sticky: str = choice(
        "session", of=("session", "tenant", "none"), doc="What keeps to one model: a session, a tenant, or nothing."
    )
    salt: str = text("", doc="Another one draws anew, so that two experiments do not share their sides.")
    _random: random.Random = attrs.field(init=False, factory=random.Random, repr=False, eq=False)

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank models by a weighted draw."""
        # Without a context there is no seed, and a library's user expects a draw all the same.
        context = context or ScoringContext(seed=self._random.getrandbits(32))
        replicas = Replicas.of(models, context)
        weights = {name: self._weight(models[at[0]]) for name, at in replicas.groups.items()}
        total = sum(weights.values())
        if not total:
            weights, total = dict.fromkeys(weights, 1.0), float(len(weights))
        keys = self._draw(weights, context)
        names = sorted(keys, key=keys.__getitem__)
        shares = [weights[model.name] / total for model in models]
        return arranged(models, replicas.order(names), shares, terms={"share": shares}, mode="weighted")

    def state(self) -> Mapping[str, Any]:
        """How it splits the traffic; nothing if the models themselves say it."""
        if not self.weights:
            return {}
        return {"sticky": self.sticky, "salt": self.salt, "weights": dict(self.weights)}

    def _weight(self, model: ModelConfig) -> float:
        return max(self.weights.get(model.name, 0.0), 0.0) if self.weights else model.weight

    def _draw(self, weights: Mapping[str, float], context: ScoringContext) -> dict[str, float]:
        """By model, a number that is the least with the probability of the model's share."""
        seed = context.seed
        caller = {"session": context.session, "tenant": context.tenant_id}.get(self.sticky)
        if caller:
            seed = xxhash.xxh3_64_intdigest(caller.encode(), xxhash.xxh3_64_intdigest(self.salt.encode()))
        keys = {}
        for name, weight in weights.items():
            uniform = (xxhash.xxh3_64_intdigest(name.encode(), seed) + 1) / (2**64 + 1)
            keys[name] = -math.log(uniform) / weight if weight else math.inf
        return keys
