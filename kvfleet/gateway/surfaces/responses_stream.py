"""A streamed chat as the events of OpenAI's Responses API.

Source of the native shapes: the types of the `openai` package, 3.57.0 (`ResponseStreamEvent`).
"""

from __future__ import annotations

from typing import Any

import attrs

from kvfleet.adapters.call import Usage
from kvfleet.gateway.surfaces.messages_answer import thought_in
from kvfleet.gateway.surfaces.responses_answer import (
    call_item,
    ended,
    logprobs_in,
    message_item,
    outline,
    text_part,
    thought_item,
)
from kvfleet.gateway.surfaces.surface import Body, Writer, event

__all__ = ["ResponsesWriter"]


@attrs.define
class _Item:
    """One item of the output that is under way.

    Attributes:
        kind: ``reasoning``, ``message`` or ``function_call``.
        index: Its place in the output.
        pieces: What it says so far.
        call: For a call of a tool: its first delta.
        part: ``output_text`` or ``refusal``, for a message.
    """

    kind: str
    id: str
    index: int
    call: Body = attrs.field(factory=dict)
    part: str = "output_text"
    pieces: list[str] = attrs.field(factory=list)
    logprobs: list[Any] = attrs.field(factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def content(self) -> dict[str, Any]:
        """Its content part, as far as it came."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        if self.part == "refusal":
            return {"type": "refusal", "refusal": self.text}
        return text_part(self.text, self.logprobs)

    def whole(self, status: str) -> dict[str, Any]:
        """The item, as far as it came."""
        if self.kind == "reasoning":
            return thought_item(self.id, self.text, status)
        if self.kind == "function_call":
            return call_item(self.id, self.call, self.text, status)
        return message_item(self.id, [self.content()] if self.pieces else [], status)


@attrs.define
class ResponsesWriter(Writer):
    """Renders a streamed chat as the events of a response."""

    body: Body
    identifier: str
    _response: dict[str, Any] = attrs.field(init=False, factory=dict)
    _sequence: int = attrs.field(init=False, default=0)
    _open: _Item | None = attrs.field(init=False, default=None)
    _calls: dict[int, _Item] = attrs.field(init=False, factory=dict)
    _done: list[tuple[int, dict[str, Any]]] = attrs.field(init=False, factory=list)
    _count: int = attrs.field(init=False, default=0)
    _reason: str | None = attrs.field(init=False, default=None)

    def feed(self, chunk: Body) -> bytes:
        """See `Writer.feed`."""
        out = self._begin(chunk)
        for choice in chunk.get("choices") or ():
            if choice.get("index"):
                continue
            delta = choice.get("delta") or {}
            if thought := thought_in(delta):
                out += self._said("reasoning", "reasoning_text", thought, [])
            if text := delta.get("content"):
                out += self._said("message", "output_text", text, logprobs_in(choice))
            if refusal := delta.get("refusal"):
                out += self._said("message", "refusal", refusal, [])
            for call in delta.get("tool_calls") or ():
                out += self._called(call)
            self._reason = choice.get("finish_reason") or self._reason
        return b"".join(out)

    def finish(self, usage: Usage | None) -> bytes:
        """See `Writer.finish`."""
        out = self._begin({})
        if self._count == 0:
            out += self._said("message", "output_text", "", [])
        response = ended(self._response, self._reason, usage)
        out += self._close_all(response["status"])
        response["output"] = [item for _, item in sorted(self._done, key=lambda one: one[0])]
        out.append(self._event(f"response.{response['status']}", {"response": response}))
        return b"".join(out)

    def fail(self, error: Body, status: int) -> bytes:
        """See `Writer.fail`: the API's own ``response.failed``, and after it an ``error`` that OpenAI's SDKs raise.

        They hand the first on as an event like any other, and a program that only looks for text would take the end
        behind it for the answer's.
        """
        out = self._begin({})
        self._response |= {
            "status": "failed",
            "error": {"code": "rate_limit_exceeded" if status == 429 else "server_error", "message": error["message"]},
            "output": [item for _, item in sorted(self._done, key=lambda one: one[0])],
        }
        out.append(self._event("response.failed", {"response": self._response}))
        told = {key: error.get(key) for key in ("code", "message", "param")}
        out.append(self._event("error", {**told, "error": error}))
        return b"".join(out)

    # Inner workings

    def _event(self, kind: str, data: Body) -> bytes:
        number, self._sequence = self._sequence, self._sequence + 1
        return event(kind, {"type": kind, "sequence_number": number, **data})

    def _begin(self, chunk: Body) -> list[bytes]:
        if self._response:
            return []
        created, model = int(chunk.get("created") or 0), str(chunk.get("model") or "")
        self._response = outline(self.body, self.identifier, created, model)
        return [
            self._event(kind, {"response": self._response}) for kind in ("response.created", "response.in_progress")
        ]

    def _add(self, kind: str, prefix: str, call: Body | None = None, part: str = "") -> tuple[_Item, list[bytes]]:
        item = _Item(kind, f"{prefix}_{self._count}_{self.identifier}", self._count, call or {}, part)
        self._count += 1
        added = {"output_index": item.index, "item": item.whole("in_progress")}
        return item, [self._event("response.output_item.added", added)]

    def _said(self, kind: str, part: str, text: str, logprobs: list[Any]) -> list[bytes]:
        out: list[bytes] = []
        item = self._open
        if item is None or (item.kind, item.part) != (kind, part):
            out += self._close("completed")
            item, added = self._add(kind, "rs" if kind == "reasoning" else "msg", part=part)
            self._open = item
            out += [*added, self._event("response.content_part.added", {**_at(item), "part": item.content()})]
        if text:
            item.pieces.append(text)
            item.logprobs += logprobs
            more = {"logprobs": logprobs} if part == "output_text" else {}
            out.append(self._event(f"response.{part}.delta", {**_at(item), "delta": text, **more}))
        return out

    def _called(self, call: Body) -> list[bytes]:
        index = call.get("index") or 0
        item, out = self._calls.get(index), []
        if item is None:
            out = self._close("completed")
            item, added = self._add("function_call", "fc", call)
            self._calls[index] = item
            out += added
        if arguments := (call.get("function") or {}).get("arguments"):
            item.pieces.append(arguments)
            where = {"item_id": item.id, "output_index": item.index}
            out.append(self._event("response.function_call_arguments.delta", {**where, "delta": arguments}))
        return out

    def _close(self, status: str) -> list[bytes]:
        """End the text or the thought that is open."""
        item, self._open = self._open, None
        if item is None:
            return []
        part = "reasoning_text" if item.kind == "reasoning" else item.part
        said = {"refusal": item.text} if part == "refusal" else {"text": item.text}
        more = {"logprobs": item.logprobs} if part == "output_text" else {}
        return [
            self._event(f"response.{part}.done", {**_at(item), **said, **more}),
            self._event("response.content_part.done", {**_at(item), "part": item.content()}),
            self._item_done(item, status),
        ]

    def _close_all(self, status: str) -> list[bytes]:
        out = self._close(status)
        for item in self._calls.values():
            where = {"item_id": item.id, "output_index": item.index}
            told = {**where, "name": item.whole("completed")["name"], "arguments": item.text}
            out.append(self._event("response.function_call_arguments.done", told))
            out.append(self._item_done(item, status))
        return out

    def _item_done(self, item: _Item, status: str) -> bytes:
        whole = item.whole(status)
        self._done.append((item.index, whole))
        return self._event("response.output_item.done", {"output_index": item.index, "item": whole})


def _at(item: _Item) -> dict[str, Any]:
    return {"item_id": item.id, "output_index": item.index, "content_index": 0}
