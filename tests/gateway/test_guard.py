"""Limits on heads, and on clients that stall, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator

import pytest

from kvfleet.adapters.call import Reply
from kvfleet.config.schema import FleetConfig, ModelConfig
from kvfleet.gateway.guard import Patience
from kvfleet.gateway.httpd import Server
from kvfleet.gateway.listening import bind
from kvfleet.gateway.server import running
from kvfleet.plugin.contract import RouteRequest
from kvfleet.runtime import Router
from tests.gateway.fleet import FakeRouter, fleet, gateway
from tests.gateway.upstream import SSE_HEAD, chunk

SHORT = Patience(head_s=0.05, body_s=0.05, read_s=0.05)
LONG = Patience()


@contextlib.asynccontextmanager
async def served(router: FakeRouter, patience: Patience = LONG, *, key: str = "") -> AsyncIterator[tuple[str, int]]:
    """A gateway on a free port."""
    app = await gateway(router, key=key)
    sockets = bind("127.0.0.1", 0)
    server = Server(app, drain_s=1, patience=patience, sweep_s=0.02)
    await server.start(sockets)
    task = asyncio.create_task(server.run())
    try:
        yield sockets[0].getsockname()
    finally:
        server.stop()
        await task


async def exchange(address: tuple[str, int], data: bytes) -> bytes:
    """Send bytes, and read until the server closes."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()


def error_of(answer: bytes) -> tuple[bytes, str]:
    """Status line and code of an error."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0], json.loads(body)["error"]["code"]


async def test_a_head_that_never_ends_is_refused() -> None:
    """A client that goes on sending headers is stopped at 32 KiB."""
    async with served(FakeRouter(fleet())) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /livez HTTP/1.1\r\n")
        for number in range(32):
            writer.write(b"X-%d: %s\r\n" % (number, b"x" * 1024))
            await writer.drain()
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
    assert error_of(answer) == (b"HTTP/1.1 431 Request Header Fields Too Large", "invalid_http")


async def test_a_large_head_in_one_piece_is_refused() -> None:
    """Where the whole head arrives at once, its size still counts; a large body does not."""
    body = b'{"messages":[{"role":"user","content":"%s"}]}' % (b"x" * 40_000)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n" % len(body)
    async with served(FakeRouter(fleet())) as address:
        refused = await exchange(address, head + b"X-Long: " + b"x" * 33_000 + b"\r\n\r\n" + body)
        taken = await exchange(address, head + b"\r\n" + body)
    assert refused.startswith(b"HTTP/1.1 431 ")
    assert taken.startswith(b"HTTP/1.1 200 ")


async def test_too_many_headers_are_refused() -> None:
    """More than a hundred headers are none of a client's business."""
    headers = b"".join(b"X-%d: 1\r\n" % number for number in range(101))
    async with served(FakeRouter(fleet())) as address:
        answer = await exchange(address, b"GET /livez HTTP/1.1\r\n" + headers + b"\r\n")
    assert error_of(answer) == (b"HTTP/1.1 431 Request Header Fields Too Large", "invalid_http")


async def test_what_is_not_http_is_told_so_in_json() -> None:
    """Even a client that speaks something else gets an error object."""
    async with served(FakeRouter(fleet())) as address:
        answer = await exchange(address, b"\x16\x03\x01 hello\r\n\r\n")
    assert error_of(answer) == (b"HTTP/1.1 400 Bad Request", "invalid_http")


async def test_a_slow_head_is_given_up() -> None:
    """A connection that sends nothing, or half a head, is closed after its time."""
    async with served(FakeRouter(fleet()), SHORT) as address:
        silent, half = await asyncio.gather(exchange(address, b""), exchange(address, b"GET /livez HTTP/1.1\r\nHo"))
    assert silent.startswith(b"HTTP/1.1 408 ")
    assert half.startswith(b"HTTP/1.1 408 ")


