"""Between an engine's own tongue and OpenAI's: what every translated engine shares.

A `Translation` is one call in another tongue: what to send, and how to read what comes back. It does no I/O, so it is
tested with plain values; `kvfleet.adapters.translated` carries it over HTTP. `Chunks` writes the OpenAI side of an
answer.
"""

from __future__ import annotations

import abc
import codecs
import enum
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import orjson

from kvfleet.adapters.call import Operation, Tally, Usage
from kvfleet.adapters.faults import error_object, from_answer
from kvfleet.errors import BackendError, Fault

__all__ = [
    "Chunks",
    "Framing",
    "Translation",
    "arguments_text",
    "as_stream",
    "tool_calls",
    "wants_usage",
]

_PREFIX = {Operation.CHAT: "chatcmpl-", Operation.COMPLETION: "cmpl-"}
_OBJECT = {
    (Operation.CHAT, False): "chat.completion",
    (Operation.CHAT, True): "chat.completion.chunk",
    (Operation.COMPLETION, False): "text_completion",
    (Operation.COMPLETION, True): "text_completion",
}
_NOTHING: Mapping[str, Any] = {}


def wants_usage(body: Mapping[str, Any]) -> bool:
    """True if the client asked for usage at the end of the stream."""
    options = body.get("stream_options")
    return isinstance(options, Mapping) and bool(options.get("include_usage"))


def arguments_text(arguments: Any) -> str:
    """A tool call's arguments as the JSON text OpenAI has there; engines of another tongue have an object."""
    return arguments if isinstance(arguments, str) else orjson.dumps(arguments or {}).decode()


@attrs.define(kw_only=True)
class Chunks:
    """Writes the OpenAI events of one streamed answer, and notes in the tally what passed.

    Attributes:
        operation: Chat or text completion.
        model: The name the engine answers under.
        created: Unix seconds.
        include_usage: True if the usage event shall be sent.
        tally: Filled in.
        id: The answer's id.
    """

    operation: Operation
    model: str
    created: int
    include_usage: bool = False
    tally: Tally = attrs.field(factory=Tally)
    id: str = ""
    _is_open: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        """Give the answer an id."""
        self.id = self.id or f"{_PREFIX.get(self.operation, '')}{uuid.uuid4().hex}"
        self.tally.response_id, self.tally.model = self.id, self.model

    def said(self, text: str, *, logprobs: Mapping[str, Any] | None = None, **delta: Any) -> bytes:
        """The events for a piece of text, and whatever else the delta of a chat chunk holds; opens the answer first."""
        if self.operation is not Operation.CHAT:
            return self._choice({"text": text}) if text else b""
        out = b""
        if not self._is_open:
            self._is_open = True
            out = self._choice({"delta": {"role": "assistant", "content": ""}})
        if text:
            delta["content"] = text
        return out + (self._choice({"delta": delta}, logprobs=logprobs) if delta else b"")

    def finish(self, reason: str, usage: Usage | None, **more: Any) -> bytes:
        """The events that end the answer: finish reason, usage if it was asked for, and ``[DONE]``.

        Args:
            reason: OpenAI's word.
            usage: What the engine counted, if it did.
            more: Further fields of the engine's last word, kept on the event that carries the finish reason.
        """
        opening = self.said("")
        self.tally.finish_reason, self.tally.usage, self.tally.is_complete = reason, usage, True
        inner: dict[str, Any] = {"delta": {}} if self.operation is Operation.CHAT else {"text": ""}
        last = self._choice(inner, reason=reason, more=more)
        if self.include_usage and usage is not None:
            last += self._event({"choices": [], "usage": usage.to_openai()})
        return opening + last + b"data: [DONE]\n\n"

    def whole(self, choice: Mapping[str, Any], usage: Usage | None, **more: Any) -> dict[str, Any]:
        """The answer as one object: a choice without its index, and the engine's further fields."""
        self.tally.finish_reason, self.tally.usage, self.tally.is_complete = choice["finish_reason"], usage, True
        out = {**more, **self._head(is_stream=False), "choices": [{"index": 0, "logprobs": None, **choice}]}
        return {**out, "usage": usage.to_openai()} if usage is not None else out

    def _head(self, *, is_stream: bool) -> dict[str, Any]:
        kind = _OBJECT[self.operation, is_stream]
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(
        self,
        inner: Mapping[str, Any],
        *,
        reason: str | None = None,
        logprobs: Mapping[str, Any] | None = None,
        more: Mapping[str, Any] = _NOTHING,
    ) -> bytes:
        # OpenAI: with include_usage every chunk has the field, null in all but the last.
        usage = {"usage": None} if self.include_usage else {}
        choice = {"index": 0, **inner, "logprobs": logprobs, "finish_reason": reason}
        return self._event({"choices": [choice], **usage}, more)

    def _event(self, rest: Mapping[str, Any], more: Mapping[str, Any] = _NOTHING) -> bytes:
        self.tally.events += 1
        return b"data: " + orjson.dumps({**more, **self._head(is_stream=True), **rest}) + b"\n\n"


class Framing(enum.StrEnum):
    """How an engine divides its stream into events."""

    SSE = "sse"
    NDJSON = "ndjson"
    TEXT = "text"  # no events: every piece of the body is a piece of the answer


