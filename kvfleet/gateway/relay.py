"""From a backend's reply to the client: bytes as they come, and an honest end."""

from __future__ import annotations

import abc
import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import attrs

from kvfleet.adapters.call import LARGE_BYTES, Reply
from kvfleet.errors import BackendError, RouteError
from kvfleet.gateway.answer_id import AnswerId
from kvfleet.gateway.errors import error_event, shutting_down
from kvfleet.gateway.exchange import Exchange, Pairs
from kvfleet.gateway.replicas import ReplicaNames

__all__ = ["SSE", "Passing", "Relay", "cut_short"]

_log = logging.getLogger(__name__)

SSE: Pairs = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would otherwise collect a stream before passing it on.
    (b"x-accel-buffering", b"no"),
]
"""Headers of a stream of server-sent events."""

_DONE = b"data: [DONE]\n\n"


@attrs.define
class Passing(abc.ABC):
    """Passes one stream on, in whichever API's words.

    It ends in exactly one way: whole, with an error in those words, or cut off because the client left. Backpressure is
    the server's: sending waits while the client does not read, and meanwhile nothing is read from the backend.
    """

    exchange: Exchange
    names: ReplicaNames

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
        exchange, pieces, renamed = self.exchange, self._pieces(reply), self._renamed()
        piece = await anext(pieces, None)
        await exchange.start(200, [*SSE, *headers])
        if callable(offer := getattr(pieces, "push", None)):
            offer(exchange.push if renamed is _as_it_is else lambda piece: exchange.push(renamed(piece)))
        try:
            while piece is not None:
                if len(piece) > LARGE_BYTES:  # it was just read; others may have their turn before it is sent
                    await asyncio.sleep(0)
                piece = renamed(piece)
                if piece.endswith(_DONE):
                    break
                await exchange.piece(piece)
                piece = await anext(pieces, None)
            return await self._finish(piece, pieces)
        except asyncio.CancelledError:
            if not exchange.has_left:
                await self._end(self._failure(shutting_down()))
            raise
        except (BackendError, RouteError) as error:
            broken: BackendError | RouteError = error
        except Exception as error:  # noqa: BLE001 - the plugin border: the client must learn that this is not the end
            _log.error("stream failed request_id=%s error=%s", exchange.request_id, type(error).__name__)
            broken = RouteError("the answer broke off: internal error")
        await self._end(self._failure(broken))
        return False

    @abc.abstractmethod
    def _pieces(self, reply: Reply) -> AsyncIterator[bytes]:
        """What goes to the client, in pieces of whole events; only a chat's may have a ``push`` and a ``[DONE]``."""

    @abc.abstractmethod
    async def _finish(self, last: bytes | None, pieces: AsyncIterator[bytes]) -> bool:
        """End the answer after its last piece, which is a ``[DONE]``, or None without one; True if it was whole.

        Raises:
            RouteError: if that is no end.
        """

    @abc.abstractmethod
    def _failure(self, error: BackendError | RouteError) -> bytes:
        """The events that end a broken answer."""

    def _renamed(self) -> Callable[[bytes], bytes]:
        """What is done to each piece."""
        return _as_it_is

    async def _end(self, piece: bytes = b"") -> None:
        # The client may go now: that must not count as a departure.
        self.exchange.unwatch()
        await self.exchange.end(piece)


@attrs.define
class Relay(Passing):
    """Passes a chat's stream on: whole is what ends with the backend's ``[DONE]``.

    Attributes:
        answer_id: Replaces the answer's `id`; it keeps its own if None.
    """

    answer_id: AnswerId | None = None

    def _pieces(self, reply: Reply) -> AsyncIterator[bytes]:
        assert reply.events is not None  # noqa: S101 - the caller looked
        return reply.events

    def _renamed(self) -> Callable[[bytes], bytes]:
        return _as_it_is if self.answer_id is None else self.answer_id.in_events

    async def _finish(self, last: bytes | None, pieces: AsyncIterator[bytes]) -> bool:
        if last is None:
            raise cut_short()
        await self._end(last)
        return await _read_out(pieces)

    def _failure(self, error: BackendError | RouteError) -> bytes:
        return error_event(error, self.names, self.exchange.request_id)


def cut_short() -> RouteError:
    """The error for an answer that ends too soon."""
    return RouteError("the answer ended before it was whole", code="stream_interrupted")


async def _read_out(events: AsyncIterator[bytes]) -> bool:
    """Let the backend's side come to its own end, which closes the route's books. The client has everything."""
    try:
        async for _ in events:
            pass
    except (BackendError, RouteError):
        return False
    return True


def _as_it_is(piece: bytes) -> bytes:
    return piece
