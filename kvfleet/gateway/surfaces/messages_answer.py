"""A chat's answer in the words of Anthropic's Messages API, whole and as a stream.

Source of the native shapes: the types of the `anthropic` package, 2.14.0 (`Message`, `RawMessageStreamEvent`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import orjson

from kvfleet.adapters.call import Usage
from kvfleet.errors import BackendError, Fault
from kvfleet.gateway.surfaces.surface import Body, Writer, event

__all__ = ["MessagesWriter", "error_of", "message_of", "usage_object"]

_STOP = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "function_call": "tool_use"}
_STOP |= {"content_filter": "refusal"}
_NATIVE_STOPS = frozenset({"pause_turn", "stop_sequence", "refusal", "model_context_window_exceeded"})
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def error_of(wrapped: Body, status: int) -> dict[str, Any]:
    """OpenAI's error answer as Anthropic's clients know errors; what kvfleet adds of the decision is kept.

    >>> error_of({"error": {"message": "busy", "code": "x"}}, 429)["error"]["type"]
    'rate_limit_error'
    """
    own = wrapped["error"]
    kind = _ERRORS.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")
    more = {key: own[key] for key in ("code", "param", "kvfleet") if own.get(key) is not None}
    error = {"type": kind, "message": own.get("message") or "", **more}
    return {"type": "error", "error": error, "request_id": (own.get("kvfleet") or {}).get("request_id")}


def usage_object(usage: Usage | None) -> dict[str, Any]:
    """Usage as Anthropic counts: `input_tokens` leave out what was read from a cache and what was written to one.

    >>> usage_object(Usage(105, 7, 112, 100))["input_tokens"]
    5
    """
    usage = usage or Usage()
    read, written = usage.cached_tokens or 0, usage.cache_creation_tokens or 0
    return {
        "input_tokens": max(usage.prompt_tokens - read - written, 0),
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": read,
        "output_tokens": usage.completion_tokens,
    }


def stop_of(choice: Body, answer: Body, stops: Sequence[str]) -> dict[str, Any]:
    """Why it ended: `stop_reason` and `stop_sequence`; some engines tell which text made them stop."""
    told = choice.get("stop_reason")
    if isinstance(told, str) and told in stops:
        return {"stop_reason": "stop_sequence", "stop_sequence": told}
    native = answer.get("stop_reason")  # what the Anthropic adapter kept of its engine's own word
    reason = native if native in _NATIVE_STOPS else _STOP.get(str(choice.get("finish_reason")), "end_turn")
    return {"stop_reason": reason, "stop_sequence": answer.get("stop_sequence") if native in _NATIVE_STOPS else None}


def thought_in(said: Body) -> str:
    """What a message or a delta thinks; engines call it one or the other."""
    text = said.get("reasoning_content") or said.get("reasoning")
    return text if isinstance(text, str) else ""


def message_of(
    answer: Body, identifier: str, usage: Usage | None, *, stops: Sequence[str], thinks: bool
) -> dict[str, Any]:
    """A whole answer.

    Raises:
        BackendError: (`Fault.PROTOCOL`) if it is no chat's.
    """
    try:
        choice = answer["choices"][0]
        content = list(_blocks(choice["message"], thinks=thinks, is_cut=choice.get("finish_reason") == "length"))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise BackendError(Fault.PROTOCOL, "the backend's answer cannot be told as a message") from error
    head = {"id": identifier, "type": "message", "role": "assistant", "model": str(answer.get("model") or "")}
    return {**head, "content": content, **stop_of(choice, answer, stops), "usage": usage_object(usage)}


def _blocks(message: Body, *, thinks: bool, is_cut: bool) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if thinks:
        signed = [{k: v for k, v in block.items() if k != "index"} for block in message.get("thinking_blocks") or ()]
        thought = thought_in(message)
        blocks += signed or ([{"type": "thinking", "thinking": thought, "signature": ""}] if thought else [])
    text = message.get("content") or message.get("refusal")
    if text:
        blocks.append({"type": "text", "text": text, "citations": None})
    for call in message.get("tool_calls") or ():
        function = call["function"]
        if (arguments := _arguments(function.get("arguments"), is_cut=is_cut)) is not None:
            blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
    return blocks


def _arguments(given: Any, *, is_cut: bool) -> Mapping[str, Any] | None:
    """A call's arguments as the object they are; None for those that the end of the answer cut off."""
    try:
        found = orjson.loads(given) if isinstance(given, str) and given.strip() else given or {}
    except orjson.JSONDecodeError:
        found = None
    if isinstance(found, Mapping):
        return found
    if is_cut:
        return None
    raise ValueError("the arguments are no JSON object")


