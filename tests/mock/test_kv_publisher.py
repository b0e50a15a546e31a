"""KV events over ZMQ: frames as vLLM 0.32 sends them, and an index that follows them to the truth."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from kvfleet.cache.kv_events import AllCleared, BlockRemoved, BlockStored, EventBatch, decode
from kvfleet.mock.kv_publisher import KVPublisher, wire_events, zmq_context
from kvfleet.sim.events import Removed
from tests.mock.serving import HELLO, ask, served

zmq = pytest.importorskip("zmq")
msgspec = pytest.importorskip("msgspec")

# A BlockStored and a BlockRemoved as a vLLM 0.32 sent them, their lists shortened.
RECORDED: dict[str, dict[str, Any]] = {
    "BlockStored": {
        "type": "BlockStored",
        "block_hashes": [6927999755895978633],
        "parent_block_hash": None,
        "token_ids": [1, 1841, 203],
        "block_size": 32,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None],
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    },
    "BlockRemoved": {"type": "BlockRemoved", "block_hashes": [15850549057331421307], "medium": "GPU", "group_idx": 0},
}


@attrs.define
class Subscriber:
    """Hears an engine, and asks for what it missed."""

    publisher: KVPublisher
    heard: Any
    replay: str

    async def next(self) -> tuple[bytes, int, EventBatch]:
        """The next message."""
        async with asyncio.timeout(10):
            topic, number, payload = await self.heard.recv_multipart()
        return topic, int.from_bytes(number, "big"), decode(payload)

    async def missed(self, first: int) -> list[tuple[bytes, int]]:
        """Topic and number of everything from a number on, and the end marker."""
        asking = self.publisher.context.socket(zmq.DEALER)
        asking.connect(self.replay)
        await asking.send_multipart([b"", first.to_bytes(8, "big")])
        found = []
        async with asyncio.timeout(10):
            while not found or found[-1][1] != -1:
                empty, topic, number, payload = await asking.recv_multipart()
                assert empty == b""
                assert (payload == b"") == (int.from_bytes(number, "big", signed=True) == -1)
                found.append((topic, int.from_bytes(number, "big", signed=True)))
        asking.close(linger=0)
        return found


@pytest.fixture
async def subscriber(tmp_path: Path) -> AsyncIterator[Subscriber]:
    """A publisher, not yet open, and a subscriber that will hear it."""
    context = zmq_context()
    endpoint, replay = f"ipc://{tmp_path}/pub", f"ipc://{tmp_path}/replay"
    heard = context.socket(zmq.SUB)
    heard.subscribe(b"")
    heard.setsockopt(zmq.RECONNECT_IVL, 10)
    heard.connect(endpoint)
    publisher = KVPublisher(context=context, endpoint=endpoint, replay=replay, time_s=lambda: 12.5)
    yield Subscriber(publisher, heard, replay)
    context.destroy(linger=0)


async def joined(publisher: KVPublisher, heard: Any) -> None:
    """Wait until what is published is heard: a subscription takes effect some time after it is made."""
    socket: Any = publisher._publisher
    async with asyncio.timeout(30):
        while not await heard.poll(10):
            socket.send(b"anybody?")
        socket.send(b"good")
        while await heard.recv_multipart() != [b"good"]:
            pass


def chat(text: str) -> dict[str, Any]:
    """A chat with this content."""
    return {**HELLO, "messages": [{"role": "user", "content": text}]}


class TestOnTheWire:
    async def test_a_batch_has_vllms_frames_and_fields(self, subscriber: Subscriber) -> None:
        """Topic, number, and a payload with the fields that a real engine's has, of the same types."""
        async with served(publisher=subscriber.publisher) as server:
            await joined(subscriber.publisher, subscriber.heard)
            await ask(server, body={**chat("x" * 640), "cache_salt": "tenant"})
            async with asyncio.timeout(10):
                topic, number, payload = await subscriber.heard.recv_multipart()
        assert (topic, number) == (b"kv-events", bytes(8))
        time_s, events, rank = msgspec.msgpack.decode(payload)
        assert (time_s, rank) == (12.5, 0)
        (event,) = events
        recorded = RECORDED["BlockStored"]
        assert list(event) == list(recorded)
        differing = {key for key in event if type(event[key]) is not type(recorded[key])}
        assert not differing
        assert (len(event["block_hashes"]), len(event["token_ids"])) == (10, 160)
        assert event["extra_keys"] == [["tenant"]] + [None] * 9

    async def test_the_tokens_are_those_of_tokenize(self, subscriber: Subscriber) -> None:
        """What a router learns from the events is what it gets when it asks for a prompt's tokens."""
        async with served(publisher=subscriber.publisher) as server:
            await joined(subscriber.publisher, subscriber.heard)
            await ask(server, body=chat("y" * 640))
            _, _, batch = await subscriber.next()
            tokens = (await ask(server, "/tokenize", chat("y" * 640))).json["tokens"]
        (stored,) = batch.events
        assert isinstance(stored, BlockStored)
        assert stored.is_dense
        assert list(memoryview(stored.tokens).cast("I")) == tokens[:160]

    async def test_what_was_missed_can_be_asked_for(self, subscriber: Subscriber) -> None:
        """From a number on, and the end is marked."""
        async with served(publisher=subscriber.publisher) as server:
            await joined(subscriber.publisher, subscriber.heard)
            for letter in "abc":
                await ask(server, body=chat(letter * 640))
            assert [(await subscriber.next())[1] for _ in range(3)] == [0, 1, 2]
            assert await subscriber.missed(1) == [(b"kv-events", 1), (b"kv-events", 2), (b"", -1)]
            assert await subscriber.missed(7) == [(b"", -1)]

    async def test_it_can_connect_to_who_listens(self, tmp_path: Path) -> None:
        """Many engines, one subscriber with an address of its own: then it is the engine that connects."""
        context = zmq_context()
        endpoint = f"ipc://{tmp_path}/pub"
        heard = context.socket(zmq.SUB)
        heard.subscribe(b"")
        heard.bind(endpoint)
        publisher = KVPublisher(context=context, endpoint=endpoint, binds=False, topic="kv@1", time_s=lambda: 0.0)
        async with served(publisher=publisher) as server:
            await joined(publisher, heard)
            await ask(server, body=chat("x" * 640))
            async with asyncio.timeout(10):
                assert (await heard.recv_multipart())[0] == b"kv@1"
        context.destroy(linger=0)

    async def test_following_the_events_is_knowing_the_cache(self, subscriber: Subscriber) -> None:
        """Whoever keeps the blocks that were stored and not removed predicts every answer's cached tokens."""
        known: set[int] = set()
        chance = random.Random(7)
        async with served(publisher=subscriber.publisher, cache_tokens=1600, answer_tokens=40) as server:
            await joined(subscriber.publisher, subscriber.heard)
            expected = 0
            for _ in range(60):
                prompt = chance.choice("abcdef") * 4 * chance.choice([64, 100, 200])
                answer = (await ask(server, body=chat(prompt))).json
                while expected < subscriber.publisher._number:
                    _, number, batch = await subscriber.next()
                    assert number == expected
                    expected += 1
                    follow(batch, known)
                assert len(known) * 16 <= 1600
                assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] <= 1600
            assert len(known) == server.engine.adapter.live.engine._blocks.pool.cached
            await ask(server, "/reset_prefix_cache", {})
            _, _, batch = await subscriber.next()
        assert batch.events == (AllCleared(),)


def follow(batch: EventBatch, known: set[int]) -> None:
    """Keep what is there; nothing is stored twice or removed without having been there."""
    for event in batch.events:
        if isinstance(event, BlockStored):
            assert not known & set(event.hashes)
            assert event.parent is None or event.parent in known
            known.update(event.hashes)
        elif isinstance(event, BlockRemoved):
            assert set(event.hashes) <= known
            known.difference_update(event.hashes)


def test_removals_are_told_block_by_block() -> None:
    """As vLLM does, with its fields."""
    told = list(wire_events([Removed(1.0, (5, 6))], 16))
    assert [event["block_hashes"] for event in told] == [[5], [6]]
    assert list(told[0]) == list(RECORDED["BlockRemoved"])


def test_an_endpoint_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    """The error says which."""
    context = zmq_context()
    publisher = KVPublisher(context=context, endpoint=f"ipc://{tmp_path}/no/where", time_s=lambda: 0.0)
    with pytest.raises(OSError, match="cannot publish KV events at ipc://"):
        publisher.open()
    publisher.close()
    context.destroy(linger=0)
