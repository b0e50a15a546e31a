"""A client that leaves stops the engine's work within 100 ms, whatever the gateway is waiting for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable

import attrs
import httpx
import pytest

from kvfleet.config.schema import FleetConfig, ModelConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.server import Serving, running
from kvfleet.runtime import Router
from tests.gateway.upstream import SSE_HEAD, chunk, upstream

LIMIT_S = 0.1
EVENT = chunk(b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n')


@contextlib.asynccontextmanager
async def gateway_to(url: str, **model: object) -> AsyncIterator[Serving]:
    """A gateway before one backend, with the real router and the real adapter."""
    config = FleetConfig(
        models=(ModelConfig(name="m", endpoint=url, provider="vllm", **model),),  # type: ignore[arg-type]
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )
    async with running(config, router=Router(config, polls=False)) as serving:
        yield serving


@attrs.define
class Caller:
    """A client that sends a request, and can hang up."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def of(cls, serving: Serving, *, stream: bool) -> Caller:
        """Send a chat request."""
        host, port = serving.url.removeprefix("http://").split(":")
        caller = cls(*await asyncio.open_connection(host, int(port)))
        caller.ask(stream=stream)
        return caller

    def ask(self, *, stream: bool) -> None:
        """Send a request."""
        body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": stream}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.writer.write(head + body)

    def hang_up(self) -> None:
        """Leave without a word, as a killed process does."""
        self.writer.transport.abort()


async def within(event: asyncio.Event) -> None:
    """Wait for something that must happen at once."""
    async with asyncio.timeout(LIMIT_S):
        await event.wait()


async def until(holds: Callable[[], bool], limit_s: float) -> None:
    """Let the loop run until something holds."""
    async with asyncio.timeout(limit_s):
        while not holds():  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("phase", "says", "stream"),
    [
        ("waiting for a whole answer", (), False),
        (
            "amid a whole answer",
            (b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{",),
            False,
        ),
        ("waiting for a stream's head", (), True),
        ("waiting for the first token", (SSE_HEAD,), True),
        ("amid a stream", (SSE_HEAD, EVENT, EVENT), True),
    ],
)
async def test_the_backend_is_left_at_once(phase: str, says: tuple[bytes, ...], stream: bool) -> None:
    """In each phase, the backend's connection closes within 100 ms, and the route is booked as cancelled."""
    async with upstream(*says) as backend, gateway_to(backend.url) as serving:
        caller = await Caller.of(serving, stream=stream)
        await asyncio.wait_for(backend.asked.wait(), 5)
        if phase == "amid a stream":
            await caller.reader.readuntil(b'"content":"a"')
        caller.hang_up()
        await within(backend.left)
        assert serving.router.services.load.in_flight(serving.router.models[0].id) == 0
        assert serving.gateway.meters.left == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_with_another_request_sent_ahead(stream: bool) -> None:
    """A client that has sent its next request already is noticed as soon when it leaves, and that one is never made."""
    async with upstream(*((SSE_HEAD, EVENT) if stream else ())) as backend, gateway_to(backend.url) as serving:
        caller = await Caller.of(serving, stream=stream)
        caller.ask(stream=stream)
        await asyncio.wait_for(backend.asked.wait(), 5)
        caller.hang_up()
        await within(backend.left)
        await until(lambda: not serving.gateway.meters.in_flight, LIMIT_S)
    assert len(backend.requests) == 1


async def test_leaving_while_connecting() -> None:
    """A backend that does not accept connections keeps nobody: the call is given up with its client."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        # With a backlog of none, one connection waits to be accepted, and what comes after it hangs in its handshake.
        for one in (first, second):
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        async with gateway_to(f"http://127.0.0.1:{full.getsockname()[1]}") as serving:
            caller = await Caller.of(serving, stream=True)
            replica = serving.router.models[0].id
            load = serving.router.services.load
            await until(lambda: load.in_flight(replica) == 1, 5)
            caller.hang_up()
            await until(lambda: load.in_flight(replica) == 0, LIMIT_S)


@pytest.mark.parametrize(("says", "stream"), [((), False), ((), True), ((SSE_HEAD,), True)])
async def test_a_requests_own_deadline(says: tuple[bytes, ...], stream: bool) -> None:
    """When a request's time is up before its answer began, it gets a 504, and the backend is left."""
    async with upstream(*says) as backend, gateway_to(backend.url) as serving, httpx.AsyncClient() as client:
        answer = await client.post(
            f"{serving.url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "Hi"}], "stream": stream},
            headers={"X-KVFleet-Timeout": "100"},
        )
        await within(backend.left)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert answer.headers["x-should-retry"] == "false"


async def test_a_deadline_amid_a_stream() -> None:
    """When the time is up amid a stream, it ends in an error event, and the backend is left."""
    async with (
        upstream(SSE_HEAD, EVENT) as backend,
        gateway_to(backend.url) as serving,
        httpx.AsyncClient() as client,
        client.stream(
            "POST",
            f"{serving.url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "Hi"}], "stream": True},
            headers={"X-KVFleet-Timeout": "300"},
        ) as answer,
    ):
        lines = [line async for line in answer.aiter_lines() if line]
        await within(backend.left)
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["kvfleet"]["fault"] == "deadline"


async def test_leaving_gives_the_place_back() -> None:
    """Where the gateway takes one request at a time, the next one gets in as soon as the first has left."""
    async with upstream() as backend:
        config = FleetConfig(
            models=(ModelConfig(name="m", endpoint=backend.url, provider="vllm"),),
            telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
        )
        config = attrs.evolve(config, gateway=attrs.evolve(config.gateway, max_concurrent=1))
        async with running(config, router=Router(config, polls=False)) as serving:
            first = await Caller.of(serving, stream=False)
            await asyncio.wait_for(backend.asked.wait(), 5)
            first.hang_up()
            await within(backend.left)
            backend.asked.clear()
            second = await Caller.of(serving, stream=False)
            await asyncio.wait_for(backend.asked.wait(), 5)
            second.hang_up()
        assert len(backend.requests) == 2


async def test_a_client_that_stays_keeps_its_backend_connection() -> None:
    """Without a departure, the next request reuses the connection: nothing was closed too early."""
    answer = b'{"id":"1","object":"chat.completion","choices":[{"index":0,"message":{}}]}'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    async with upstream(head % len(answer) + answer) as backend, gateway_to(backend.url) as serving:
        for _ in range(3):
            caller = await Caller.of(serving, stream=False)
            await asyncio.wait_for(caller.reader.readuntil(b'"message":{}}]}'), 5)
            caller.writer.close()
        assert len(backend.requests) == 3
        assert not backend.left.is_set()
