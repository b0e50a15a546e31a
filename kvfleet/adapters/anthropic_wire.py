"""Anthropic's answers and streams in OpenAI's shapes.

Source of the native shapes: the types of the `anthropic` package, 2.12.0 (`Message`, `RawMessageStreamEvent`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import orjson

from kvfleet.adapters.anthropic_blocks import Blocks
from kvfleet.adapters.call import Operation, Usage, count_of
from kvfleet.adapters.faults import from_answer
from kvfleet.adapters.translation import Chunks, Framing, Translation, arguments_text, wants_usage
from kvfleet.errors import BackendError

__all__ = ["FINISH", "AnthropicChat", "status_of", "usage_of"]

FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
# Kept under their own names beside OpenAI's; everything else of a message has a place in OpenAI's shape.
_READ = frozenset({"id", "type", "role", "model", "content", "usage"})
_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


def status_of(error: Any) -> int:
    """The HTTP status an error object stands for; in a stream it comes under a 200.

    >>> status_of({"type": "overloaded_error", "message": "Overloaded"})
    529
    """
    return _STATUS.get(str(error.get("type")), 500) if isinstance(error, Mapping) else 500


def usage_of(usage: Mapping[str, Any] | None) -> Usage | None:
    """Anthropic's usage as OpenAI counts; None for none.

    Anthropic's `input_tokens` leave out what was read from its prompt cache and what was written to it; OpenAI's prompt
    tokens are all of it.

    >>> usage_of({"input_tokens": 5, "cache_read_input_tokens": 100, "output_tokens": 7}).prompt_tokens
    105
    """
    if not isinstance(usage, Mapping) or not usage:
        return None
    read, written = usage.get("cache_read_input_tokens"), usage.get("cache_creation_input_tokens")
    parts = [count_of(part or 0) for part in (usage.get("input_tokens"), read, written)]
    if None in parts:
        return None
    details = usage.get("output_tokens_details")
    thought = details.get("thinking_tokens") if isinstance(details, Mapping) else None
    return Usage.told(sum(part or 0 for part in parts), usage.get("output_tokens"), read, written, thought)


@attrs.define(kw_only=True)
class AnthropicChat(Translation):
    """A call of ``/v1/messages``."""

    path: str = "/v1/messages"
    framing: Framing = Framing.SSE
    operation: Operation = Operation.CHAT
    _usage: dict[str, Any] = attrs.field(init=False, factory=dict)
    _last: dict[str, Any] = attrs.field(init=False, factory=dict)
    _blocks: Blocks = attrs.field(init=False, factory=Blocks)

    @classmethod
    def of(cls, body: Mapping[str, Any], theirs: Mapping[str, Any], chunks: Chunks) -> AnthropicChat:
        """The call for an OpenAI chat body, and what it is in Anthropic's words."""
        chunks.include_usage = wants_usage(body)
        return cls(body=theirs, chunks=chunks)

    def whole(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """The chat completion."""
        self._begin(answer)
        more = {key: value for key, value in answer.items() if key not in _READ and value is not None}
        choice = {"message": _message(answer["content"]), "finish_reason": _reason(answer.get("stop_reason"))}
        return self.chunks.whole(choice, usage_of(answer.get("usage")), **more)

    def event(self, data: Any) -> bytes:
        """One event of the stream; ``ping`` and events that are not known say nothing."""
        kind = data["type"]
        if kind == "message_start":
            # nothing is sent yet: an overload is often reported just after it, and another replica may then answer
            self._begin(data["message"])
            self._count(data["message"].get("usage"))
        elif kind == "content_block_start":
            return self._said(self._blocks.start(data["index"], data["content_block"]))
        elif kind == "content_block_delta":
            return self._said(self._blocks.delta(data["index"], data["delta"]))
        elif kind == "content_block_stop":
            return self._said(self._blocks.stop(data["index"]))
        elif kind == "message_delta":
            self._last |= {key: value for key, value in data["delta"].items() if value is not None}
            self._count(data.get("usage"))
        elif kind == "message_stop":
            return self.chunks.finish(_reason(self._last.get("stop_reason")), usage_of(self._usage), **self._last)
        return b""

    def error(self, data: Mapping[str, Any], *, received: bool) -> BackendError:
        """The error that an ``error`` event stands for."""
        return from_answer(status_of(data.get("error")), self.headers, orjson.dumps(data), received=received)

    def _begin(self, message: Mapping[str, Any]) -> None:
        chunks = self.chunks
        chunks.id = chunks.tally.response_id = message.get("id") or chunks.id
        chunks.model = chunks.tally.model = message.get("model") or chunks.model

    def _count(self, usage: Mapping[str, Any] | None) -> None:
        """Usage in a stream is cumulative: what comes later replaces what came before."""
        self._usage |= {key: value for key, value in (usage or {}).items() if value is not None}

    def _said(self, delta: Mapping[str, Any]) -> bytes:
        if not delta:
            return b""
        rest = {key: value for key, value in delta.items() if key != "content"}
        return self.chunks.said(delta.get("content", ""), **rest)


def _reason(stop_reason: Any) -> str:
    return FINISH.get(stop_reason, "stop")


def _message(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The assistant's message: text, thoughts, calls of tools, and the blocks OpenAI has no place for as they are."""
    by_kind: dict[str, list[Mapping[str, Any]]] = {"text": [], "thinking": [], "redacted_thinking": [], "tool_use": []}
    others: list[Mapping[str, Any]] = []
    for block in blocks:
        by_kind.get(block["type"], others).append(block)
    text = "".join(block["text"] for block in by_kind["text"])
    calls = [
        {"id": call["id"], "type": "function", "function": _function(call["name"], call.get("input"))}
        for call in by_kind["tool_use"]
    ]
    optional: dict[str, Any] = {
        "reasoning_content": "".join(block["thinking"] for block in by_kind["thinking"]),
        "thinking_blocks": [block for block in blocks if block["type"] in ("thinking", "redacted_thinking")],
        "tool_calls": calls,
        "citations": [mark for block in by_kind["text"] for mark in block.get("citations") or ()],
        "content_blocks": others,
    }
    said = text or (None if calls else "")
    return {"role": "assistant", "content": said} | {key: value for key, value in optional.items() if value}


def _function(name: str, arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments_text(arguments)}