async def test_a_body_that_stops_is_given_up() -> None:
    """A client that announces a body and does not send it loses its connection; nobody is asked."""
    router = FakeRouter(fleet())
    async with served(router, SHORT) as address:
        answer = await exchange(
            address, b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{"
        )
    assert (answer, router.requests) == (b"", [])


async def test_a_client_that_reads_nothing_is_given_up() -> None:
    """A stream to a client that does not read stops reading from the backend, and ends after a while."""
    sent, closed = 0, asyncio.Event()

    async def torrent(request: RouteRequest) -> Reply:
        async def forever() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                sent += 1
                yield b"data: %s\n\n" % (b"x" * 65_536)

        async def close() -> None:
            closed.set()

        return Reply(events=forever(), close=close)

    body = b'{"stream":true,"messages":[{"role":"user","content":""}]}'
    async with served(FakeRouter(fleet(), torrent), SHORT) as address:
        _, writer = await asyncio.open_connection(*address, limit=1024)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        await asyncio.wait_for(closed.wait(), 5)
        writer.close()
    assert sent * 65_536 < 32 * 1024 * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others have other buffers")
async def test_the_system_holds_little_of_what_a_client_does_not_read() -> None:
    """Its memory for sockets is all connections'; left to itself it takes 4 MB of such a stream, and more."""
    sent, is_stuck = 0, asyncio.Event()
    event = chunk(b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % (b"x" * 4000))

    async def torrent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        with contextlib.suppress(ConnectionError, TimeoutError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(SSE_HEAD)
            while True:
                writer.write(event)
                await asyncio.wait_for(writer.drain(), 0.5)
                sent += len(event)
        is_stuck.set()
        writer.close()

    engine = await asyncio.start_server(torrent, "127.0.0.1", 0)
    url = "http://{}:{}".format(*engine.sockets[0].getsockname())
    config = FleetConfig(models=(ModelConfig(name="m", endpoint=url, provider="openai_compat"),))
    async with engine, running(config, router=Router(config, polls=False)) as serving:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(serving.url.rpartition(":")[2])))
        body = b'{"stream":true,"messages":[{"role":"user","content":"Hi"}]}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n"
        client.sendall(head % len(body) + body)
        async with asyncio.timeout(30):
            await is_stuck.wait()
        assert client.recv(15) == b"HTTP/1.1 200 OK"
        client.close()
    assert 64 * 1024 < sent < 2 * 1024 * 1024


async def test_an_answer_that_takes_long_is_not_a_stall() -> None:
    """Waiting for the backend costs the client nothing of its time."""
    async with served(FakeRouter(fleet(), slow), SHORT) as address:
        body = b'{"messages":[{"role":"user","content":""}]}'
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            % len(body)
        )
        answer = await exchange(address, head + body)
    assert answer.startswith(b"HTTP/1.1 200 ")


async def slow(request: RouteRequest) -> Reply:
    """Take four times as long as a client may take with its own part."""
    done = asyncio.Event()
    asyncio.get_running_loop().call_later(0.2, done.set)
    await done.wait()
    return Reply(body=b"{}")


BODY = b'{"messages":[{"role":"user","content":"Hi"}]}'
SMUGGLED = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n5c\r\n" + SMUGGLED + b"\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + SMUGGLED,
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        b"Content-Length: 0\r\nContent-Length: 45\r\n\r\n" + SMUGGLED,
        b"Content-Length: +0\r\n\r\n" + SMUGGLED,
        b"Content-Length : 0\r\n\r\n" + SMUGGLED,
        b"X: a\r\n Content-Length: 0\r\nContent-Length: 45\r\n\r\n" + SMUGGLED,
        b"X: a\rContent-Length: 0\r\nContent-Length: 45\r\n\r\n" + SMUGGLED,
    ],
)
async def test_no_request_hides_in_another(framing: bytes) -> None:
    """Contradictory framing is refused, or cut off, and what follows it is not read as a request of its own."""
    router = FakeRouter(fleet())
    async with served(router) as address:
        answer = await exchange(address, b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + framing)
    assert answer[:13] in (b"HTTP/1.1 400 ", b"")
    assert router.requests == []


@pytest.mark.parametrize(
    "target",
    [
        b"/v1/models",
        b"http://x/v1/models",
        b"http://x/livez?/../v1/models",
        b"/livez/../v1/models",
        b"/v1%2fmodels",
        b"/%76%31/models",
        b"//v1/models",
        b"/v1/models#/livez",
        b"/livez%00",
        b"/livez;/v1/models",
    ],
)
@pytest.mark.parametrize("host", [b"x", b"x/livez?", b"127.0.0.1", b""])
async def test_no_spelling_gets_past_the_key(target: bytes, host: bytes) -> None:
    """However target and Host are written, nothing protected is answered without the key."""
    request = b"GET %s HTTP/1.1\r\nHost: %s\r\nX-Forwarded-Host: livez\r\nConnection: close\r\n\r\n" % (target, host)
    async with served(FakeRouter(fleet()), key="k") as address:
        answer = await exchange(address, request)
    assert answer[9:12] in (b"400", b"401") or b'{"status":"ok"}' in answer
