"""The data path's transport: httpx's seam over a lean pool of HTTP/1.1 connections.

`httpx.AsyncClient` costs 85-135 µs before a byte moves, and httpx's own transport as much again; this one costs about a
tenth of that (``benchmarks/transport.py``). It speaks plain HTTP/1.1, follows no redirect and decodes nothing.
"""

from __future__ import annotations

import asyncio
import functools
import math
import ssl
import warnings
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from kvfleet.adapters.h1 import Connection

__all__ = ["Body", "Payload", "PooledTransport", "trusting"]

# A connection that the backend had closed before our request came shows it within a round trip. One that dies later
# died of something else (the request itself, perhaps): repeating that is the route's decision, not the transport's.
STALE_WITHIN_S = 1.0

_Origin = tuple[bytes, bytes, int | None]


@functools.cache
def trusting(*protocols: str) -> ssl.SSLContext:
    """A TLS context that trusts the usual authorities; kept for each choice of protocols, because it takes 40 ms."""
    context = httpx.create_ssl_context()
    context.set_alpn_protocols(list(protocols))
    return context


class Payload(httpx.AsyncByteStream):
    """A request body that is there as a whole."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.data


class Body(httpx.AsyncByteStream):
    """The body of an answer, piece by piece as it arrives.

    Attributes:
        is_complete: True once it has ended and its framing proved that nothing is missing. A body that ends where the
            connection does never is: nobody can tell that from a connection that was cut.
    """

    def __init__(self, connection: Connection) -> None:
        self.is_complete = False
        self._connection: Connection | None = connection

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        connection = self._connection
        if connection is None:
            raise StopAsyncIteration
        try:
            piece = await connection.next_piece()
        except BaseException:
            connection.abort()
            raise
        if connection.has_ended and self._connection is not None:
            self._end(connection)
        if not piece:
            raise StopAsyncIteration
        return piece

    def finish(self) -> None:
        """Take no more; the connection is kept if the answer ends within a moment."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()

    async def aclose(self) -> None:
        """Take no more; if the answer has not ended, its connection is closed at once. Safe twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            if connection.has_ended:
                connection.release()
            else:
                connection.abort()

    def __del__(self) -> None:
        connection = self._connection
        if connection is not None and connection.is_open:  # an engine must not go on working for nobody
            connection.abort_soon()
            message = "an answer was dropped amid its body; close it with aclose()"
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)

    def _end(self, connection: Connection) -> None:
        self.is_complete = connection.is_complete
        self._connection = None
        connection.release()


class PooledTransport(httpx.AsyncBaseTransport):
    """Sends requests over pooled HTTP/1.1 connections, the most recently used one first.

    There is no limit on connections: who may be in flight is decided elsewhere. An object of this class belongs to the
    event loop it was first used on (`kvfleet.adapters.connections.Connections` keeps one for each).

    ``request.extensions["timeout"]`` may hold ``connect``, ``first_byte`` (from sending to the first byte of the
    answer: of its body, if it has one) and ``read`` (longest silence after that), in seconds; ``first_byte`` is
    ``read`` if it is absent. ``response.extensions["is_repeat"]`` is True if a pooled connection turned out to be dead
    before a byte of the answer had come, and the request was sent again on a fresh one; that happens at most once.

    Args:
        idle_s: Seconds after which an unused connection is closed.
        ssl_context: For https; the usual trusted authorities if None.
    """

    def __init__(self, *, idle_s: float = 30.0, ssl_context: ssl.SSLContext | None = None) -> None:
        self._idle_s = idle_s
        self._ssl = ssl_context
        self._free: dict[_Origin, dict[Connection, None]] = {}
        self._busy: dict[Connection, _Origin] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; returns when the answer's head is there.

        Raises:
            httpx.ConnectError, httpx.ConnectTimeout: if there is no connection.
            httpx.ReadTimeout, httpx.ReadError, httpx.RemoteProtocolError: if there is no answer.
            httpx.LocalProtocolError: for a request that cannot be written.
        """
        url = request.url
        origin = (url.raw_scheme, url.raw_host, url.port)
        body = await _body_of(request)
        head = _head_of(request)
        limits: Mapping[str, Any] = request.extensions.get("timeout") or {}
        connection = self._reuse(origin)
        is_repeat = False
        while True:
            if connection is None:
                connection = await self._connect(origin, limits.get("connect"))
            try:
                await _exchange(connection, request.method, head, body, limits)
                break
            except BaseException as error:
                is_repeat = _is_stale(connection, error)
                connection.abort()
                if not is_repeat:
                    raise
                connection = None
        return httpx.Response(
            connection.status, headers=connection.headers, stream=Body(connection), extensions={"is_repeat": is_repeat}
        )

    async def aclose(self) -> None:
        """Close every connection, also amid an answer. Safe twice."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        free, self._free = self._free, {}
        for connections in free.values():
            for connection in connections:
                connection.abort()
        for connection in tuple(self._busy):
            connection.abort()

    @property
    def state(self) -> Mapping[str, int]:
        """How many connections are ``free`` and ``busy``."""
        return {"free": sum(map(len, self._free.values())), "busy": len(self._busy)}

    def _reuse(self, origin: _Origin) -> Connection | None:
        free = self._free.get(origin)
        while free:
            connection, _ = free.popitem()
            if connection.is_usable:
                self._busy[connection] = origin
                return connection
        return None

    async def _connect(self, origin: _Origin, timeout_s: float | None) -> Connection:
        scheme, host, port = origin
        if scheme not in (b"http", b"https"):
            raise httpx.UnsupportedProtocol("only http:// and https:// can be spoken")
        tls = (self._ssl or trusting("http/1.1")) if scheme == b"https" else None
        loop = asyncio.get_running_loop()
        name = host.decode("ascii")
        connection = Connection(loop, self._on_free, self._on_lost)
        try:
            async with asyncio.timeout(timeout_s):
                await loop.create_connection(lambda: connection, name, port or (443 if tls else 80), ssl=tls)
        except TimeoutError as error:
            raise httpx.ConnectTimeout("no connection in time") from error
        except (OSError, ValueError, OverflowError) as error:
            raise httpx.ConnectError("no connection") from error
        self._busy[connection] = origin
        return connection

    def _on_free(self, connection: Connection) -> None:
        origin = self._busy.pop(connection)
        self._free.setdefault(origin, {})[connection] = None
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(self._idle_s, self._sweep)

    def _on_lost(self, connection: Connection) -> None:
        if self._busy.pop(connection, None) is None:
            for connections in self._free.values():
                connections.pop(connection, None)

    def _sweep(self) -> None:
        """Close what has been idle for too long, and look again while there is anything."""
        loop = asyncio.get_running_loop()
        oldest_s = loop.time() - self._idle_s
        for origin, connections in list(self._free.items()):
            for connection in [each for each in connections if each.idle_since_s <= oldest_s]:
                connection.abort()
            if not connections:
                del self._free[origin]
        self._sweeper = loop.call_later(self._idle_s / 2, self._sweep) if self._free else None


async def _exchange(connection: Connection, method: str, head: bytes, body: bytes, limits: Mapping[str, Any]) -> None:
    idle_s = limits.get("read")
    first_s = limits.get("first_byte", idle_s)
    now_s = asyncio.get_running_loop().time()
    await connection.exchange(
        head,
        body,
        is_bodiless=method == "HEAD",
        first_by_s=math.inf if first_s is None else now_s + first_s,
        idle_s=math.inf if idle_s is None else idle_s,
    )


def _is_stale(connection: Connection, error: BaseException) -> bool:
    """True if the request met a connection that was dead already, so that it was never seen."""
    if connection.exchanges < 2 or connection.has_received or connection.is_closed_here:
        return False
    if not isinstance(error, httpx.ReadError):
        return False
    return asyncio.get_running_loop().time() - connection.began_s < STALE_WITHIN_S


async def _body_of(request: httpx.Request) -> bytes:
    stream = request.stream
    if type(stream) is Payload:
        return stream.data
    if not isinstance(stream, httpx.AsyncByteStream):
        raise httpx.LocalProtocolError("the request's body can only be read synchronously")
    body = b"".join([piece async for piece in stream])
    if "transfer-encoding" in request.headers:
        return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    return body


def _head_of(request: httpx.Request) -> bytes:
    raw = request.headers.raw
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
    lines += [b"%b: %b" % header for header in raw]
    head = b"\r\n".join(lines) + b"\r\n\r\n"
    if head.count(b"\n") != len(raw) + 2 or head.count(b"\r") != len(raw) + 2 or b"\0" in head:
        raise httpx.LocalProtocolError("a request header holds a line break")
    return head
