"""Listening to a whole fleet."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import attrs
import pytest

pytest.importorskip("msgspec")
pytest.importorskip("zmq")

from kvfleet.adapters.base import EngineLoad
from kvfleet.cache.knowledge import CacheKnowledge
from kvfleet.cache.kv_state import KVMode
from kvfleet.clock import FrozenClock
from kvfleet.config.caching import KVEventsConfig, PromptBlocksConfig
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.telemetry.kv_watch import CacheWatch
from kvfleet.telemetry.load import FleetLoad
from kvfleet.testing.fakes import FakeAdapter
from tests.cache.publisher import Publisher
from tests.cache.test_knowledge import chain
from tests.telemetry.test_kv_stream import free_port
from tests.telemetry.zmq_engine import ZmqEngine, until

TOKENS = {"tokens": [{"token_id": token, "token_extra_id": 0} for token in (1, 2, 3, 4)]}
CREATED = {"event_id": 0, "data": {"type": "created", "num_blocks_per_cache_level": [9]}}
STORED = {
    "event_id": 1,
    "data": {"type": "stored", "parent_hash": None, "blocks": [{"block_hash": 7, "cache_level": 0, **TOKENS}]},
}


@attrs.define
class Drained(FakeAdapter):
    """An engine whose events are handed out once."""

    events: list[Any] = attrs.field(factory=list)
    fails: BackendError | None = None
    is_able: bool = True
    asked: int = 0

    async def drain_kv_events(self) -> bytes | None:
        """Hand them out."""
        self.asked += 1
        if self.fails is not None:
            raise self.fails
        events, self.events = self.events, []
        return json.dumps(events).encode() if self.is_able else None


class Scene:
    """A fleet, and a watch over it."""

    def __init__(self, *settings: KVEventsConfig, adapter: FakeAdapter | None = None) -> None:
        blocks = PromptBlocksConfig(mode="engine", block_tokens=4)
        self.models = [
            ModelConfig(name="m", endpoint=f"http://127.0.0.1:{8000 + at}", kv_events=one, prompt_blocks=blocks)
            for at, one in enumerate(settings)
        ]
        self.clock = FrozenClock()
        self.caches = CacheKnowledge(self.clock)
        self.caches.register(self.models)
        self.load = FleetLoad(self.clock)
        self.load.register(self.models)
        adapters = {model.id: adapter or FakeAdapter() for model in self.models}
        self.watch = CacheWatch(self.caches, adapters, self.load)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Watch for as long as the block lasts."""
        async with anyio.create_task_group() as group:
            group.start_soon(self.watch.run)
            yield
            group.cancel_scope.cancel()
        self.watch.close()

    def modes(self) -> list[KVMode]:
        """How each cache is known."""
        return [source.judge()[0] for source in self.caches.sources]

    def entries(self) -> int:
        """How many blocks are known to be in some cache; unlike `held`, asking takes no time."""
        known: Any = self.caches.state()["m"]
        return int(known["entries"])

    def held(self) -> float:
        """What the first replica holds of a prompt."""
        self.clock.advance(1)
        found = self.caches.held("m", chain([1, 2, 3, 4, 5]), self.clock.now_s())
        return found[self.models[0].id].device_tokens


def trtllm(**more: Any) -> KVEventsConfig:
    """Asked over HTTP."""
    return KVEventsConfig(source="trtllm", poll_ms=5, **more)


async def test_an_engine_is_drained() -> None:
    """Again and again."""
    engine = Drained(events=[CREATED, STORED])
    scene = Scene(trtllm(), adapter=engine)
    async with scene.watching():
        await until(lambda: scene.modes() == [KVMode.EXACT])
        assert scene.held() == 4
        engine.events = [{"event_id": 2, "data": {"type": "removed", "block_hashes": [7]}}]
        await until(lambda: not engine.events and engine.asked > 3)
        assert scene.held() == 0


