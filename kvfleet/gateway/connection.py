"""One connection of a client: HTTP/1.1 over an asyncio protocol and httptools (llhttp, in its strict mode).

A general server in front of an ASGI application costs a dictionary for each message, a task that waits for the client's
departure, and two writes for each answer; this one costs a third of that (``benchmarks/gateway.py``). It speaks
HTTP/1.0 and 1.1 with keep-alive and pipelining, no TLS and no upgrade. Times are looked at once a second, in
`kvfleet.gateway.guard.sweep`; here they are only noted.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import sys
import termios
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import unquote

import attrs
import httptools
import orjson

from kvfleet.config.limits import ClientLimits
from kvfleet.gateway.http_exchange import STATUS_LINES, Answerer, HTTPExchange

__all__ = ["DEFAULT_SIZES", "ClientConnection", "Host", "Sizes"]


_FULL = (503, "too_many_connections")
_LARGE_READ_BYTES = 128 * 1024
_MOST_AHEAD_BYTES = 64 * 1024
"""Of requests that come before the last one was answered."""
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@attrs.frozen(kw_only=True)
class Sizes:
    """How large a request's head may be, and how many connections there may be; 0 is no limit for these."""

    head_bytes: int = 32 * 1024
    headers: int = 100
    connections: int = 0

    @classmethod
    def of(cls, limits: ClientLimits) -> Sizes:
        """As configured."""
        return cls(head_bytes=limits.max_header_bytes, headers=limits.max_headers, connections=limits.max_connections)


DEFAULT_SIZES = Sizes()


class Host(Answerer, Protocol):
    """What a connection needs of the server it belongs to."""

    loop: asyncio.AbstractEventLoop
    connections: set[ClientConnection]
    sizes: Sizes

    def gone(self, connection: ClientConnection) -> None:
        """Forget a connection that is closed."""


