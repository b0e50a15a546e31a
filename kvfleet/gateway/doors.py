"""The gateway's listeners, and who stands behind them: the one thing that a reload changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from kvfleet.gateway.app import Gateway, OperatorsDoor, Reload
from kvfleet.gateway.connection import Sizes
from kvfleet.gateway.guard import Patience
from kvfleet.gateway.httpd import Server
from kvfleet.gateway.listening import listening_at
from kvfleet.gateway.siblings_door import SiblingsDoor
from kvfleet.gateway.workers import Seat

__all__ = ["Doors", "Stop"]

_log = logging.getLogger(__name__)


class Doors:
    """The listeners for clients and, where they have one of their own, for operators.

    A request is answered to its end by the gateway that stood behind its door when it came.

    Args:
        gateway: Who stands there at first.
        drain_s: Seconds that requests in flight have to end after a stop.
        patience: With clients that stall; as the fleet's file has it, also after a reload, if None.
        has_operators: True if operators have a listener of their own.
        ends_all: Asked at a stop: whether no other worker goes on.

    Attributes:
        gateway: Who stands there now.
    """

    def __init__(
        self,
        gateway: Gateway,
        *,
        drain_s: float,
        patience: Patience | None = None,
        has_operators: bool = False,
        ends_all: Callable[[], bool] = lambda: True,
    ) -> None:
        self.gateway = gateway
        self._patience = patience
        clients = patience or Patience()
        self._clients = Server(gateway, drain_s=drain_s, patience=clients, ends_all=ends_all)
        self._siblings: tuple[Server, SiblingsDoor] | None = None
        self._operators = Server(OperatorsDoor(gateway), drain_s=drain_s, patience=clients) if has_operators else None
        self._set_limits()

    async def open(
        self,
        sockets: Sequence[socket.socket],
        operators: Sequence[socket.socket] = (),
        others: Sequence[socket.socket] = (),
    ) -> None:
        """Accept connections from now on, and stand in for those who have the others."""
        await self._clients.start(sockets)
        self._clients.stand_in(others)
        if self._operators is not None:
            await self._operators.start(operators)

    async def open_to_siblings(self, path: Path, reload: Reload | None) -> None:
        """Let the other workers ask, on a socket of the file system."""
        door = SiblingsDoor(self.gateway, reload)
        server = Server(door, drain_s=0.0, patience=Patience())
        await server.start([listening_at(path)])
        self._siblings = server, door

    def change(self, gateway: Gateway) -> frozenset[asyncio.Task[Any]]:
        """Have another gateway answer from the next request on; what is still to be answered by the one before."""
        before = self.in_flight
        self.gateway = self._clients.gateway = gateway
        self._set_limits()
        if self._siblings is not None:
            self._siblings[1].gateway = gateway
        if self._operators is not None:
            self._operators.gateway = OperatorsDoor(gateway)
        return before

    def _set_limits(self) -> None:
        """Hold clients to what the file says; operators' connections are not counted."""
        limits = self.gateway.router.config.gateway.limits
        self._clients.sizes = Sizes.of(limits)
        self._clients.patience = self._patience or Patience.of(limits)

    @property
    def in_flight(self) -> frozenset[asyncio.Task[Any]]:
        """The requests being answered."""
        return self._clients.in_flight | (self._operators.in_flight if self._operators else frozenset())

    @property
    def is_stopping(self) -> bool:
        """True once nothing more is to be accepted."""
        return self._clients.is_stopping

    def stop(self) -> None:
        """Accept no more clients, wait for what is in flight, and end."""
        self._clients.stop()

    def stop_now(self) -> None:
        """End without waiting."""
        self._clients.stop_now()

    async def run(self) -> None:
        """Serve until stopped; operators are served until the clients' last answer has ended."""
        operators = None if self._operators is None else asyncio.create_task(self._operators.run(), name="operators")
        siblings = (
            None if self._siblings is None else asyncio.create_task(self._siblings[0].run(), name="kvfleet-siblings")
        )
        await self._clients.run()
        for server, task in ((self._operators, operators), (self._siblings and self._siblings[0], siblings)):
            if server is not None and task is not None:
                server.stop_now()
                await task


@attrs.define
class Stop:
    """What signals do: the first one stops gently, the second at once.

    Attributes:
        unready_s: Seconds between not being ready and closing the door.
    """

    unready_s: float
    _count: int = attrs.field(init=False, default=0)

    @contextlib.contextmanager
    def on_signals(
        self, doors: Doors, reload: Callable[[], None] | None = None, seat: Seat | None = None
    ) -> Iterator[None]:
        """Obey SIGTERM and SIGINT within the block, SIGHUP if there is something to reload, and a supervisor's end."""
        loop = asyncio.get_running_loop()

        def obey() -> None:
            self._count += 1
            if self._count > 1:
                doors.stop_now()
                return
            _log.info("gateway stopping in_flight=%d", doors.gateway.meters.in_flight)
            doors.gateway.drain()
            loop.call_later(self.unready_s, doors.stop)

        def alone(leash: int) -> None:
            loop.remove_reader(leash)
            _log.error("supervisor is gone")
            obey()

        wanted = {signal.SIGTERM: obey, signal.SIGINT: obey, **({signal.SIGHUP: reload} if reload else {})}
        for one, do in wanted.items():
            loop.add_signal_handler(one, do)
        if seat is not None:
            loop.add_reader(seat.leash, alone, seat.leash)
        try:
            yield
        finally:
            for one in wanted:
                loop.remove_signal_handler(one)
            if seat is not None:
                loop.remove_reader(seat.leash)
