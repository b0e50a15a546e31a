"""One HTTP/1.1 connection to a backend: an asyncio protocol over httptools (llhttp)."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import Callable
from typing import Any

import httptools
import httpx

__all__ = ["Connection"]

MAX_HEAD_BYTES = 64 * 1024
MAX_INTERIM_ANSWERS = 16
HIGH_WATER_BYTES = 64 * 1024
DRAIN_BYTES = 64 * 1024
DRAIN_S = 1.0
JOIN_BELOW_BYTES = 64 * 1024
_MOST_UNREAD_BYTES = 256 * 1024
"""Of an answer that nobody takes, the system holds twice as much at most; left to itself 33 MB (`tcp_rmem`), and some
hundred such answers use up the memory that all of the machine's connections share (`benchmarks/shapes.py`). Over 100 ms
of network it still lets 2.5 MB a second through, far more than any stream has."""

_FREE, _ENDED, _HEAD, _BODY = range(4)
_OPEN = _HEAD  # from here on an answer is awaited


class Connection(asyncio.Protocol):
    """Makes one exchange after the other with one backend.

    Its owner calls `begin`, `take_head` until that is True, then `take` until that gives ``b""``; where one of the two
    has nothing yet, it awaits `arrival` and asks again. `on_free` is called once for each exchange after which the
    connection can be used again, `on_lost` once when it cannot be used any more.

    No timer is set for each read: one watchdog looks after a deadline that moves (a timer costs 2 µs).

    Attributes:
        is_open: False once the connection is gone.
        is_closed_here: True if that was our own doing.
        exchanges: How many were begun.
        began_s: The loop's time at which the present one began.
        has_received: True once a byte of the present answer has arrived.
        status, headers: Of the present answer.
        is_complete: True once the present answer has ended, and its framing proved it.
        idle_since_s: The loop's time at which the connection became free.
    """

    __slots__ = (
        "_deadline_s",
        "_error",
        "_first_by_s",
        "_framing",
        "_head_bytes",
        "_idle_s",
        "_interim",
        "_is_bodiless",
        "_is_draining",
        "_is_paused",
        "_is_tidy",
        "_loop",
        "_on_free",
        "_on_lost",
        "_parser",
        "_pieces",
        "_sink",
        "_size",
        "_state",
        "_timer",
        "_transport",
        "_unseen",
        "_waiter",
        "began_s",
        "exchanges",
        "has_received",
        "headers",
        "idle_since_s",
        "is_closed_here",
        "is_complete",
        "is_open",
        "status",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_free: Callable[[Connection], None],
        on_lost: Callable[[Connection], None],
    ) -> None:
        self._loop = loop
        self._on_free = on_free
        self._on_lost = on_lost
        self._transport: Any = None
        self._parser = httptools.HttpResponseParser(self)
        self._timer: asyncio.TimerHandle | None = None
        self._deadline_s = math.inf
        self._waiter: asyncio.Future[None] | None = None
        self._state = _FREE
        self._is_tidy = True
        self.is_open = True
        self.is_closed_here = False
        self.exchanges = 0
        self.began_s = 0.0
        self.idle_since_s = 0.0
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.has_received = self.is_complete = False
        self._is_draining = self._is_paused = self._is_bodiless = False
        self._framing = b""
        self._error: Exception | None = None
        self._pieces: list[bytes] = []
        self._sink: Callable[[bytes], bool] | None = None
        self._size = self._head_bytes = self._unseen = self._interim = 0

    # What the owner calls

    def begin(self, head: bytes, body: bytes, *, is_bodiless: bool, first_by_s: float, idle_s: float) -> None:
        """Send a request.

        Args:
            head: The request's head, as it goes on the wire.
            body: Its body.
            is_bodiless: True if the answer has no body, whatever it says (HEAD).
            first_by_s: The loop's time by which the answer must have begun: its body, if it has one.
            idle_s: Longest silence after that.

        Raises:
            httpx.ReadError: if the connection has ended.
        """
        self._reset()
        self._is_bodiless = is_bodiless
        self._first_by_s, self._idle_s = first_by_s, idle_s
        self._state = _HEAD
        self.exchanges += 1
        self.began_s = self._loop.time()
        if not self.is_usable:
            raise httpx.ReadError("the backend closed the connection while it was idle")
        if len(body) < JOIN_BELOW_BYTES:
            self._transport.write(head + body)  # one segment where it fits
        else:
            self._transport.write(head)
            self._transport.write(body)

    def take_head(self) -> bool:
        """True once the head of the answer is there.

        Raises:
            httpx.ReadTimeout: if it did not begin in time.
            httpx.ReadError: if the connection ended.
            httpx.RemoteProtocolError: if what came is not HTTP.
        """
        if self._state != _HEAD:
            return True
        if self._error is not None:
            raise self._error
        return False

    def take(self) -> bytes | None:
        """What has arrived of the body since the last call; None if that is nothing yet, ``b""`` at its end.

        Raises:
            httpx.ReadTimeout: if the backend fell silent.
            httpx.ReadError: if the connection ended before the body did.
            httpx.RemoteProtocolError: if what came is not HTTP.
        """
        if self._pieces:
            self._first_by_s = 0.0
            return self._take()
        if self._error is not None:
            raise self._error
        return None if self._state == _BODY else b""

    def arrival(self) -> asyncio.Future[None]:
        """Done when there is something new to take, be it an error; one at a time."""
        self._waiter = waiter = self._loop.create_future()
        self._watch(self._first_by_s or self._loop.time() + self._idle_s)
        return waiter

    def push(self, sink: Callable[[bytes], bool]) -> None:
        """From now on offer the present answer's body to `sink` as it arrives, where somebody waits for it anyway.

        Waking the one who waits costs as much as all that is done with a piece of a stream. What `sink` takes (it gives
        True) is not to be taken again; what it does not take wakes him as ever. So nothing overtakes anything.
        """
        self._sink = sink

    def now_s(self) -> float:
        """The event loop's time, which every deadline here is measured by."""
        return self._loop.time()

    @property
    def is_usable(self) -> bool:
        """False once the connection is gone, or about to go."""
        return self.is_open and not self._transport.is_closing()

    @property
    def has_ended(self) -> bool:
        """True once the present answer has ended and nothing of it is left to take."""
        return self._state == _ENDED and not self._pieces

    def release(self) -> None:
        """The present answer is of no more interest: keep the connection if its end is near, close it otherwise."""
        if self._state == _ENDED:
            self._settle()
        elif self._error is not None or not self.is_usable:
            self.abort()
        else:
            self._is_draining = True
            self._sink = None
            self._pieces.clear()
            self._size = 0
            self._resume()
            self._watch(self._loop.time() + DRAIN_S)

    def abort(self) -> None:
        """Close the connection at once, whatever it is doing; the backend notices. Safe twice."""
        if self._transport is not None:
            self.is_closed_here = self.is_closed_here or self.is_usable
            self._transport.abort()
        self._lose(httpx.ReadError("the connection was closed on this side"))

    def abort_soon(self) -> None:
        """The same from wherever the garbage collector happens to run."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed, and its connections with it
            self._loop.call_soon_threadsafe(self.abort)

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        sock = transport.get_extra_info("socket")
        # asyncio leaves this unset on sockets made with proto 0: the first byte then comes after 46 ms instead of 8
        with contextlib.suppress(OSError, AttributeError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _MOST_UNREAD_BYTES)

    def data_received(self, data: bytes) -> None:
        if self._state < _OPEN:  # an answer to nothing: whose is it?
            self.abort()
            return
        self.has_received = True
        self._unseen += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._on_nonsense()
        if self._unseen > MAX_HEAD_BYTES and self._state >= _OPEN:
            self._on_nonsense()  # trailers or chunk extensions without end
        if self._is_draining:
            self._drain()
        elif self._state != _HEAD and (self._pieces or self._sink is None or self._state != _BODY):
            self._wake()  # there is something to take, and nobody has taken it

    def eof_received(self) -> None:
        self._end_of_stream(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_of_stream(exc)
        self._lose(httpx.ReadError("the backend closed the connection"))

    # What the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("the head is too long")
        if self._state == _HEAD:  # trailers are left out, and what is behind our answer
            self.headers.append((name, value))
            size = len(name)
            if size == 14 and name.lower() == b"content-length":
                self._framing = b"length"
            elif size == 17 and name.lower() == b"transfer-encoding" and value.lower().endswith(b"chunked"):
                self._framing = b"chunked"

    def on_headers_complete(self) -> None:
        if self._state != _HEAD:
            return  # an answer to nothing, behind ours: `on_message_begin` has seen to it
        status = self._parser.get_status_code()
        if status < 200:
            self._interim += 1
            if status == 101 or self._interim > MAX_INTERIM_ANSWERS:
                raise ValueError("an interim answer that was not asked for")
            self.headers.clear()
            self._framing = b""
            return
        self.status = status
        self._state = _BODY
        if self._is_bodiless:
            self._is_tidy = False  # the parser expects the body that its head announces
            self._complete()

    def on_body(self, data: bytes) -> None:
        self._unseen = 0
        if self._state != _BODY:
            return
        sink, waiter, pieces = self._sink, self._waiter, self._pieces
        if sink is not None and waiter is not None and not pieces and not waiter.done() and sink(data):
            self._deadline_s = self._loop.time() + self._idle_s
            return
        self._size += len(data)
        if self._is_draining:
            return
        pieces.append(data)
        if self._size > HIGH_WATER_BYTES and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def on_message_begin(self) -> None:
        if self._state == _ENDED:  # bytes beyond the answer's end
            self._is_tidy = False

    def on_message_complete(self) -> None:
        if self._state == _BODY:
            self._is_tidy = self._is_tidy and self._parser.should_keep_alive()
            self._complete()

    # Inner workings

    def _complete(self) -> None:
        self.is_complete = True
        self._state = _ENDED
        self._deadline_s = math.inf

    def _take(self) -> bytes:
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._size = 0
        if self._is_paused:
            self._resume()
        return data

    def _resume(self) -> None:
        if self._is_paused and self.is_open:
            self._is_paused = False
            self._transport.resume_reading()

    def _drain(self) -> None:
        if self._state == _ENDED:
            self._settle()
        elif self._size > DRAIN_BYTES:
            self.abort()

    def _settle(self) -> None:
        """The exchange is over: free the connection if it can be used again."""
        is_written = self.is_usable and not self._transport.get_write_buffer_size()
        if self.is_complete and self._is_tidy and is_written:
            self._state = _FREE
            self._deadline_s = math.inf
            self.idle_since_s = self._loop.time()
            self._on_free(self)
        else:
            self.abort()

    def _on_nonsense(self) -> None:
        """What came is not HTTP; an answer that was whole before that stays whole."""
        self._is_tidy = False
        if self._state != _ENDED:
            self._error = httpx.RemoteProtocolError("the backend's answer is not proper HTTP")
            self._transport.abort()
            self._wake()

    def _end_of_stream(self, exc: Exception | None) -> None:
        self._is_tidy = False
        if self._state == _BODY and not self._framing and exc is None:
            self._state = _ENDED  # the end of such a body cannot be told from its being cut off: not `is_complete`
        elif self._state >= _OPEN and self._error is None:
            self._error = httpx.ReadError("the backend closed the connection before its answer ended")
        self._wake()

    def _lose(self, error: Exception) -> None:
        if not self.is_open:
            return
        self.is_open = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._state >= _OPEN and self._error is None:
            self._error = error
        self._wake()
        self._on_lost(self)

    # Waiting

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _watch(self, by_s: float) -> None:
        self._deadline_s = by_s
        if by_s == math.inf:
            return
        if self._timer is not None:
            if self._timer.when() <= by_s:
                return  # it will look again then
            self._timer.cancel()
        self._timer = self._loop.call_at(by_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._deadline_s == math.inf or not (self._is_waited_for or self._is_draining):
            return
        if self._loop.time() < self._deadline_s:
            self._timer = self._loop.call_at(self._deadline_s, self._on_timer)
        elif self._is_draining:
            self.abort()
        else:
            self._error = httpx.ReadTimeout("the backend was silent for too long")
            self.abort()

    @property
    def _is_waited_for(self) -> bool:
        return self._waiter is not None and not self._waiter.done()
