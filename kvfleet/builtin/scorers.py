"""Scorers: one column each, in a unit of its own. What does not change is looked up by replica."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import add

import attrs

from kvfleet.builtin.facts import answer_tokens, prompt_tokens
from kvfleet.config.fields import number
from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.component import Component, Services, Stability
from kvfleet.plugin.contract import Kind, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.router.scoring import Column, Unit
from kvfleet.telemetry.cost import Price
from kvfleet.telemetry.fleet_limits import FleetLimits
from kvfleet.telemetry.load import FleetLoad

__all__ = [
    "CacheAffinityScorer",
    "CapacityScorer",
    "ComplianceScorer",
    "CostScorer",
    "HardwareLoadScorer",
    "LatencyScorer",
    "QualityScorer",
]


@attrs.define
class CostScorer:
    """What the request would cost, in US dollars: its prompt, and an answer of `max_tokens` or the usual length.

    A model without any price is unknown, not free; one with a price for prompts alone is taken to ask it for answers
    too. What a replica is expected to have of the prompt in its cache costs what cached tokens cost there.
    """

    answer_tokens: int = number(
        256, ge=0, unit="tokens", doc="Length of an answer where the request sets no `max_tokens`."
    )
    _prices: tuple[Price | None, ...] = attrs.field(init=False, default=(), repr=False)
    _by_id: dict[str, int] = attrs.field(init=False, factory=dict, repr=False)
    _discounts: bool = attrs.field(init=False, default=False)

    def provision(self, services: Services) -> None:
        """Note the prices; there are far fewer than replicas."""
        prices = {model.id: Price.of(model) for model in services.models}
        self._prices = tuple(dict.fromkeys(prices.values()))
        place = {price: i for i, price in enumerate(self._prices)}
        self._by_id = {replica: place[price] for replica, price in prices.items()}
        self._discounts = any(price is not None and price.cached != price.prompt for price in self._prices)

    def score(self, ctx: RoutingContext) -> Column:
        """The column, in US dollars."""
        tokens = self._tokens(ctx)
        known, prices = self._by_id, self._prices
        if self._discounts and any(ctx.affinity.values()):
            cached = ctx.affinity
            replicas = [(prices[known[m.id]], cached.get(m.id, 0.0)) for m in ctx.candidates]
            return Column(Unit.USD, [_cost(price, (*tokens, saved)) for price, saved in replicas])
        costs = [_cost(price, tokens) for price in prices]
        try:
            return Column(Unit.USD, [costs[known[model.id]] for model in ctx.candidates])
        except KeyError:  # a model that is not of the fleet, as in a test
            return Column(Unit.USD, [_cost(Price.of(model), tokens) for model in ctx.candidates])

    def _tokens(self, ctx: RoutingContext) -> tuple[int, int]:
        return prompt_tokens(ctx), answer_tokens(ctx, self.answer_tokens)


def _cost(price: Price | None, tokens: tuple[float, ...]) -> float | None:
    return None if price is None else price.cost_usd(*tokens)


@attrs.define
class LatencyScorer:
    """How long until the answer begins, in seconds: the queue, and the part of the prompt that is not cached there.

    Both are at the replica's own pace, learned from its answers; one that was not measured yet is taken to be like its
    model's others, or as declared. The terms say how the time comes about, and what else placing the request there
    means: how long a step of decoding takes, how many answers its prompt would hold up, how full the KV cache is, and
    how much of the prompt's time later requests will save if it is computed there.
    """

    _load: FleetLoad = attrs.field(init=False, factory=FleetLoad, repr=False, eq=False)

    def provision(self, services: Services) -> None:
        """Use the fleet's load."""
        self._load = services.load
        services.load.also(services.models)

    def score(self, ctx: RoutingContext) -> Column:
        """The column, in seconds."""
        cached = ctx.affinity
        tokens = [cached.get(m.id, 0.0) for m in ctx.candidates]
        found = self._load.waits(ctx.candidates, prompt_tokens(ctx), tokens, ctx.now_s, ctx.returns)
        return Column(Unit.SECONDS, list(map(add, found.queue_s, found.prompt_s)), found.terms)


