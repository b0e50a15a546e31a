"""Serves a surface: a request in its words becomes a chat, is routed as one, and is answered in its words."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import attrs
import orjson

from kvfleet.adapters.call import Reply
from kvfleet.adapters.splitters import data_of, split_events
from kvfleet.errors import BackendError, Fault, RouteError
from kvfleet.gateway.errors import event_object
from kvfleet.gateway.exchange import Pairs
from kvfleet.gateway.relay import Passing, cut_short
from kvfleet.gateway.surfaces.surface import Asked, Surface, Writer

__all__ = ["SurfaceAnswer"]

_DONE = b"[DONE]"


@attrs.define(kw_only=True)
class SurfaceAnswer(Passing):
    """Gives one answer in a surface's words, whoever made it.

    What an engine said in those words goes on as it came.

    Attributes:
        identifier: The answer's, if it is the gateway that writes it.
    """

    surface: Surface
    asked: Asked
    identifier: str
    _writer: Writer = attrs.field(init=False)

    @_writer.default
    def _make_writer(self) -> Writer:
        return self.surface.writer(self.asked, self.identifier)

    async def whole(self, reply: Reply, headers: Pairs) -> None:
        """Send a whole answer.

        Raises:
            BackendError: if it cannot be told in these words.
        """
        body = reply.body
        if reply.surface != self.surface.name:
            body = orjson.dumps(self.surface.render(_parsed(body), self.asked, self.identifier, reply.tally))
        self.exchange.unwatch()
        await self.exchange.whole(200, body, [(b"content-type", b"application/json"), *headers])

    def _pieces(self, reply: Reply) -> AsyncIterator[bytes]:
        return _as_they_are(reply) if reply.surface == self.surface.name else _written(reply, self._writer)

    async def _finish(self, last: bytes | None, pieces: AsyncIterator[bytes]) -> bool:
        del last, pieces  # these words have no mark of the end that is not an event of its own
        await self._end()
        return True

    def _failure(self, error: BackendError | RouteError) -> bytes:
        told = event_object(error, self.names, self.exchange.request_id)
        status = error.status if isinstance(error, RouteError) else 502
        return self._writer.fail(told["error"], status or 502)


async def _as_they_are(reply: Reply) -> AsyncIterator[bytes]:
    assert reply.events is not None  # noqa: S101 - the caller looked
    async for piece in reply.events:
        yield piece


async def _written(reply: Reply, writer: Writer) -> AsyncIterator[bytes]:
    """A chat's stream in the surface's words; its end is what ends the iteration.

    Raises:
        BackendError: for a stream that ended before its answer did.
    """
    assert reply.events is not None  # noqa: S101 - the caller looked
    has_ended = False
    async for piece in reply.events:
        out = []
        for chunk in _chunks(piece):
            has_ended = has_ended or chunk is None
            if chunk is not None:
                out.append(_fed(writer, chunk))
        if written := b"".join(out):
            yield written
    if not has_ended:
        raise cut_short()
    yield writer.finish(reply.tally.usage)


def _fed(writer: Writer, chunk: dict[str, Any]) -> bytes:
    try:
        return writer.feed(chunk)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        message = "the backend sent a chunk that has not the shape it should"
        raise BackendError(Fault.PROTOCOL, message, received=True) from error


def _chunks(piece: bytes) -> list[dict[str, Any] | None]:
    """The chunks in a piece of whole events; None for the end."""
    found: list[dict[str, Any] | None] = []
    for one in split_events(piece):
        data = data_of(one).strip()
        if data:
            found.append(None if data == _DONE else _parsed(data))
    return found


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BackendError(Fault.PROTOCOL, "the backend's answer is not JSON", received=True) from error
    if not isinstance(found, dict):
        raise BackendError(Fault.PROTOCOL, "the backend's answer is no JSON object", received=True)
    return found
