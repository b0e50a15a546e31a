"""An answer on its way: pieces of bytes as they arrive, and one kind of error whatever goes wrong."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import httpx
import orjson

from kvfleet.adapters import faults
from kvfleet.adapters.call import Limits
from kvfleet.adapters.splitters import MAX_EVENT_BYTES
from kvfleet.errors import BackendError, Fault

__all__ = ["ForeignAnswer", "Incoming", "Source", "parsed", "send_timed"]

MAX_BODY_BYTES = 64 * 1024 * 1024


class Source(Protocol):
    """Where an answer comes from."""

    @property
    def status(self) -> int:
        """The answer's status."""

    @property
    def headers(self) -> Sequence[tuple[bytes, bytes]]:
        """Its headers as they came."""

    @property
    def is_repeat(self) -> bool:
        """True if the request was sent a second time."""

    @property
    def is_complete(self) -> bool:
        """True once the body has ended and its framing proved that nothing is missing."""

    def take(self) -> bytes | None:
        """What has arrived of the body since the last call; None if that is nothing yet, ``b""`` at its end."""

    def arrival(self) -> Awaitable[None]:
        """Done when there is something new to take."""

    def push(self, sink: Callable[[bytes], bool]) -> None:
        """See `Incoming.push`."""

    def finish(self) -> None:
        """Take no more; the connection is kept if the answer ends within a moment."""

    async def aclose(self) -> None:
        """Take no more, and close what has not ended."""


class Incoming:
    """An accepted answer, its body still on the way.

    Iterate it for the pieces as they arrive, or `read` it whole. Everything that can go wrong is a `BackendError`.

    Attributes:
        status: 200..299.
        headers: The backend's headers; keys are lower-case.
        has_begun: True once a byte of the body has arrived.
        event_bytes: Longest event or line that its stream may hold.
    """

    __slots__ = ("_is_closed", "_source", "event_bytes", "has_begun", "headers", "status")

    def __init__(self, source: Source, event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.status = source.status
        self.event_bytes = event_bytes
        self.headers: Mapping[str, str] = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in source.headers
        }
        self.has_begun = False
        self._source = source
        self._is_closed = False

    @property
    def is_repeat(self) -> bool:
        """True if a stale connection had to be replaced and the request was sent a second time."""
        return self._source.is_repeat

    @property
    def is_complete(self) -> bool:
        """True once the body has ended and its framing proved that nothing is missing."""
        return self._source.is_complete

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        piece = await self.piece()
        if not piece:
            raise StopAsyncIteration
        return piece

    async def piece(self) -> bytes:
        """What has arrived since the last call; ``b""`` at the body's end.

        Raises:
            BackendError: if it breaks off, or falls silent.
        """
        source = self._source
        try:
            while (piece := source.take()) is None:
                await source.arrival()
        except (httpx.HTTPError, httpx.StreamError, TimeoutError) as error:
            if self._is_closed:
                raise BackendError(Fault.CANCELLED, "the call was ended", received=self.has_begun) from error
            await self.aclose()
            raise faults.from_exception(error, received=self.has_begun) from error
        except BaseException:  # a cancelled call: an engine must not go on working for nobody
            await source.aclose()
            raise
        if piece:
            self.has_begun = True
        return piece

    async def read(self, limit_bytes: int = MAX_BODY_BYTES) -> bytes:
        """The whole body.

        Raises:
            BackendError: if it breaks off, or is longer than the limit.
        """
        pieces: list[bytes] = []
        size = 0
        while piece := await self.piece():
            pieces.append(piece)
            size += len(piece)
            if size > limit_bytes:
                await self.aclose()
                raise BackendError(Fault.PROTOCOL, f"the backend's answer is longer than {limit_bytes} bytes")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read_json(self) -> Any:
        """The whole body, parsed.

        Raises:
            BackendError: if it breaks off or is not JSON.
        """
        return parsed(await self.read(), self.status)

    def push(self, sink: Callable[[bytes], bool]) -> None:
        """Offer pieces to `sink` as they arrive, while somebody waits for the next one; what it takes, he does not get.

        A source that cannot do that goes on as before.
        """
        self._source.push(sink)

    def finish(self) -> None:
        """Take no more, though the body may not have ended: the connection is kept if it does within a moment."""
        self._source.finish()

    async def aclose(self) -> None:
        """End the exchange at once; amid a body this closes the connection, which the engine notices. Safe twice."""
        self._is_closed = True
        await self._source.aclose()


def parsed(body: bytes, status: int) -> Any:
    """A body as JSON.

    Raises:
        BackendError: if it is not.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BackendError(Fault.PROTOCOL, "the backend's answer is not JSON", status=status) from error


async def send_timed(transport: httpx.AsyncBaseTransport, request: httpx.Request, limits: Limits) -> ForeignAnswer:
    """Send over a transport that does not tell the first byte from the others, and keep the limits from outside.

    Raises:
        TimeoutError: if the answer's head is not there in time.
    """
    longest_s = max(limits.first_byte_s, limits.idle_s)
    request.extensions["timeout"] = {
        "connect": limits.connect_s,
        "pool": limits.connect_s,
        "read": longest_s,
        "write": longest_s,
    }
    by_s = asyncio.get_running_loop().time() + limits.first_byte_s
    async with asyncio.timeout_at(by_s):
        response = await transport.handle_async_request(request)
    return ForeignAnswer(response, by_s, limits.idle_s)


class ForeignAnswer:
    """An answer of any httpx transport, with the limits on silence that `PooledTransport` keeps by itself.

    Args:
        response: Its stream is read here, and nowhere else.
        first_by_s: The loop's time by which the body must have begun.
        idle_s: Longest silence after that, in seconds.
    """

    is_repeat = False

    def __init__(self, response: httpx.Response, first_by_s: float = math.inf, idle_s: float = math.inf) -> None:
        self.status = response.status_code
        self.headers = response.headers.raw
        self.is_complete = False
        self._stream = cast("httpx.AsyncByteStream", response.stream)
        self._next = self._stream.__aiter__().__anext__
        self._by_s: float | None = first_by_s
        self._idle_s = idle_s
        self._piece: bytes | None = None

    def take(self) -> bytes | None:
        """See `Source.take`."""
        if self.is_complete:
            return b""
        piece, self._piece = self._piece, None
        return piece

    async def arrival(self) -> None:
        """See `Source.arrival`."""
        by_s = self._by_s if self._by_s is not None else asyncio.get_running_loop().time() + self._idle_s
        try:
            async with asyncio.timeout_at(None if by_s == math.inf else by_s):
                self._piece = await self._next() or None
        except StopAsyncIteration:
            self.is_complete = True
        self._by_s = None

    def push(self, sink: Callable[[bytes], bool]) -> None:
        """See `Source.push`; what such a transport has received is known only to whoever waits for it."""

    def finish(self) -> None:
        """See `Source.finish`; such a transport has no word for it, and its owner closes the answer."""

    async def aclose(self) -> None:
        """See `Source.aclose`."""
        await self._stream.aclose()