class ClientConnection(asyncio.Protocol):
    """Reads requests, and has them answered one after the other.

    Attributes:
        loop, host: The event loop, and the server.
        in_head_since: When the head under way began, or the connection if it has sent nothing; else None.
        in_body_since: When the last piece of the body under way arrived; else None.
        idle_since: When the last answer ended, if nothing has come since; else None.
        closing_since: When the closing began, if what the client still sends is only thrown away; else None.
        stalled: Bytes in the write buffer, and since when they are as many, while the client does not read.
        is_read_paused, is_write_paused: Whether bytes are held back, in either direction.
        write: Sends bytes, once there is a connection.
    """

    __slots__ = (
        "_ahead_bytes",
        "_answering",
        "_fields",
        "_head_bytes",
        "_incoming",
        "_parser",
        "_read_bytes",
        "_transport",
        "_url",
        "_waiting",
        "_writable",
        "closing_since",
        "host",
        "idle_since",
        "in_body_since",
        "in_head_since",
        "is_read_paused",
        "is_write_paused",
        "loop",
        "stalled",
        "write",
    )

    write: Callable[[bytes], None]

    def __init__(self, host: Host) -> None:
        self.host = host
        self.loop = host.loop
        self.in_head_since: float | None = None
        self.in_body_since: float | None = None
        self.idle_since: float | None = None
        self.closing_since: float | None = None
        self.stalled: tuple[int, float] | None = None
        self.is_read_paused = self.is_write_paused = False
        self._parser = httptools.HttpRequestParser(self)
        self._transport: Any = None
        self._url = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._head_bytes = self._read_bytes = self._ahead_bytes = 0
        self._incoming: HTTPExchange | None = None  # whose body is on its way
        self._answering: HTTPExchange | None = None
        self._waiting: deque[HTTPExchange] | None = None  # sent before the one before was answered
        self._writable: asyncio.Future[None] | None = None

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.write = transport.write  # type: ignore[attr-defined]  # it is one, of a stream
        host = self.host
        host.connections.add(self)
        self.in_head_since = self.loop.time()
        if host.sizes.connections and len(host.connections) > host.sizes.connections:
            status, code = _FULL
            self.refuse(status, "as many clients are connected as may be", code)

    def data_received(self, data: bytes) -> None:
        if self.closing_since is not None:
            return
        self._read_bytes = len(data)
        if len(data) >= _LARGE_READ_BYTES and not self.is_read_paused:
            self._let_others_read()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._on_nonsense()
        if self._waiting:
            self._hold_up(len(data))
        if self.in_head_since is not None:
            self._head_bytes += len(data)
            if self._head_bytes > self.host.sizes.head_bytes:
                self._refuse_head()

    def eof_received(self) -> None:
        """A client that closes its half has left: the transport closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - whatever the reason
        self.resume_writing()
        for exchange in (self._incoming, self._answering, *(self._waiting or ())):
            if exchange is not None:
                exchange.leave()
        self._incoming = self._answering = self._waiting = None
        self.host.gone(self)

    def pause_writing(self) -> None:
        self.is_write_paused = True

    def resume_writing(self) -> None:
        self.is_write_paused = False
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    # What the parser calls

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        self._url = b""
        self._fields = []
        self.idle_since = None
        self.in_head_since = self.loop.time()

    def on_url(self, url: bytes) -> None:
        self._url = self._url + url if self._url else url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        fields = self._fields
        sizes = self.host.sizes
        if len(fields) > sizes.headers:
            raise ValueError("too many headers")
        # Only what came with a large read can be a large head, and only then are the bytes counted.
        if self._read_bytes + self._head_bytes > sizes.head_bytes and self._size_of_head() > sizes.head_bytes:
            raise ValueError("too large a head")
        parser = self._parser
        if parser.should_upgrade():
            return  # the parser stops behind this head: see `_ignore_upgrade`
        keeps_alive = parser.should_keep_alive()
        is_old = (not keeps_alive or _names_connection(fields)) and _is_old(parser.get_http_version())
        method = parser.get_method().decode("ascii")
        exchange = HTTPExchange(method, _path_of(self._url, fields), fields, self, keeps_alive, is_old)
        self._fields = []
        self.in_head_since = None
        self.in_body_since = self.loop.time()
        self._incoming = exchange
        if self._answering is None:
            self._answering = exchange
            exchange.begin()
        else:
            self._queue(exchange)

    def on_body(self, data: bytes) -> None:
        if self._incoming is not None:
            self.in_body_since = self.loop.time()
            self._incoming.receive(data)

    def on_message_complete(self) -> None:
        self.in_body_since = None
        exchange, self._incoming = self._incoming, None
        if exchange is not None:
            exchange.received()

    # What an exchange calls

    def encourage(self, exchange: HTTPExchange) -> None:
        """Tell a client that asks before it sends its body (RFC 9110, 10.1.1) to send it."""
        if (b"expect", b"100-continue") in [(name, value.lower()) for name, value in exchange.fields]:
            self.write(_CONTINUE)

    async def writable(self) -> None:
        """Wait until the client has read what was sent."""
        if self._writable is None:
            self._writable = self.loop.create_future()
        await self._writable

    def answered(self, exchange: HTTPExchange) -> None:
        """An answer is whole: go on to the next request, or close."""
        self._answering = None
        if not exchange.keeps_alive:
            self.close(drains=not exchange.is_received or bool(self._waiting))
        elif self._waiting:
            self._answering = self._waiting.popleft()
            self._answering.begin()
            if not self._waiting:
                self._ahead_bytes = 0
                self._resume_reading()
        else:
            self.idle_since = self.loop.time()

    def abort(self) -> None:
        """Close at once, whatever has not been sent yet."""
        self._transport.abort()

    def reset(self) -> None:
        """Close with a reset: what is under way is lost on both sides. For mock engines that break."""
        self._transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self._transport.abort()

    # What the server calls

    @property
    def is_answering(self) -> bool:
        """True while this connection is owed an answer."""
        return self._answering is not None

    @property
    def unsent_bytes(self) -> int:
        """How much waits for the client to read."""
        return int(self._transport.get_write_buffer_size())

    @property
    def silent_since(self) -> float | None:
        """Since when nothing has come on this connection; None while a request or an answer is under way."""
        if self._answering is not None or self._head_bytes:
            return None
        return self.in_head_since if self.idle_since is None else self.idle_since

    def part(self) -> None:
        """Close, unless something has just come that the event loop has not read yet."""
        if not _unread_bytes(self._transport.get_extra_info("socket").fileno()):
            self.stop()

    def stop(self) -> None:
        """Close, if nothing is owed any more."""
        if self._answering is None:
            self._transport.close()

    def refuse(self, status: int, message: str, code: str = "invalid_http") -> None:
        """Answer what is no proper request, or cannot be taken, and close; amid another answer, only close."""
        self.in_head_since = self.in_body_since = None
        answering = self._answering
        if answering is not None and answering.is_received and not answering.keeps_alive:
            return  # what comes behind the last request of a connection is nobody's
        if answering is not None and (answering is not self._incoming or answering.status):
            self.abort()
            return
        if answering is not None:  # it is its body that is nonsense, and whoever waits for that is told to stop
            self._answering = self._incoming = None
            answering.leave()
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {"message": message, "type": kind, "param": None, "code": code}
        body = orjson.dumps({"error": error})
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n" % len(body)
        self.write(STATUS_LINES[status] + head + self.host.date_line + b"\r\n" + body)
        self.close(drains=True)

    def close(self, *, drains: bool) -> None:
        """Close once everything is sent.

        Args:
            drains: True if the client may still be sending: were that answered with a reset, it might never read what
                it is told. So only this half is closed, and what comes is thrown away for a moment.
        """
        self.closing_since = self.loop.time()
        self.in_head_since = self.in_body_since = self.idle_since = None
        if drains and not self._transport.is_closing():
            self._resume_reading()
            self._transport.write_eof()
        else:
            self._transport.close()

    # Inner workings

    def _queue(self, exchange: HTTPExchange) -> None:
        """A request that came before the last one was answered has to wait."""
        if self._waiting is None:
            self._waiting = deque()
        self._waiting.append(exchange)

    def _hold_up(self, size: int) -> None:
        """Read no more than so much ahead: until then a client that leaves is noticed, and while we do not read not."""
        self._ahead_bytes += size
        if self._ahead_bytes > _MOST_AHEAD_BYTES and not self.is_read_paused:
            self.is_read_paused = True
            self._transport.pause_reading()

    def _let_others_read(self) -> None:
        """Read on in the next turn of the event loop: libuv would take up to 32 such pieces at once, 8 MB."""
        self._transport.pause_reading()
        self.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if not self.is_read_paused and not self._transport.is_closing():
            self._transport.resume_reading()

    def _resume_reading(self) -> None:
        if self.is_read_paused:
            self.is_read_paused = False
            self._transport.resume_reading()
            if self.in_body_since is not None:
                self.in_body_since = self.loop.time()  # it was we who held it up

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Read the request whose head offers another protocol as if it did not: no other is spoken here.

        Java's client offers HTTP/2 on every first request; the parser would leave that request's body to somebody else.
        """
        method, fields = self._parser.get_method(), self._fields
        if method == b"CONNECT":
            self.refuse(400, "this is no proxy")
            return
        kept = [field for field in fields if field[0] not in (b"connection", b"upgrade", b"http2-settings")]
        lines = [b"%b %b HTTP/1.1" % (method, self._url), *[b"%b: %b" % field for field in kept], b"\r\n"]
        self._parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join(lines) + rest)

    def _on_nonsense(self) -> None:
        sizes = self.host.sizes
        if len(self._fields) > sizes.headers or self._size_of_head() > sizes.head_bytes:
            self._refuse_head()
        else:
            self.refuse(400, "what was sent is not proper HTTP/1.1")

    def _refuse_head(self) -> None:
        sizes = self.host.sizes
        self.refuse(431, f"the request's head has more than {sizes.headers} headers or {sizes.head_bytes} bytes")

    def _size_of_head(self) -> int:
        return len(self._url) + sum([len(name) + len(value) for name, value in self._fields])


