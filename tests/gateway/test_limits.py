"""What a fleet file says of clients is held: sizes, depth, connections, and how slow they may be; and what it costs."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import resource
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import attrs
import httpx
import pytest

from kvfleet.config.limits import ClientLimits
from kvfleet.config.schema import (
    FleetConfig,
    GatewayConfig,
    ModelCapabilities,
    ModelConfig,
    TelemetryConfig,
    TraceStoreConfig,
)
from kvfleet.gateway.connection import ClientConnection
from kvfleet.gateway.http_exchange import HTTPExchange
from kvfleet.gateway.server import Serving, running
from kvfleet.runtime import Router
from tests.gateway.upstream import SSE_HEAD, chunk, upstream, whole

ANSWER = whole(b'{"id":"1","object":"chat.completion","choices":[{"index":0,"message":{"content":"Yes"}}]}')
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@contextlib.asynccontextmanager
async def gateway_to(url: str, *, provider: str = "vllm", **limits: Any) -> AsyncIterator[Serving]:
    """A gateway before one backend, with the real router and the real adapter."""
    config = FleetConfig(
        models=(ModelConfig(name="m", endpoint=url, provider=provider),),
        gateway=GatewayConfig(limits=ClientLimits(**limits)),
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )
    async with running(config, router=Router(config, polls=False)) as serving:
        yield serving


def address(serving: Serving) -> tuple[str, int]:
    """Where it listens."""
    host, _, port = serving.url.removeprefix("http://").partition(":")
    return host, int(port)


async def told(serving: Serving, data: bytes) -> tuple[int, str]:
    """Status and code of the answer to some bytes."""
    reader, writer = await asyncio.open_connection(*address(serving))
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


async def test_sizes_are_as_configured() -> None:
    """A smaller head, fewer headers, a shallower body."""
    async with (
        upstream(ANSWER) as backend,
        gateway_to(backend.url, max_header_bytes=2048, max_headers=10, max_json_depth=8) as serving,
        httpx.AsyncClient(base_url=serving.url) as client,
    ):
        many = b"".join(b"X-%d: 1\r\n" % i for i in range(11))
        assert await told(serving, b"GET /livez HTTP/1.1\r\n%b\r\n" % many) == (431, "invalid_http")
        assert await told(serving, b"GET /%b HTTP/1.1\r\n\r\n" % (b"x" * 2048)) == (431, "invalid_http")
        assert await told(serving, b"GET /livez HTTP/1.1\r\nX: %b\r\n\r\n" % (b"x" * 2048)) == (431, "invalid_http")
        for depth, status in ((7, 200), (8, 400)):  # the body itself is one more level
            nested: Any = "[[[[[[[[[["
            for _ in range(depth):
                nested = [nested]
            answer = await client.post("/v1/chat/completions", json={**CHAT, "x": nested})
            assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"] == "the request body is nested deeper than 8 levels"


async def test_a_deep_body_is_refused_by_default_and_costs_nothing() -> None:
    """A hundred thousand levels, open or closed, are a 400 and no defect of ours."""
    async with (
        upstream(ANSWER) as backend,
        gateway_to(backend.url) as serving,
        httpx.AsyncClient(base_url=serving.url) as client,
    ):
        for opened, closed in ((100_000, 100_000), (100_000, 0), (900, 900), (70, 70)):
            body = b'{"messages":[{"role":"user","content":' + b"[" * opened + b"]" * closed + b"}]}"
            answer = await client.post("/v1/chat/completions", content=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
        assert backend.requests == []


async def test_one_connection_too_many_is_told_so_and_fits_once_another_is_gone() -> None:
    """It gets a 503 without having to ask, and those that are open go on."""
    async with upstream(ANSWER) as backend, gateway_to(backend.url, max_connections=3) as serving:
        held = [await asyncio.open_connection(*address(serving)) for _ in range(3)]
        assert await told(serving, b"") == (503, "too_many_connections")
        held[0][1].write(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert (await asyncio.wait_for(held[0][0].readline(), 5)) == b"HTTP/1.1 200 OK\r\n"
        held[1][1].close()
        await held[1][1].wait_closed()
        async with asyncio.timeout(5):
            while (await fetch_status(serving)) != 200:  # noqa: ASYNC110 - nobody announces it
                await asyncio.sleep(0.01)
        for _, writer in held:
            writer.close()


async def fetch_status(serving: Serving) -> int:
    """The status of a request over a connection of its own."""
    reader, writer = await asyncio.open_connection(*address(serving))
    writer.write(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    line = await asyncio.wait_for(reader.readline(), 5)
    writer.close()
    return int(line.split()[1])


async def test_a_slow_loris_harms_nobody() -> None:
    """300 clients that send a head byte by byte, or a body, are let go in time; everybody else is served meanwhile."""
    async with (
        upstream(ANSWER) as backend,
        gateway_to(backend.url, header_timeout_seconds=1, body_timeout_seconds=1) as serving,
        httpx.AsyncClient(base_url=serving.url, timeout=5) as client,
    ):
        slow = [await asyncio.open_connection(*address(serving)) for _ in range(300)]
        for i, (_, writer) in enumerate(slow):
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            writer.write(head if i % 2 else head + b"Content-Length: 100\r\n\r\n{")

        async def drip() -> None:
            while True:
                for i, (_, writer) in enumerate(slow):
                    if i % 2 and not writer.transport.is_closing():
                        writer.write(b"x")
                await asyncio.sleep(0.2)

        dripping = asyncio.create_task(drip())
        began = asyncio.get_running_loop().time()
        for _ in range(20):
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        for reader, _ in slow:
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 10)
        took_s = asyncio.get_running_loop().time() - began
        dripping.cancel()
        assert took_s < 8
        assert len(backend.requests) == 20
        for _, writer in slow:
            writer.close()


@attrs.define
class Torrent:
    """A backend that streams as fast as it is read, and counts what it got rid of."""

    sent: int = 0
    left: asyncio.Event = attrs.field(factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        event = {"id": "1", "choices": [{"index": 0, "delta": {"content": "x" * 4000}, "finish_reason": None}]}
        piece = chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(length)
            writer.write(SSE_HEAD)
            while self.sent < 400 * 1024 * 1024:
                writer.write(piece)
                await writer.drain()
                self.sent += len(piece)
        self.left.set()
        writer.close()


def resident_bytes() -> int:
    """What this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