async def test_an_engine_that_cannot_be_reached() -> None:
    """Is not known, and asked again."""
    engine = Drained(fails=BackendError(Fault.CONNECT, "no"))
    scene = Scene(trtllm(), adapter=engine)
    async with scene.watching():
        await until(lambda: engine.asked)
        assert scene.modes() == [KVMode.APPROXIMATE]


async def test_an_adapter_that_cannot_ask() -> None:
    """Is left alone, and the reason is told."""
    engine = Drained(is_able=False)
    scene = Scene(trtllm(), adapter=engine)
    async with scene.watching():
        await until(lambda: engine.asked)
        await anyio.sleep(0.05)
        assert engine.asked == 1
    assert scene.caches.mode(scene.models[0].id) == (KVMode.APPROXIMATE, "not connected")
    assert scene.caches.sources[0].states[0].why == "its adapter cannot ask for events"


async def test_publishers_each_on_its_port() -> None:
    """And the ranks of one on the ports above it."""
    ports = [free_port(), free_port()]
    settings = [
        KVEventsConfig(endpoint=f"tcp://{{host}}:{port}", replay=f"tcp://{{host}}:{free_port()}") for port in ports
    ]
    scene = Scene(*settings)
    engines = [
        ZmqEngine(Publisher(scene.clock), port, int(one.replay.rpartition(":")[2]))
        for port, one in zip(ports, settings, strict=True)
    ]
    engines[0].publisher.store([1, 2, 3, 4])
    async with engines[0].running(), engines[1].running(), scene.watching():
        await until(lambda: scene.modes() == [KVMode.EXACT, KVMode.EXACT])
        assert scene.held() == 4


async def test_an_engine_that_connects_to_us() -> None:
    """The second replica's on the next port."""
    port = free_port()
    settings = KVEventsConfig(endpoint=f"tcp://127.0.0.1:{port}", bind=True)
    scene = Scene(settings, settings)
    second = ZmqEngine(Publisher(scene.clock), connects_to=f"tcp://127.0.0.1:{port + 1}")
    async with scene.watching(), second.running():
        await until(lambda: scene.caches.sources[1].states[0].is_connected)
        await second.subscribed()
        await second.send(second.publisher.store([1, 2, 3, 4]))
        await until(lambda: scene.modes() == [KVMode.APPROXIMATE, KVMode.EXACT])


def successor(scene: Scene, *models: ModelConfig) -> CacheWatch:
    """A watch over a fleet read anew, as a reload makes it, with what was known and listened to before."""
    caches = CacheKnowledge(scene.clock)
    caches.register(models)
    caches.inherit(scene.caches)
    watch = CacheWatch(caches, {model.id: FakeAdapter() for model in models}, scene.load)
    watch.inherit(scene.watch)
    scene.caches, scene.watch = caches, watch
    return watch


async def test_nothing_is_missed_between_two_watches() -> None:
    """What an engine says while nobody listens is read by the next one, who need not connect or ask."""
    engine = ZmqEngine(Publisher(FrozenClock()), free_port(), free_port())
    at = "tcp://127.0.0.1"
    scene = Scene(KVEventsConfig(endpoint=f"{at}:{engine.port}", replay=f"{at}:{engine.replay_port}"))
    async with engine.running():
        await watched(scene, lambda: scene.modes() == [KVMode.EXACT], close=False)
        await engine.send(engine.publisher.store([1, 2, 3, 4]))
        await watched(scene, lambda: scene.entries() == 1, close=False)
        for _ in range(3):
            await engine.send(engine.publisher.evict(random.Random(1)))
            await engine.send(engine.publisher.store([1, 2, 3, 4]))
        await engine.send(engine.publisher.evict(random.Random(1)))
        successor(scene, *scene.models)
        assert scene.modes() == [KVMode.EXACT]
        asked = len(engine.requests)
        await watched(scene, lambda: scene.entries() == 0)
        state = scene.caches.sources[0].states[0]
        assert (len(engine.requests), state.counts.gaps, state.counts.losses) == (asked, 0, 0)
        assert not state.is_connected