def _unread_bytes(descriptor: int) -> int:
    """How much has come that nobody has read; 0 for a socket that is closed."""
    with contextlib.suppress(OSError, ValueError):
        return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)
    return 0


def _names_connection(fields: list[tuple[bytes, bytes]]) -> bool:
    return any(name == b"connection" for name, _ in fields)


def _is_old(version: str) -> bool:
    """True for HTTP/1.0.

    Raises:
        ValueError: for HTTP/0.9, which has no headers and so no keys.
    """
    if version not in ("1.0", "1.1"):
        raise ValueError("an unknown version of HTTP")
    return version == "1.0"


def _path_of(target: bytes, fields: list[tuple[bytes, bytes]]) -> str:
    """The decoded path of a request's target, which may also be a whole URL (RFC 9112, 3.2).

    Raises:
        ValueError: if it is none of the two, or not ASCII, or names another host than the headers do.
    """
    if not target.startswith(b"/") and target != b"*":
        url = httptools.parse_url(target)
        authority = target.partition(b"://")[2].partition(b"/")[0].partition(b"?")[0]
        if [value.strip().lower() for name, value in fields if name == b"host"] != [authority.lower()]:
            raise ValueError("the target names another host than the headers")
        target = url.path or b"/"
    path = target.partition(b"?")[0].partition(b"#")[0].decode("ascii")
    return unquote(path) if "%" in path else path
