"""From a route's outcome to what a learned strategy can learn of it, and the answers that may still be rated."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import attrs

from kvfleet.errors import Fault
from kvfleet.trace import names
from kvfleet.trace.attributes import verdicts_of
from kvfleet.trace.spans import Span, Status

if TYPE_CHECKING:
    from kvfleet.plugin.contract import Outcome

__all__ = ["Answered", "RecentAnswers", "Result", "compute_reward", "result_of"]

_MOST_ANSWERS = 20_000
_NOT_THE_MODELS = frozenset(
    f.value for f in Fault if f.is_callers or f in (Fault.CANCELLED, Fault.DEADLINE, Fault.CIRCUIT_OPEN)
)
"""Faults that say nothing of the model: the caller's own, its own deadline, and a client that left."""


def compute_reward(
    latency_ms: float,
    quality_score: float,
    cost: float | None,
    success: bool = True,
    target_latency_ms: float = 2000,
) -> float:
    """What an answer was worth, 0..1: 0.4 for its time, 0.3 for its quality, 0.3 for its price; 0 if it failed.

    Args:
        latency_ms: How long it took; worth nothing from the target on.
        quality_score: How good it was, 0..1.
        cost: What it cost in US dollars, worth nothing from a cent on. None if that is not known: time and quality then
            share its weight, so that an unknown price is neither good nor bad.
        success: False for a failure.
        target_latency_ms: See above.

    >>> round(compute_reward(latency_ms=350, quality_score=0.85, cost=0.001, success=True), 3)
    0.855
    """
    if not success:
        return 0.0
    earned = 0.4 * max(0.0, 1 - latency_ms / target_latency_ms) + 0.3 * quality_score
    return min(1.0, earned / 0.7 if cost is None else earned + 0.3 * max(0.0, 1 - 100 * cost))


@attrs.frozen
class Result:
    """What a route says of the models.

    Attributes:
        failed: Models whose calls failed or whose answers did not suffice, and who did not answer in the end.
        served: The model that gave a whole answer; empty if none did.
        latency_ms: From the first call to that model to the end of its answer.
    """

    failed: tuple[str, ...] = ()
    served: str = ""
    latency_ms: float = 0.0


def result_of(outcome: Outcome) -> Result:
    """Read a route's attempts."""
    attempts = [span for span in outcome.trace.stages if names.REPLICA in span.attributes]
    whole = outcome.served_by is not None and outcome.error is None
    served = outcome.served_by.name if outcome.served_by is not None and whole else ""
    insufficient = _insufficient(outcome)
    failed = dict.fromkeys(_model(span) for span in attempts if _has_failed(span) or _number(span) in insufficient)
    failed.pop(served, None)
    own = [span for span in attempts if _model(span) == served]
    latency_ms = (own[-1].end_ns - own[0].start_ns) / 1e6 if own else outcome.duration_s * 1000
    return Result(tuple(failed), served, latency_ms)


def _insufficient(outcome: Outcome) -> frozenset[int]:
    """The numbers of the attempts whose answers were not trusted."""
    trace = outcome.trace
    threshold = trace.route.attributes.get(names.CONFIDENCE_THRESHOLD)
    if not isinstance(threshold, float):
        return frozenset()
    return frozenset(number for number, (value, _) in verdicts_of(trace).items() if 0 <= value < threshold)


def _number(span: Span) -> int:
    return int(str(span.attributes.get(names.ATTEMPT, 0)))


def _model(span: Span) -> str:
    return str(span.attributes.get(names.MODEL, ""))


def _has_failed(span: Span) -> bool:
    return span.status is Status.ERROR and span.attributes.get(names.ERROR_TYPE) not in _NOT_THE_MODELS


@attrs.define
class Answered:
    """An answer whose reward was learned, and can be corrected when somebody rates it.

    Attributes:
        model: Who gave it.
        latency_ms, cost_usd, quality: What its reward was made of.
        reward: What was learned.
        chance: With which probability its model had been chosen; None for a fallback, which nobody chose.
        arms: How many models there were to choose from.
        score: Its rating; None until there is one.
    """

    model: str
    latency_ms: float
    cost_usd: float | None
    quality: float
    reward: float
    chance: float | None
    arms: int
    score: float | None = None


@attrs.define
class RecentAnswers:
    """The last answers by the identifiers of their requests and traces; the oldest go first."""

    most: int = _MOST_ANSWERS
    _by_id: OrderedDict[str, Answered] = attrs.field(init=False, factory=OrderedDict, repr=False)

    def add(self, answered: Answered, *identifiers: str) -> None:
        """Remember an answer."""
        for one in identifiers:
            if one:
                self._by_id[one] = answered
                self._by_id.move_to_end(one)
        while len(self._by_id) > self.most:
            self._by_id.popitem(last=False)

    def get(self, identifier: str) -> Answered | None:
        """The answer, if it is remembered."""
        return self._by_id.get(identifier)

    def __len__(self) -> int:
        return len(self._by_id)
