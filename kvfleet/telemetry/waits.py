"""What a replica would make a request wait, in seconds: the queue, its own prompt, and what it means for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import attrs

from kvfleet.telemetry.pace import Rates
from kvfleet.telemetry.reservations import ReplicaLoad

__all__ = ["NOTHING", "Waits", "delayed_s_of", "own_queue_s", "queue_s_of", "returned_s"]

_TRAVEL_S = 0.001
"""What it takes a request, at least, to come to where it is computed."""
NOTHING: Mapping[float, float] = MappingProxyType({})
"""Of a prompt that nobody else will ask for."""


@attrs.frozen
class Waits:
    """What each of some replicas would make a request wait, in seconds, in their order.

    Attributes:
        queue_s: For the prompts in front of it.
        prompt_s: For its own prompt, the way there and back included.
        saved_s: What the cached part of its prompt saves of that.
        returns_s: What later requests will save of that, on average, if it is computed there.
        later_s: What those to come wait for its prompt, on average, less what they will find computed; see
            `kvfleet.telemetry.congestion`.
        step_s: For each token of its answer, decoded together with what is there.
        step_each_s: How much of that is due to each other request.
        decoding: How many requests would have to wait while its prompt is computed.
        delayed_s: By how much prompts in front of it, which would be computed together with it, are answered later for
            that, summed up.
        usage: Share of the KV cache in use; 0 if unknown.
        pending: Requests there, ours and others'.
        answer_tokens: Tokens of a usual answer, where there are any.
    """

    queue_s: list[float]
    prompt_s: list[float]
    saved_s: list[float]
    returns_s: list[float]
    later_s: list[float]
    step_s: list[float]
    step_each_s: list[float]
    decoding: list[float]
    delayed_s: list[float]
    usage: list[float]
    pending: list[float]
    answer_tokens: list[float]

    @property
    def terms(self) -> Mapping[str, list[float]]:
        """All of it, by name."""
        return {
            "queue_s": self.queue_s,
            "prompt_s": self.prompt_s,
            "saved_s": self.saved_s,
            "returns_s": self.returns_s,
            "later_s": self.later_s,
            "step_s": self.step_s,
            "step_each_s": self.step_each_s,
            "decoding": self.decoding,
            "delayed_s": self.delayed_s,
            "usage": self.usage,
            "pending": self.pending,
            "answer_tokens": self.answer_tokens,
        }


def queue_s_of(known: ReplicaLoad, prompt: float, now_s: float) -> float:
    """How long the queue lasts, others' requests in it included, which are taken to be like ours."""
    queue_s = own_queue_s(known, now_s)
    others = known.waiting_of_others
    return queue_s + others * known.rates.service_s(known.uncached_tokens or prompt, 0.0) if others else queue_s


def own_queue_s(known: ReplicaLoad, now_s: float) -> float:
    """How long our own queue lasts: not less than what is behind its head, which has not answered yet."""
    return max(known.free_s - now_s, known.behind_s) if known.prefilling else 0.0


def returned_s(rates: Sequence[Rates], cached: Sequence[float], returns: Mapping[float, float]) -> list[float]:
    """Of the time to compute what is not cached, what is not spent for this request alone.

    What will be used n times more costs each user a share of 1 / (1 + n).
    """
    spared = {tokens: _spared(tokens, returns) for tokens in {*cached}}
    found = []
    for rate, tokens in zip(rates, cached, strict=True):
        uncached, around = spared[tokens]
        found.append(rate.token_s * uncached + rate.pair_s * around)
    return found


def _spared(cached: float, returns: Mapping[float, float]) -> tuple[float, float]:
    """The uncached tokens, and pairs of one and a token before it, that need not be computed for one request alone."""
    uncached = around = 0.0
    for end, uses in returns.items():
        if end > cached:
            share = uses / (1 + uses)
            uncached += (end - cached) * share
            around += (end * end - cached * cached) / 2 * share
            cached = end
    return uncached, around


def delayed_s_of(known: ReplicaLoad, rates: Rates, prompt_s: float, now_s: float) -> float:
    """By how much those of our own queue are answered later, together, for which a prompt shares a step."""
    waiting = _not_begun(known, rates, now_s)
    if not waiting:
        return 0.0
    step = known.step_tokens
    if known.queued_tokens < step:
        return min(prompt_s, rates.token_s * (step - known.queued_tokens)) * waiting
    room = step - known.queued_tokens % step
    return min(prompt_s, rates.token_s * room)  # the last of them; the others are done before


def _not_begun(known: ReplicaLoad, rates: Rates, now_s: float) -> float:
    """Prompts in our own queue whose computation has not begun: what joins them is computed in the same step."""
    queue = known.prefilling
    head = next(iter(queue.values()))
    begun_s = max(head.started_s, known.last_first_s) + rates.under_way_s(known.decoding) + _TRAVEL_S
    return float(len(queue) - (begun_s < now_s))
