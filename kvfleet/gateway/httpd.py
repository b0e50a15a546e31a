"""The gateway's own HTTP server: accepts, watches over clients that stall, and ends without dropping anything."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import logging
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from kvfleet.gateway.connection import DEFAULT_SIZES, ClientConnection, Sizes
from kvfleet.gateway.exchange import Exchange
from kvfleet.gateway.guard import Patience, sweep, sweep_steps
from kvfleet.gateway.http_exchange import HTTPExchange
from kvfleet.gateway.listening import let_nobody_in
from kvfleet.turns import in_turns

__all__ = ["Door", "Server"]

_log = logging.getLogger(__name__)

_LAST_WORDS_S = 1.0
"""How long clients may take, after a stop, to read what was sent to them."""
_FIRST_WORDS_S = 1.0
"""How long clients must have sent nothing, after a stop, for their connection to be closed: what they send meanwhile
may have been on its way already, and is answered."""
_A_MOMENT_S = 0.02
_LOOK_S = 0.05
_STAND_IN_S = 0.1
_MOST_FOR_OTHERS = 4
"""At once, so that those who stand in share the work."""
_MOST_AT_THE_END = 8192
"""At once from each socket, at a stop: more than can wait there, and yet an end."""


class Door(Protocol):
    """What answers requests."""

    def handle(self, exchange: Exchange) -> Coroutine[Any, Any, None]:
        """Answer one, whatever happens."""


class Server:
    """Serves a gateway on listening sockets.

    Args:
        gateway: What answers; it may be exchanged at any time, for the requests that come from then on.
        drain_s: Seconds that requests in flight have to end after a stop.
        patience: With clients that stall.
        sweep_s: Seconds between two looks at them.
        sizes: How large heads may be, and how many connections there may be.
        first_words_s: Seconds that clients without a request have, after a stop, to send one after all.
        ends_all: Asked at a stop: whether nobody else will accept at its sockets.

    Attributes:
        loop: The event loop it runs on.
        connections: The open ones.
        date_line: The Date header of every answer, a sweep old at most.
        is_stopping: True once it accepts nothing more.
        gateway: What answers now.
        patience, sizes: The same, as they are now.
    """

    def __init__(
        self,
        gateway: Door,
        *,
        drain_s: float,
        patience: Patience,
        sweep_s: float = 1.0,
        sizes: Sizes = DEFAULT_SIZES,
        first_words_s: float = _FIRST_WORDS_S,
        ends_all: Callable[[], bool] = lambda: True,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.connections: set[ClientConnection] = set()
        self.date_line = _date_line()
        self.is_stopping = False
        self.sizes = sizes
        self.gateway = gateway
        self._drain_s = drain_s
        self.patience = patience
        self._sweep_s = sweep_s
        self._first_words_s = first_words_s
        self._ends_all = ends_all
        self._listening: list[asyncio.Server] = []
        self._sockets: list[socket.socket] = []
        self._others: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._is_hurried = asyncio.Event()
        self._is_quiet = asyncio.Event()

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        """Accept connections from now on."""
        for one in sockets:
            self._sockets.append(one.dup())  # outlives the server, for who has connected and was not accepted yet
            make = self.loop.create_unix_server if one.family == socket.AF_UNIX else self.loop.create_server
            self._listening.append(await make(lambda: ClientConnection(self), sock=one))

    def stand_in(self, sockets: Sequence[socket.socket]) -> None:
        """Also accept who waits too long at other workers' sockets: they are busy, or being started again."""
        self._others = list(sockets)  # which this process has no other use for, and closes with its own

    def stop(self) -> None:
        """Accept nothing more, wait for what is in flight, and end."""
        self._stopping.set()

    def stop_now(self) -> None:
        """End without waiting."""
        self._is_hurried.set()
        self.stop()

    async def run(self) -> None:
        """Serve until stopped; returns after the last answer."""
        standing_in = self.loop.create_task(self._stand_in()) if self._others else None
        while not self._stopping.is_set():
            self.date_line = _date_line()
            await in_turns(sweep_steps(self.connections, self.loop.time(), self.patience))
            await _happens(self._stopping, self._sweep_s)
        if standing_in is not None:
            await standing_in  # never cancelled: a connection may be half accepted
        await self._end()

    @property
    def in_flight(self) -> frozenset[asyncio.Task[None]]:
        """The requests being answered."""
        return frozenset(self._tasks)

    # What a connection calls

    def begin(self, exchange: HTTPExchange) -> asyncio.Task[None]:
        """See `kvfleet.gateway.http_exchange.Answerer`."""
        task = self.loop.create_task(self.gateway.handle(exchange))
        self._tasks.add(task)
        return task

    def ended(self, task: asyncio.Task[None]) -> None:
        """See `kvfleet.gateway.http_exchange.Answerer`."""
        self._tasks.discard(task)
        if self.is_stopping:
            self._look_around()

    def gone(self, connection: ClientConnection) -> None:
        """See `kvfleet.gateway.connection.Host`."""
        self.connections.discard(connection)
        self._look_around()

    # The end

    def _look_around(self) -> None:
        if self.is_stopping and not self._tasks and not self.connections:
            self._is_quiet.set()

    async def _end(self) -> None:
        self.is_stopping = True
        await self._accept_the_last()
        self._look_around()
        await self._finish(self._drain_s)
        if self._tasks:
            _log.warning("gateway gives up requests in_flight=%d drain_s=%g", len(self._tasks), self._drain_s)
        for task in tuple(self._tasks):
            task.cancel()  # each tells its client that the gateway is shutting down
        for connection in tuple(self.connections):
            connection.stop()
        self._look_around()
        if not await _happens(self._is_quiet, _LAST_WORDS_S):
            for connection in tuple(self.connections):
                connection.abort()
            await _happens(self._is_quiet, _LAST_WORDS_S)

    async def _finish(self, within_s: float) -> None:
        """Answer what is in flight and what still comes, and close connections on which nothing comes any more.

        A client that was not told of the end may be sending its next request at this moment, so that its connection is
        not closed at once; the answer to that one tells it.
        """
        stopped_s = self.loop.time()
        by_s = stopped_s + within_s
        while (now_s := self.loop.time()) < by_s and not self._is_hurried.is_set() and not self._is_quiet.is_set():
            sweep(self.connections, now_s, self.patience)
            for connection in tuple(self.connections):
                silent_s = connection.silent_since
                if silent_s is not None and now_s - max(silent_s, stopped_s) >= self._first_words_s:
                    connection.part()
            await self._quiet(min(_LOOK_S, by_s - now_s))

    async def _stand_in(self) -> None:
        while not await _happens(self._stopping, _STAND_IN_S):
            for one in self._others:
                await self._accept_at(one, _MOST_FOR_OTHERS)

    async def _accept_the_last(self) -> None:
        """Accept who has connected already: the system would reset them when the last listening socket is closed.

        Who connects from now on is refused a moment later: if they were let in while the last are accepted, there would
        always be some between the last look and the end. But if only this worker stops, the others let them in.
        """
        if self._ends_all():
            for one in (*self._sockets, *self._others):
                let_nobody_in(one)
        await _happens(self._is_hurried, _A_MOMENT_S)  # for those who were let in, but are a round trip away
        for server in self._listening:
            server.close()
        for one in (*self._sockets, *self._others):
            with one:
                await self._accept_at(one, _MOST_AT_THE_END)

    async def _accept_at(self, one: socket.socket, most: int) -> None:
        """Accept who waits at a socket."""
        by_s = self.loop.time() + _LAST_WORDS_S
        with contextlib.suppress(OSError):
            for _ in range(most):
                if self.loop.time() > by_s:
                    return  # where others cannot be kept from connecting they must not hold up the end
                sock, _ = one.accept()
                sock.setblocking(False)
                await self.loop.connect_accepted_socket(lambda: ClientConnection(self), sock)

    async def _quiet(self, seconds: float) -> None:
        """Wait until nothing is in flight, somebody is in a hurry, or the time is up."""
        quiet = asyncio.ensure_future(self._is_quiet.wait())
        hurried = asyncio.ensure_future(self._is_hurried.wait())
        await asyncio.wait({quiet, hurried}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        quiet.cancel()
        hurried.cancel()


async def _happens(event: asyncio.Event, within_s: float) -> bool:
    """True if an event happens within so many seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await event.wait()
    return event.is_set()


def _date_line() -> bytes:
    return b"date: %b\r\n" % email.utils.formatdate(usegmt=True).encode("ascii")
