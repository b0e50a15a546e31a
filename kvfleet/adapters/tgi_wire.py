"""Text Generation Inference's two tongues and OpenAI's, each in terms of the other.

TGI's own OpenAI route (`/v1/chat/completions`, the Messages API) is nearly OpenAI's; `MessagesCall` mends where it is
not. Its native route (`/generate`, `/generate_stream`) serves text completions, and chat where the Messages API is
missing. Source: ``router/src/{lib,server,chat}.rs`` of huggingface/text-generation-inference (January 2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import orjson

from kvfleet.adapters.call import Operation, Usage
from kvfleet.adapters.faults import from_answer
from kvfleet.adapters.refusals import number_of_choices, refuse, text_only
from kvfleet.adapters.translation import Chunks, Framing, Translation, arguments_text, wants_usage
from kvfleet.errors import BackendError

__all__ = ["GenerateCall", "MessagesCall", "generate_body", "messages_body", "tgi_error"]

ENGINE = "TGI"

_FINISH = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}

# OpenAI's name of a parameter, and TGI's under `parameters`; the later of two names wins.
_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "frequency_penalty": "frequency_penalty",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}
# TGI's word for an error, and the status it stands for: amid a stream there is none, and its 424 means that the engine
# failed, not the caller.
_STATUS = {"validation": 422, "tool_error": 422, "template_error": 422, "generation": 500, "overloaded": 503}

_SAID = frozenset(
    {
        *_PARAMETERS,
        *("model", "messages", "prompt", "stream", "stream_options", "stop", "parameters", "response_format"),
        *("n", "best_of", "tools", "tool_choice", "logprobs", "echo"),
    }
)


def tgi_error(status: int, headers: Mapping[str, str], body: bytes, *, received: bool = False) -> BackendError:
    """The error that an answer of TGI stands for; it says 429 where others say 503: its queue is full."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        data = None
    kind = data.get("error_type") if isinstance(data, Mapping) else None
    return from_answer(_STATUS.get(str(kind), status), headers, body, received=received)


def messages_body(body: Mapping[str, Any], *, model: str, is_stream: bool) -> dict[str, Any]:
    """The body of the Messages API: OpenAI's, with what TGI reads otherwise put right.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`) for what TGI cannot do.
    """
    number_of_choices(body, ENGINE)
    out = {**body, "model": model, "stream": is_stream, "messages": _messages(body.get("messages"))}
    if isinstance(body.get("stop"), str):
        out["stop"] = [body["stop"]]
    if _is_everything(body.get("top_p")):
        del out["top_p"]
    if "response_format" in body:
        out["response_format"] = _grammar(body["response_format"])
    if "max_completion_tokens" in body and "max_tokens" in body:
        del out["max_tokens"]  # two names of one field there, and an error if both are given
    if not is_stream:
        out.pop("stream_options", None)
    return {key: value for key, value in out.items() if value is not None}


def _is_everything(top_p: Any) -> bool:
    """OpenAI's way to say "all tokens"; TGI allows only less than 1."""
    return isinstance(top_p, int | float) and top_p >= 1


def _messages(messages: Any) -> list[Mapping[str, Any]]:
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise refuse("messages must be a list of messages", "messages")
    return [part for message in messages for part in _message(message)]


