"""Personal data taken out of a request before it leaves, and put back into the answer.

Each value gets a placeholder of its own, ``[EMAIL_1]``, the same wherever the value stands, so an answer can speak
of it. Numbering follows the text, so a conversation that grows keeps its placeholders, and an engine its prefix cache.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import attrs
import orjson

from kvfleet.adapters.call import Reply
from kvfleet.adapters.splitters import data_of
from kvfleet.policy.embedded import rewritten
from kvfleet.policy.pii import PIIDetector
from kvfleet.policy.texts import is_text, may_have_files, strings_of

__all__ = ["Redaction", "RestoredEvents"]

_TEXTS = ("content", "reasoning_content", "reasoning", "refusal")
_PLACEHOLDER_TAIL = re.compile(r"\[[A-Z_]*[0-9]*\Z")


@attrs.define
class Redaction:
    """What was taken out of one request. Its repr shows types and counts.

    Attributes:
        body: The request without personal data; other parts are shared with the original, which is not changed.
        types: The types taken out, sorted.
    """

    body: Mapping[str, Any] = attrs.field(repr=False)
    types: tuple[str, ...]
    _values: Mapping[str, str] = attrs.field(repr=False, alias="values")
    _pattern: re.Pattern[str] = attrs.field(init=False, repr=False)

    @_pattern.default
    def _compile(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._values)))

    @classmethod
    def of(cls, body: Mapping[str, Any], detector: PIIDetector) -> Redaction | None:
        """Take personal data out of every text of an OpenAI body; None if there is none.

        Texts are all strings but names of things (`model`, `role`, `type`), keys, and embedded files that are no text.
        """
        raw = orjson.dumps(body)
        whole = raw.decode()
        if may_have_files(raw):
            whole = "\n".join([whole, *strings_of(body)])
        taken = _Taken(detector, whole)
        redacted = {name: value if name == "model" else taken.redact(value, name) for name, value in body.items()}
        if not taken.placeholders:
            return None
        values = {placeholder: value for value, placeholder in taken.placeholders.items()}
        return cls(redacted, tuple(sorted(taken.counts)), values)

    @property
    def count(self) -> int:
        """How many different values were taken out."""
        return len(self._values)

    def restore_text(self, text: str, *, is_json: bool = False) -> str:
        """A text with the values back; in JSON written as JSON writes them."""
        if "[" not in text:
            return text
        return self._pattern.sub(lambda found: self._value(found[0], is_json=is_json), text)

    def restore(self, reply: Reply) -> Reply:
        """An answer with the values back, whole or as a stream."""
        if reply.events is not None:
            return attrs.evolve(reply, events=RestoredEvents(reply.events, self))
        return attrs.evolve(reply, body=self._restore_body(reply.body))

    def _restore_body(self, body: bytes) -> bytes:
        if b"[" not in body:
            return body
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            return body  # no adapter gives such a body; what it holds are placeholders, which give nothing away
        return orjson.dumps(self._restore_in(answer))

    def _restore_in(self, value: Any, key: str = "") -> Any:
        if isinstance(value, str):
            return self.restore_text(value, is_json=key == "arguments")
        if isinstance(value, dict):
            return {name: self._restore_in(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return value if value and isinstance(value[0], float) else [self._restore_in(item, key) for item in value]
        return value

    def _value(self, placeholder: str, *, is_json: bool) -> str:
        value = self._values[placeholder]
        return orjson.dumps(value).decode()[1:-1] if is_json else value


@attrs.define
class _Taken:
    """Placeholders given so far, by value."""

    detector: PIIDetector
    whole: str
    placeholders: dict[str, str] = attrs.field(factory=dict)
    counts: dict[str, int] = attrs.field(factory=dict)

    def redact(self, value: Any, key: str = "") -> Any:
        """A part of the body without personal data."""
        if isinstance(value, str):
            return rewritten(key, value, self._redact_text) if is_text(key, value) else value
        if isinstance(value, Mapping):
            return {name: self.redact(item, name) for name, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [self.redact(item, key) for item in value]
        return value

    def _redact_text(self, text: str) -> str:
        parts, at = [], 0
        for match in self.detector.detect(text).matches:
            parts += [text[at : match["start"]], self._placeholder(match["type"], match["value"])]
            at = match["end"]
        return "".join([*parts, text[at:]]) if parts else text

    def _placeholder(self, kind: str, value: str) -> str:
        """The value's own; one that stands in the request already would come back as something it is not."""
        given = self.placeholders.get(value)
        while given is None:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            name = f"[{re.sub('[^A-Z]', '_', kind.upper())}_{self.counts[kind]}]"
            given = None if name in self.whole else name
        self.placeholders[value] = given
        return given


