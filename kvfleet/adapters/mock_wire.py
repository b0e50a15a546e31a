"""The OpenAI shapes of a mock engine's answers: reading a body into the work to do, writing answers and chunks."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import orjson

from kvfleet.adapters.call import Operation, Usage
from kvfleet.adapters.mock_content import embed, instance_of, overlap, pack_floats, pieces, render_chat, text_of
from kvfleet.errors import BackendError, Fault
from kvfleet.sim.tokens import count_tokens

__all__ = ["Part", "Said", "Work", "Writer", "error_body", "plan"]

_DONE = b"data: [DONE]\n\n"
_COMPLETION_TOKENS = 16  # OpenAI's own default for text completions
_MAX_CHOICES = 128


def error_body(message: str, code: str, *, param: str | None = None) -> dict[str, Any]:
    """What stands under ``error`` in an OpenAI error."""
    return {"message": message, "type": "invalid_request_error", "param": param, "code": code}


def _bad(message: str, param: str) -> BackendError:
    body = error_body(message, "invalid_request", param=param)
    return BackendError(Fault.BAD_REQUEST, message, status=400, body=body)


class Part(enum.StrEnum):
    """What an event of a stream is."""

    OPENING = "opening"
    TOKEN = "token"  # noqa: S105 - a word of an answer
    FINISH = "finish"
    USAGE = "usage"
    DONE = "done"


@attrs.frozen(kw_only=True)
class Said:
    """One choice of an answer: its text in tokens, why it ended, and the tool it calls (then the text is arguments)."""

    pieces: tuple[str, ...]
    finish_reason: str = "stop"
    tool: str = ""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


@attrs.frozen(kw_only=True)
class Work:
    """What one call asks of the engine.

    Attributes:
        prompts: The texts to read.
        choices: What to say, for chat and text completions: as many for each prompt.
        data: The finished payload, for embeddings and reranking.
        include_usage: True if the client asked for usage at the end of a stream.
        salt: What keeps the prompts' cache apart from others' (vLLM's ``cache_salt``).
        probability: Of each token, if the client asked for probabilities and the engine tells them.
    """

    prompts: tuple[bytes, ...]
    choices: tuple[Said, ...] = ()
    data: tuple[Mapping[str, Any], ...] = ()
    include_usage: bool = False
    salt: str = ""
    probability: float | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(count_tokens, self.prompts))

    @property
    def output_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(len(choice.pieces) for choice in self.choices)

    @property
    def steps(self) -> int:
        """Decode steps: the choices grow side by side."""
        return max((len(choice.pieces) for choice in self.choices), default=0)


def plan(
    operation: Operation, body: Mapping[str, Any], text: str, dimensions: int, probability: float | None = None
) -> Work:
    """Read a body.

    Args:
        operation: Which endpoint.
        body: The OpenAI body; fields it does not know are ignored.
        text: What to say if the body asks for nothing special.
        dimensions: Length of embeddings, unless the body says.
        probability: Of each token, told if the body asks for `logprobs`; None for an engine that never tells.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`) for a body no engine would take.
    """
    work = _PLANS[operation](body, text, dimensions)
    if probability is None or body.get("logprobs") in (None, False):
        return work
    return attrs.evolve(work, probability=probability)


def _plan_chat(body: Mapping[str, Any], text: str, _: int) -> Work:
    messages = body.get("messages")
    if not isinstance(messages, Sequence) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise _bad("messages must be a list of messages, at least one", "messages")
    limit = _limit(body, None)
    tool = _forced_tool(body)
    if tool:
        arguments = orjson.dumps(instance_of(tool.get("parameters") or {"type": "object"})).decode()
        said = _said(arguments, (), limit, "tool_calls", str(tool.get("name", "")))
    else:
        said = _said(_formatted(body, text), _stops(body), limit)
    return Work(
        prompts=(render_chat(messages, body.get("tools")),),
        choices=(said,) * _count(body),
        include_usage=_wants_usage(body),
        salt=_salt(body),
    )


def _plan_completion(body: Mapping[str, Any], text: str, _: int) -> Work:
    prompts = _texts(body.get("prompt"), "prompt")
    stops, limit = _stops(body), _limit(body, _COMPLETION_TOKENS)
    choices = [
        _said((prompt if body.get("echo") else "") + text, stops, limit)
        for prompt in prompts
        for _ in range(_count(body))
    ]
    return Work(prompts=_encoded(prompts), choices=tuple(choices), include_usage=_wants_usage(body), salt=_salt(body))


def _plan_embedding(body: Mapping[str, Any], _: str, dimensions: int) -> Work:
    texts = _texts(body.get("input"), "input")
    asked = body.get("dimensions")
    size = dimensions if asked is None else asked
    if not isinstance(size, int) or not 1 <= size <= 65_536:
        raise _bad("dimensions must be a whole number of at least 1", "dimensions")
    pack: Any = pack_floats if body.get("encoding_format") == "base64" else list
    data = [{"object": "embedding", "index": i, "embedding": pack(embed(t, size))} for i, t in enumerate(texts)]
    return Work(prompts=_encoded(texts), data=tuple(data))


def _plan_rerank(body: Mapping[str, Any], _: str, __: int) -> Work:
    query, documents = body.get("query"), body.get("documents")
    if not isinstance(query, str):
        raise _bad("query must be a text", "query")
    if not isinstance(documents, Sequence) or isinstance(documents, str) or not documents:
        raise _bad("documents must be a list, at least one", "documents")
    texts = [document if isinstance(document, str) else text_of([document]) for document in documents]
    scores = [overlap(query, text) for text in texts]
    order = sorted(range(len(texts)), key=scores.__getitem__, reverse=True)
    top = body.get("top_n")
    order = order[: top if isinstance(top, int) and top > 0 else None]
    has_documents = body.get("return_documents", True)
    data = [
        {"index": i, **({"document": {"text": texts[i]}} if has_documents else {}), "relevance_score": scores[i]}
        for i in order
    ]
    return Work(prompts=_encoded([f"{query}\n{text}" for text in texts]), data=tuple(data))


_PLANS = {
    Operation.CHAT: _plan_chat,
    Operation.COMPLETION: _plan_completion,
    Operation.EMBEDDING: _plan_embedding,
    Operation.RERANK: _plan_rerank,
}


def _encoded(texts: Sequence[str]) -> tuple[bytes, ...]:
    """Prompts as bytes; an engine reads at least its own token that begins a text."""
    return tuple(text.encode("utf-8", "surrogatepass") or b"\0" for text in texts)


def _said(text: str, stops: Sequence[str], limit: int | None, reason: str = "stop", tool: str = "") -> Said:
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    words = pieces(text[: min(ends, default=len(text))])
    if limit is not None and len(words) > limit:
        words, reason = words[:limit], "length"
    return Said(pieces=tuple(words), finish_reason=reason, tool=tool)


def _formatted(body: Mapping[str, Any], text: str) -> str:
    """The text, or JSON that says the same if the body asks for JSON."""
    wanted = body.get("response_format")
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if kind == "json_object":
        return orjson.dumps({"message": text}).decode()
    if kind == "json_schema" and isinstance(wanted, Mapping):
        schema = (wanted.get("json_schema") or {}).get("schema") or {"type": "object"}
        return orjson.dumps(instance_of(schema, text=text)).decode()
    return text


def _forced_tool(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The function to call, if `tool_choice` leaves no choice."""
    wanted = body.get("tool_choice")
    functions = [tool.get("function") or {} for tool in body.get("tools") or () if isinstance(tool, Mapping)]
    if wanted == "required" and functions:
        return functions[0]
    if not isinstance(wanted, Mapping):
        return None
    name = (wanted.get("function") or {}).get("name")
    for function in functions:
        if function.get("name") == name:
            return function
    raise _bad("tool_choice names a function that is not in tools", "tool_choice")


def _limit(body: Mapping[str, Any], default: int | None) -> int | None:
    for key in ("max_completion_tokens", "max_tokens"):
        value = body.get(key)
        if value is not None:
            if not isinstance(value, int) or value < 1:
                raise _bad(f"{key} must be a whole number of at least 1", key)
            return value
    return default


def _count(body: Mapping[str, Any]) -> int:
    count = body.get("n")
    if count is None:
        return 1
    if not isinstance(count, int) or not 1 <= count <= _MAX_CHOICES:
        raise _bad(f"n must be a whole number from 1 to {_MAX_CHOICES}", "n")
    return count


def _stops(body: Mapping[str, Any]) -> list[str]:
    stop = body.get("stop") or ()
    return [text for text in ([stop] if isinstance(stop, str) else stop) if isinstance(text, str) and text]


def _wants_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    return bool(isinstance(options, Mapping) and options.get("include_usage"))


def _salt(body: Mapping[str, Any]) -> str:
    salt = body.get("cache_salt")
    if salt is None:
        return ""
    if not isinstance(salt, str) or not salt:
        raise _bad("cache_salt must be a text that is not empty", "cache_salt")
    return salt


def _texts(value: Any, param: str) -> list[str]:
    """Texts of a prompt or input: one text, many, or lists of token numbers."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Sequence) and value:
        if all(isinstance(item, int) for item in value):
            return [" ".join(map(str, value))]
        if all(isinstance(item, str | Sequence) for item in value):
            return [item if isinstance(item, str) else " ".join(map(str, item)) for item in value]
    raise _bad(f"{param} must be a text or a list of texts, at least one", param)


@attrs.frozen(kw_only=True)
class Writer:
    """Writes one answer: `whole` as a JSON object, or `chunks` as the events of a stream."""

    operation: Operation
    id: str
    created: int
    model: str
    work: Work

    def whole(self, usage: Usage) -> bytes:
        """The answer as one object."""
        return orjson.dumps(getattr(self, f"_{self.operation.value}")(usage))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chat(self, usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": self._message(said, i),
                "logprobs": self._logprobs(said.pieces),
                "finish_reason": said.finish_reason,
            }
            for i, said in enumerate(self.work.choices)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage.to_openai()}

    def _logprobs(self, pieces: Sequence[str]) -> dict[str, Any] | None:
        """What is told of some tokens' probabilities; None if nobody asked."""
        if self.work.probability is None or not pieces:
            return None
        value = math.log(self.work.probability)
        if self.operation is Operation.COMPLETION:
            return {"tokens": list(pieces), "token_logprobs": [value] * len(pieces)}
        return {"content": [{"token": piece, "logprob": value, "bytes": None, "top_logprobs": []} for piece in pieces]}

    def _message(self, said: Said, index: int) -> dict[str, Any]:
        if not said.tool:
            return {"role": "assistant", "content": said.text}
        return {"role": "assistant", "content": None, "tool_calls": [self._tool_call(said, index, said.text)]}

    def _tool_call(self, said: Said, index: int, arguments: str) -> dict[str, Any]:
        function = {"name": said.tool, "arguments": arguments}
        return {"id": f"call_{self.id.rpartition('-')[2]}_{index}", "type": "function", "function": function}

    def _completion(self, usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "text": said.text,
                "logprobs": self._logprobs(said.pieces),
                "finish_reason": said.finish_reason,
            }
            for i, said in enumerate(self.work.choices)
        ]
        return {**self._head("text_completion"), "choices": choices, "usage": usage.to_openai()}

    def _embedding(self, usage: Usage) -> dict[str, Any]:
        tokens = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.total_tokens}
        return {"object": "list", "data": self.work.data, "model": self.model, "usage": tokens}

    def _rerank(self, usage: Usage) -> dict[str, Any]:
        tokens = {"total_tokens": usage.total_tokens}
        return {"id": self.id, "model": self.model, "usage": tokens, "results": self.work.data}

    def chunks(self, usage: Usage) -> Iterator[tuple[Part, bytes]]:
        """The events of the stream, and what each is; the tokens of one decode step come together."""
        said = self.work.choices
        if self.operation is Operation.CHAT:
            for index, choice in enumerate(said):
                yield Part.OPENING, self._event(index, self._opening(choice, index))
        for step in range(self.work.steps):
            events = [
                self._event(i, self._piece(c, c.pieces[step]), logprobs=self._logprobs(c.pieces[step : step + 1]))
                for i, c in enumerate(said)
                if step < len(c.pieces)
            ]
            yield Part.TOKEN, b"".join(events)
        for index, choice in enumerate(said):
            empty = {} if self.operation is Operation.CHAT else {"text": ""}
            yield Part.FINISH, self._event(index, empty, choice.finish_reason)
        if self.work.include_usage:
            yield Part.USAGE, self._data({"choices": [], "usage": usage.to_openai()})
        yield Part.DONE, _DONE

    def _opening(self, said: Said, index: int) -> dict[str, Any]:
        if not said.tool:
            return {"role": "assistant", "content": ""}
        calls = [{"index": 0, **self._tool_call(said, index, "")}]
        return {"role": "assistant", "content": None, "tool_calls": calls}

    def _piece(self, said: Said, piece: str) -> dict[str, Any]:
        if self.operation is Operation.COMPLETION:
            return {"text": piece}
        if said.tool:
            return {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}
        return {"content": piece}

    def _event(
        self,
        index: int,
        said: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: Mapping[str, Any] | None = None,
    ) -> bytes:
        inner = {"delta": said} if self.operation is Operation.CHAT else said
        choice = {"index": index, **inner, "logprobs": logprobs, "finish_reason": finish_reason}
        # OpenAI: with include_usage every chunk has the field, null in all but the last.
        return self._data({"choices": [choice], **({"usage": None} if self.work.include_usage else {})})

    def _data(self, rest: dict[str, Any]) -> bytes:
        kind = "chat.completion.chunk" if self.operation is Operation.CHAT else "text_completion"
        return b"data: " + orjson.dumps({**self._head(kind), **rest}) + b"\n\n"
