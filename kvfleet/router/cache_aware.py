"""Strategies that know of KV caches as other routers do, usable by name and for comparison with `expected_latency`.

Each is the published rule with its published defaults, on kvfleet's own knowledge of caches and load, so that a
comparison shows the rules' difference and nothing else. Where a rule counts blocks, a block is 16 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs

from kvfleet.config.fields import number
from kvfleet.config.schema import ModelConfig
from kvfleet.router.scoring import NO_COLUMNS, Ranking, ScoringContext, rank
from kvfleet.telemetry.load import FleetLoad, HasLoad
from kvfleet.telemetry.reservations import ReplicaLoad

__all__ = [
    "BlockCostStrategy",
    "LatencyProductStrategy",
    "LeastLoadStrategy",
    "LeastTokensStrategy",
    "PrefixThresholdStrategy",
    "WeightedPrefixStrategy",
]

_NEUTRAL = ScoringContext()
_BLOCK_TOKENS = 16
_NOBODY = ReplicaLoad()


@attrs.define
class _ByLoad:
    """Has the fleet's load, and ranks by a cost."""

    reads: ClassVar = NO_COLUMNS
    _load: FleetLoad = attrs.field(init=False, factory=FleetLoad, repr=False, eq=False)

    def provision(self, services: HasLoad) -> None:
        """Use the fleet's load."""
        self._load = services.load

    def _known(self, models: Sequence[ModelConfig]) -> list[ReplicaLoad]:
        return [self._load.of(model.id) or _NOBODY for model in models]


def _cheapest(
    models: Sequence[ModelConfig],
    costs: Sequence[float],
    context: ScoringContext,
    terms: Mapping[str, Sequence[float]] | None = None,
    mode: str = "exploit",
) -> Ranking:
    """Least cost first; equals take turns. Totals are 1 for no cost, 1/2 for a cost of one."""
    return rank(models, [1 / (1 + cost) for cost in costs], terms=terms, mode=mode, seed=context.seed)


@attrs.define
class LeastTokensStrategy(_ByLoad):
    """Choose the replica with the fewest tokens to do: prompts not computed yet, and answers that are being written.

    llm-d's token load scorer counts so, without the answers (https://github.com/llm-d/llm-d-router).
    """

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the replicas by their tokens, in thousands."""
        tokens = [known.queued_tokens + known.held_tokens for known in self._known(models)]
        return _cheapest(models, [t / 1000 for t in tokens], context or _NEUTRAL, {"tokens": tokens})


@attrs.define
class LeastLoadStrategy(_ByLoad):
    """Choose by the seconds of queued prompt tokens, and a barrier as the KV cache fills.

    The rule is that of SGLang's model gateway, ``least_load`` (https://github.com/lightseekorg/smg): tokens queued by
    throughput, plus `memory_s` times usage / (1 - usage). It knows nothing of what is cached.
    """

    memory_s: float = number(0.15, ge=0, unit="s", doc="Weight of the barrier.")
    tokens_per_s: float = number(2000, gt=0, unit="tokens/s", doc="Throughput of a replica without measurement.")

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the replicas by these seconds."""
        costs = []
        for model, known in zip(models, self._known(models), strict=True):
            rates = self._load.rates(model.id)
            token_s = rates.token_s if rates is not None and rates.token_s else 1 / self.tokens_per_s
            usage = min(known.kv_usage or 0.0, 0.99)
            costs.append(known.queued_tokens * token_s + self.memory_s * usage / (1 - usage))
        return _cheapest(models, costs, context or _NEUTRAL, {"load_s": costs})