@attrs.define(kw_only=True)
class Translation(abc.ABC):
    """One call in an engine's own tongue.

    Attributes:
        operation: What was asked.
        path: Where to post.
        body: What to post.
        framing: How the engine divides its stream.
        chunks: Writes the OpenAI side.
        headers: The engine's answer headers, set before anything is read.
        is_whole: Set at the end of a stream: True if HTTP's framing proves that nothing is missing. That does not prove
            that the engine was finished: one that dies behind a proxy may leave a stream that is whole and too short.
    """

    operation: Operation
    path: str
    body: Mapping[str, Any]
    framing: Framing
    chunks: Chunks
    headers: Mapping[str, str] = attrs.field(factory=dict)
    is_whole: bool = False
    _decoder: codecs.IncrementalDecoder = attrs.field(init=False, factory=codecs.getincrementaldecoder("utf-8"))

    @abc.abstractmethod
    def whole(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """The OpenAI object for a whole answer."""

    @abc.abstractmethod
    def event(self, data: Any) -> bytes:
        """The OpenAI events for one event of the engine (decoded JSON, or text); empty if it says nothing."""

    def done(self) -> bytes:
        """The OpenAI events when the engine sent ``[DONE]``; most have said all before."""
        return b""

    def end(self) -> bytes:
        """The OpenAI events when the engine's stream ended and it had not said that it was finished.

        Raises:
            BackendError: (`Fault.DISCONNECTED`) if that is no end.
        """
        raise BackendError(Fault.DISCONNECTED, "the backend's stream ended before it was finished", received=True)

    def error(self, data: Mapping[str, Any], *, received: bool) -> BackendError:
        """The error that an answer under a 200 stands for; engines with odd errors add theirs."""
        return from_answer(200, self.headers, orjson.dumps(data), received=received)

    def read_whole(self, raw: bytes, status: int) -> bytes:
        """A whole answer, read and translated.

        Raises:
            BackendError: if it reports an error (some engines do so under a 200), or has not the engine's shape.
        """
        try:
            answer = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise BackendError(Fault.PROTOCOL, "the backend's answer is not JSON", status=status) from error
        self._complain(answer, received=False)
        return orjson.dumps(self._shaped(self.whole, answer))

    def read_event(self, raw: bytes) -> bytes:
        """One event of the engine's stream, read and translated.

        Raises:
            BackendError: if it reports an error, or has not the engine's shape.
        """
        if self.framing is Framing.TEXT:
            return self.event(self._decoder.decode(raw))
        try:
            data = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise BackendError(Fault.PROTOCOL, "an event of the backend is not JSON", received=True) from error
        self._complain(data, received=self.chunks.tally.events > 0)
        return bytes(self._shaped(self.event, data))

    def _complain(self, data: Any, *, received: bool) -> None:
        if isinstance(data, Mapping) and "error" in data and error_object(data) is not None:
            raise self.error(data, received=received)

    @staticmethod
    def _shaped(read: Any, data: Any) -> Any:
        try:
            return read(data)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise BackendError(
                Fault.PROTOCOL, f"the backend's answer has not the shape it should: {error!r}"
            ) from error


def as_stream(operation: Operation, answer: Mapping[str, Any], *, include_usage: bool) -> bytes:
    """A whole OpenAI answer told as a stream: for each choice what was said and its finish, then ``[DONE]``.

    Raises:
        BackendError: (`Fault.PROTOCOL`) if it has not OpenAI's shape.
    """
    head = {key: value for key, value in answer.items() if key not in ("choices", "usage")}
    head["object"] = _OBJECT[operation, True]
    try:
        choices = [event for place, choice in enumerate(answer["choices"]) for event in _told(operation, choice, place)]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise BackendError(Fault.PROTOCOL, f"the backend's answer has not the shape it should: {error!r}") from error
    rest = {"usage": None} if include_usage else {}
    said: list[dict[str, Any]] = [{**head, "choices": [choice], **rest} for choice in choices]
    if include_usage and answer.get("usage"):
        said.append({**head, "choices": [], "usage": answer["usage"]})
    return b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in said) + b"data: [DONE]\n\n"


def _told(operation: Operation, choice: Mapping[str, Any], place: int) -> list[dict[str, Any]]:
    head = {"index": choice.get("index", place)}
    said = {**head, "logprobs": choice.get("logprobs"), "finish_reason": None}
    last = {**head, "logprobs": None, "finish_reason": choice.get("finish_reason") or "stop"}
    if operation is not Operation.CHAT:
        return [{**said, "text": choice["text"]}, {**last, "text": ""}]
    delta = dict(choice["message"])
    if delta.get("tool_calls"):
        delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
    return [{**said, "delta": delta}, {**last, "delta": {}}]


def tool_calls(calls: Sequence[Mapping[str, Any]], *, is_delta: bool, first: int = 0) -> list[dict[str, Any]]:
    """An engine's tool calls in the OpenAI shape: with an id, with arguments as text and, in a delta, with an index."""
    out = []
    for index, call in enumerate(calls, first):
        function = call["function"]
        name, arguments = function["name"], arguments_text(function.get("arguments"))
        one = {
            "id": call.get("id") or f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        out.append({"index": index, **one} if is_delta else one)
    return out
