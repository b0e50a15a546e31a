"""The pooled transport, against an engine on loopback that does what it is told on the wire."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from kvfleet.adapters.h1 import HIGH_WATER_BYTES
from kvfleet.adapters.transport import Payload, PooledTransport
from tests.adapters.scripted import (
    STREAM_END,
    STREAM_HEAD,
    Bare,
    Engine,
    Request,
    Wire,
    answering,
    chunk,
    engine,
    listening,
    until,
    whole,
)

HELLO = whole(b"hello")
LIMITS = {"connect": 5.0, "first_byte": 5.0, "read": 5.0}


@contextlib.asynccontextmanager
async def pooled(**options: object) -> AsyncIterator[PooledTransport]:
    """A transport that is closed at the end."""
    transport = PooledTransport(**options)  # type: ignore[arg-type]
    try:
        yield transport
    finally:
        await transport.aclose()


def request(at: Engine, *, body: bytes = b"", method: str = "POST", **limits: float) -> httpx.Request:
    """A request with generous limits."""
    extensions = {"timeout": {**LIMITS, **limits}}
    return httpx.Request(method, at.url + "/v1/x?y=1", content=body, extensions=extensions)


async def ask(transport: PooledTransport, at: Engine, **options: float) -> tuple[httpx.Response, bytes]:
    """One whole exchange."""
    response = await transport.handle_async_request(request(at, **options))
    return response, b"".join([piece async for piece in response.stream])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("answer", "closes", "body", "is_complete", "is_kept"),
    [
        (HELLO, False, b"hello", True, True),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nt: 1\r\n\r\n",
            False,
            b"hello",
            True,
            True,
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nlink: x\r\n\r\n" + HELLO, False, b"hello", True, True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", False, b"", True, True),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", False, b"", True, True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", False, b"", True, True),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello", False, b"hello", True, False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nhello", False, b"hello", True, False),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", True, b"hello", False, False),
        (HELLO + b"and more", False, b"hello", True, False),
        (HELLO + HELLO, False, b"hello", True, False),
    ],
    ids=[
        "length",
        "chunked",
        "interim",
        "204",
        "304",
        "empty",
        "close",
        "http10",
        "until-eof",
        "surplus",
        "two-answers",
    ],
)
async def test_framing(answer: bytes, closes: bool, body: bytes, is_complete: bool, is_kept: bool) -> None:
    """Each framing gives its body; only a proven end counts as complete; only a clean connection is kept."""
    async with engine(answering(answer, close=closes)) as at, pooled() as transport:
        response, got = await ask(transport, at)
        assert got == body
        assert response.stream.is_complete is is_complete  # type: ignore[union-attr]
        assert transport.state == {"free": int(is_kept), "busy": 0}


@pytest.mark.parametrize(
    "answer", [HELLO, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"]
)
async def test_every_cut_gives_the_same(answer: bytes) -> None:
    """An answer that arrives byte by byte is the same answer."""

    async def script(wire: Wire, asked: Request) -> None:
        for index in range(len(answer)):
            wire.send(answer[index : index + 1])
            await asyncio.sleep(0)

    async with engine(script) as at, pooled() as transport:
        _, got = await ask(transport, at)
        assert got == b"hello"
        assert transport.state == {"free": 1, "busy": 0}


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhello", httpx.ReadError),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", httpx.ReadError),
        (b"HTTP/1.1 200 OK\r\ncontent-le", httpx.ReadError),
        (b"", httpx.ReadError),
        (b"<html>not found</html>\r\n\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello", httpx.RemoteProtocolError),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            httpx.RemoteProtocolError,
        ),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nnonsense\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 102 Processing\r\n\r\n" * 20 + HELLO, httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nx: " + b"a" * 70_000 + b"\r\n\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 30_000 + b"\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5;" + b"e" * 70_000, httpx.RemoteProtocolError),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: " + b"t" * 70_000,
            httpx.RemoteProtocolError,
        ),
    ],
    ids=[
        "short-length",
        "short-chunks",
        "cut-head",
        "nothing",
        "html",
        "two-lengths",
        "length-and-chunked",
        "bad-chunk",
        "upgrade",
        "endless-interim",
        "long-header",
        "many-headers",
        "long-extension",
        "long-trailer",
    ],
)
async def test_broken_answers(answer: bytes, error: type[Exception]) -> None:
    """A cut or malformed answer is an error, and its connection is gone."""
    async with engine(answering(answer, close=True)) as at, pooled() as transport:
        with pytest.raises(error):
            await ask(transport, at)
        assert transport.state == {"free": 0, "busy": 0}


async def test_what_is_sent() -> None:
    """The request's line, headers and body go out as they are."""
    async with engine(answering(HELLO)) as at, pooled() as transport:
        await ask(transport, at)
        sent = httpx.Request(
            "POST", at.url + "/v1/y", headers=[("Host", "x"), ("Content-Length", "2")], stream=Payload(b"{}")
        )
        response = await transport.handle_async_request(sent)
        await response.aread()
        first, second = at.requests
        assert (first.method, first.path) == ("POST", "/v1/x?y=1")
        assert (second.path, second.body, second.headers) == ("/v1/y", b"{}", {"host": "x", "content-length": "2"})


