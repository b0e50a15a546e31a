"""The words of two APIs beside OpenAI's chat that engines speak: Anthropic's Messages and OpenAI's Responses.

What is learned of an answer that passes by in them is what is learned of a chat: usage, finish reason, and that an end
is an end. Sources: the types of the packages `anthropic` 2.14.0 (`RawMessageStreamEvent`) and `openai` 3.57.0
(`ResponseStreamEvent`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from kvfleet.adapters.anthropic_wire import FINISH, status_of, usage_of
from kvfleet.adapters.call import Tally, Usage
from kvfleet.adapters.faults import error_object
from kvfleet.errors import BackendError, Fault

__all__ = ["WIRES", "ErrorMaker", "NativeWire", "response_usage"]

ErrorMaker = Callable[[Mapping[str, Any]], BackendError]


@attrs.frozen
class NativeWire:
    """One API's words.

    Attributes:
        path: Under the endpoint, with the usual ``/v1``.
        openers: Events that say nothing yet; they wait for the next one, so that an error just behind them is still the
            call's own.
        learns: Events that are looked into.
        read: Learns from one of those; True if it was the last.
        fixed: Fields that every request gets.
        key: The list that every whole answer has.
        learn_whole: Learns from a whole answer.
        status_of: The HTTP status that an error in a stream stands for; 200 if it says so itself.
    """

    path: str
    openers: frozenset[bytes]
    learns: frozenset[bytes]
    read: Callable[[bytes, Mapping[str, Any], Tally, ErrorMaker], bool]
    fixed: Mapping[str, Any]
    key: str
    learn_whole: Callable[[Mapping[str, Any], Tally], None]
    status_of: Callable[[Mapping[str, Any]], int]

    def read_whole(self, answer: Any, error_of: ErrorMaker) -> Tally:
        """What is learned of a whole answer.

        Raises:
            BackendError: if it reports an error under a 200, or has another shape.
        """
        if isinstance(answer, Mapping) and answer.get("error") and error_object(answer) is not None:
            raise error_of(answer)
        if not isinstance(answer, Mapping) or not isinstance(answer.get(self.key), list):
            raise BackendError(Fault.PROTOCOL, f"the backend's answer is none to {self.path}")
        tally = Tally(is_complete=True)
        self.learn_whole(answer, tally)
        return tally


# Anthropic's Messages


def _learn_message(answer: Mapping[str, Any], tally: Tally) -> None:
    tally.response_id, tally.model = str(answer.get("id") or ""), str(answer.get("model") or "")
    tally.usage = usage_of(answer.get("usage"))
    tally.finish_reason = FINISH.get(str(answer.get("stop_reason")), "stop")


def _read_message_event(kind: bytes, data: Mapping[str, Any], tally: Tally, error_of: ErrorMaker) -> bool:
    if kind == b"error":
        raise error_of(data)
    if kind == b"message_start":
        message = data.get("message") or {}
        _learn_message(message, tally)
        tally.finish_reason = None
    elif kind == b"message_delta":
        reason = (data.get("delta") or {}).get("stop_reason")
        tally.finish_reason = FINISH.get(reason, "stop") if reason else tally.finish_reason
        tally.usage = _later(tally.usage, usage_of(data.get("usage")), data.get("usage") or {})
    return kind == b"message_stop"


def _later(before: Usage | None, now: Usage | None, said: Mapping[str, Any]) -> Usage | None:
    """Usage in a stream is cumulative; what a later event does not say stands as it was."""
    if before is None or now is None:
        return now or before
    if said.get("input_tokens") is None:
        prompt, cached, written = before.prompt_tokens, before.cached_tokens, before.cache_creation_tokens
    else:
        prompt, cached, written = now.prompt_tokens, now.cached_tokens, now.cache_creation_tokens
    return Usage(
        prompt,
        now.completion_tokens,
        prompt + now.completion_tokens,
        cached,
        written,
        reasoning_tokens=now.reasoning_tokens,
    )


# OpenAI's Responses

_INCOMPLETE = {"max_output_tokens": "length", "content_filter": "content_filter"}
_FAILED_STATUS = {"rate_limit_exceeded": 429, "invalid_prompt": 400, "server_error": 500}


def response_usage(usage: Any) -> Usage | None:
    """The usage of a response; None for none.

    >>> response_usage({"input_tokens": 9, "output_tokens": 2}).total_tokens
    11
    """
    if not isinstance(usage, Mapping) or not usage:
        return None
    inward, outward = usage.get("input_tokens_details"), usage.get("output_tokens_details")
    inward = inward if isinstance(inward, Mapping) else {}
    written = inward.get("cache_write_tokens") or None
    thought = outward.get("reasoning_tokens") if isinstance(outward, Mapping) else None
    return Usage.told(
        usage.get("input_tokens"), usage.get("output_tokens"), inward.get("cached_tokens"), written, thought
    )


def _learn_response(answer: Mapping[str, Any], tally: Tally) -> None:
    tally.response_id, tally.model = str(answer.get("id") or ""), str(answer.get("model") or "")
    tally.usage = response_usage(answer.get("usage"))
    why = (answer.get("incomplete_details") or {}).get("reason")
    output = answer.get("output") or ()
    calls = any(isinstance(item, Mapping) and item.get("type") == "function_call" for item in output)
    tally.finish_reason = _INCOMPLETE.get(str(why), "length") if why else "tool_calls" if calls else "stop"


def _read_response_event(kind: bytes, data: Mapping[str, Any], tally: Tally, error_of: ErrorMaker) -> bool:
    response = data.get("response") or {}
    if kind in (b"error", b"response.failed"):
        own = data.get("error") or response.get("error") or data
        code = own.get("code") if isinstance(own, Mapping) else None
        told = {**own, "code": _FAILED_STATUS.get(str(code), code)} if isinstance(own, Mapping) else {"message": own}
        raise error_of({"error": told})
    if kind == b"response.created":
        tally.response_id, tally.model = str(response.get("id") or ""), str(response.get("model") or "")
        return False
    if not response:
        raise ValueError("the last event has the whole response, or is none")
    _learn_response(response, tally)
    return True


WIRES: Mapping[str, NativeWire] = {
    "messages": NativeWire(
        path="/v1/messages",
        openers=frozenset({b"message_start", b"ping"}),
        learns=frozenset({b"message_start", b"message_delta", b"message_stop", b"error"}),
        read=_read_message_event,
        fixed={},
        key="content",
        learn_whole=_learn_message,
        status_of=lambda data: status_of(data.get("error")),
    ),
    "responses": NativeWire(
        path="/v1/responses",
        openers=frozenset({b"response.created", b"response.queued", b"response.in_progress", b"keepalive"}),
        learns=frozenset(
            {b"response.created", b"response.completed", b"response.incomplete", b"response.failed", b"error"}
        ),
        read=_read_response_event,
        fixed={"store": False},
        key="output",
        learn_whole=_learn_response,
        status_of=lambda _: 200,
    ),
}
