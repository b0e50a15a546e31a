"""An engine's two sockets, over a `Publisher` made by hand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import attrs
import zmq
import zmq.asyncio

from tests.cache.publisher import Publisher

__all__ = ["ZmqEngine", "until"]

END = (2**64 - 1).to_bytes(8, "big")


async def until(is_so: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait for what another task brings about."""
    with anyio.fail_after(seconds):
        while not is_so():  # noqa: ASYNC110 - it is a socket's doing, not ours
            await asyncio.sleep(0.005)


@attrs.define(eq=False)
class ZmqEngine:
    """Publishes what `publisher` says, and answers for what was missed.

    Attributes:
        drops: How many messages of a replay get through before one is dropped, as by a full queue; all if None.
        is_deaf: True to answer no request for a replay.
    """

    publisher: Publisher
    port: int = 0
    replay_port: int = 0
    topic: bytes = b"kv"
    drops: int | None = None
    is_deaf: bool = False
    connects_to: str = ""
    requests: list[int] = attrs.field(factory=list)
    _pub: Any = None
    _context: Any = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[ZmqEngine]:
        """Serve for as long as the block lasts."""
        context = self._context = zmq.asyncio.Context()
        self._pub, router = context.socket(zmq.XPUB), context.socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, 0)
        self._pub.setsockopt(zmq.LINGER, 0)
        try:
            if self.connects_to:
                self._pub.connect(self.connects_to)
            else:
                self.port = _bind(self._pub, self.port)
            self.replay_port = _bind(router, self.replay_port)
            async with anyio.create_task_group() as group:
                group.start_soon(self._serve, router)
                yield self
                group.cancel_scope.cancel()
        finally:
            context.destroy(linger=0)

    async def _serve(self, router: Any) -> None:
        while True:
            client, _, start = await router.recv_multipart()
            self.requests.append(int.from_bytes(start, "big"))
            if self.is_deaf:
                continue
            left, self.drops = self.drops, None
            for seq, payload in self.publisher.buffer:
                if seq < self.requests[-1]:
                    continue
                if left != 0:
                    await router.send_multipart([client, b"", seq.to_bytes(8, "big"), payload])
                left = None if left is None else left - 1
            await router.send_multipart([client, b"", END, b""])

    def restart(self) -> None:
        """Close the door to subscribers, as an engine that goes down does."""
        self._pub.unbind(f"tcp://127.0.0.1:{self.port}")
        self._pub.close(linger=0)

    def resume(self) -> None:
        """Open it again."""
        self._pub = self._context.socket(zmq.XPUB)
        self._pub.setsockopt(zmq.LINGER, 0)
        self.port = _bind(self._pub, self.port)

    async def subscribed(self) -> None:
        """Wait for a subscription, which comes a little after the handshake: what is published before is lost."""
        with anyio.fail_after(10.0):
            await self._pub.recv()

    async def send(self, message: tuple[int, bytes]) -> None:
        """Publish; it is lost while the door is closed."""
        seq, payload = message
        if self._pub.closed:
            return
        await self._pub.send_multipart([self.topic, seq.to_bytes(8, "big"), payload])

    async def send_frames(self, *frames: bytes) -> None:
        """Publish something else."""
        await self._pub.send_multipart(list(frames))


def _bind(socket: Any, port: int) -> int:
    """Listen there, or anywhere."""
    if port:
        socket.bind(f"tcp://127.0.0.1:{port}")
        return port
    found: int = socket.bind_to_random_port("tcp://127.0.0.1")
    return found