@attrs.define
class QualityScorer:
    """How good the model's answers are, as declared, 0 to 1."""

    _last: tuple[Sequence[ModelConfig], Column] | None = attrs.field(init=False, default=None, repr=False, eq=False)

    def score(self, ctx: RoutingContext) -> Column:
        """The column, a utility; the same one for the same candidates."""
        candidates, last = ctx.candidates, self._last
        if last is None or last[0] is not candidates:
            column = Column(Unit.UTILITY, [model.quality_score for model in candidates])
            self._last = last = (candidates, column)
        return last[1]


@attrs.frozen
class CacheAffinityScorer:
    """How many tokens of the prompt the replica is expected to have in its KV cache."""

    def score(self, ctx: RoutingContext) -> Column:
        """The column, in tokens."""
        cached = ctx.affinity
        return Column(Unit.TOKENS, [cached.get(model.id, 0.0) for model in ctx.candidates])


@attrs.define
class HardwareLoadScorer:
    """How free the replica is, 1 idle to 0 full: by its requests, ours and others', and by its KV cache's filling."""

    _load: FleetLoad = attrs.field(init=False, factory=FleetLoad, repr=False, eq=False)

    def provision(self, services: Services) -> None:
        """Use the fleet's load."""
        self._load = services.load
        services.load.also(services.models)

    def score(self, ctx: RoutingContext) -> Column:
        """The column, a utility; not known of a replica that nobody has registered."""
        return Column(Unit.UTILITY, self._load.free(ctx.now_s, ctx.candidates))


@attrs.define
class ComplianceScorer:
    """Whether the model is cleared for the request's data class: 1 or 0."""

    _last: tuple[Sequence[ModelConfig], str, Column] | None = attrs.field(
        init=False, default=None, repr=False, eq=False
    )

    def score(self, ctx: RoutingContext) -> Column:
        """The column, a utility; the same one for the same candidates and data class."""
        candidates, data_class, last = ctx.candidates, ctx.data_class, self._last
        if last is None or last[0] is not candidates or last[1] != data_class:
            column = Column(Unit.UTILITY, [float(data_class in m.allowed_data_classes) for m in candidates])
            self._last = last = (candidates, data_class, column)
        return last[2]


@attrs.define
class CapacityScorer:
    """Which share of the replica's tightest rate limit is left, 1 to 0; 1 where no limit is known.

    It is not `hardware_load`: an idle engine may stand behind a limit that is used up, and a busy one behind none.
    """

    _limits: FleetLimits = attrs.field(init=False, factory=FleetLimits, repr=False, eq=False)

    def provision(self, services: Services) -> None:
        """Use the fleet's limits."""
        self._limits = services.limits

    def score(self, ctx: RoutingContext) -> Column:
        """The column, a utility."""
        return Column(Unit.UTILITY, [self._limits.capacity(model.id, ctx.now_s) for model in ctx.candidates])


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The scorers."""
    yield Component(Kind.SCORE, "cost", CostScorer, stability=Stability.STABLE)
    yield Component(Kind.SCORE, "latency", LatencyScorer, stability=Stability.STABLE)
    yield Component(Kind.SCORE, "quality", QualityScorer, stability=Stability.STABLE)
    yield Component(Kind.SCORE, "cache_affinity", CacheAffinityScorer, stability=Stability.STABLE)
    yield Component(Kind.SCORE, "hardware_load", HardwareLoadScorer, stability=Stability.STABLE)
    yield Component(Kind.SCORE, "compliance", ComplianceScorer, stability=Stability.STABLE)
    yield Component(Kind.SCORE, "capacity", CapacityScorer)