async def test_a_reader_that_stops_holds_up_its_backend_and_costs_no_memory() -> None:
    """Twenty streams nobody reads: each backend gets rid of a few megabytes, which the kernel's buffers hold, and stops.

    The process, which is the backend too, grows by a few megabytes for each at most, where everything that is sent would
    be hundreds; a reader beside them that reads gets all it wants.
    """
    torrent = Torrent()
    server = await asyncio.start_server(torrent.serve, "127.0.0.1", 0)
    async with server:
        url = "http://{}:{}".format(*server.sockets[0].getsockname())
        async with gateway_to(url) as serving:
            body = json.dumps({**CHAT, "stream": True}).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
            gc.collect()
            before = resident_bytes()
            stuck = [await asyncio.open_connection(*address(serving), limit=1024) for _ in range(20)]
            for _, writer in stuck:
                writer.write(head + body)
            sent = await stands_still(torrent)
            assert sent / 20 < 16 * 1024 * 1024
            assert resident_bytes() - before < 60 * 1024 * 1024
            reader, writer = await asyncio.open_connection(*address(serving), limit=1024 * 1024)
            writer.write(head + body)
            read = 0
            async with asyncio.timeout(10):
                while read < 20 * 1024 * 1024:
                    read += len(await reader.read(1024 * 1024))
            writer.transport.abort()
            await asyncio.wait_for(torrent.left.wait(), 2)
            for _, one in stuck:
                one.transport.abort()


async def stands_still(torrent: Torrent) -> int:
    """What was sent once nothing more is."""
    sent = -1
    async with asyncio.timeout(20):
        while sent != torrent.sent or not sent:
            sent = torrent.sent
            await asyncio.sleep(0.3)
    return sent


@pytest.mark.parametrize("path", ["embeddings", "rerank", "completions"])
async def test_leaving_any_kind_of_call_leaves_its_backend(path: str) -> None:
    """Embeddings, rerankings and completions too, within 100 ms."""
    kind = {"embeddings": "embedding", "rerank": "rerank", "completions": "completion"}[path]
    body = {"input": "x", "query": "x", "documents": ["y"], "prompt": "x"}
    async with upstream() as backend:
        fleet = FleetConfig(
            models=(
                ModelConfig(
                    name="m", endpoint=backend.url, provider="vllm", capabilities=ModelCapabilities(model_type=kind)
                ),
            ),
            telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
        )
        async with running(fleet, router=Router(fleet, polls=False)) as serving:
            data = json.dumps(body).encode()
            _, writer = await asyncio.open_connection(*address(serving))
            writer.write(
                b"POST /v1/%b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%b"
                % (path.encode(), len(data), data)
            )
            await asyncio.wait_for(backend.asked.wait(), 5)
            writer.transport.abort()
            async with asyncio.timeout(0.1):
                await backend.left.wait()
            assert serving.router.services.load.in_flight(serving.router.models[0].id) == 0


EVENT = b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("has_begun", [False, True])
async def test_an_event_without_an_end_is_an_error_and_not_memory(path: str, has_begun: bool) -> None:
    """The engine is left as soon as an event is larger than it may be; before the first one it is a 502, else an event."""
    endless = chunk(b"data: " + b"x" * 200_000)
    says = (SSE_HEAD, chunk(EVENT), endless) if has_begun else (SSE_HEAD, endless)
    async with (
        upstream(*says) as backend,
        gateway_to(backend.url, provider="openai_compat", max_event_bytes=65536) as serving,
        httpx.AsyncClient(base_url=serving.url) as client,
    ):
        answer = await client.post(path, json={**CHAT, "max_tokens": 9, "stream": True})
        await asyncio.wait_for(backend.left.wait(), 5)
    assert answer.status_code == (200 if has_begun else 502)
    assert "an event of more than 65536 bytes (gateway.limits.max_event_bytes)" in answer.text
    assert "xxx" not in answer.text
    assert "[DONE]" not in answer.text


async def test_a_body_in_the_smallest_pieces_takes_no_more_than_itself() -> None:
    """Two bytes at a time: what each piece would take as an object of its own is twenty times as much."""
    exchange = HTTPExchange("POST", "/", [], connection=cast("ClientConnection", None))
    piece, count = b"ab", 100_000
    tracemalloc.start()
    try:
        for _ in range(count):
            exchange.receive(bytes(bytearray(piece)))  # another object each time, as the parser gives
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    exchange.received()
    assert held < 2 * count * len(piece)
    assert await exchange.body(10**6) == piece * count


async def test_many_connections_are_looked_at_in_steps() -> None:
    """All of them, and those that have stalled are closed, however many there are."""
    async with upstream(ANSWER) as backend, gateway_to(backend.url, idle_timeout_seconds=0.5) as serving:
        idle = [await asyncio.open_connection(*address(serving)) for _ in range(600)]
        for _, writer in idle:
            writer.write(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        for reader, writer in idle:
            assert (await asyncio.wait_for(reader.read(), 30)).startswith(b"HTTP/1.1 200")
            writer.close()
