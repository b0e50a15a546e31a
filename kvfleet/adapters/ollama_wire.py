"""Ollama's native answers and streams in OpenAI's shapes.

Source of the native shapes: ``docs/api.md`` and ``api/types.go`` of ollama/ollama (August 2026).
"""

from __future__ import annotations

import abc
import array
import base64
import datetime as dt
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from kvfleet.adapters.call import Operation, Usage, count_of
from kvfleet.adapters.ollama_bodies import chat_body, completion_body, embedding_body
from kvfleet.adapters.translation import Chunks, Framing, Translation, tool_calls, wants_usage

__all__ = ["OllamaChat", "OllamaCompletion", "OllamaEmbedding"]

_FINISH = {"stop": "stop", "length": "length"}
_READ = frozenset(
    {
        *("model", "created_at", "message", "response", "thinking", "done", "done_reason", "logprobs", "tool_calls"),
        *("prompt_eval_count", "eval_count", "embeddings"),
    }
)


def _usage(answer: Mapping[str, Any]) -> Usage | None:
    """What Ollama counted. It leaves `prompt_eval_count` out where it is nought."""
    prompt, said = answer.get("prompt_eval_count"), answer.get("eval_count")
    if prompt is None and said is None:
        return None
    return Usage.told(prompt, said)


def _more(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Ollama's further fields: durations, and whatever it will have next."""
    return {key: value for key, value in answer.items() if key not in _READ}


def created_s(answer: Mapping[str, Any], default: int) -> int:
    """Unix seconds of `created_at` (RFC 3339, with nanoseconds); the default if it is not there.

    >>> created_s({"created_at": "2026-11-23T01:55:07.123456789Z"}, 0)
    1795398907
    """
    text = answer.get("created_at")
    if not isinstance(text, str):
        return default
    seconds, _, fraction = text.partition(".")
    zone = fraction.lstrip("0123456789") if fraction else ""
    try:
        return int(dt.datetime.fromisoformat(seconds + zone).timestamp())
    except ValueError:
        return default


@attrs.define(kw_only=True)
class _Generating(Translation):
    """What chat and text completions have in common."""

    framing: Framing = Framing.NDJSON
    _has_called: bool = attrs.field(default=False, init=False)
    _is_dated: bool = attrs.field(default=False, init=False)

    def event(self, data: Any) -> bytes:
        """One line of the stream; the last one has ``done``."""
        if not self._is_dated:
            self._is_dated = True
            self._date(data)
        out = self._piece(data)
        if data.get("done"):
            out += self.chunks.finish(self._reason(data), _usage(data), **_more(data))
        return out

    @abc.abstractmethod
    def _piece(self, data: Mapping[str, Any]) -> bytes:
        """What one line of the stream has for the client."""

    def _date(self, answer: Mapping[str, Any]) -> None:
        self.chunks.created = created_s(answer, self.chunks.created)
        self.chunks.model = self.chunks.tally.model = answer.get("model") or self.chunks.model

    def _reason(self, answer: Mapping[str, Any]) -> str:
        reason = _FINISH.get(answer.get("done_reason") or "stop", "stop")
        return "tool_calls" if self._has_called and reason == "stop" else reason


@attrs.define(kw_only=True)
class OllamaChat(_Generating):
    """A call of ``/api/chat``."""

    path: str = "/api/chat"
    _calls: int = attrs.field(default=0, init=False)

    @classmethod
    def of(cls, body: Mapping[str, Any], chunks: Chunks, *, is_stream: bool, defaults: Mapping[str, Any]) -> OllamaChat:
        """The call for an OpenAI chat body."""
        chunks.include_usage = wants_usage(body)
        theirs = chat_body(body, model=chunks.model, is_stream=is_stream, defaults=defaults)
        return cls(operation=Operation.CHAT, body=theirs, chunks=chunks)

    def whole(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """The chat completion."""
        self._date(answer)
        theirs = answer["message"]
        calls = theirs.get("tool_calls") or ()
        self._has_called = bool(calls)
        message: dict[str, Any] = {"role": "assistant", "content": theirs.get("content") or (None if calls else "")}
        if theirs.get("thinking"):
            message["reasoning_content"] = theirs["thinking"]
        if calls:
            message["tool_calls"] = tool_calls(calls, is_delta=False)
        choice = {"message": message, "finish_reason": self._reason(answer)}
        if answer.get("logprobs"):
            choice["logprobs"] = {"content": answer["logprobs"]}
        return self.chunks.whole(choice, _usage(answer), **_more(answer))

    def _piece(self, data: Mapping[str, Any]) -> bytes:
        message = data.get("message") or {}
        delta: dict[str, Any] = {}
        if message.get("thinking"):
            delta["reasoning_content"] = message["thinking"]
        calls = message.get("tool_calls")
        if calls:
            delta["tool_calls"] = tool_calls(calls, is_delta=True, first=self._calls)
            self._has_called, self._calls = True, self._calls + len(calls)
        logprobs = {"content": data["logprobs"]} if data.get("logprobs") else None
        return self.chunks.said(message.get("content") or "", logprobs=logprobs, **delta)


@attrs.define(kw_only=True)
class OllamaCompletion(_Generating):
    """A call of ``/api/generate``."""

    path: str = "/api/generate"

    @classmethod
    def of(
        cls, body: Mapping[str, Any], chunks: Chunks, *, is_stream: bool, defaults: Mapping[str, Any]
    ) -> OllamaCompletion:
        """The call for an OpenAI text completion."""
        chunks.include_usage = wants_usage(body)
        theirs = completion_body(body, model=chunks.model, is_stream=is_stream, defaults=defaults)
        return cls(operation=Operation.COMPLETION, body=theirs, chunks=chunks)

    def whole(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """The text completion."""
        self._date(answer)
        choice = {"text": answer["response"], "finish_reason": self._reason(answer)}
        return self.chunks.whole(choice, _usage(answer), **_more(answer))

    def _piece(self, data: Mapping[str, Any]) -> bytes:
        return self.chunks.said(data.get("response") or "")


@attrs.define(kw_only=True)
class OllamaEmbedding(Translation):
    """A call of ``/api/embed``. OpenAI's own clients ask for base64 by default, so that is made here."""

    path: str = "/api/embed"
    framing: Framing = Framing.NDJSON
    is_base64: bool = False

    @classmethod
    def of(cls, body: Mapping[str, Any], chunks: Chunks, *, defaults: Mapping[str, Any]) -> OllamaEmbedding:
        """The call for an OpenAI embedding body."""
        theirs = embedding_body(body, model=chunks.model, defaults=defaults)
        is_base64 = body.get("encoding_format") == "base64"
        return cls(operation=Operation.EMBEDDING, body=theirs, chunks=chunks, is_base64=is_base64)

    def whole(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """The list of embeddings."""
        pack: Any = _packed if self.is_base64 else list
        data = [
            {"object": "embedding", "index": index, "embedding": pack(vector)}
            for index, vector in enumerate(answer["embeddings"])
        ]
        tokens = count_of(answer.get("prompt_eval_count")) or 0
        self.chunks.tally.usage, self.chunks.tally.is_complete = Usage(tokens, 0, tokens), True
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        model = answer.get("model") or self.chunks.model
        return {**_more(answer), "object": "list", "data": data, "model": model, "usage": usage}

    def event(self, data: Any) -> bytes:
        """Embeddings are not streamed."""
        raise TypeError(type(data))


def _packed(vector: Sequence[float]) -> str:
    """Floats as OpenAI packs them: base64 of little-endian 32-bit floats."""
    packed = array.array("f", vector)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode("ascii")
