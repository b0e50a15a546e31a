"""Relay an OpenAI event stream as bytes, learn from it in passing, and never let a dead one end cleanly.

The relay reads an event only where something to learn stands in it (a usage, a finish reason, an error). Most events
hold a few letters of text and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import orjson

from kvfleet.adapters.call import Tally, Usage
from kvfleet.adapters.incoming import Incoming
from kvfleet.adapters.plain import PlainEvents
from kvfleet.adapters.splitters import EventSplitter, data_of
from kvfleet.errors import BackendError, Fault

__all__ = ["DONE", "EventRelay"]

DONE = b"data: [DONE]\n\n"
_FIELDS = (b"data:", b":", b"event:", b"id:", b"retry:")
_END = re.compile(rb"\n\r?\n")

ErrorMaker = Callable[[bytes], BackendError]
UsageReader = Callable[[Mapping[str, Any]], Usage | None]


def usage_of(chunk: Mapping[str, Any]) -> Usage | None:
    """The usage in an OpenAI answer or chunk."""
    found = chunk.get("usage")
    return Usage.from_openai(found) if isinstance(found, Mapping) else None


class EventRelay:
    """Iterates over pieces of whole events, the final ``[DONE]`` included.

    It is an iterator and not a generator, so that `aclose` may be called while another task waits for the next piece.

    Args:
        incoming: The answer.
        tally: Filled in as the answer passes.
        choices: How many choices were asked for (``n``); each has a finish reason of its own.
        hide_usage: True to take out the event that holds nothing but the usage.
        error_of: Makes the error of an error event's data.
        read_usage: Finds the usage in a chunk.

    Raises (while iterating):
        BackendError: if the stream breaks off, falls silent, holds an error or something that is no event, or ends
            without having finished. The error's `received` tells whether an event had been given out before.
    """

    def __init__(
        self,
        incoming: Incoming,
        tally: Tally,
        *,
        choices: int = 1,
        hide_usage: bool = False,
        error_of: ErrorMaker,
        read_usage: UsageReader = usage_of,
    ) -> None:
        self._incoming = incoming
        self._tally = tally
        self._choices = choices
        self._hide_usage = hide_usage
        self._error_of = error_of
        self._read_usage = read_usage
        self._take = incoming.piece
        self._splitter = EventSplitter(incoming.event_bytes)
        self._feed = self._splitter.feed
        self._plain = PlainEvents()
        self._finished: set[int] = set()
        self._has_given = False
        self._is_over = False
        self._failed: BackendError | None = None

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._is_over:
            raise StopAsyncIteration
        try:
            if self._failed is not None:
                raise self._failed
            while data := await self._take():
                piece = self._feed(data)
                if piece and (out := self._passed(piece)):
                    self._has_given = True
                    return out
            out = self._at_end()
        except BackendError as error:
            self._is_over = True
            error.received = self._has_given
            await self._incoming.aclose()
            raise
        self._has_given = True
        return out

    def push(self, sink: Callable[[bytes], bool]) -> None:
        """Offer plain events to `sink` as they arrive, while somebody waits for the next one.

        Only those that differ from the one before in their text alone; what ends the stream, breaks it, or tells
        something comes to whoever iterates.
        """

        def take(data: bytes) -> bool:
            if self._splitter.rest or not self._plain.fits(data) or not sink(data):
                return False
            self._tally.events += 1
            return True

        self._incoming.push(take)

    async def aclose(self) -> None:
        """End the stream at once; the engine then stops its work. Safe twice."""
        await self._incoming.aclose()

    def _at_end(self) -> bytes:
        """The body ended without ``[DONE]``: that is an end only if everything was said."""
        cut = self._splitter.rest.strip()
        if not self._tally.events and not _may_begin(cut):
            raise BackendError(Fault.PROTOCOL, "the backend sent something that is no event stream")
        if cut or len(self._finished) < self._choices:
            raise BackendError(Fault.DISCONNECTED, "the backend's stream ended before its answer did", received=True)
        self._end()
        return DONE

    def _end(self) -> None:
        self._is_over = True
        self._tally.is_complete = True

    def _passed(self, piece: bytes) -> bytes:
        """What of a piece goes on; everything to be learned from it is learned."""
        tally = self._tally
        if self._plain.fits(piece):
            tally.events += 1
            return piece
        count = piece.count(b"\n\n")
        if (
            tally.events
            and piece.startswith(b"data: {")
            and piece.endswith(b"}\n\n")
            and piece.count(b"}\n\ndata: {") == count - 1
            and piece.find(b'"error"') < 0
            and _all_null(piece, b'"finish_reason"')
            and _all_null(piece, b'"usage"')
        ):
            tally.events += count
            if count == 1:
                self._plain.learn(piece)
            return piece
        return self._read(piece)

    def _read(self, piece: bytes) -> bytes:
        """The same, event by event. What stands before an error is passed on before that is raised."""
        kept: list[bytes] = []
        try:
            for event in _events(piece):
                if not self._read_event(event):
                    kept.append(event)
                if self._is_over:
                    self._incoming.finish()  # the connection may be used again once the body's end is there
                    break
        except BackendError as error:
            if not kept:
                raise
            self._failed = error
        return b"".join(kept)

    def _read_event(self, event: bytes) -> bool:
        """Learn from one event; True if it shall not be passed on."""
        data = data_of(event).strip()
        if not data:
            return self._read_bare(event)
        self._tally.events += 1
        if data == b"[DONE]":
            self._end()
            return False
        chunk = _chunk(data)
        if chunk.get("error") or chunk.get("object") == "error" or event.lstrip().startswith(b"event: error"):
            raise self._error_of(data)
        return self._learn(chunk)

    def _read_bare(self, event: bytes) -> bool:
        """An event without data: a comment, or only white space. Anything else is not of this format."""
        for line in event.split(b"\n"):
            line = line.strip()  # noqa: PLW2901 - the line, without its end
            if line.startswith(b"error:"):  # older llama.cpp
                raise self._error_of(line[6:])
            if not _may_begin(line):
                raise BackendError(Fault.PROTOCOL, "the backend sent something that is no event stream")
        return False

    def _learn(self, chunk: Mapping[str, Any]) -> bool:
        tally = self._tally
        if not tally.response_id:
            tally.response_id = str(chunk.get("id") or "")
            tally.model = str(chunk.get("model") or "")
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, Mapping) and choice.get("finish_reason"):
                index = choice.get("index")
                self._finished.add(index if isinstance(index, int) else 0)
                if not index or tally.finish_reason is None:
                    tally.finish_reason = str(choice["finish_reason"])
        usage = self._read_usage(chunk)
        if usage is not None:
            tally.usage = usage
        return self._hide_usage and usage is not None and not choices


def _may_begin(line: bytes) -> bool:
    """True if a line, which may be cut off, can be one of this format."""
    return not line or any(field.startswith(line[: len(field)]) for field in _FIELDS)


def _all_null(piece: bytes, key: bytes) -> bool:
    """True if no value of the key is anything but ``null``."""
    count = piece.count(key)
    return not count or piece.count(key + b":null") == count


def _events(piece: bytes) -> list[bytes]:
    """Single events, each with its end; together they are the piece, byte by byte."""
    if b"\r" not in piece:
        return [event + b"\n\n" for event in piece.split(b"\n\n")[:-1]]
    ends = [match.end() for match in _END.finditer(piece)]
    return [piece[begin:end] for begin, end in zip([0, *ends], [*ends, len(piece)], strict=True) if begin < end]


def _chunk(data: bytes) -> dict[str, Any]:
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BackendError(Fault.PROTOCOL, "the backend sent an event that is not JSON") from error
    if not isinstance(chunk, dict):
        raise BackendError(Fault.PROTOCOL, "the backend sent an event that is no JSON object")
    return chunk
