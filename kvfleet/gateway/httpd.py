"""uvicorn as the gateway runs it: quick to stop, watchful of clients that stall, gentle to what is in flight."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import attrs
import uvicorn

from kvfleet.gateway.app import Gateway
from kvfleet.gateway.guard import GuardedProtocol, Patience, sweep

__all__ = ["Server", "Stop"]

_log = logging.getLogger(__name__)

# Longer than the pools of usual clients and load balancers keep an idle connection (httpx 5 s, AWS 60 s), so that it is
# they who close it, and never the gateway under a request that is just being sent.
_KEEP_ALIVE_S = 75


class Server(uvicorn.Server):
    """Uvicorn's server, stopped by a call instead of a poll, and with `sweep` once a second."""

    def __init__(self, gateway: Gateway, *, drain_s: float, patience: Patience, sweep_s: float = 1.0) -> None:
        super().__init__(
            uvicorn.Config(
                gateway,
                http=GuardedProtocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(drain_s)),
            )
        )
        self._patience = patience
        self._sweep_s = sweep_s
        self._ready = asyncio.Event()
        self._stopping = asyncio.Event()

    async def wait_until_started(self, task: asyncio.Task[None]) -> None:
        """Return once connections are accepted.

        Raises:
            Exception: whatever kept it from starting.
        """
        ready = asyncio.create_task(self._ready.wait())
        await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if task.done():
            await task

    def stop(self) -> None:
        """Accept nothing more, wait for what is in flight, and end."""
        self.should_exit = True
        self._stopping.set()

    def stop_now(self) -> None:
        """End without waiting."""
        self.force_exit = True
        self.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's start, announced."""
        await super().startup(sockets)
        self._ready.set()

    async def main_loop(self) -> None:
        """Uvicorn's own wakes ten times a second to look whether it should stop."""
        loop = asyncio.get_running_loop()
        while not await self.on_tick(0):
            sweep(self.server_state.connections, loop.time(), self._patience)  # type: ignore[arg-type]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._sweep_s):
                    await self._stopping.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to whoever runs the server."""
        yield


@attrs.define
class Stop:
    """What signals do: the first one stops gently, the second at once."""

    unready_s: float
    _count: int = attrs.field(init=False, default=0)

    @contextlib.contextmanager
    def on_signals(self, gateway: Gateway, server: Server) -> Iterator[None]:
        """Obey SIGTERM and SIGINT within the block."""
        loop = asyncio.get_running_loop()

        def obey() -> None:
            self._count += 1
            if self._count > 1:
                server.stop_now()
                return
            _log.info("gateway stopping in_flight=%d", gateway.meters.in_flight)
            gateway.drain()
            loop.call_later(self.unready_s, server.stop)

        signals = (signal.SIGTERM, signal.SIGINT)
        for one in signals:
            loop.add_signal_handler(one, obey)
        try:
            yield
        finally:
            for one in signals:
                loop.remove_signal_handler(one)
