"""Relay an OpenAI event stream as bytes, learn from it in passing, and never let a dead one end cleanly.

The relay reads an event only where something to learn stands in it (a usage, a finish reason, an error). Most events
hold a few letters of text and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from kvfleet.adapters.call import Tally, Usage
from kvfleet.adapters.incoming import Incoming
from kvfleet.adapters.plain import PlainEvents
from kvfleet.adapters.relaying import RelayedEvents, cut_off
from kvfleet.adapters.splitters import data_of
from kvfleet.errors import BackendError, Fault

__all__ = ["DONE", "EventRelay"]

DONE = b"data: [DONE]\n\n"
_LARGE_BYTES = 64 * 1024
"""A larger event is parsed at once: that takes 1 ms for a megabyte, and to see that this is not needed 3 ms."""
_FIELDS = (b"data:", b":", b"event:", b"id:", b"retry:")

ErrorMaker = Callable[[bytes], BackendError]
UsageReader = Callable[[Mapping[str, Any]], Usage | None]


def usage_of(chunk: Mapping[str, Any]) -> Usage | None:
    """The usage in an OpenAI answer or chunk."""
    found = chunk.get("usage")
    return Usage.from_openai(found) if isinstance(found, Mapping) else None


class EventRelay(RelayedEvents):
    """Iterates over pieces of whole events, the final ``[DONE]`` included.

    Args:
        incoming, tally: See `RelayedEvents`.
        choices: How many choices were asked for (``n``); each has a finish reason of its own.
        hide_usage: True to take out the event that holds nothing but the usage.
        error_of: Makes the error of an error event's data.
        read_usage: Finds the usage in a chunk.
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
        super().__init__(incoming, tally)
        self._choices = choices
        self._hide_usage = hide_usage
        self._error_of = error_of
        self._read_usage = read_usage
        self._plain = PlainEvents()
        self._finished: set[int] = set()

    def push(self, sink: Callable[[bytes], bool]) -> None:
        """Offer plain events to `sink` as they arrive, while somebody waits for the next one.

        Only those that differ from the one before in their text alone; what ends the stream, breaks it, or tells
        something comes to whoever iterates.
        """
        held, fits, tally = self._splitter.held, self._plain.fits, self.tally

        def take(data: bytes) -> bool:
            if held or not fits(data) or not sink(data):
                return False
            tally.events += 1
            return True

        self._incoming.push(take)

    def _at_end(self) -> bytes:
        """The body ended without ``[DONE]``: that is an end only if everything was said."""
        cut = self._splitter.rest.strip()
        if not self.tally.events and not _may_begin(cut):
            raise BackendError(Fault.PROTOCOL, "the backend sent something that is no event stream")
        if cut or len(self._finished) < self._choices:
            raise cut_off()
        self._end()
        return DONE

    def _passed(self, piece: bytes) -> bytes:
        """What of a piece goes on; everything to be learned from it is learned."""
        tally = self.tally
        if self._plain.fits(piece):
            tally.events += 1
            return piece
        if len(piece) > _LARGE_BYTES and piece.startswith(b"data: {") and piece.find(b"\n") == len(piece) - 2:
            return self._read_data(piece, piece[6:-2])
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
        return self._one_by_one(piece)

    def _read_event(self, event: bytes) -> bytes:
        """Learn from one event; empty if it shall not be passed on."""
        data = data_of(event).strip()
        if not data:
            self._check_bare(event)
            return event
        return self._read_data(event, data)

    def _read_data(self, event: bytes, data: bytes) -> bytes:
        self.tally.events += 1
        if data == b"[DONE]":
            if not self._finished:  # a proxy whose own engine died says it too
                raise cut_off()
            self._end()
            return DONE  # whoever reads on looks for these very bytes, however this engine ends its lines
        chunk = _chunk(data)
        if chunk.get("error") or chunk.get("object") == "error" or event.lstrip().startswith(b"event: error"):
            raise self._error_of(data)
        return b"" if self._learn(chunk) else event

    def _check_bare(self, event: bytes) -> None:
        """An event without data: a comment, or only white space. Anything else is not of this format."""
        for line in event.split(b"\n"):
            line = line.strip()  # noqa: PLW2901 - the line, without its end
            if line.startswith(b"error:"):  # older llama.cpp
                raise self._error_of(line[6:])
            if not _may_begin(line):
                raise BackendError(Fault.PROTOCOL, "the backend sent something that is no event stream")

    def _learn(self, chunk: Mapping[str, Any]) -> bool:
        tally = self.tally
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
        return self._hide_usage and not choices and (usage is not None or bool(chunk.get("usage")))


def _may_begin(line: bytes) -> bool:
    """True if a line, which may be cut off, can be one of this format."""
    return not line or any(field.startswith(line[: len(field)]) for field in _FIELDS)


def _all_null(piece: bytes, key: bytes) -> bool:
    """True if no value of the key is anything but ``null``."""
    count = piece.count(key)
    return not count or piece.count(key + b":null") == count


def _chunk(data: bytes) -> dict[str, Any]:
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BackendError(Fault.PROTOCOL, "the backend sent an event that is not JSON") from error
    if not isinstance(chunk, dict):
        raise BackendError(Fault.PROTOCOL, "the backend sent an event that is no JSON object")
    return chunk
