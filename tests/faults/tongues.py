"""What an engine says in each API that the gateway has: chats, Anthropic's messages, OpenAI's responses.

One known text, whole and in events, so that a fault is the same fault in whichever API it befalls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

__all__ = ["CHAT", "MESSAGES", "MODEL", "RESPONSES", "TEXT", "TOKENS", "TONGUES", "Tongue", "delta", "event"]

MODEL = "mock"
TEXT = "Über den Wolken — so the quick brown fox said — “jump”, and jumped: over 犬, twice."
TOKENS = tuple(TEXT[i : i + 6] for i in range(0, len(TEXT), 6))
_PROMPT = "Say it."
_CRASH = "CUDA error"


@attrs.frozen
class Tongue:
    """One API.

    Attributes:
        name: As the gateway calls it.
        path: Where it is.
        ask: What a client sends, but for whether it wants a stream.
        opening: How many events stand before the first with text.
        events_of: A whole stream that says these tokens.
        answer: A whole answer with this text.
        breakdown: How an engine says that it failed, in events.
        failed: The same as an answer.
        key: Of the list that every answer has.
    """

    name: str
    path: str
    ask: Mapping[str, Any]
    opening: int
    events_of: Callable[[Sequence[str]], list[bytes]]
    answer: Callable[[str], Mapping[str, Any]]
    breakdown: tuple[bytes, ...]
    failed: Mapping[str, Any]
    key: str

    def answer_of(self, text: str) -> bytes:
        """A whole answer."""
        return json.dumps(self.answer(text), ensure_ascii=False).encode()

    def beginning(self, tokens: int) -> list[bytes]:
        """A stream's events as far as these many tokens."""
        return self.events_of(TOKENS)[: self.opening + tokens]

    def rest(self, tokens: int) -> list[bytes]:
        """What comes behind them."""
        return self.events_of(TOKENS)[self.opening + tokens :]


# Chats ---------------------------------------------------------------------------------------------------------------


def event(data: Any) -> bytes:
    """One server-sent event."""
    said = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + said.encode() + b"\n\n"


def delta(content: str | None = None, finish: str | None = None) -> dict[str, Any]:
    """One chunk of a streamed chat; with neither text nor end it is the first, which names the role."""
    said: dict[str, Any] = {} if finish else {"content": content}
    if content is None and finish is None:
        said = {"role": "assistant", "content": ""}
    choice = {"index": 0, "delta": said, "finish_reason": finish}
    return {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]}


def _chat_events(tokens: Sequence[str]) -> list[bytes]:
    """Role, tokens, end."""
    return [event(delta()), *[event(delta(token)) for token in tokens], event(delta(finish="stop")), event("[DONE]")]


def _chat_answer(text: str) -> Mapping[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
    return {"id": "c-1", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice], "usage": usage}


_VLLMS = {"message": _CRASH, "type": "InternalServerError", "param": None, "code": 500}
CHAT = Tongue(
    name="chat",
    path="/v1/chat/completions",
    ask={"model": MODEL, "messages": [{"role": "user", "content": _PROMPT}]},
    opening=1,
    events_of=_chat_events,
    answer=_chat_answer,
    breakdown=(event({"error": _VLLMS}), event("[DONE]")),
    failed={"error": _VLLMS},
    key="choices",
)

# Messages ------------------------------------------------------------------------------------------------------------


def _typed(kind: str, **more: Any) -> bytes:
    return f"event: {kind}\n".encode() + event({"type": kind, **more})


def _message(text: str) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 5, "output_tokens": 12},
    }


def _message_events(tokens: Sequence[str]) -> list[bytes]:
    begun = {**_message(""), "content": [], "stop_reason": None}
    return [
        _typed("message_start", message=begun),
        _typed("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        *[_typed("content_block_delta", index=0, delta={"type": "text_delta", "text": token}) for token in tokens],
        _typed("content_block_stop", index=0),
        _typed("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 12}),
        _typed("message_stop"),
    ]


MESSAGES = Tongue(
    name="messages",
    path="/v1/messages",
    ask={**CHAT.ask, "max_tokens": 100},
    opening=2,
    events_of=_message_events,
    answer=_message,
    breakdown=(_typed("error", error={"type": "api_error", "message": _CRASH}),),
    failed={"type": "error", "error": {"type": "api_error", "message": _CRASH}},
    key="content",
)

# Responses -----------------------------------------------------------------------------------------------------------


def _response(text: str, status: str = "completed") -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": status, "content": [part]}
    usage = {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 12,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 17,
    }
    said = {"output": [item], "usage": usage} if text else {"output": [], "usage": None}
    fixed = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    return {"id": "resp_1", "object": "response", "created_at": 1, "model": MODEL, "status": status, **fixed, **said}


def _response_events(tokens: Sequence[str]) -> list[bytes]:
    text = "".join(tokens)
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
    told: list[tuple[str, dict[str, Any]]] = [
        ("response.created", {"response": _response("", "in_progress")}),
        ("response.in_progress", {"response": _response("", "in_progress")}),
        ("response.output_item.added", {"output_index": 0, "item": item}),
        ("response.content_part.added", {**where, "part": {"type": "output_text", "text": "", "annotations": []}}),
        *[("response.output_text.delta", {**where, "delta": token, "logprobs": []}) for token in tokens],
        ("response.output_text.done", {**where, "text": text, "logprobs": []}),
        ("response.output_item.done", {"output_index": 0, "item": _response(text)["output"][0] if text else item}),
        ("response.completed", {"response": _response(text)}),
    ]
    return [_typed(kind, sequence_number=number, **more) for number, (kind, more) in enumerate(told)]


_SERVERS = {"code": "server_error", "message": _CRASH}
RESPONSES = Tongue(
    name="responses",
    path="/v1/responses",
    ask={"model": MODEL, "input": _PROMPT},
    opening=4,
    events_of=_response_events,
    answer=_response,
    breakdown=(_typed("response.failed", sequence_number=9, response={**_response("", "failed"), "error": _SERVERS}),),
    failed={"error": {**_SERVERS, "type": "server_error", "param": None}},
    key="output",
)
TONGUES = (CHAT, MESSAGES, RESPONSES)
