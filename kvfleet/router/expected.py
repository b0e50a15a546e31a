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
from operator import mul
from typing import ClassVar

import attrs

from kvfleet.config.fields import number
from kvfleet.config.schema import ModelConfig
from kvfleet.router.replicas import column_of
from kvfleet.router.scoring import Ranking, ScoringContext, Unit, arranged, take_turns

__all__ = ["ExpectedLatencyStrategy"]

_NEUTRAL = ScoringContext()
_ALIKE_S = 1e-6
_NEVER = float("inf")
_FULL = 0.98
"""A cache fuller than this is as bad as one that is just so full."""


@attrs.define
class ExpectedLatencyStrategy:
    """Choose the replica that is expected to answer soonest: queue, uncached part of the prompt, decoding, memory.

    The total of a replica, in seconds, is the time to its first token (the column `latency`); plus, by weights, the
    seconds of decoding that the request costs there, by which its prompt holds up the answers being written and its own
    answer is slower among others; plus, by weight, the seconds for which requests to come wait for its prompt, which
    are the more the busier the fleet is; plus a barrier that rises as the KV cache fills: `memory_s` times usage / (1 -
    usage), which is the mean queue of an M/M/1 server.
    """

    reads: ClassVar = frozenset({"latency"})
    harm_weight: float = number(
        0.05, ge=0, doc="What a second counts by which the prompt holds up an answer that is being written there."
    )
    batch_weight: float = number(
        0.07, ge=0, doc="What a second counts by which its own answer is slower in the batch there than alone."
    )
    return_weight: float = number(
        0.95, ge=0, le=1, doc="What a second counts that later requests save, because it is computed there now."
    )
    delay_weight: float = number(
        1.0, ge=0, doc="What a second counts by which prompts that wait there are answered later, because of its own."
    )
    later_weight: float = number(
        0.7, ge=0, doc="What a second counts by which requests to come wait, because its prompt is computed there."
    )
    memory_s: float = number(
        0.02, ge=0, unit="s", doc="What a half full KV cache counts; nine times that if it is nine tenths full."
    )

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank the replicas by their expected seconds."""
        context = context or _NEUTRAL
        column = column_of("latency", models, context)
        values, parts = column.values, column.terms
        first = [_NEVER if s is None else s for s in values]
        if len(models) < 2 or not parts:
            return _ranked(models, context, first, {"first_token_s": first}, ())
        pending, usage = parts["pending"], parts["usage"]
        held_up = slower = memory = [0.0] * len(models)
        if any(pending):
            held_up = list(map(mul, parts["prompt_s"], parts["decoding"]))
            slower = [a * s * n for a, s, n in zip(parts["answer_tokens"], parts["step_each_s"], pending, strict=True)]
        returns, delayed, later = parts["returns_s"], parts["delayed_s"], parts["later_s"]
        if any(usage):
            memory = [self.memory_s * min(u, _FULL) / (1 - min(u, _FULL)) for u in usage]
        harm, batch = self.harm_weight, self.batch_weight
        delay, invest, congest = self.delay_weight, self.return_weight, self.later_weight
        totals = [
            f - invest * r + congest * w + delay * d + harm * h + batch * b + m
            for f, r, w, d, h, b, m in zip(first, returns, later, delayed, held_up, slower, memory, strict=True)
        ]
        terms = {
            "first_token_s": first,
            "queue_s": parts["queue_s"],
            "prompt_s": parts["prompt_s"],
            "saved_s": parts["saved_s"],
            "returns_s": returns,
            "later_s": later,
            "delayed_s": delayed,
            "held_up_s": held_up,
            "slower_s": slower,
            "memory_s": memory,
        }
        return _ranked(models, context, totals, terms, pending)


def _ranked(
    models: Sequence[ModelConfig],
    context: ScoringContext,
    totals: Sequence[float],
    terms: Mapping[str, Sequence[float]],
    pending: Sequence[float],
) -> Ranking:
    """Least seconds first; equals to the microsecond take turns by the seed."""
    order = sorted(range(len(models)), key=totals.__getitem__)
    if len(order) > 1 and totals[order[1]] - totals[order[0]] <= _ALIKE_S:
        take_turns(order, context.seed, [-1 if t == _NEVER else round(t / _ALIKE_S) for t in totals])
    details = _instead(order, totals, pending)
    return arranged(models, order, totals, unit=Unit.SECONDS, terms=terms, details=details)


def _instead(order: Sequence[int], totals: Sequence[float], pending: Sequence[float]) -> Mapping[str, float]:
    """What others would have cost: the second choice, round robin (on average), and least requests."""
    if len(order) < 2:
        return {}
    found = {"second_choice_s": totals[order[1]], "round_robin_s": sum(totals) / len(totals)}
    if pending:
        found["least_requests_s"] = totals[pending.index(min(pending))]
    return found
