"""Triton's generate extension and OpenAI's shapes, each in terms of the other.

``POST /v2/models/<model>/generate`` and ``/generate_stream`` take a text and give a text; what else a model takes and
gives is the model's own affair. A `Dialect` says how the common ones name it. Source: ``src/http_server.cc`` and
``docs/protocol/extension_generate.md`` of triton-inference-server/server (26.09), ``src/model.py`` and
``src/utils/request.py`` of its vllm_backend, and the examples of its tensorrtllm_backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import orjson

from kvfleet.adapters.call import Operation, Usage, count_of
from kvfleet.adapters.refusals import refuse, text_only
from kvfleet.adapters.translation import Chunks, Framing, Translation, wants_usage
from kvfleet.errors import BackendError, Fault

__all__ = ["DIALECTS", "ENGINE", "Dialect", "GenerateCall", "generate_body"]

ENGINE = "Triton's generate endpoint"

_SAID = frozenset(
    {
        *("model", "messages", "prompt", "stream", "stream_options", "max_tokens", "max_completion_tokens", "stop"),
        *("n", "best_of", "tools", "tool_choice", "response_format", "logprobs", "echo", "parameters"),
    }
)


@attrs.frozen(kw_only=True)
class Dialect:
    """How the models of one Triton backend name things.

    Attributes:
        names: OpenAI's name of a parameter, and the backend's; a name that is not here is sent as it is.
        prefix: Put before a parameter's name.
        stream_field: The input that asks for a stream; empty if there is none.
        fixed: Inputs that are always sent.
        packed_into: The input that takes all parameters as one JSON text; empty if each is an input of its own.
        says_finish: True if it always gives a finish reason, so that a stream without one is cut off.
        finish_field, input_tokens_field, output_tokens_field: Outputs with the finish reason and the token counts.
    """

    names: Mapping[str, str] = attrs.field(factory=dict)
    prefix: str = ""
    stream_field: str = ""
    fixed: Mapping[str, Any] = attrs.field(factory=dict)
    packed_into: str = ""
    says_finish: bool = False
    finish_field: str = "finish_reason"
    input_tokens_field: str = "num_input_tokens"
    output_tokens_field: str = "num_output_tokens"

    def named(self, key: str) -> str:
        """The backend's name of a parameter."""
        return self.prefix + self.names.get(key, key)


DIALECTS: Mapping[str, Dialect] = {
    "plain": Dialect(),
    # the ensemble and BLS models of the TensorRT-LLM backend
    "tensorrt_llm": Dialect(names={"stop": "stop_words"}, stream_field="stream"),
    # its newer LLM API model
    "tensorrt_llm_api": Dialect(
        prefix="sampling_param_",
        stream_field="streaming",
        says_finish=True,
        fixed={"sampling_param_exclude_input_from_output": True, "return_finish_reason": True},
    ),
    "vllm": Dialect(
        stream_field="stream",
        fixed={
            "exclude_input_in_output": True,
            "return_finish_reason": True,
            "return_num_input_tokens": True,
            "return_num_output_tokens": True,
        },
        packed_into="sampling_parameters",
        says_finish=True,
    ),
}
"""The dialects of Triton's usual text backends; `plain` uses OpenAI's names."""


def generate_body(
    body: Mapping[str, Any], prompt: str, *, text_input: str, is_stream: bool, dialect: Dialect
) -> dict[str, Any]:
    """The body of a generate call: the text, and the parameters as inputs of the model.

    Triton takes an input the model has, and hands the rest on as request parameters; those must be plain values.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`) for what the endpoint cannot do.
    """
    text_only(body, ENGINE)
    wanted = body.get("response_format")
    if isinstance(wanted, Mapping) and wanted.get("type") not in (None, "text"):
        raise refuse(f"{ENGINE} has no response_format", "response_format")
    asked: dict[str, Any] = {key: value for key, value in body.items() if key not in _SAID and value is not None}
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    if limit is not None:
        asked["max_tokens"] = limit
    stop = body.get("stop")
    if stop:
        asked["stop"] = [stop] if isinstance(stop, str) else list(stop)
    named = {dialect.named(key): value for key, value in asked.items()}
    out = {text_input: prompt, **dialect.fixed}
    if dialect.stream_field:
        out[dialect.stream_field] = is_stream
    out |= {dialect.packed_into: orjson.dumps(named).decode()} if dialect.packed_into and named else named
    return {**out, **({"parameters": body["parameters"]} if isinstance(body.get("parameters"), Mapping) else {})}


