"""From a backend's reply to the client: bytes as they come, and an honest end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import attrs

from kvfleet.adapters.call import Reply
from kvfleet.errors import BackendError, RouteError
from kvfleet.gateway.answer_id import AnswerId
from kvfleet.gateway.errors import error_event, shutting_down
from kvfleet.gateway.exchange import Exchange, Pairs
from kvfleet.gateway.replicas import ReplicaNames

__all__ = ["SSE", "Relay"]

_log = logging.getLogger(__name__)

SSE: Pairs = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would otherwise collect a stream before passing it on.
    (b"x-accel-buffering", b"no"),
]
"""Headers of a stream of server-sent events."""

_DONE = b"data: [DONE]\n\n"


@attrs.frozen
class Relay:
    """Passes one stream on.

    It ends in exactly one way: with the backend's ``[DONE]``, with an error event, or cut off because the client left.
    Backpressure is the server's: sending waits while the client does not read, and meanwhile nothing is read from the
    backend.

    Attributes:
        answer_id: Replaces the answer's `id`; it keeps its own if None.
    """

    exchange: Exchange
    names: ReplicaNames
    answer_id: AnswerId | None = None

    async def pass_on(self, reply: Reply, headers: Pairs) -> None:
        """Send the stream, event by event.

        Raises:
            BackendError, RouteError: if it breaks before its first byte.
        """
        is_whole = False
        try:
            is_whole = await self._pass_on(reply, headers)
        finally:
            if not is_whole:
                await reply.close()

    async def _pass_on(self, reply: Reply, headers: Pairs) -> bool:
        """True if it ended as it should, and was read to its end."""
        exchange, events = self.exchange, reply.events
        assert events is not None  # noqa: S101 - the caller looked
        renamed = _as_it_is if self.answer_id is None else self.answer_id.in_events
        piece = await anext(events, None)
        await exchange.start(200, [*SSE, *headers])
        if callable(offer := getattr(events, "push", None)):
            offer(lambda piece: exchange.push(renamed(piece)))
        try:
            while piece is not None:
                piece = renamed(piece)
                if piece.endswith(_DONE):
                    await self._end(piece)
                    return await self._read_out(events)
                await exchange.piece(piece)
                piece = await anext(events, None)
        except asyncio.CancelledError:
            if not exchange.has_left:
                await self._end(error_event(shutting_down(), self.names, exchange.request_id))
            raise
        except (BackendError, RouteError) as error:
            broken: BackendError | RouteError = error
        except Exception as error:  # noqa: BLE001 - the plugin border: the client must learn that this is not the end
            _log.error("stream failed request_id=%s error=%s", exchange.request_id, type(error).__name__)
            broken = RouteError("the answer broke off: internal error")
        else:
            broken = RouteError("the answer ended before it was whole", code="stream_interrupted")
        await self._end(error_event(broken, self.names, exchange.request_id))
        return False

    async def _end(self, piece: bytes) -> None:
        # The client may go now: that must not count as a departure.
        self.exchange.unwatch()
        await self.exchange.end(piece)

    async def _read_out(self, events: AsyncIterator[bytes]) -> bool:
        """Let the backend's side come to its own end, which closes the route's books. The client has everything."""
        try:
            async for _ in events:
                pass
        except (BackendError, RouteError):
            return False
        return True


def _as_it_is(piece: bytes) -> bytes:
    return piece