@attrs.define
class MessagesWriter(Writer):
    """Renders a streamed chat as the events of a message.

    A text or a thought is closed when something else begins. A call of a tool stays open to the end, since engines may
    go on with an earlier one.
    """

    identifier: str
    stops: Sequence[str] = ()
    thinks: bool = False
    _model: str = attrs.field(init=False, default="")
    _is_open: bool = attrs.field(init=False, default=False)
    _count: int = attrs.field(init=False, default=0)
    _block: tuple[str, int] | None = attrs.field(init=False, default=None)  # the text or thought that is open
    _tools: dict[int, int] = attrs.field(init=False, factory=dict)
    _end: dict[str, Any] = attrs.field(init=False, factory=dict)

    def feed(self, chunk: Body) -> bytes:
        """See `Writer.feed`."""
        self._model = self._model or str(chunk.get("model") or "")
        out = [] if self._is_open else [self._begin()]
        for choice in chunk.get("choices") or ():
            if choice.get("index"):
                continue
            delta = choice.get("delta") or {}
            out += self._delta(delta)
            if choice.get("finish_reason"):
                self._end = stop_of(choice, chunk, self.stops)
        return b"".join(out)

    def finish(self, usage: Usage | None) -> bytes:
        """See `Writer.finish`."""
        out = [] if self._is_open else [self._begin()]
        out += self._close()
        out += [event("content_block_stop", {"type": "content_block_stop", "index": i}) for i in self._tools.values()]
        delta = self._end or {"stop_reason": "end_turn", "stop_sequence": None}
        out.append(event("message_delta", {"type": "message_delta", "delta": delta, "usage": usage_object(usage)}))
        out.append(event("message_stop", {"type": "message_stop"}))
        return b"".join(out)

    def fail(self, error: Body, status: int) -> bytes:
        """See `Writer.fail`."""
        return event("error", error_of({"error": error}, status))

    def _begin(self) -> bytes:
        self._is_open = True
        message: dict[str, Any] = {
            "id": self.identifier,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_object(None),
        }
        return event("message_start", {"type": "message_start", "message": message})

    def _delta(self, delta: Body) -> list[bytes]:
        out: list[bytes] = []
        if self.thinks and (thought := thought_in(delta)):
            out += self._said("thinking", {"type": "thinking_delta", "thinking": thought})
        if self.thinks:
            for block in delta.get("thinking_blocks") or ():
                out += self._signed(block)
        text = delta.get("content") or delta.get("refusal")
        if text:
            out += self._said("text", {"type": "text_delta", "text": text})
        for call in delta.get("tool_calls") or ():
            out += self._called(call)
        return out

    def _said(self, kind: str, delta: Body) -> list[bytes]:
        out: list[bytes] = []
        if self._block is None or self._block[0] != kind:
            out += self._close()
            empty: dict[str, Any] = {"type": "text", "text": "", "citations": None}
            if kind == "thinking":
                empty = {"type": "thinking", "thinking": "", "signature": ""}
            self._block = (kind, self._count)
            out.append(self._start(empty))
        out.append(self._go_on(self._block[1], delta))
        return out

    def _signed(self, block: Mapping[str, Any]) -> list[bytes]:
        """A thought that is whole: its signature if its text has gone out, else all of it."""
        if block.get("type") == "thinking" and self._block is not None and self._block[0] == "thinking":
            delta = {"type": "signature_delta", "signature": block.get("signature") or ""}
            return [self._go_on(self._block[1], delta), *self._close()]
        out = self._close()
        self._block = ("whole", self._count)
        out.append(self._start({key: value for key, value in block.items() if key != "index"}))
        return out + self._close()

    def _called(self, call: Mapping[str, Any]) -> list[bytes]:
        index, function = call.get("index") or 0, call.get("function") or {}
        out: list[bytes] = []
        if index not in self._tools:
            out += self._close()
            self._tools[index] = self._count
            empty: dict[str, Any] = {
                "type": "tool_use",
                "id": call.get("id") or "",
                "name": function.get("name") or "",
                "input": {},
            }
            out.append(self._start(empty))
        if arguments := function.get("arguments"):
            out.append(self._go_on(self._tools[index], {"type": "input_json_delta", "partial_json": arguments}))
        return out

    def _start(self, block: Body) -> bytes:
        index, self._count = self._count, self._count + 1
        return event("content_block_start", {"type": "content_block_start", "index": index, "content_block": block})

    def _go_on(self, index: int, delta: Body) -> bytes:
        return event("content_block_delta", {"type": "content_block_delta", "index": index, "delta": delta})

    def _close(self) -> list[bytes]:
        if self._block is None:
            return []
        index, self._block = self._block[1], None
        return [event("content_block_stop", {"type": "content_block_stop", "index": index})]