@attrs.define(kw_only=True)
class GenerateCall(Translation):
    """A call of the generate extension.

    The stream has no last word: it is over when the body has ended properly, or when the model gave a finish reason.
    """

    framing: Framing = Framing.SSE
    text_output: str = "text_output"
    dialect: Dialect = DIALECTS["plain"]
    _has_text: bool = attrs.field(default=False, init=False)
    _input_tokens: int = attrs.field(default=0, init=False)
    _output_tokens: int = attrs.field(default=0, init=False)
    _reason: str = attrs.field(default="", init=False)

    @classmethod
    def of(
        cls,
        operation: Operation,
        path: str,
        body: Mapping[str, Any],
        prompt: str,
        chunks: Chunks,
        *,
        is_stream: bool,
        text_input: str,
        text_output: str,
        dialect: Dialect,
    ) -> GenerateCall:
        """The call for an OpenAI body whose prompt is a text already."""
        chunks.include_usage = wants_usage(body)
        theirs = generate_body(body, prompt, text_input=text_input, is_stream=is_stream, dialect=dialect)
        return cls(operation=operation, path=path, body=theirs, chunks=chunks, text_output=text_output, dialect=dialect)

    def whole(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """The completion."""
        text = _joined(answer[self.text_output])
        self._count(answer)
        inner: dict[str, Any] = {"text": text}
        if self.operation is Operation.CHAT:
            inner = {"message": {"role": "assistant", "content": text}}
        choice = {**inner, "finish_reason": self._reason or "stop"}
        return self.chunks.whole(choice, self._usage(), **self._more(answer))

    def event(self, data: Any) -> bytes:
        """One response of the model: a piece of the text."""
        self._has_text = True
        self._count(data)
        return self.chunks.said(_joined(data.get(self.text_output, "")))

    def end(self) -> bytes:
        """Finish, if HTTP says that the body is whole or the model that it is done."""
        is_over = self._reason or (self.is_whole and not self.dialect.says_finish)
        if not (self._has_text and is_over):
            raise BackendError(Fault.DISCONNECTED, "the backend's stream ended before it was finished", received=True)
        return self.chunks.finish(self._reason or "stop", self._usage())

    def _count(self, data: Mapping[str, Any]) -> None:
        """Token counts and finish reason, where the model gives them; output tokens come piece by piece."""
        self._input_tokens = count_of(_first(data.get(self.dialect.input_tokens_field))) or self._input_tokens
        self._output_tokens += count_of(_first(data.get(self.dialect.output_tokens_field))) or 0
        reason = _first(data.get(self.dialect.finish_field))
        if isinstance(reason, str) and reason not in ("", "None"):  # the vLLM backend sends a printed None until then
            self._reason = "length" if reason == "length" else "stop"

    def _usage(self) -> Usage | None:
        if not self._input_tokens and not self._output_tokens:
            return None
        return Usage(self._input_tokens, self._output_tokens, self._input_tokens + self._output_tokens)

    def _more(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """The model's further outputs."""
        known = {self.text_output, self.dialect.finish_field, "id"}
        return {key: value for key, value in answer.items() if key not in known}


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _joined(value: Any) -> str:
    """A text output: a text, or a list with one."""
    found = _first(value)
    if not isinstance(found, str):
        raise TypeError(f"a text output of type {type(found).__name__}")
    return found
