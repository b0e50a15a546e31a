"""An engine with a prefix cache that tells of it: vLLM's HTTP and ZMQ, as far as a router needs them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import attrs
import orjson

from kvfleet.adapters.call import Operation
from kvfleet.cache.kv_events import BlockRemoved, BlockStored, Event
from kvfleet.cache.tokens import LocalTokenizer
from kvfleet.clock import SystemClock
from tests.cache.hybrid_engine import HybridEngine, Layers
from tests.cache.publisher import SIZE, Publisher
from tests.gateway.upstream import whole
from tests.telemetry.zmq_engine import ZmqEngine

__all__ = ["DraftingKVEngine", "HybridKVEngine", "KVEngine", "RankedEngine", "free_ports"]


class Ticking(SystemClock):
    """The machine's clock, for a publisher that would advance a frozen one."""

    def advance(self, seconds: float) -> None:
        """Time passes by itself."""


@attrs.define(eq=False)
class KVEngine:
    """Answers chats, counts what of a prompt it had cached, and publishes what it stores and removes.

    Attributes:
        tokenizer: The model's.
        name: What it answers, to tell engines apart.
        port: Where it is; any free one if 0. It publishes on the next, and replays on the one after.
        asked: How many tokens of each prompt it was asked, and how many it had.
        is_silent: True to publish nothing.
    """

    tokenizer: LocalTokenizer
    name: str = "engine"
    port: int = 0
    asked: list[tuple[int, int]] = attrs.field(factory=list)
    is_silent: bool = False
    publisher: Publisher = attrs.field(factory=lambda: Publisher(Ticking()))  # type: ignore[arg-type]
    wire: ZmqEngine = attrs.field(init=False)
    _queried: int = 0
    _hits: int = 0

    @wire.default
    def _make_wire(self) -> ZmqEngine:
        return ZmqEngine(self.publisher)

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.port}"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[KVEngine]:
        """Serve for as long as the block lasts."""
        if not self.port:
            self.port = free_ports(3)
        self.wire.port, self.wire.replay_port = self.port + 1, self.port + 2
        async with serving(self.port, lambda _, path, body: self.answer(path, body)), self.wire.running():
            yield self

    async def answer(self, path: str, body: bytes) -> bytes:
        """Answer one request."""
        if path == "/metrics":
            return whole(self.metrics())
        if path == "/tokenize":
            ids = self.tokenizer.tokenise(Operation.CHAT, orjson.loads(body))
            tokens = [int.from_bytes(ids[at : at + 4], "little") for at in range(0, len(ids), 4)]
            return whole(orjson.dumps({"tokens": tokens, "count": len(tokens)}))
        if path.endswith("/chat/completions"):
            return whole(orjson.dumps(await self._chat(orjson.loads(body))))
        return whole(b"{}")

    async def _chat(self, body: Any) -> Any:
        ids = self.tokenizer.tokenise(Operation.CHAT, body)
        tokens = [int.from_bytes(ids[at : at + 4], "little") for at in range(0, len(ids), 4)]
        cached = self.hit(tokens)
        self.asked.append((len(tokens), cached))
        self._queried += len(tokens)
        self._hits += cached
        message = self.store(tokens)
        if not self.is_silent:
            await self.wire.send(message)
        usage = {
            "prompt_tokens": len(tokens),
            "completion_tokens": 1,
            "total_tokens": len(tokens) + 1,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        choice = {"index": 0, "message": {"role": "assistant", "content": self.name}, "finish_reason": "stop"}
        return {"id": "1", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}

    def hit(self, tokens: list[int]) -> int:
        """How many tokens of a prompt it has, in whole blocks, short of all."""
        cache, blocks = self.publisher.cache, 0
        while (end := (blocks + 1) * SIZE) < len(tokens) and tuple(tokens[:end]) in cache:
            blocks += 1
        return blocks * SIZE

    def store(self, tokens: list[int]) -> tuple[int, bytes]:
        """Keep a prompt's blocks: the message that tells of it."""
        return self.publisher.store(tokens)

    async def evict(self, count: int, rng: random.Random) -> None:
        """Forget some blocks, from the ends of prompts."""
        for _ in range(count):
            await self.wire.send(self.publisher.evict(rng))

    def metrics(self, labels: str = 'model_name="m"') -> bytes:
        """The metrics page."""
        lines = {
            "vllm:num_requests_running": 0,
            "vllm:num_requests_waiting": 0,
            "vllm:kv_cache_usage_perc": 0,
            "vllm:prefix_cache_queries_total": self._queried,
            "vllm:prefix_cache_hits_total": self._hits,
        }
        return "".join(f"{key}{{{labels}}} {value}\n" for key, value in lines.items()).encode()


@attrs.define(eq=False)
class HybridKVEngine(KVEngine):
    """One whose model has a group of layers with full attention, and one with a sliding window of nine tokens.

    It tells of them as vLLM 0.32 does, and finds what `HybridEngine` finds.
    """

    layers: HybridEngine = attrs.field(
        factory=lambda: HybridEngine([Layers("full_attention", SIZE), Layers("sliding_window", SIZE, 9)])
    )

    def hit(self, tokens: list[int]) -> int:
        """See `KVEngine`."""
        return self.layers.hit(tuple(tokens))

    def store(self, tokens: list[int]) -> tuple[int, bytes]:
        """See `KVEngine`."""
        return self.publisher.publish(list(map(_told, self.layers.compute(tuple(tokens)))))

    async def evict(self, count: int, rng: random.Random) -> None:
        """Forget some blocks, whichever."""
        events = [event for _ in range(count) for event in self.layers.lose(rng)]
        await self.wire.send(self.publisher.publish(list(map(_told, events))))


class DraftingKVEngine(KVEngine):
    """One whose model drafts: it computes the last block that it finds anew, and no event says so."""

    def hit(self, tokens: list[int]) -> int:
        """See `KVEngine`."""
        return max(super().hit(tokens) - SIZE, 0)


def _told(event: Event) -> dict[str, Any]:
    """An event in vLLM's words."""
    if isinstance(event, BlockRemoved):
        return {"type": "BlockRemoved", "block_hashes": event.hashes, "medium": "GPU", "group_idx": event.group}
    assert isinstance(event, BlockStored)
    return {
        "type": "BlockStored",
        "block_hashes": event.hashes,
        "parent_block_hash": event.parent,
        "token_ids": [int.from_bytes(event.tokens[at : at + 4], "little") for at in range(0, len(event.tokens), 4)],
        "block_size": event.block_tokens,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "group_idx": event.group,
        "kv_cache_spec_kind": event.kind,
        **({"kv_cache_spec_sliding_window": event.window} if event.window else {}),
    }


@attrs.define(eq=False)
class RankedEngine:
    """One server in front of data-parallel ranks, each with a cache of its own; a header says which is asked.

    Attributes:
        ranks: The engines; that of rank r publishes on the port r + 1 above the server's, and replays 10 above that.
        port: Where the server is.
        unsaid: Requests that did not say who is asked.
    """

    ranks: list[KVEngine]
    port: int = attrs.field(factory=lambda: free_ports(20))
    unsaid: int = 0

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.port}"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[RankedEngine]:
        """Serve for as long as the block lasts."""
        async with contextlib.AsyncExitStack() as stack:
            for rank, engine in enumerate(self.ranks):
                engine.publisher.rank = rank
                engine.wire.port, engine.wire.replay_port = self.port + 1 + rank, self.port + 11 + rank
                await stack.enter_async_context(engine.wire.running())
            await stack.enter_async_context(serving(self.port, self._answer))
            yield self

    async def _answer(self, head: list[bytes], path: str, body: bytes) -> bytes:
        if path == "/metrics":
            pages = (engine.metrics(f'engine="{rank}",model_name="m"') for rank, engine in enumerate(self.ranks))
            return whole(b"".join(pages))
        asked = next((line.partition(b":")[2] for line in head if line.startswith(b"x-data-parallel-rank:")), None)
        self.unsaid += asked is None and path.endswith("/chat/completions")
        return await self.ranks[int(asked or 0)].answer(path, body)


@contextlib.asynccontextmanager
async def serving(port: int, answer: Callable[[list[bytes], str, bytes], Awaitable[bytes]]) -> AsyncIterator[None]:
    """Answer HTTP by the head's lines in lower case, the path, and the body."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
                length = next((int(line[15:]) for line in head if line.startswith(b"content-length:")), 0)
                body = await reader.readexactly(length)
                writer.write(await answer(head, head[0].split(b" ")[1].decode(), body))
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", port):
        try:
            yield
        finally:
            for writer in writers:
                writer.close()


def free_ports(count: int) -> int:
    """The first of so many ports in a row that are free.

    They are below those that the system gives to whoever connects, so that they are still free when an engine that was
    killed is started again.
    """
    while True:
        first = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