async def test_a_large_body_is_sent_whole() -> None:
    """A body beyond what is joined with its head arrives as it was."""
    body = bytes(range(256)) * 4096
    async with engine(answering(HELLO)) as at, pooled() as transport:
        response = await transport.handle_async_request(request(at, body=body))
        await response.aread()
        assert at.requests[0].body == body


async def test_a_body_without_a_length_is_chunked() -> None:
    """A request whose body is an iterator announces chunks, and sends them."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b"he"
        yield b"llo"

    bodies: list[bytes] = []

    class Reading(Bare):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.seen.endswith(b"0\r\n\r\n"):
                bodies.append(self.seen.partition(b"\r\n\r\n")[2])
                self.transport.write(HELLO)

    async with listening(Reading) as port, pooled() as transport:
        url = f"http://127.0.0.1:{port}"
        response = await transport.handle_async_request(httpx.Request("POST", url, content=pieces()))
        assert await response.aread() == b"hello"
        assert bodies == [b"5\r\nhello\r\n0\r\n\r\n"]


@pytest.mark.parametrize("value", ["a\r\nhost: evil", "a\nb", "a\rb", "a\0b"])
async def test_headers_cannot_smuggle(value: str) -> None:
    """A header value that holds a line break is refused before anything is sent."""
    async with engine(answering(HELLO)) as at, pooled() as transport:
        with pytest.raises(httpx.LocalProtocolError):
            await transport.handle_async_request(httpx.Request("GET", at.url, headers={"x-a": value}))
        assert not at.wires


async def test_a_head_request_has_no_body() -> None:
    """The length that an answer to HEAD announces is not waited for."""
    async with engine(answering(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n")) as at, pooled() as transport:
        response = await transport.handle_async_request(request(at, method="HEAD"))
        assert await response.aread() == b""


async def test_connections_are_reused_last_first() -> None:
    """One call after the other shares one connection; parallel ones get their own; the last one free is taken first."""
    gate = asyncio.Event()

    async def script(wire: Wire, asked: Request) -> None:
        await gate.wait()
        wire.send(HELLO)

    async with engine(script) as at, pooled() as transport:
        both = asyncio.gather(ask(transport, at), ask(transport, at))
        await until(lambda: len(at.requests) >= 2)
        gate.set()
        await both
        assert len(at.wires) == 2
        for _ in range(5):
            await ask(transport, at)
        assert len(at.wires) == 2
        assert transport.state == {"free": 2, "busy": 0}


async def test_tcp_nodelay_is_set() -> None:
    """A small request does not wait for the acknowledgement of the one before."""
    async with engine(answering(HELLO)) as at, pooled() as transport:
        await ask(transport, at)
        (connections,) = transport._free.values()
        (connection,) = connections
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


async def test_idle_connections_expire() -> None:
    """A connection that nobody uses for `idle_s` is closed."""
    async with engine(answering(HELLO)) as at, pooled(idle_s=0.02) as transport:
        await ask(transport, at)
        assert transport.state == {"free": 1, "busy": 0}
        await at.wires[0].gone.wait()
        assert transport.state == {"free": 0, "busy": 0}


async def test_a_connection_closed_while_idle_is_forgotten() -> None:
    """What the backend closed between two requests is not used again, and nothing had to be repeated."""
    async with engine(answering(HELLO)) as at, pooled() as transport:
        await ask(transport, at)
        at.wires[0].close()
        await until(lambda: not transport.state["free"])
        response, _ = await ask(transport, at)
        assert response.extensions["is_repeat"] is False
        assert len(at.wires) == 2


@pytest.mark.parametrize("surprise", [b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n", b"?"])
async def test_bytes_out_of_turn_end_a_connection(surprise: bytes) -> None:
    """An answer to nothing is never taken for the answer to the next request."""
    async with engine(answering(HELLO)) as at, pooled() as transport:
        await ask(transport, at)
        at.wires[0].send(surprise)
        await at.wires[0].gone.wait()
        assert transport.state == {"free": 0, "busy": 0}
        _, body = await ask(transport, at)
        assert body == b"hello"


async def test_a_stale_connection_is_replaced_once() -> None:
    """A reused connection that dies before a byte of the answer is replaced, once, and the answer says so."""

    async def script(wire: Wire, asked: Request) -> None:
        if len(at.requests) == 2:
            wire.reset()
        else:
            wire.send(HELLO)

    async with engine(script) as at, pooled() as transport:
        first, _ = await ask(transport, at)
        second, body = await ask(transport, at)
        assert (first.extensions["is_repeat"], second.extensions["is_repeat"], body) == (False, True, b"hello")
        assert (len(at.requests), len(at.wires)) == (3, 2)


async def test_a_repeat_is_not_repeated() -> None:
    """If the fresh connection dies too, that is the answer."""

    async def script(wire: Wire, asked: Request) -> None:
        if len(at.requests) == 1:
            wire.send(HELLO)
        else:
            wire.reset()

    async with engine(script) as at, pooled() as transport:
        await ask(transport, at)
        with pytest.raises(httpx.ReadError):
            await ask(transport, at)
        assert len(at.requests) == 3


async def test_a_fresh_connection_is_not_repeated() -> None:
    """A request that kills a fresh connection is not sent again."""

    async def script(wire: Wire, asked: Request) -> None:
        wire.reset()

    async with engine(script) as at, pooled() as transport:
        with pytest.raises(httpx.ReadError):
            await ask(transport, at)
        assert len(at.requests) == 1


async def test_nothing_is_repeated_once_an_answer_began() -> None:
    """One byte of an answer, and the request is not sent again."""

    async def script(wire: Wire, asked: Request) -> None:
        wire.send(HELLO if len(at.requests) == 1 else b"H")
        if len(at.requests) > 1:
            wire.close()

    async with engine(script) as at, pooled() as transport:
        await ask(transport, at)
        with pytest.raises(httpx.ReadError):
            await ask(transport, at)
        assert len(at.requests) == 2


async def test_refused_connections() -> None:
    """Nobody listening is a connect error."""
    async with engine(answering(HELLO)) as at:
        pass
    async with pooled() as transport:
        with pytest.raises(httpx.ConnectError):
            await ask(transport, at)
        with pytest.raises(httpx.UnsupportedProtocol):
            await transport.handle_async_request(httpx.Request("GET", "ftp://127.0.0.1/x"))


async def test_connecting_has_a_limit() -> None:
    """A handshake that never ends is a connect timeout."""
    async with listening(Bare) as port, pooled() as transport:
        url = f"https://127.0.0.1:{port}"
        with pytest.raises(httpx.ConnectTimeout):
            await transport.handle_async_request(httpx.Request("GET", url, extensions={"timeout": {"connect": 0.05}}))
        assert transport.state == {"free": 0, "busy": 0}


async def test_the_first_byte_has_a_limit() -> None:
    """Neither silence nor a head without a body holds beyond `first_byte`; the connection is closed then."""

    async def script(wire: Wire, asked: Request) -> None:
        if len(at.requests) == 2:
            wire.send(STREAM_HEAD)
        await wire.gone.wait()

    async with engine(script) as at, pooled() as transport:
        with pytest.raises(httpx.ReadTimeout):
            await ask(transport, at, first_byte=0.03)
        with pytest.raises(httpx.ReadTimeout):
            await ask(transport, at, first_byte=0.03)
        for wire in at.wires:
            await wire.gone.wait()


async def test_silence_has_a_limit_of_its_own() -> None:
    """After the first byte the limit is the silence between two: many small waits may add up to more."""

    async def script(wire: Wire, asked: Request) -> None:
        wire.send(STREAM_HEAD)
        for _ in range(6):
            wire.send(chunk(b"x"))
            await asyncio.sleep(0.03)
        await wire.gone.wait()

    async with engine(script) as at, pooled() as transport:
        response = await transport.handle_async_request(request(at, first_byte=0.1, read=0.1))
        pieces = aiter(response.stream)  # type: ignore[arg-type]
        got = [await anext(pieces) for _ in range(6)]
        assert b"".join(got) == b"x" * 6
        with pytest.raises(httpx.ReadTimeout):
            await anext(pieces)


async def test_no_limits_at_all() -> None:
    """A request without limits waits, and is answered."""
    async with engine(answering(HELLO)) as at, pooled() as transport:
        response = await transport.handle_async_request(httpx.Request("GET", at.url))
        assert await response.aread() == b"hello"


async def test_a_cancelled_wait_closes_the_connection() -> None:
    """Whoever stops waiting for the head takes the request back: the engine sees the connection end within 100 ms."""

    async def script(wire: Wire, asked: Request) -> None:
        await wire.gone.wait()

    async with engine(script) as at, pooled() as transport:
        task = asyncio.ensure_future(ask(transport, at))
        await until(lambda: at.requests)
        task.cancel()
        async with asyncio.timeout(0.1):
            await at.wires[0].gone.wait()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert transport.state == {"free": 0, "busy": 0}


async def test_closing_amid_a_body_closes_the_connection() -> None:
    """`aclose` on an unfinished answer reaches the engine within 100 ms, also while another task waits for its next piece."""

    async def script(wire: Wire, asked: Request) -> None:
        wire.send(STREAM_HEAD, chunk(b"x"))
        await wire.gone.wait()

    async with engine(script) as at, pooled() as transport:
        response = await transport.handle_async_request(request(at))
        pieces = aiter(response.stream)  # type: ignore[arg-type]
        assert await anext(pieces) == b"x"
        waiting = asyncio.ensure_future(anext(pieces))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await response.stream.aclose()  # type: ignore[union-attr]
        async with asyncio.timeout(0.1):
            await at.wires[0].gone.wait()
        with pytest.raises(httpx.ReadError):
            await waiting
        await response.stream.aclose()  # type: ignore[union-attr]
        assert transport.state == {"free": 0, "busy": 0}


async def test_a_forgotten_answer_is_closed() -> None:
    """An answer that nobody holds any more is closed, with a warning to whoever forgot it."""

    async def script(wire: Wire, asked: Request) -> None:
        wire.send(STREAM_HEAD, chunk(b"x"))
        await wire.gone.wait()

    async with engine(script) as at, pooled() as transport:
        response = await transport.handle_async_request(request(at))
        held = [response]
        del response
        with pytest.warns(ResourceWarning, match="aclose"):
            held.clear()
        async with asyncio.timeout(0.1):
            await at.wires[0].gone.wait()
        assert transport.state == {"free": 0, "busy": 0}


async def test_closing_after_the_end_keeps_the_connection() -> None:
    """An answer that is there as a whole may be closed unread; its connection is used again."""
    async with engine(answering(whole(b""))) as at, pooled() as transport:
        response = await transport.handle_async_request(request(at))
        await response.stream.aclose()  # type: ignore[union-attr]
        assert transport.state == {"free": 1, "busy": 0}


async def test_finish_keeps_a_connection_whose_answer_ends_soon() -> None:
    """The end of the framing may come after the last byte of interest: the connection is kept when it does."""
    gate = asyncio.Event()

    async def script(wire: Wire, asked: Request) -> None:
        wire.send(STREAM_HEAD, chunk(b"last"))
        await gate.wait()
        wire.send(chunk(b"of no interest"), STREAM_END)

    async with engine(script) as at, pooled() as transport:
        response = await transport.handle_async_request(request(at))
        assert await anext(aiter(response.stream)) == b"last"  # type: ignore[arg-type]
        response.stream.finish()  # type: ignore[union-attr]
        assert transport.state == {"free": 0, "busy": 1}
        gate.set()
        await until(lambda: transport.state["free"])
        assert transport.state == {"free": 1, "busy": 0}


async def test_finish_closes_a_connection_that_goes_on() -> None:
    """An engine that keeps sending after the end of interest is cut off."""

    async def script(wire: Wire, asked: Request) -> None:
        wire.send(STREAM_HEAD, chunk(b"last"))
        while not wire.gone.is_set():
            wire.send(chunk(b"x" * 10_000))
            await asyncio.sleep(0)

    async with engine(script) as at, pooled() as transport:
        response = await transport.handle_async_request(request(at))
        await anext(aiter(response.stream))  # type: ignore[arg-type]
        response.stream.finish()  # type: ignore[union-attr]
        await at.wires[0].gone.wait()
        assert transport.state == {"free": 0, "busy": 0}


async def test_a_slow_reader_stops_the_engine() -> None:
    """What is not taken is not read: the engine's writing stalls, memory stays bounded, nothing is lost."""
    size = 64 * 1024
    count = 400
    sent = 0

    async def script(wire: Wire, asked: Request) -> None:
        nonlocal sent
        wire.send(STREAM_HEAD)
        for _ in range(count):
            await wire.resumed.wait()
            wire.send(chunk(b"x" * size))
            sent += 1
        wire.send(STREAM_END)

    async with engine(script) as at, pooled() as transport:
        response = await transport.handle_async_request(request(at))
        stalled = 0
        while stalled < 50:  # the loop goes round and nothing more is sent
            before = sent
            await asyncio.sleep(0.001)
            stalled = stalled + 1 if sent == before else 0
        assert sent < count
        (connection,) = transport._busy
        assert connection._size < HIGH_WATER_BYTES * 3
        got = sum([len(piece) async for piece in response.stream])  # type: ignore[union-attr]
        assert got == size * count
        assert response.stream.is_complete  # type: ignore[union-attr]


