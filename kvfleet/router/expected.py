"""`expected_latency`: cache and load in one unit, seconds.

The replica is chosen that will answer soonest, counting what is in its KV cache and what is queued on it. What is not
cached of a prompt takes time to compute, and so does what is in front of it: both are tokens at the replica's learned
pace, so there is nothing to balance by hand, no threshold of a match and none of an imbalance. A session stays where it
is until moving is cheaper; a prompt that everybody shares counts for everybody who has it, so it decides nothing where
all have it; a hot prefix is computed a second time as soon as the queue in front of the first copy costs more.

`docs/explanation/expected-latency.md` explains the formula with its evidence; `benchmarks/routing.py` measures it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from kvfleet.config.fields import number
from kvfleet.config.schema import ModelConfig
from kvfleet.router.replicas import column_of
from kvfleet.router.scoring import Column, Ranking, ScoringContext, Unit, arranged, take_turns
from kvfleet.telemetry.load import FleetLoad, HasLoad

__all__ = ["ExpectedLatencyStrategy"]

_NEUTRAL = ScoringContext()
_ALIKE = 1e-6


@attrs.define
class ExpectedLatencyStrategy:
    """Choose the replica that is expected to answer soonest: queue, uncached part of the prompt, decoding, memory.

    The total of a replica, in seconds, is the time to its first token (the column `latency`), plus `decode_weight`
    times the seconds its decoding takes and its prompt holds up others', plus a barrier that rises as its KV cache
    fills: `memory_s` times usage / (1 - usage), the mean queue of an M/M/1 server.
    """

    decode_weight: float = number(
        0.1, ge=0, doc="What a second of decoding counts beside a second before the first token."
    )
    memory_s: float = number(
        0.05,
        ge=0,
        unit="s",
        doc="What a KV cache that is half full counts; one that is nine tenths full, nine times that.",
    )
    _load: FleetLoad = attrs.field(init=False, factory=FleetLoad, repr=False, eq=False)

    def provision(self, services: HasLoad) -> None:
        """Use the fleet's load."""
        self._load = services.load

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the replicas by their expected seconds."""
        context = context or _NEUTRAL
        column = column_of("latency", models, context)
        first = [s if s is not None else float("inf") for s in column.values]
        terms: dict[str, Sequence[float]] = {"first_token_s": first}
        totals = first
        if column.terms and len(models) > 1:
            decode = self._decoding(column, models)
            memory = [self.memory_s * min(u, _FULL) / (1 - min(u, _FULL)) for u in column.terms["usage"]]
            terms |= {"decode_s": decode, "memory_s": memory}
            totals = [f + self.decode_weight * d + m for f, d, m in zip(first, decode, memory, strict=True)]
        order = sorted(range(len(models)), key=totals.__getitem__)
        if len(order) > 1:
            take_turns(order, context.seed, [round(t / _ALIKE) if t < float("inf") else -1 for t in totals])
        details = self._instead(models, order, totals)
        return arranged(models, order, totals, unit=Unit.SECONDS, terms=terms, details=details)

    def _decoding(self, column: Column, models: Sequence[ModelConfig]) -> list[float]:
        """Seconds of decoding: its own answer's, and those by which its prompt holds up the answers there."""
        steps, together = column.terms["step_s"], column.terms["decoding"]
        prompts = column.terms["prompt_s"]
        answers = [self._load.usual_answer_tokens(model.id) for model in models]
        return [a * s + p * n for a, s, p, n in zip(answers, steps, prompts, together, strict=True)]

    def _instead(
        self, models: Sequence[ModelConfig], order: Sequence[int], totals: Sequence[float]
    ) -> Mapping[str, float]:
        """What others would have cost: the second choice, round robin (on average), and least requests."""
        if len(order) < 2:
            return {}
        pending = [self._load.pending(model.id) for model in models]
        fewest = min(range(len(models)), key=lambda i: (pending[i], i))
        return {
            "second_choice_s": totals[order[1]],
            "round_robin_s": sum(totals) / len(totals),
            "least_requests_s": totals[fewest],
        }


_FULL = 0.98
