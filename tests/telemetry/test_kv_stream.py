"""The wire of KV events, with sockets."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

pytest.importorskip("msgspec")
pytest.importorskip("zmq")

from kvfleet.cache.engine_blocks import EngineBlocks
from kvfleet.cache.kv_sequence import EventStream
from kvfleet.cache.kv_state import KVMode
from kvfleet.clock import FrozenClock
from kvfleet.telemetry.kv_stream import EventReader, zmq_context
from tests.cache.made import Noted
from tests.cache.publisher import Publisher
from tests.telemetry.zmq_engine import ZmqEngine, until

A, B, C = [1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]


class Scene:
    """An engine, and a reader that listens to it."""

    def __init__(self) -> None:
        self.clock = FrozenClock()
        self.publisher = Publisher(self.clock)
        self.index = Noted()
        self.state = EventStream(
            make_blocks=lambda rank: [EngineBlocks(index=self.index, holder="a", block_tokens=4)], clock=self.clock
        )

    def engine(self, **options: Any) -> ZmqEngine:
        """The engine, not yet running."""
        return ZmqEngine(self.publisher, **options)

    @contextlib.asynccontextmanager
    async def reading(self, endpoint: str, replay: str = "", **options: Any) -> AsyncIterator[EventReader]:
        """Read for as long as the block lasts."""
        context = zmq_context()
        self.state.can_replay = bool(replay)
        reader = EventReader(state=self.state, context=context, endpoint=endpoint, replay=replay, **options)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(reader.run)
                yield reader
                group.cancel_scope.cancel()
        finally:
            reader.close()
            context.destroy(linger=0)

    def reading_from(self, engine: ZmqEngine, **options: Any) -> contextlib.AbstractAsyncContextManager[EventReader]:
        """The same, with replay."""
        at = "tcp://127.0.0.1"
        return self.reading(f"{at}:{engine.port}", f"{at}:{engine.replay_port}", **options)

    @property
    def is_right(self) -> bool:
        """True if everything is known, and known to be so."""
        claims = self.index.claims.get(("a", "gpu"), set())
        return self.state.judge()[0] is KVMode.EXACT and claims == self.publisher.held()


def free_port() -> int:
    """A port that is free on loopback now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def scene() -> Scene:
    """A scene."""
    return Scene()


async def test_live_and_replayed(scene: Scene) -> None:
    """What was said before one listened, and what is said then."""
    scene.publisher.store(A)
    async with scene.engine().running() as engine, scene.reading_from(engine):
        await until(lambda: scene.is_right)
        await engine.send(scene.publisher.store([*A, *B]))
        await until(lambda: scene.is_right)
        await engine.send(scene.publisher.evict(random.Random(1)))
        await until(lambda: scene.is_right)
    assert engine.requests == [0]
    assert scene.state.counts.batches == 3
    assert not scene.state.is_connected


async def test_a_gap(scene: Scene) -> None:
    """Is filled from the replay socket."""
    async with scene.engine().running() as engine, scene.reading_from(engine):
        await until(lambda: scene.is_right)
        await engine.send(scene.publisher.store(A))
        scene.publisher.store(B)
        await engine.send(scene.publisher.store(C))
        await until(lambda: scene.is_right and scene.state.counts.gaps)
    assert engine.requests == [0, 0]


async def test_a_replay_that_loses_messages(scene: Scene) -> None:
    """Is asked for its rest."""
    for at in range(6):
        scene.publisher.store([0, 0, 0, at])
    async with scene.engine(drops=3).running() as engine, scene.reading_from(engine):
        await until(lambda: scene.is_right)
    assert engine.requests == [0, 2]


async def test_a_restart(scene: Scene) -> None:
    """The engine comes, goes, and comes back on the same ports with an empty cache."""
    port, replay_port = free_port(), free_port()
    address, replay = f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{replay_port}"
    async with scene.reading(address, replay):
        async with scene.engine(port=port, replay_port=replay_port).running() as first:
            await until(lambda: scene.is_right)
            await first.send(scene.publisher.store(A))
            await until(lambda: scene.state.counts.batches == 1)
        await until(lambda: not scene.state.is_connected)
        scene.publisher.restart()
        scene.publisher.store(B)
        async with scene.engine(port=port, replay_port=replay_port).running() as second:
            await until(lambda: scene.is_right)
            await second.send(scene.publisher.store(C))
            await until(lambda: scene.is_right)
    assert scene.state.counts.restarts == 1


async def test_without_replay(scene: Scene) -> None:
    """From the first message on."""
    async with scene.engine().running() as engine, scene.reading(f"tcp://127.0.0.1:{engine.port}"):
        await until(lambda: scene.state.is_connected)
        await engine.subscribed()
        await engine.send(scene.publisher.store(A))
        await until(lambda: scene.is_right)
    assert engine.requests == []


async def test_an_engine_that_connects_to_us(scene: Scene) -> None:
    """As vLLM does when it is given an address without a star."""
    address = f"tcp://127.0.0.1:{free_port()}"
    async with scene.reading(address, binds=True), scene.engine(connects_to=address).running() as engine:
        await until(lambda: scene.state.is_connected)
        await engine.subscribed()
        await engine.send(scene.publisher.store(A))
        await until(lambda: scene.is_right)


async def test_a_topic(scene: Scene) -> None:
    """Of other topics nothing is heard."""
    async with scene.engine().running() as engine, scene.reading_from(engine, topic="kv"):
        await until(lambda: scene.is_right)
        engine.topic = b"other"
        await engine.send((7, b"\xc1"))
        engine.topic = b"kv@pod"
        await engine.send(scene.publisher.store(A))
        await until(lambda: scene.is_right)
    assert (scene.state.counts.unreadable, scene.state.counts.gaps) == (0, 0)


async def test_frames_of_another_shape(scene: Scene) -> None:
    """Are counted, and harm nothing."""
    async with scene.engine().running() as engine, scene.reading_from(engine):
        await until(lambda: scene.is_right)
        await engine.send_frames(b"kv")
        await engine.send_frames(b"kv", b"one", b"\x90")
        await engine.send(scene.publisher.store(A))
        await until(lambda: scene.is_right)
    assert scene.state.counts.unreadable == 2


async def test_nobody_there(scene: Scene) -> None:
    """Nothing is known, and nothing fails."""
    async with scene.reading("tcp://127.0.0.1:9", "tcp://127.0.0.1:9"):
        await anyio.sleep(0.05)
        assert scene.state.judge() == (KVMode.APPROXIMATE, "not connected")