async def test_two_hundred_streams() -> None:
    """Two hundred streams at a time get their own bytes, and leave two hundred free connections."""

    async def script(wire: Wire, asked: Request) -> None:
        wire.send(STREAM_HEAD)
        for index in range(5):
            wire.send(chunk(b"%b:%d " % (asked.body, index)))
            await asyncio.sleep(0)
        wire.send(STREAM_END)

    async def one(index: int) -> bytes:
        response = await transport.handle_async_request(request(at, body=b"%d" % index))
        return b"".join([piece async for piece in response.stream])  # type: ignore[union-attr]

    async with engine(script) as at, pooled() as transport:
        got = await asyncio.gather(*(one(index) for index in range(200)))
        assert got == [b"".join(b"%d:%d " % (index, part) for part in range(5)) for index in range(200)]
        assert transport.state == {"free": 200, "busy": 0}


async def test_aclose_ends_everything() -> None:
    """Closing the transport closes free and busy connections, and may be done twice."""

    async def script(wire: Wire, asked: Request) -> None:
        if len(at.requests) < 3:
            wire.send(HELLO)
        await wire.gone.wait()

    async with engine(script) as at:
        transport = PooledTransport()
        await asyncio.gather(ask(transport, at), ask(transport, at))
        waiting = asyncio.ensure_future(ask(transport, at))
        await until(lambda: len(at.requests) >= 3)
        await transport.aclose()
        await transport.aclose()
        with pytest.raises(httpx.ReadError):
            await waiting
        for wire in at.wires:
            await wire.gone.wait()
        assert transport.state == {"free": 0, "busy": 0}


async def test_an_early_answer_ends_the_connection_after_it() -> None:
    """An answer that comes before the request has been written is given; such a connection is not used again."""

    class Hasty(Bare):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.transport.pause_reading()
            self.transport.write(whole(b"{}", status="413 Content Too Large"))

    async with listening(Hasty) as port, pooled() as transport:
        url = f"http://127.0.0.1:{port}"
        response = await transport.handle_async_request(httpx.Request("POST", url, content=b"x" * 30_000_000))
        assert (response.status_code, await response.aread()) == (413, b"{}")
        assert transport.state == {"free": 0, "busy": 0}


async def test_tls() -> None:
    """An https URL goes through TLS, with the peer's certificate checked."""
    pem = Path(__file__).with_name("samples") / "loopback.pem"
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(pem)
    trusting = ssl.create_default_context(cafile=pem)
    async with engine(answering(HELLO), tls=server_side) as at:
        async with pooled(ssl_context=trusting) as transport:
            _, body = await ask(transport, at)
            assert body == b"hello"
            _, body = await ask(transport, at)
            assert len(at.wires) == 1
        async with pooled() as doubting:
            with pytest.raises(httpx.ConnectError):
                await ask(doubting, at)
