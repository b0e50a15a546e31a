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
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import httpx

from kvfleet.adapters.h1 import Connection

__all__ = ["Body", "Origin", "Payload", "PooledAnswer", "PooledTransport", "trusting"]

# A connection that the backend had closed before our request came shows it within a round trip. One that dies later
# died of something else (the request itself, perhaps): repeating that is the route's decision, not the transport's.
STALE_WITHIN_S = 1.0

Origin = tuple[bytes, bytes, int | None]
"""Scheme, host, and port if it is not the scheme's own."""


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


class PooledAnswer:
    """An answer on its way over a pooled connection; its head is there.

    Attributes:
        status, headers: As they came.
        is_repeat: True if a pooled connection turned out to be dead, and the request was sent again on a fresh one.
        is_complete: True once the body has ended and its framing proved that nothing is missing. A body that ends where
            the connection does never is: nobody can tell that from a connection that was cut.
    """

    __slots__ = ("_connection", "_is_dropped", "headers", "is_complete", "is_repeat", "status")

    def __init__(self, connection: Connection, *, is_repeat: bool) -> None:
        self.status = connection.status
        self.headers = connection.headers
        self.is_repeat = is_repeat
        self.is_complete = False
        self._connection: Connection | None = connection
        self._is_dropped = False

    def take(self) -> bytes | None:
        """What has arrived of the body since the last call; None if that is nothing yet, ``b""`` at its end.

        Raises:
            httpx.ReadTimeout, httpx.ReadError, httpx.RemoteProtocolError: if it breaks off.
        """
        connection = self._connection
        if connection is None:
            if self._is_dropped:
                raise httpx.ReadError("the answer was closed on this side")
            return b""
        try:
            piece = connection.take()
        except BaseException:
            connection.abort()
            raise
        if connection.has_ended:
            self.is_complete = connection.is_complete
            self._connection = None
            connection.release()
        return piece

    def arrival(self) -> Awaitable[None]:
        """Done when there is something new to take."""
        assert self._connection is not None  # noqa: S101 - `take` gave None
        return self._connection.arrival()

    def push(self, sink: Callable[[bytes], bool]) -> None:
        """Offer what arrives from now on to `sink`; see `Connection.push`."""
        if self._connection is not None:
            self._connection.push(sink)

    def finish(self) -> None:
        """Take no more; the connection is kept if the answer ends within a moment."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()

    def drop(self) -> None:
        """Take no more; if the answer has not ended, its connection is closed at once. Safe twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            if connection.has_ended:
                connection.release()
            else:
                self._is_dropped = True
                connection.abort()

    async def aclose(self) -> None:
        """The same as `drop`."""
        self.drop()

    def __del__(self) -> None:
        connection = self._connection
        if connection is not None and connection.is_open:  # an engine must not go on working for nobody
            connection.abort_soon()
            message = "an answer was dropped amid its body; close it with aclose()"
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)


class Body(httpx.AsyncByteStream):
    """The body of an answer as httpx has it, piece by piece as it arrives."""

    def __init__(self, answer: PooledAnswer) -> None:
        self._answer = answer

    @property
    def is_complete(self) -> bool:
        """See `PooledAnswer`."""
        return self._answer.is_complete

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        answer = self._answer
        while (piece := answer.take()) is None:
            try:
                await answer.arrival()
            except BaseException:
                answer.drop()
                raise
        if not piece:
            raise StopAsyncIteration
        return piece

    def finish(self) -> None:
        """Take no more; see `PooledAnswer.finish`."""
        self._answer.finish()

    async def aclose(self) -> None:
        """Take no more; see `PooledAnswer.drop`."""
        self._answer.drop()


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
        self._free: dict[Origin, dict[Connection, None]] = {}
        self._busy: dict[Connection, Origin] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; returns when the answer's head is there.

        Raises:
            httpx.ConnectError, httpx.ConnectTimeout: if there is no connection.
            httpx.ReadTimeout, httpx.ReadError, httpx.RemoteProtocolError: if there is no answer.
            httpx.LocalProtocolError: for a request that cannot be written.
        """
        url = request.url
        body = await _body_of(request)
        limits: Mapping[str, Any] = request.extensions.get("timeout") or {}
        idle_s = _or_never(limits.get("read"))
        answer = await self.send(
            (url.raw_scheme, url.raw_host, url.port),
            _head_of(request),
            body,
            connect_s=limits.get("connect"),
            first_byte_s=_or_never(limits.get("first_byte", idle_s)),
            idle_s=idle_s,
            is_bodiless=request.method == "HEAD",
        )
        return httpx.Response(
            answer.status, headers=answer.headers, stream=Body(answer), extensions={"is_repeat": answer.is_repeat}
        )

    async def send(
        self,
        origin: Origin,
        head: bytes,
        body: bytes,
        *,
        connect_s: float | None,
        first_byte_s: float,
        idle_s: float,
        is_bodiless: bool = False,
    ) -> PooledAnswer:
        """The same for a request that is bytes already: httpx's objects cost more than all the rest.

        Args:
            origin: Scheme, host, and port if it is not the scheme's own.
            head: The whole head, with the empty line at its end.
            body: The body as the head announces it.
            connect_s: Limit in seconds, as above.
            first_byte_s: Another.
            idle_s: Another, above called ``read``.
            is_bodiless: True if the answer has no body, whatever it says (HEAD).
        """
        connection = self._reuse(origin)
        is_repeat = False
        while True:
            if connection is None:
                connection = await self._connect(origin, connect_s)
            try:
                first_by_s = connection.now_s() + first_byte_s
                connection.begin(head, body, is_bodiless=is_bodiless, first_by_s=first_by_s, idle_s=idle_s)
                while not connection.take_head():
                    await connection.arrival()
            except BaseException as error:
                is_repeat = _is_stale(connection, error)
                connection.abort()
                if not is_repeat:
                    raise
                connection = None
            else:
                return PooledAnswer(connection, is_repeat=is_repeat)

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

    def _reuse(self, origin: Origin) -> Connection | None:
        free = self._free.get(origin)
        while free:
            connection, _ = free.popitem()
            if connection.is_usable:
                self._busy[connection] = origin
                return connection
        return None

    async def _connect(self, origin: Origin, timeout_s: float | None) -> Connection:
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


def _or_never(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def _is_stale(connection: Connection, error: BaseException) -> bool:
    """True if the request met a connection that was dead already, so that it was never seen."""
    if connection.exchanges < 2 or connection.has_received or connection.is_closed_here:
        return False
    if not isinstance(error, httpx.ReadError):
        return False
    return connection.now_s() - connection.began_s < STALE_WITHIN_S


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
