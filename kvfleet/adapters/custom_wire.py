"""Bodies and answers of an HTTP API that only its operator knows, described by a template and a few paths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import orjson

from kvfleet.adapters.call import Operation, Usage
from kvfleet.adapters.refusals import refuse
from kvfleet.adapters.translation import Framing, Translation
from kvfleet.errors import BackendError, Fault

__all__ = ["ABSENT", "CustomCall", "Paths", "fill", "look_up", "nothing_lost", "placeholders", "values_of"]

_LENGTH = frozenset({"length", "max_tokens", "max_length", "MAX_TOKENS"})
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


class _Absent:
    """What a placeholder stands for if the request has no such field."""

    __slots__ = ()


ABSENT = _Absent()


def placeholders(template: Any) -> frozenset[str]:
    """The names in a template.

    >>> sorted(placeholders({"text": "{prompt}", "opts": [{"n": "{max_tokens}"}]}))
    ['max_tokens', 'prompt']
    """
    if isinstance(template, str):
        return frozenset(_PLACEHOLDER.findall(template))
    inner: Sequence[Any] = ()
    if isinstance(template, Mapping):
        inner = tuple(template.values())
    elif isinstance(template, Sequence):
        inner = template
    return frozenset().union(*(placeholders(item) for item in inner))


def fill(template: Any, values: Mapping[str, Any]) -> Any:
    """A template with its placeholders replaced by values.

    A text that is one placeholder becomes the value itself, of whatever type; the field it stands in is left out if
    there is no value. Amid other text, only texts and numbers may be put in. Values are never read as templates, and
    never become part of JSON's own syntax.

    >>> fill({"q": "{prompt}", "n": "{max_tokens}", "s": "say: {prompt}"}, {"prompt": "{model}"})
    {'q': '{model}', 's': 'say: {model}'}
    """
    if isinstance(template, Mapping):
        filled = {key: fill(value, values) for key, value in template.items()}
        return {key: value for key, value in filled.items() if value is not ABSENT}
    if isinstance(template, list | tuple):
        return [value for item in template if (value := fill(item, values)) is not ABSENT]
    if not isinstance(template, str):
        return template
    alone = _PLACEHOLDER.fullmatch(template)
    if alone:
        return values.get(alone[1], ABSENT)
    return _PLACEHOLDER.sub(lambda found: _amid_text(found[1], values), template)


def _amid_text(name: str, values: Mapping[str, Any]) -> str:
    value = values.get(name, "")
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise refuse(f"the request template has {{{name}}} amid text, and the request's {name} is not a text", name)


def look_up(data: Any, path: str) -> Any:
    """What stands at a dotted path, as in ``data.0.text``; `ABSENT` if nothing does.

    >>> look_up({"data": [{"text": "Hi"}]}, "data.0.text")
    'Hi'
    """
    for step in path.split("."):
        if isinstance(data, Mapping):
            data = data.get(step, ABSENT)
        elif isinstance(data, list) and step.removeprefix("-").isdecimal() and -len(data) <= int(step) < len(data):
            data = data[int(step)]
        else:
            return ABSENT
    return data


@attrs.frozen(kw_only=True)
class Paths:
    """Where things stand in an answer, and in one event of a stream.

    Attributes:
        content: The answer's text; empty if the answer has OpenAI's shape.
        stream_content: The text in one event of a stream; that of `content` if empty.
        finish: The finish reason; empty if it says none.
        prompt_tokens, completion_tokens: Token counts; empty if it says none.
    """

    content: str = ""
    stream_content: str = ""
    finish: str = ""
    prompt_tokens: str = ""
    completion_tokens: str = ""


@attrs.define(kw_only=True)
class CustomCall(Translation):
    """A call of an API described by `Paths`.

    Attributes:
        paths: Where things stand.
        end_mark: The event that ends a stream; if empty, the proper end of the body does.
    """

    paths: Paths = Paths()
    end_mark: str = ""
    _usage: Usage | None = attrs.field(default=None, init=False)
    _reason: str = attrs.field(default="", init=False)
    _has_text: bool = attrs.field(default=False, init=False)

    def whole(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """The completion: the answer itself if it has OpenAI's shape, else made from the text in it."""
        if not self.paths.content:
            return self._openai(answer)
        text = _text(answer, self.paths.content)
        self._note(answer)
        inner: dict[str, Any] = {"text": text}
        if self.operation is Operation.CHAT:
            inner = {"message": {"role": "assistant", "content": text}}
        return self.chunks.whole({**inner, "finish_reason": self._reason or "stop"}, self._usage)

    def _openai(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        if "choices" not in answer:
            raise BackendError(
                Fault.PROTOCOL, f"the backend's answer has no choices but {sorted(answer)}; set custom_content_key"
            )
        tally = self.chunks.tally
        tally.response_id, tally.model = str(answer.get("id", "")), str(answer.get("model", ""))
        tally.finish_reason = answer["choices"][0].get("finish_reason")
        tally.usage, tally.is_complete = Usage.from_openai(answer.get("usage")), True
        return answer

    def read_event(self, raw: bytes) -> bytes:
        """One event of the engine's stream, or the mark that ends it."""
        if self.end_mark and raw.strip() == self.end_mark.encode():
            return self.done()
        return super().read_event(raw)

    def event(self, data: Any) -> bytes:
        """One event: a piece of the text. Events without text (a beginning, say, or counts) give nothing."""
        if isinstance(data, str):
            return self._piece(data)
        if not self.paths.content and not self.paths.stream_content:
            return self._openai_event(data)
        self._note(data)
        piece = look_up(data, self.paths.stream_content or self.paths.content)
        return b"" if piece in (ABSENT, None) else self._piece(piece)

    def _piece(self, text: Any) -> bytes:
        if not isinstance(text, str):
            raise TypeError(f"a text of type {type(text).__name__}")
        self._has_text = True
        return self.chunks.said(text)

    def _openai_event(self, data: Mapping[str, Any]) -> bytes:
        tally = self.chunks.tally
        for choice in data["choices"]:
            tally.finish_reason = choice.get("finish_reason") or tally.finish_reason
        tally.usage = Usage.from_openai(data.get("usage")) or tally.usage
        tally.events += 1
        self._has_text = True
        return b"data: " + orjson.dumps(data) + b"\n\n"

    def done(self) -> bytes:
        """The engine said that the stream is over."""
        if not self._has_text:
            where = self.paths.stream_content or self.paths.content
            raise BackendError(Fault.PROTOCOL, f"no event of the backend's stream has a text at {where!r}")
        if not self.paths.content and not self.paths.stream_content and self.framing is not Framing.TEXT:
            self.chunks.tally.is_complete = True
            return b"data: [DONE]\n\n"
        return self.chunks.finish(self._reason or "stop", self._usage)

    def end(self) -> bytes:
        """Without a mark, a whole body ends the stream; with one, it should have come."""
        if self.is_whole and not self.end_mark:
            return self.done()
        return super().end()

    def _note(self, data: Mapping[str, Any]) -> None:
        """Finish reason and token counts, where an answer or event has them."""
        reason = look_up(data, self.paths.finish) if self.paths.finish else None
        if isinstance(reason, str) and reason:
            self._reason = "length" if reason in _LENGTH else "stop"
        counts = [
            look_up(data, path) if path else None for path in (self.paths.prompt_tokens, self.paths.completion_tokens)
        ]
        if any(isinstance(count, int) for count in counts):
            self._usage = Usage.told(*[count if isinstance(count, int) else 0 for count in counts])
        elif isinstance(data.get("usage"), Mapping):
            self._usage = Usage.from_openai(data["usage"])


def _text(answer: Mapping[str, Any], path: str) -> str:
    found = look_up(answer, path)
    if found is ABSENT:
        raise BackendError(Fault.PROTOCOL, f"the backend's answer has nothing at {path!r}; it has {sorted(answer)}")
    if not isinstance(found, str):
        raise BackendError(Fault.PROTOCOL, f"what the backend's answer has at {path!r} is not a text")
    return found


def values_of(body: Mapping[str, Any], *, model: str, is_stream: bool) -> dict[str, Any]:
    """What placeholders stand for: the request's fields, but for the prompt."""
    values = {key: value for key, value in body.items() if value is not None}
    values |= {"model": model, "stream": is_stream}
    if not is_stream:
        values.pop("stream_options", None)  # OpenAI-like servers refuse it without a stream
    if body.get("max_completion_tokens") is not None:
        values["max_tokens"] = body["max_completion_tokens"]
    return values


def nothing_lost(body: Mapping[str, Any], used: frozenset[str]) -> None:
    """Refuse a request that asks for more than the template carries.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`).
    """
    wanted = body.get("response_format")
    asks = {
        "tools": bool(body.get("tools")) and body.get("tool_choice") != "none",
        "response_format": isinstance(wanted, Mapping) and wanted.get("type") not in (None, "text"),
        "n": body.get("n") not in (None, 1),
        "logprobs": bool(body.get("logprobs")),
    }
    for key, is_asked in asks.items():
        if is_asked and key not in used:
            raise refuse(f"the request template of this model has no place for {key}", key)
