"""One call to one model for the sake of comparison: timed, with a limit of its own, and it never raises."""

from __future__ import annotations

import asyncio
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import orjson

from kvfleet.adapters.base import ChatRequest, ChatResponse, InferenceAdapter, chunks_of
from kvfleet.adapters.call import Call, Limits, Operation, Reply
from kvfleet.clock import Clock
from kvfleet.errors import BackendError

__all__ = ["Asked", "ask", "call_for", "mean", "median", "quantile", "similarity", "text_of_answer", "whole_call"]

_STREAMING = ("stream", "stream_options")
_WORD = re.compile(r"\w+")
_MOST_COMPARED = 20_000


@attrs.frozen(kw_only=True)
class Asked:
    """How one call went.

    Attributes:
        response: The answer; None if there was none.
        error: Why not, in words without content; empty if there was one.
        fault: The same in one word; ``ok`` if there was one.
        failed: The error of a call that its backend refused or broke off.
        latency_ms: Milliseconds until the whole answer was there, or until it was given up.
    """

    response: ChatResponse | None = None
    error: str = ""
    fault: str = "ok"
    failed: BackendError | None = attrs.field(default=None, eq=False, repr=False)
    latency_ms: float = 0.0


def call_for(request: ChatRequest, *, timeout_s: float, headers: tuple[tuple[str, str], ...] = ()) -> Call:
    """The call that asks for a whole answer to a chat request."""
    return whole_call(Operation.CHAT, request.to_openai(), timeout_s=timeout_s, headers=headers)


def whole_call(
    operation: Operation, body: Mapping[str, Any], *, timeout_s: float, headers: tuple[tuple[str, str], ...] = ()
) -> Call:
    """The call that asks for a whole answer, whether or not a stream was asked for the first time."""
    plain = {key: value for key, value in body.items() if key not in _STREAMING}
    limits = Limits(connect_s=min(5.0, timeout_s), first_byte_s=timeout_s, idle_s=timeout_s)
    return Call(operation=operation, body=plain, headers=headers, limits=limits)


async def ask(
    adapter: InferenceAdapter,
    call: Call,
    *,
    timeout_s: float,
    clock: Clock,
    restore: Callable[[Reply], Reply] | None = None,
) -> Asked:
    """Make a call for a whole answer; what goes wrong is part of what is found, and only cancelling is raised.

    `restore` changes the answer before it is read.
    """
    started_s = clock.now_s()
    response, error, fault, refusal = None, "", "ok", None
    try:
        async with asyncio.timeout(timeout_s):
            reply = await adapter.send(call)
            reply = reply if restore is None else restore(reply)
            response = ChatResponse.from_openai(orjson.loads(reply.body), endpoint=adapter.endpoint)
    except BackendError as failed:
        error, fault, refusal = failed.message, failed.kind.value, failed
    except TimeoutError:
        error, fault = f"no whole answer within {timeout_s:g} s", "timeout"
    except Exception as broken:  # noqa: BLE001 - the plugin border: an adapter that breaks is a result too
        error, fault = f"the adapter failed: {type(broken).__name__}", "protocol"
    latency_ms = (clock.now_s() - started_s) * 1000
    if response is not None:
        response = attrs.evolve(response, latency_ms=latency_ms)
    return Asked(response=response, error=error, fault=fault, failed=refusal, latency_ms=latency_ms)


def text_of_answer(content: bytes) -> str:
    r"""The text of an answer as the caller got it: a JSON object, or a stream's events one after the other.

    >>> text_of_answer(b'{"choices": [{"message": {"content": "Hi"}}]}')
    'Hi'
    >>> text_of_answer(b'data: {"choices":[{"delta":{"content":"Hi"}}]}\n\ndata: [DONE]\n\n')
    'Hi'
    """
    if not content.startswith(b"{"):
        return "".join(chunk.content for chunk in chunks_of(content))
    try:
        return ChatResponse.from_openai(orjson.loads(content)).content
    except BackendError:
        return ""


def similarity(one: str, other: str) -> float:
    """How alike two texts are by their words, 0 to 1: the Sørensen-Dice coefficient of their word counts.

    It says how much of the wording is shared, not whether both are right. Only the first 20,000 characters count.

    >>> similarity("The sky is blue.", "the sky is grey")
    0.75
    """
    counts = [Counter(_WORD.findall(text[:_MOST_COMPARED].lower())) for text in (one, other)]
    total = sum(counts[0].values()) + sum(counts[1].values())
    return 1.0 if total == 0 else 2 * (counts[0] & counts[1]).total() / total


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None


def median(values: Sequence[float]) -> float | None:
    """The median (the lower one of two in the middle); None of nothing."""
    return quantile(values, 0.5) if values else None


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that so great a share of the values does not exceed; there must be one.

    >>> quantile([4, 1, 3, 2], 0.5), quantile(range(1, 101), 0.95)
    (2, 95)
    """
    return sorted(values)[max(math.ceil(len(values) * share) - 1, 0)]
