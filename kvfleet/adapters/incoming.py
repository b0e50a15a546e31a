"""An answer on its way: pieces of bytes as they arrive, and one kind of error whatever goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, cast

import httpx
import orjson

from kvfleet.adapters import faults
from kvfleet.adapters.call import Limits
from kvfleet.errors import BackendError, Fault

__all__ = ["Incoming", "parsed", "send_timed"]

MAX_BODY_BYTES = 64 * 1024 * 1024


class Incoming:
    """An accepted answer, its body still on the way.

    Iterate it for the pieces as they arrive, or `read` it whole. Everything that can go wrong is a `BackendError`.

    Attributes:
        status: 200..299.
        headers: The backend's headers; keys are lower-case.
        is_repeat: True if a stale connection had to be replaced and the request was sent a second time.
        has_begun: True once a byte of the body has arrived.
        is_complete: True once the body has ended and its framing proved that nothing is missing.
    """

    __slots__ = ("_is_closed", "_next", "_response", "_stream", "has_begun", "headers", "status")

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        # a look-up in httpx's own costs as much as making this
        self.headers: Mapping[str, str] = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers.raw
        }
        self.has_begun = False
        self._response = response
        self._stream = cast("Any", response.stream)
        self._next: Callable[[], Awaitable[bytes]] = self._stream.__aiter__().__anext__
        self._is_closed = False

    @property
    def is_repeat(self) -> bool:
        """See the class."""
        return bool(self._response.extensions.get("is_repeat"))

    @property
    def is_complete(self) -> bool:
        """See the class."""
        return bool(getattr(self._stream, "is_complete", False))

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            piece = await self._next()
        except StopAsyncIteration:
            raise
        except (httpx.HTTPError, httpx.StreamError, TimeoutError) as error:
            if self._is_closed:
                raise BackendError(Fault.CANCELLED, "the call was ended", received=self.has_begun) from error
            await self.aclose()
            raise faults.from_exception(error, received=self.has_begun) from error
        self.has_begun = True
        return piece

    async def read(self, limit_bytes: int = MAX_BODY_BYTES) -> bytes:
        """The whole body.

        Raises:
            BackendError: if it breaks off, or is longer than the limit.
        """
        pieces: list[bytes] = []
        size = 0
        async for piece in self:
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

    def finish(self) -> None:
        """Take no more, though the body may not have ended: the connection is kept if it does within a moment."""
        finish = getattr(self._stream, "finish", None)
        if finish is not None:
            finish()

    async def aclose(self) -> None:
        """End the exchange at once; amid a body this closes the connection, which the engine notices. Safe twice."""
        self._is_closed = True
        await self._stream.aclose()


def parsed(body: bytes, status: int) -> Any:
    """A body as JSON.

    Raises:
        BackendError: if it is not.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BackendError(Fault.PROTOCOL, "the backend's answer is not JSON", status=status) from error


async def send_timed(transport: httpx.AsyncBaseTransport, request: httpx.Request, limits: Limits) -> httpx.Response:
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
    response.stream = _Timed(cast("httpx.AsyncByteStream", response.stream), by_s, limits.idle_s)
    return response


class _Timed(httpx.AsyncByteStream):
    """A body with the limits on silence that `PooledTransport` keeps by itself."""

    def __init__(self, stream: httpx.AsyncByteStream, first_by_s: float, idle_s: float) -> None:
        self.is_complete = False
        self._stream = stream
        self._next = stream.__aiter__().__anext__
        self._by_s: float | None = first_by_s
        self._idle_s = idle_s

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        by_s = self._by_s if self._by_s is not None else asyncio.get_running_loop().time() + self._idle_s
        try:
            async with asyncio.timeout_at(by_s):
                piece = await self._next()
        except StopAsyncIteration:
            self.is_complete = True
            raise
        self._by_s = None
        return piece

    async def aclose(self) -> None:
        await self._stream.aclose()
