"""HTTP/1.1 on the wire: what is sent, and which answers are taken for what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from kvfleet.adapters.transport import Payload
from tests.adapters.pooling import HELLO, ask, pooled, request
from tests.adapters.scripted import (
    Bare,
    Request,
    Wire,
    answering,
    engine,
    listening,
)


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