@attrs.define
class PrefixThresholdStrategy(_ByLoad):
    """Go where most of the prompt is cached, if that is enough and the fleet is balanced; else where least is done.

    The rule of the cache-aware policy of sglang-router, SMG and vllm-router, with their command lines' defaults
    (https://github.com/vllm-project/router). One imbalanced replica turns the affinity off for all.
    """

    threshold: float = number(0.3, ge=0, le=1, doc="Share of the prompt that must be cached.")
    balance_abs: int = number(64, ge=0, unit="requests", doc="A difference of requests that may be imbalance …")
    balance_rel: float = number(1.5, ge=1, doc="… if the most are also more than this many times the fewest.")

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the replicas."""
        context = context or _NEUTRAL
        requests = [float(known.in_flight) for known in self._known(models)]
        most, fewest = max(requests, default=0), min(requests, default=0)
        shares = _cached_shares(models, context)
        terms = {"requests": requests, "cached_share": shares}
        if most - fewest > self.balance_abs and most > self.balance_rel * fewest:
            return _cheapest(models, requests, context, terms, "imbalanced")
        if max(shares, default=0) <= self.threshold:
            return _cheapest(models, requests, context, terms, "no match")
        best = max(shares)
        costs = [0.0 if share == best else 1 + r for share, r in zip(shares, requests, strict=True)]
        return _cheapest(models, costs, context, terms, "match")


@attrs.define
class BlockCostStrategy(_ByLoad):
    """Choose by blocks: those of the prompt that are not cached there, those queued, and those in use.

    NVIDIA Dynamo's rule for its KV router, with its defaults (https://github.com/ai-dynamo/dynamo, ``lib/kv-router``).
    """

    overlap_weight: float = number(1.0, ge=0, doc="What a block counts that must be computed.")

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the replicas by their blocks."""
        context = context or _NEUTRAL
        prompt = context.prompt_tokens
        costs = []
        for model, known in zip(models, self._known(models), strict=True):
            uncached = max(prompt - context.affinity.get(model.id, 0.0), 0.0)
            prefill = (known.queued_tokens + uncached) / _BLOCK_TOKENS
            decode = (sum(r.work.prompt_tokens for r in known.open.values()) + prompt) / _BLOCK_TOKENS
            costs.append(self.overlap_weight * prefill + decode)
        return _cheapest(models, costs, context, {"blocks": costs})


@attrs.define
class WeightedPrefixStrategy(_ByLoad):
    """Choose by a weighted sum of three scores: the cached share of the prompt, the queue, the KV cache's free part.

    The rule of llm-d's router with the weights of its guides, 2 to 2 to 1 (https://github.com/llm-d/llm-d-router).
    """

    prefix: float = number(2.0, ge=0, doc="Weight of the cached share.")
    queue: float = number(2.0, ge=0, doc="Weight of the queue: 1 for the shortest, 0 for the longest.")
    memory: float = number(1.0, ge=0, doc="Weight of the free part of the KV cache.")

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the replicas by the sum."""
        context = context or _NEUTRAL
        known = self._known(models)
        waiting = [float(len(one.prefilling) + one.waiting_of_others) for one in known]
        most, fewest = max(waiting, default=0), min(waiting, default=0)
        queue = [(most - w) / (most - fewest) if most > fewest else 1.0 for w in waiting]
        free = [1 - min(one.kv_usage or 0.0, 1.0) for one in known]
        shares = _cached_shares(models, context)
        whole = self.prefix + self.queue + self.memory or 1.0
        totals = [
            (self.prefix * s + self.queue * q + self.memory * f) / whole
            for s, q, f in zip(shares, queue, free, strict=True)
        ]
        terms = {"cached_share": shares, "queue": queue, "memory": free}
        return rank(models, totals, terms=terms, seed=context.seed)


@attrs.define
class LatencyProductStrategy(_ByLoad):
    """Choose by a product: tokens to compute there before the answer begins, times the requests in its batch.

    Dynamo's ``lmetric`` policy (https://github.com/ai-dynamo/dynamo, ``lib/kv-router``), after LMetric (2026).
    """

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the replicas by the product, in thousands."""
        context = context or _NEUTRAL
        costs = []
        for model, known in zip(models, self._known(models), strict=True):
            uncached = max(context.prompt_tokens - context.affinity.get(model.id, 0.0), 0.0)
            costs.append((known.queued_tokens + uncached) * (known.in_flight + 1) / 1000)
        return _cheapest(models, costs, context, {"product": costs})


def _cached_shares(models: Sequence[ModelConfig], context: ScoringContext) -> list[float]:
    prompt = max(context.prompt_tokens, 1.0)
    return [min(context.affinity.get(model.id, 0.0) / prompt, 1.0) for model in models]
