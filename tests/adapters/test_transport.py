"""The pooled transport, against an engine on loopback that does what it is told on the wire."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import httpx
import pytest

from kvfleet.adapters.h1 import HIGH_WATER_BYTES
from kvfleet.adapters.transport import PooledTransport
from tests.adapters.pooling import HELLO, ask, pooled, request
from tests.adapters.scripted import (
    STREAM_END,
    STREAM_HEAD,
    Bare,
    Request,
    Wire,
    answering,
    chunk,
    engine,
    listening,
    until,
    whole,
)

READ_BYTES = 256 * 1024
"""Most that the event loop reads at once."""


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
        assert connection._size <= HIGH_WATER_BYTES + READ_BYTES
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