async def test_what_is_no_longer_listened_to_is_let_go_of() -> None:
    """An engine that is asked in another way than before begins anew, and its port is free at once."""
    port = free_port()
    before = KVEventsConfig(endpoint=f"tcp://127.0.0.1:{port}", bind=True)
    scene = Scene(before)
    old = scene.caches.sources[0].states[0]
    async with ZmqEngine(Publisher(scene.clock), connects_to=f"tcp://127.0.0.1:{port}").running():
        await watched(scene, lambda: old.is_connected, close=False)
        assert old.is_connected
        successor(scene, attrs.evolve(scene.models[0], kv_events=attrs.evolve(before, topic="k")))
        assert not old.is_connected
        new = scene.caches.sources[0].states[0]
        await watched(scene, lambda: new.is_connected)
        assert new is not old


async def test_a_replay_that_was_broken_off_is_asked_for_again() -> None:
    """By whoever listens next."""
    engine = ZmqEngine(Publisher(FrozenClock()), free_port(), free_port(), is_deaf=True)
    at = "tcp://127.0.0.1"
    scene = Scene(KVEventsConfig(endpoint=f"{at}:{engine.port}", replay=f"{at}:{engine.replay_port}"))
    engine.publisher.store([1, 2, 3, 4])
    async with engine.running():
        await watched(scene, lambda: engine.requests, close=False)
        engine.is_deaf = False
        successor(scene, *scene.models)
        await watched(scene, lambda: scene.modes() == [KVMode.EXACT] and scene.entries() == 1)
    assert engine.requests == [0, 0]


async def watched(scene: Scene, is_so: Callable[[], Any], *, close: bool = True) -> None:
    """Watch until something is so; the last time, subscribe no more then."""
    async with anyio.create_task_group() as group:
        group.start_soon(scene.watch.run)
        await until(is_so)
        group.cancel_scope.cancel()
    if close:
        scene.watch.close()


async def test_what_breaks_one_reader_does_not_break_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, nothing is believed, and it is tried again."""
    engine = ZmqEngine(Publisher(FrozenClock()), free_port(), free_port())
    at = "tcp://127.0.0.1"
    settings = KVEventsConfig(endpoint=f"{at}:{engine.port}", replay=f"{at}:{engine.replay_port}")
    scene = Scene(settings, trtllm(), adapter=Drained(events=[CREATED]))

    def broken(rank: int) -> Any:
        raise RuntimeError(f"rank {rank}")

    scene.caches.sources[0].states[0].make_blocks = broken
    engine.publisher.store([1, 2, 3, 4])
    async with engine.running(), scene.watching():
        await until(lambda: scene.modes() == [KVMode.APPROXIMATE, KVMode.EXACT])
        await until(lambda: "kv events stopped" in caplog.text)
    assert scene.caches.mode(scene.models[0].id) == (KVMode.APPROXIMATE, "what it said could not be taken in")


async def test_engines_own_figures_are_held_against_it() -> None:
    """While they are fresh, and where they are one engine's."""
    engine = Drained(events=[CREATED, STORED])
    scene = Scene(trtllm(), adapter=engine)
    async with scene.watching():
        await until(lambda: scene.modes() == [KVMode.EXACT])
    blocks = next(scene.caches.sources[0].blocks())
    blocks._whole.copies = 100
    scene.load.report(scene.models[0].endpoint, EngineLoad(cache_blocks=9), scene.clock.now_s())
    scene.clock.advance(60)
    scene.watch.compare()
    assert blocks.copies == 100
    scene.load.report(scene.models[0].endpoint, EngineLoad(cache_blocks=9), scene.clock.now_s())
    scene.watch.compare()
    assert scene.caches.mode(scene.models[0].id) == (KVMode.APPROXIMATE, "it announced more blocks than its cache has")


async def test_nobody_tells() -> None:
    """Then there is nothing to do."""
    await CacheWatch(CacheKnowledge(), {}, FleetLoad()).run()
