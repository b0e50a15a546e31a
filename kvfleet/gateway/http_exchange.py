"""One request of a connection, and its answer: how it is framed, and what becomes of it if the client leaves."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Protocol

import anyio.to_thread
import attrs

from kvfleet.errors import BadRequestError
from kvfleet.gateway.exchange import ClientLeftError, Exchange, Pairs, check_announced, too_large
from kvfleet.gateway.headers import Headers

__all__ = ["STATUS_LINES", "Answerer", "HTTPExchange", "Line"]

STATUS_LINES = {one.value: f"HTTP/1.1 {one.value} {one.phrase}\r\n".encode() for one in HTTPStatus}
"""The first line of an answer, by its status."""

_BODILESS = (204, 304)
_MOST_PIECES = 128
"""Of a body that are kept as they came: of one that comes two bytes at a time each would take twenty times its size."""
_MOST_JOINED_BYTES = 1024 * 1024


class Answerer(Protocol):
    """What an exchange needs of the server.

    Attributes:
        date_line: The Date header of this second.
        is_stopping: True if every answer is its connection's last.
    """

    date_line: bytes
    is_stopping: bool

    def begin(self, exchange: HTTPExchange) -> asyncio.Task[None]:
        """Have a request answered."""

    def ended(self, task: asyncio.Task[None]) -> None:
        """Forget a task that `begin` gave: its request has been dealt with."""


class Line(Protocol):
    """What an exchange needs of the connection it came from.

    Attributes:
        loop: The event loop.
        is_write_paused: True if the client does not read fast enough.
    """

    loop: asyncio.AbstractEventLoop
    is_write_paused: bool

    @property
    def host(self) -> Answerer:
        """The server."""

    def encourage(self, exchange: HTTPExchange) -> None:
        """Tell a client that waits for it to send its body."""

    def write(self, data: bytes) -> None:
        """Send bytes."""

    async def writable(self) -> None:
        """Wait until the client has read."""

    def answered(self, exchange: HTTPExchange) -> None:
        """The answer is whole: have the next request of the connection answered, or close it."""

    def abort(self) -> None:
        """Close it at once."""

    def reset(self) -> None:
        """Close it with a TCP reset."""


@attrs.define(eq=False)
class HTTPExchange(Exchange):
    """One request of a connection, and its answer.

    Attributes:
        connection: Where it came from.
        keeps_alive: True if another request may follow on the connection.
        is_old: True for HTTP/1.0, which knows no chunks.
        is_received: True once the request's body is whole.
        is_over: True once the answer is whole, or cut off.
    """

    connection: Line
    keeps_alive: bool = True
    is_old: bool = False
    is_received: bool = attrs.field(init=False, default=False)
    is_over: bool = attrs.field(init=False, default=False)
    _pieces: list[bytes] = attrs.field(init=False, factory=list, repr=False)
    _rest: bytes | bytearray = attrs.field(init=False, default=b"", repr=False)
    _size: int = attrs.field(init=False, default=0)
    _waiter: asyncio.Future[None] | None = attrs.field(init=False, default=None, repr=False)
    _task: asyncio.Task[None] | None = attrs.field(init=False, default=None, repr=False)
    _is_watched: bool = attrs.field(init=False, default=False)
    _is_chunked: bool = attrs.field(init=False, default=False)
    _head: bytes = attrs.field(init=False, default=b"", repr=False)

    # What a handler calls

    async def body(self, limit: int) -> bytes:
        """See `Exchange.body`."""
        check_announced(self.headers, limit)
        if not self.is_received:
            self.connection.encourage(self)
        while not self.is_received:
            if self._size > limit:
                raise too_large(limit)
            if self.is_over:
                raise ClientLeftError
            self._waiter = self.connection.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._size > limit:
            raise too_large(limit)
        pieces = self._pieces
        if len(pieces) == 1:
            return pieces[0]
        if self._size <= _MOST_JOINED_BYTES:
            return b"".join((*pieces, self._rest))
        # more than that Python joins without holding others up, if all pieces are bytes
        return await anyio.to_thread.run_sync(b"".join, (*pieces, bytes(self._rest)))

    async def start(self, status: int, headers: Pairs) -> None:
        """See `Exchange.start`; the head leaves with the first piece."""
        if self.method != "HEAD" and status not in _BODILESS:
            if self.is_old:
                self.keeps_alive = False  # the end of the connection is the end of the answer
            else:
                self._is_chunked = True
                headers = [*headers, (b"transfer-encoding", b"chunked")]
        self._head = self._head_of(status, headers)

    async def whole(self, status: int, body: bytes, headers: Pairs) -> None:
        """See `Exchange.whole`."""
        head = self._head_of(status, [(b"content-length", b"%d" % len(body)), *headers])
        self._write(head if self.method == "HEAD" else head + body)
        self._done()

    async def piece(self, body: bytes) -> None:
        """See `Exchange.piece`."""
        if body:
            self._write(self._framed(body))
        if self.connection.is_write_paused:
            await self.connection.writable()

    def push(self, body: bytes) -> bool:
        """See `Exchange.push`."""
        connection = self.connection
        if connection.is_write_paused or self._head or self.is_over:
            return False
        connection.write(b"%x\r\n%b\r\n" % (len(body), body) if self._is_chunked else body)
        return True

    async def end(self, body: bytes = b"") -> None:
        """See `Exchange.end`."""
        data = self._framed(body)
        self._write(data + b"0\r\n\r\n" if self._is_chunked else data)
        self._done()

    def check_head(self) -> None:
        """See `Exchange.check_head`; the parser has refused most of what is wrong (`kvfleet.gateway.connection`)."""
        headers = self.headers
        if b"transfer-encoding" in headers or b"host" not in headers:
            self._check_framing(headers)

    def _check_framing(self, headers: Headers) -> None:
        """RFC 9112: 6.1, a body in chunks has no other coding here, and none in HTTP/1.0; 3.2, 1.1 names a host."""
        coding = headers.get(b"transfer-encoding")
        if coding is not None and (self.is_old or coding.strip().lower() != b"chunked"):
            raise BadRequestError("the only transfer coding is 'chunked', in HTTP/1.1", code="invalid_http")
        if b"host" not in headers and not self.is_old:
            raise BadRequestError("a request in HTTP/1.1 needs a Host header", code="invalid_http")

    def watch(self) -> None:
        """See `Exchange.watch`."""
        self._is_watched = True
        if self.is_over:
            self.leave()

    def unwatch(self) -> None:
        """See `Exchange.unwatch`."""
        self._is_watched = False

    def finish(self) -> None:
        """See `Exchange.finish`."""
        self._is_watched = False
        if not self.is_over:
            self.is_over = True
            self.connection.abort()
        if self._task is not None:
            self.connection.host.ended(self._task)

    # What the connection calls

    def begin(self) -> None:
        """Have the request answered."""
        self._task = self.connection.host.begin(self)

    def receive(self, data: bytes) -> None:
        """A piece of the request's body has arrived."""
        if not self.is_over:
            self._size += len(data)
            if len(self._pieces) < _MOST_PIECES:
                self._pieces.append(data)
            else:
                self._rest = self._rest or bytearray()
                self._rest += data
            self._wake()

    def received(self) -> None:
        """The request's body is whole."""
        self.is_received = True
        self._wake()

    def leave(self) -> None:
        """The client has left."""
        self.is_over = True
        self._wake()
        if self._is_watched and self._task is not None:
            self.has_left = True
            self._is_watched = False
            self._task.cancel()

    # Inner workings

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _head_of(self, status: int, headers: Pairs) -> bytes:
        """The answer's head; also decides whether the connection is kept."""
        self.status = status
        host = self.connection.host
        common = self.common
        if self.closes or host.is_stopping or not self.is_received:
            self.keeps_alive = False
        if not self.keeps_alive:
            common = [*common, (b"connection", b"close")]
        elif self.is_old:
            common = [*common, (b"connection", b"keep-alive")]
        lines = [b"%b: %b\r\n" % pair for pair in (*headers, *common)]
        first = STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
        return b"".join((first, *lines, host.date_line, b"\r\n"))

    def _framed(self, body: bytes) -> bytes:
        head, self._head = self._head, b""
        if self._is_chunked and body:
            return b"%b%x\r\n%b\r\n" % (head, len(body), body)
        return head if self.method == "HEAD" else head + body

    def _write(self, data: bytes) -> None:
        if not self.is_over and data:
            self.connection.write(data)

    def _done(self) -> None:
        self._is_watched = False
        if not self.is_over:
            self.is_over = True
            self.connection.answered(self)
