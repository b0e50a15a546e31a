"""Gives an answer the request's identifier for its `id`, by splicing bytes: whole answers, and a stream's events."""

from __future__ import annotations

from typing import Any

import attrs
import orjson

from kvfleet.adapters.splitters import data_of, split_events

__all__ = ["AnswerId"]

_LARGE_BYTES = 64 * 1024
"""A larger piece is taken apart from line to line, for to search it takes 0.5 ms for a megabyte, each time."""


@attrs.define
class AnswerId:
    r"""One answer's `id`, which its engine made up, becomes the request's.

    Engines write the same `id` into every event of a stream, so it is looked for once, and from then on replaced where
    those very bytes stand. They cannot stand in a text: its quotation marks are escaped there.

    Args:
        own: The request's identifier: letters, digits and what needs no escape in JSON.

    >>> AnswerId("mine").in_answer(b'{"id":"cmpl-1","choices":[]}')
    b'{"id":"mine","choices":[]}'
    >>> AnswerId("mine").in_events(b'data: {"id":"cmpl-1","choices":[]}\n\n')
    b'data: {"id":"mine","choices":[]}\n\n'
    """

    own: str
    _old: bytes = attrs.field(init=False, default=b"")
    _start: bytes = attrs.field(init=False, default=b"\0")  # no event begins so
    _behind: int = attrs.field(init=False, default=0)
    _new: bytes = attrs.field(init=False)
    _begin: bytes = attrs.field(init=False)

    @_new.default
    def _written(self) -> bytes:
        return b'"id":"%b"' % self.own.encode()

    @_begin.default
    def _begun(self) -> bytes:
        return b"data: {" + self._new

    def in_answer(self, body: bytes, known: str = "") -> bytes:
        """A whole answer with it.

        Args:
            body: A JSON object. One without choices (vectors, a ranking) that tells no `id` keeps none.
            known: Its `id`, if that was read before.
        """
        if known and (found := self._spliced(body, known)):
            return found
        return self._read(body) if b'"choices"' in body else body

    def in_events(self, piece: bytes) -> bytes:
        """A piece of whole server-sent events with it."""
        if piece.startswith(self._start) and piece.find(b"\n") == len(piece) - 2:  # one event, as most are; 0.6 µs
            return self._begin + piece[self._behind :]
        old = self._old
        if old and len(piece) < _LARGE_BYTES and piece.count(old) == piece.count(b"\n\n"):
            return piece.replace(old, self._new)
        return b"".join(map(self._in_event, split_events(piece)))

    def _in_event(self, event: bytes) -> bytes:
        if event.startswith(self._start):
            return self._begin + event[self._behind :]
        data = data_of(event).strip()
        at = event.find(b"{", event.find(b"data:"))
        if not data.startswith(b"{") or not event.startswith(data, at):  # no object, or one over several lines
            return event
        return event[:at] + self._read(data) + event[at + len(data) :]

    def _read(self, body: bytes) -> bytes:
        """The same for one object whose `id` is not known yet."""
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:  # the adapter let it pass, and so may we
            return body
        if not isinstance(answer, dict) or not ("id" in answer or "choices" in answer):
            return body
        found = self._spliced(body, answer.get("id"))
        return found or orjson.dumps({"id": self.own} | answer | {"id": self.own})

    def _spliced(self, body: bytes, old: Any) -> bytes:
        """The body with the old `id` replaced; empty if its place is not certain."""
        if not isinstance(old, str):
            return b""
        name = orjson.dumps(old)
        for token in (b'"id":' + name, b'"id": ' + name):
            if body.count(token) == 1:
                self._old, self._start = token, b"data: {" + token
                self._behind = len(self._start)
                return body.replace(token, self._new)
        return b""
