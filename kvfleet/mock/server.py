"""Serves mock engines: each on a port of its own, all in one event loop, until they are stopped."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from kvfleet.gateway.auth import Keys
from kvfleet.gateway.connection import DEFAULT_SIZES, ClientConnection
from kvfleet.gateway.guard import Patience, sweep
from kvfleet.gateway.http_exchange import HTTPExchange
from kvfleet.gateway.listening import bind, url_of
from kvfleet.mock.app import MockApp
from kvfleet.mock.engine import MockEngine

__all__ = ["MockServer", "serve_engines", "serving"]

_log = logging.getLogger(__name__)

_SWEEP_S = 1.0
_NOBODY_ASKS = Keys()
# A mock engine's clients may be as slow as they like; only what never ends is ended.
_PATIENCE = Patience(head_s=60.0, body_s=300.0, read_s=600.0, idle_s=600.0)


class MockServer:
    """One engine's port.

    It is what a connection needs of its server (`kvfleet.gateway.connection.Host`).

    Args:
        engine: The engine.
        host: Where to listen.
        port: On which port; 0 for any.
        keys: What clients must bring one of.

    Attributes:
        loop, connections, date_line, is_stopping, sizes: See `kvfleet.gateway.connection.Host`.
        url: Where it listens.
    """

    def __init__(self, engine: MockEngine, host: str, port: int, *, keys: Keys = _NOBODY_ASKS) -> None:
        self.loop = asyncio.get_running_loop()
        self.connections: set[ClientConnection] = set()
        self.date_line = _date_line()
        self.is_stopping = False
        self.sizes = DEFAULT_SIZES
        self.engine = engine
        self._host, self._port = host, port
        self._app = MockApp(engine, self._refuse, keys)
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: list[asyncio.Server] = []
        self._refusing = asyncio.Event()
        self._refuse_s = 0.0
        self.url = ""

    async def open(self) -> None:
        """Listen.

        Raises:
            OSError: if the port cannot be had.
        """
        sockets = bind(self._host, self._port)
        self.url = url_of(sockets[0])
        self._port = int(sockets[0].getsockname()[1])
        await self._listen(sockets)

    async def run(self) -> None:
        """Keep its door, until cancelled: closed for as long as a fault wants it, and open else."""
        while True:
            await self._refusing.wait()
            self._refusing.clear()
            self._close_door()
            await asyncio.sleep(self._refuse_s)
            await self._open_door()

    def sweep(self) -> None:
        """Look after the connections; once a second."""
        self.date_line = _date_line()
        sweep(self.connections, self.loop.time(), _PATIENCE)

    async def close(self, drain_s: float) -> None:
        """Accept nothing more, and end; what is in flight has so many seconds."""
        self.is_stopping = True
        for server in self._listening:
            server.close()
        for connection in tuple(self.connections):
            connection.stop()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=drain_s)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in tuple(self.connections):
            connection.abort()

    # What a connection calls

    def begin(self, exchange: HTTPExchange) -> asyncio.Task[None]:
        """See `kvfleet.gateway.connection.Host`."""
        task = self.loop.create_task(self._app.handle(exchange))
        self._tasks.add(task)
        return task

    def ended(self, task: asyncio.Task[None]) -> None:
        """See `kvfleet.gateway.connection.Host`."""
        self._tasks.discard(task)

    def gone(self, connection: ClientConnection) -> None:
        """See `kvfleet.gateway.connection.Host`."""
        self.connections.discard(connection)

    # Inner workings

    async def _listen(self, sockets: Sequence[socket.socket]) -> None:
        self._listening = [await self.loop.create_server(lambda: ClientConnection(self), sock=one) for one in sockets]

    async def _open_door(self) -> None:
        while True:
            try:
                await self._listen(bind(self._host, self._port))
            except OSError as error:  # somebody has taken the port meanwhile
                _log.warning("mock engine cannot listen again error=%s", error)
                await asyncio.sleep(_SWEEP_S)
            else:
                return

    def _refuse(self, seconds: float) -> None:
        self._refuse_s = seconds
        self._refusing.set()

    def _close_door(self) -> None:
        for server in self._listening:
            server.close()
        for connection in tuple(self.connections):
            connection.abort()


@contextlib.asynccontextmanager
async def serving(
    engines: Sequence[MockEngine],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    keys: Keys = _NOBODY_ASKS,
    drain_s: float = 0.0,
) -> AsyncIterator[list[MockServer]]:
    """Serve engines on a port each, in the current event loop, until the block ends.

    Args:
        engines: The engines.
        host: Where to listen.
        port: The first one's port, the others' follow; 0 for any.
        keys: What clients must bring one of.
        drain_s: Seconds that requests in flight have at the end.

    Raises:
        OSError: if a port, or an endpoint of KV events, cannot be had.
    """
    servers = [MockServer(engine, host, port and port + index, keys=keys) for index, engine in enumerate(engines)]
    ranks = [rank for engine in engines for rank in engine.ranks]
    publishers = [rank.publisher for rank in ranks if rank.publisher is not None]
    tasks: list[asyncio.Task[None]] = []
    try:
        for publisher in publishers:
            publisher.open()
        for server in servers:
            await server.open()
        work = [_look_after(servers), *(s.run() for s in servers), *(p.serve_replay() for p in publishers)]
        tasks += map(asyncio.ensure_future, work)
        yield servers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(server.close(drain_s) for server in servers if server.url))
        for publisher in publishers:
            publisher.close()


async def _look_after(servers: Sequence[MockServer]) -> None:
    while True:
        for server in servers:
            server.sweep()
        await asyncio.sleep(_SWEEP_S)


async def serve_engines(
    engines: Sequence[MockEngine],
    *,
    host: str,
    port: int,
    keys: Keys = _NOBODY_ASKS,
    drain_s: float = 5.0,
    on_ready: Callable[[Sequence[str]], None] | None = None,
) -> None:
    """Serve engines until SIGTERM or SIGINT.

    Args:
        engines: The engines.
        host: Where to listen.
        port: The first one's port, the others' follow; 0 for any.
        keys: What clients must bring one of.
        drain_s: Seconds that requests in flight have at the end.
        on_ready: Called with their addresses once they accept requests.

    Raises:
        OSError: if a port, or an endpoint of KV events, cannot be had.
    """
    stop = asyncio.Event()
    with _signals(stop.set):
        async with serving(engines, host=host, port=port, keys=keys, drain_s=drain_s) as servers:
            _log.info("mock engines listening count=%d first=%s", len(servers), servers[0].url)
            if on_ready is not None:
                on_ready([server.url for server in servers])
            await stop.wait()


@contextlib.contextmanager
def _signals(obey: Callable[[], object]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for one in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(one, obey)
    try:
        yield
    finally:
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(one)


def _date_line() -> bytes:
    return b"date: %b\r\n" % email.utils.formatdate(usegmt=True).encode("ascii")