def _message(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A message has content or tool calls there, never both: TGI would drop the calls without a word."""
    if not message.get("tool_calls"):
        return [message]
    without = {key: value for key, value in message.items() if key != "content"}
    if not message.get("content"):
        return [without]
    return [{key: value for key, value in message.items() if key != "tool_calls"}, without]


def _grammar(wanted: Any) -> dict[str, Any] | None:
    """`response_format` as TGI has it: the schema stands under ``value``."""
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if kind in (None, "text"):
        return None
    if "value" in wanted:
        return dict(wanted)
    if kind == "json_object":
        return {"type": "json", "value": {"type": "object"}}
    if kind == "json_schema" and isinstance(wanted.get("json_schema"), Mapping):
        return {"type": "json", "value": wanted["json_schema"].get("schema") or {"type": "object"}}
    raise refuse(f"{ENGINE} has no response_format of type {kind}", "response_format")


def generate_body(body: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """The body of ``/generate`` and ``/generate_stream``.

    Unknown fields go under `parameters`, where TGI's own (`top_k`, `truncate`, `adapter_id`, ...) are.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`) for what TGI cannot do.
    """
    text_only(body, ENGINE)
    parameters: dict[str, Any] = {key: value for key, value in body.items() if key not in _SAID}
    parameters |= {theirs: body[ours] for ours, theirs in _PARAMETERS.items() if body.get(ours) is not None}
    if _is_everything(parameters.get("top_p")):
        del parameters["top_p"]
    # OpenAI samples unless told otherwise; TGI, given any parameters, does not, and takes no temperature of nought
    parameters["do_sample"] = parameters.get("temperature") != 0
    if not parameters["do_sample"]:
        del parameters["temperature"]
    stop = body.get("stop")
    if stop:
        parameters["stop"] = [stop] if isinstance(stop, str) else list(stop)
    grammar = _grammar(body.get("response_format"))
    if grammar is not None:
        parameters["grammar"] = grammar
    return {"inputs": prompt, "parameters": {**parameters, "details": True, **(body.get("parameters") or {})}}


class _Call(Translation):
    """What both tongues have in common: the errors."""

    __slots__ = ()

    def error(self, data: Mapping[str, Any], *, received: bool) -> BackendError:
        """The error in an answer under a 200."""
        return tgi_error(200, self.headers, orjson.dumps(data), received=received)


@attrs.define(kw_only=True)
class GenerateCall(_Call):
    """A call of ``/generate`` or ``/generate_stream``."""

    framing: Framing = Framing.SSE

    @classmethod
    def of(
        cls, operation: Operation, body: Mapping[str, Any], prompt: str, chunks: Chunks, *, is_stream: bool
    ) -> GenerateCall:
        """The call for an OpenAI body whose prompt is a text already."""
        chunks.include_usage = wants_usage(body)
        path = "/generate_stream" if is_stream else "/generate"
        return cls(operation=operation, path=path, body=generate_body(body, prompt), chunks=chunks)

    def whole(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """The completion; TGI tells the prompt's tokens in a header."""
        text, details = answer["generated_text"], answer.get("details") or {}
        reason = _FINISH.get(str(details.get("finish_reason")), "stop")
        inner: dict[str, Any] = {"text": text}
        if self.operation is Operation.CHAT:
            inner = {"message": {"role": "assistant", "content": text}}
        told = str(self.headers.get("x-prompt-tokens") or 0)
        usage = _counted(int(told) if told.isdecimal() else None, details.get("generated_tokens"))
        return self.chunks.whole({**inner, "finish_reason": reason}, usage)

    def event(self, data: Any) -> bytes:
        """One token; the last one comes with the whole text and the details."""
        token = data["token"]
        out = b"" if token.get("special") else self.chunks.said(token["text"])
        if data.get("generated_text") is None:
            return out
        details = data.get("details") or {}
        usage = _counted(details.get("input_length"), details.get("generated_tokens"))
        return out + self.chunks.finish(_FINISH.get(str(details.get("finish_reason")), "stop"), usage)


def _counted(prompt: Any, said: Any) -> Usage | None:
    return None if said is None else Usage.told(prompt, said)


@attrs.define(kw_only=True)
class MessagesCall(_Call):
    """A call of TGI's OpenAI route, whose answers are passed on with a few words put right."""

    path: str = "/v1/chat/completions"
    framing: Framing = Framing.SSE

    @classmethod
    def of(cls, body: Mapping[str, Any], chunks: Chunks, *, is_stream: bool, ask_usage: bool) -> MessagesCall:
        """The call for an OpenAI chat body; usage that only kvfleet asked for is taken out of the stream again."""
        chunks.include_usage = wants_usage(body)
        theirs = messages_body(body, model=chunks.model, is_stream=is_stream)
        if is_stream and ask_usage:
            theirs["stream_options"] = {**theirs.get("stream_options", {}), "include_usage": True}
        return cls(operation=Operation.CHAT, body=theirs, chunks=chunks)

    def whole(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """The chat completion."""
        out = self._named(answer)
        for choice in out["choices"]:
            _mend(choice, choice["message"])
        tally = self.chunks.tally
        tally.usage, tally.is_complete = Usage.from_openai(out.get("usage")), True
        tally.finish_reason = out["choices"][0]["finish_reason"]
        return out

    def event(self, data: Any) -> bytes:
        """One chunk."""
        out, tally = self._named(data), self.chunks.tally
        for choice in out["choices"]:
            _mend(choice, choice["delta"])
            tally.finish_reason = choice.get("finish_reason") or tally.finish_reason
        tally.usage = Usage.from_openai(out.get("usage")) or tally.usage
        if not out["choices"] and not self.chunks.include_usage:
            return b""
        tally.events += 1
        return b"data: " + orjson.dumps(out) + b"\n\n"

    def done(self) -> bytes:
        """TGI said that the stream is over."""
        self.chunks.tally.is_complete = True
        return b"data: [DONE]\n\n"

    def end(self) -> bytes:
        """Older versions send no ``[DONE]``: there the finish reason and a whole body are enough."""
        if self.is_whole and self.chunks.tally.finish_reason:
            return self.done()
        return super().end()

    def _named(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """With an id, which TGI leaves empty."""
        out = {**answer, "id": answer.get("id") or self.chunks.id}
        self.chunks.tally.response_id, self.chunks.tally.model = out["id"], str(out.get("model", ""))
        return out


def _mend(choice: dict[str, Any], said: dict[str, Any]) -> None:
    """TGI's finish reasons by OpenAI's names, and tool calls as a list with arguments as text (older versions)."""
    reason = choice.get("finish_reason")
    calls = said.get("tool_calls")
    if isinstance(calls, Mapping):
        calls = said["tool_calls"] = [dict(calls)]
    for call in calls or ():
        if isinstance(call["function"].get("arguments"), Mapping):
            call["function"]["arguments"] = arguments_text(call["function"]["arguments"])
    if reason:
        choice["finish_reason"] = _FINISH.get(reason, reason)