class RestoredEvents(AsyncIterator[bytes]):
    """A stream with the values back, also where a placeholder is cut in two by the pieces.

    What may be a placeholder's beginning is held back until the next piece decides, at most to the end of its choice.
    It is an iterator and not a generator, so that the stream may be closed while another task waits for a piece.
    """

    def __init__(self, events: AsyncIterator[bytes], redaction: Redaction) -> None:
        self._events = events
        self._redaction = redaction
        self._held: dict[tuple[int, str, int], str] = {}
        self._last: dict[str, Any] = {}

    async def __anext__(self) -> bytes:
        piece = await anext(self._events)
        if b"[" not in piece and not self._held:
            return piece
        return b"".join([self._event(event) for event in re.split(rb"(?<=\n\n)|(?<=\n\r\n)", piece) if event])

    def _event(self, event: bytes) -> bytes:
        """One event, with its texts restored; what carries no chunk is left as it is."""
        data = data_of(event)
        if data.strip() == b"[DONE]":
            return self._rest() + event
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            return event
        choices = chunk.get("choices") if isinstance(chunk, dict) else None
        if not isinstance(choices, list):
            return event
        self._last = chunk
        for choice in choices:
            if isinstance(choice, dict):
                self._choice(choice)
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def _choice(self, choice: dict[str, Any]) -> None:
        index = choice.get("index") or 0
        is_last = choice.get("finish_reason") is not None
        if isinstance(choice.get("text"), str) or (is_last and (index, "text", 0) in self._held):
            choice["text"] = self._piece((index, "text", 0), choice.get("text") or "", is_last=is_last)
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return
        for name in _TEXTS:
            if isinstance(delta.get(name), str) or (is_last and (index, name, 0) in self._held):
                delta[name] = self._piece((index, name, 0), delta.get(name) or "", is_last=is_last)
        self._calls(index, delta, is_last=is_last)

    def _calls(self, index: int, delta: dict[str, Any], *, is_last: bool) -> None:
        """The arguments of tool calls, each with what was held back of it."""
        for call in delta.get("tool_calls") or ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                key = (index, "arguments", call.get("index") or 0)
                function["arguments"] = self._piece(key, function["arguments"], is_last=is_last)
        if is_last:
            held = [key for key in self._held if key[:2] == (index, "arguments")]
            rest = [{"index": key[2], "function": {"arguments": self._held.pop(key)}} for key in held]
            if rest:
                delta["tool_calls"] = [*(delta.get("tool_calls") or ()), *rest]

    def _piece(self, key: tuple[int, str, int], text: str, *, is_last: bool) -> str:
        """What of a text may go on, restored; the rest is held back."""
        whole = self._held.pop(key, "") + text
        is_json = key[1] == "arguments"
        tail = None if is_last else _PLACEHOLDER_TAIL.search(whole, max(len(whole) - 40, 0))
        if tail is None:
            return self._redaction.restore_text(whole, is_json=is_json)
        self._held[key] = tail[0]
        return self._redaction.restore_text(whole[: tail.start()], is_json=is_json)

    def _rest(self) -> bytes:
        """What is still held back of choices that never said they were finished, as one more event."""
        if not self._held:
            return b""
        choices: list[dict[str, Any]] = [
            {"index": index, "finish_reason": None, **_as_choice(name, which, text)}
            for (index, name, which), text in self._held.items()
        ]
        self._held.clear()
        return b"data: " + orjson.dumps({**self._last, "choices": choices}) + b"\n\n"


def _as_choice(name: str, which: int, text: str) -> dict[str, Any]:
    if name == "text":
        return {"text": text}
    if name == "arguments":
        return {"delta": {"tool_calls": [{"index": which, "function": {"arguments": text}}]}}
    return {"delta": {name: text}}
