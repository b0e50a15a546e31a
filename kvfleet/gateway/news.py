"""What workers tell each other all the time: what is in flight, how engines stand, where a prompt went.

Datagrams between processes of one machine, a few times a second, which nobody waits for: one that finds no room is
lost and counted. What they carry is an estimate for those who hear it, so nothing depends on any one of them.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable, Iterator

import orjson

from kvfleet.gateway.workers import Seat
from kvfleet.runtime import Router
from kvfleet.telemetry.siblings_load import SiblingsLoad, own_counts
from kvfleet.telemetry.siblings_state import SiblingsState

__all__ = ["News"]

_log = logging.getLogger(__name__)

_EVERY_S = 0.05
_HEARTBEAT_S = 1.0
_MOST_BYTES = 60_000
_MOST_AT_ONCE = 256
_MOST_WAITING = 4096
_LOAD, _STAGES, _STATE = 1, 2, 3
_HEAD = struct.Struct("<BB")
_PART = struct.Struct("<HI")


class News:
    """Tells the other workers of this one, and takes in what they tell.

    Args:
        seat: This worker's place.

    Attributes:
        lost: Datagrams that found no room.
    """

    def __init__(self, seat: Seat) -> None:
        self.lost = 0
        self._seat = seat
        self._waiting: list[tuple[str, bytes]] = []
        self._router: Callable[[], Router] | None = None
        self._siblings: SiblingsLoad | None = None
        self._state: SiblingsState | None = None
        self._said: tuple[float, dict[str, tuple[int, int]]] = (float("-inf"), {})

    def publish(self, stage: str, payload: bytes) -> None:
        """Have the same stage of the other workers hear something, within a twentieth of a second; never waits."""
        if len(self._waiting) < _MOST_WAITING and len(payload) < _MOST_BYTES:
            self._waiting.append((stage, payload))
        else:
            self.lost += 1

    async def run(self, router: Callable[[], Router]) -> None:
        """Tell and hear, until cancelled.

        Args:
            router: Gives the router that serves now.
        """
        self._router, loop = router, asyncio.get_running_loop()
        own = self._seat.news[self._seat.number]
        loop.add_reader(own.fileno(), self._hear)
        try:
            while True:
                await asyncio.sleep(_EVERY_S)
                self.tell()
        finally:
            loop.remove_reader(own.fileno())

    def tell(self) -> None:
        """Tell once."""
        assert self._router is not None  # noqa: S101 - `run` has begun
        router = self._router()
        now_s, load = router.clock.now_s(), router.services.load
        counts = own_counts(load, router.models)
        if counts != self._said[1] or now_s - self._said[0] > _HEARTBEAT_S:
            self._said = now_s, counts
            self._send(_LOAD, orjson.dumps(counts))
        for told in self._state_of(router).told(now_s):
            self._send(_STATE, told)
        waiting, self._waiting = self._waiting, []
        for batch in _batches(waiting):
            self._send(_STAGES, batch)
        if self._siblings is None or self._siblings.load is not load:
            self._siblings = SiblingsLoad(load)
        self._siblings.apply(router.models, now_s)

    def _state_of(self, router: Router) -> SiblingsState:
        services = router.services
        if (
            self._state is None
            or self._state.health is not services.health
            or self._state.limits is not services.limits
        ):
            self._state = SiblingsState(services.health, services.limits)
        return self._state

    def _send(self, kind: int, body: bytes) -> None:
        data = _HEAD.pack(kind, self._seat.number) + body
        for number in self._seat.others:
            try:
                self._seat.tells[number].send(data)
            except OSError:  # no room: that worker is busy, or not there
                self.lost += 1

    def _hear(self) -> None:
        own = self._seat.news[self._seat.number]
        for _ in range(_MOST_AT_ONCE):
            try:
                data = own.recv(2 * _MOST_BYTES)
            except OSError:
                return
            try:
                self._take(data)
            except Exception as error:  # noqa: BLE001 - what a worker of another configuration says may not fit here
                _log.debug("news not understood error=%s", type(error).__name__)

    def _take(self, data: bytes) -> None:
        assert self._router is not None  # noqa: S101 - `run` has begun
        kind, number = _HEAD.unpack_from(data)
        router = self._router()
        if kind == _LOAD:
            if self._siblings is not None:
                told = {replica: tuple(counts) for replica, counts in orjson.loads(data[_HEAD.size :]).items()}
                self._siblings.hear(number, told, router.clock.now_s())
            return
        if kind == _STATE:
            self._state_of(router).hear(data[_HEAD.size :], {model.endpoint for model in router.models})
            return
        for stage, payload in _parts(data[_HEAD.size :]):
            router.hear(stage, payload)


def _batches(waiting: list[tuple[str, bytes]]) -> Iterator[bytes]:
    """What is told, in datagrams."""
    parts: list[bytes] = []
    size = 0
    for stage, payload in waiting:
        name = stage.encode()
        if parts and size + len(payload) > _MOST_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
        parts += [_PART.pack(len(name), len(payload)), name, payload]
        size += _PART.size + len(name) + len(payload)
    if parts:
        yield b"".join(parts)


def _parts(data: bytes) -> Iterator[tuple[str, bytes]]:
    at = 0
    while at < len(data):
        name, size = _PART.unpack_from(data, at)
        at += _PART.size
        yield data[at : at + name].decode(), data[at + name : at + name + size]
        at += name + size
