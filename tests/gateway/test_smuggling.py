"""Requests whose end two readers might see in two places: refused, the connection closed, and nothing passed on.

Each is followed by a sound request on the same connection: were the first misread, the second would be answered, or be
taken for a body. Sources: RFC 9112 (framing), and the known families of request smuggling: CL.TE, TE.CL, TE.TE, two
lengths, obsolete folding, bare CR or LF, chunks.
"""

from __future__ import annotations

import asyncio
import contextlib
import re

import pytest

from kvfleet.gateway.hosts import Hosts
from kvfleet.gateway.httpd import Server
from tests.gateway.fleet import FakeRouter, fleet
from tests.gateway.test_connection import served

BODY = b'{"messages":[{"role":"user","content":"Hi"}]}'
LENGTH = b"%d" % len(BODY)
LINE = b"POST /v1/chat/completions HTTP/1.1\r\n"
HEAD = LINE + b"Host: x\r\n"
SOUND = HEAD + b"Content-Length: " + LENGTH + b"\r\n\r\n" + BODY
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


def sized(*headers: bytes, head: bytes = HEAD) -> bytes:
    """A request with a proper length, and these headers before it."""
    return head + b"".join(one + b"\r\n" for one in headers) + b"Content-Length: " + LENGTH + b"\r\n\r\n" + BODY


def with_length(value: bytes) -> bytes:
    """A request whose length is written so."""
    return HEAD + b"Content-Length:" + value + b"\r\n\r\n" + BODY


def coded(value: bytes, *, head: bytes = HEAD, chunks: bytes = CHUNKS) -> bytes:
    """A request whose transfer coding is written so."""
    return head + b"Transfer-Encoding:" + value + b"\r\n\r\n" + chunks


def in_chunks(chunks: bytes) -> bytes:
    """A request in these chunks."""
    return coded(b" chunked", chunks=chunks)


REFUSED = {
    # two lengths
    "length and coding": HEAD + b"Content-Length: " + LENGTH + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS,
    "coding and length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + CHUNKS,
    "two lengths": sized(b"Content-Length: 5"),
    "the same length twice": sized(b"Content-Length: " + LENGTH),
    "a list of lengths": with_length(b" " + LENGTH + b", " + LENGTH),
    # lengths that are none
    "plus": with_length(b" +" + LENGTH),
    "minus": with_length(b" -1"),
    "hexadecimal": with_length(b" 0x2d"),
    "beyond 64 bits": with_length(b" 99999999999999999999999"),
    "two numbers": with_length(b" 4 5"),
    "empty": with_length(b" "),
    "underscore": with_length(b" 4_5"),
    "digits of another script": with_length(" ٤٥".encode()),
    # codings that are none, or not ours
    "xchunked": coded(b" xchunked"),
    "quoted": coded(b' "chunked"'),
    "identity": HEAD + b"Transfer-Encoding: identity\r\nContent-Length: " + LENGTH + b"\r\n\r\n" + BODY,
    "gzip, chunked": coded(b" gzip, chunked"),
    "chunked twice": coded(b" chunked, chunked"),
    "chunked, identity": coded(b" chunked, identity"),
    "chunked and identity": coded(b" chunked\r\nTransfer-Encoding: identity"),
    "identity and chunked": coded(b" identity\r\nTransfer-Encoding: chunked"),
    "vertical tab": coded(b" \x0bchunked"),
    "empty coding": coded(b" "),
    "chunks in HTTP/1.0": coded(b" chunked", head=HEAD.replace(b"1.1", b"1.0")),
    # headers that are none
    "space before the colon": HEAD + b"Content-Length : " + LENGTH + b"\r\n\r\n" + BODY,
    "space before the coding's colon": HEAD + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKS,
    "space before the first header": LINE + b" Host: x\r\nContent-Length: " + LENGTH + b"\r\n\r\n" + BODY,
    "obsolete folding": sized(b"X-A: b\r\n c"),
    "folded coding": coded(b"\r\n chunked"),
    "no colon": sized(b"Garbage"),
    "no name": sized(b": x"),
    "NUL in a value": sized(b"X-A: b\0c"),
    "NUL in a name": sized(b"X-\0A: b"),
    # ends of lines
    "bare LF": sized().replace(b"\r\n", b"\n"),
    "bare LF after a header": sized(b"X-A: b\nX-B: c"),
    "bare CR in a value": sized(b"X-A: b\rc"),
    "bare CR before a length": sized(b"X-A: b\rContent-Length: 3"),
    # chunks
    "0x before a size": in_chunks(b"0x%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)),
    "plus before a size": in_chunks(b"+%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)),
    "minus before a size": in_chunks(b"-1\r\n%b\r\n0\r\n\r\n" % BODY),
    "size beyond 64 bits": in_chunks(b"f" * 18 + b"\r\n%b\r\n0\r\n\r\n" % BODY),
    "space after a size": in_chunks(b"%x \r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)),
    "bare LF after a size": in_chunks(b"%x\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)),
    "bare LF after a chunk": in_chunks(b"%x\r\n%b\n0\r\n\r\n" % (len(BODY), BODY)),
    "a chunk that is longer than its size": in_chunks(b"5\r\n%b\r\n0\r\n\r\n" % BODY),
    "bare LF in an extension": in_chunks(b"%x;a\nxx\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)),
    "bare CR in an extension": in_chunks(b"%x;a\rxx\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)),
    "a length among the trailers": in_chunks(b"%x\r\n%b\r\n0\r\nContent-Length: 5\r\n\r\n" % (len(BODY), BODY)),
    # first lines
    "HTTP/0.9": b"GET /livez\r\n\r\n",
    "HTTP/1.2": sized(head=HEAD.replace(b"HTTP/1.1", b"HTTP/1.2")),
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http in small letters": sized(head=HEAD.replace(b"HTTP/1.1", b"http/1.1")),
    "something behind the version": sized(head=HEAD.replace(b"HTTP/1.1", b"HTTP/1.1x")),
    "tab in the first line": sized(head=HEAD.replace(b"POST /", b"POST\t/")),
    "space before the first line": sized(head=b" " + HEAD),
    "an odd method": sized(head=HEAD.replace(b"POST", b"P@ST")),
    "a control character in the path": sized(head=HEAD.replace(b"/v1", b"/v1\x01")),
    "bytes beyond ASCII in the path": sized(head=HEAD.replace(b"/v1", "/é".encode())),
    "TLS": bytes.fromhex("16030100c8010000c40303") + b"\0" * 50,
    "a tunnel": b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
    # hosts
    "a whole URL of another host": sized(head=HEAD.replace(b"POST /", b"POST http://evil.test/")),
    "a whole URL with a user": sized(head=HEAD.replace(b"POST /", b"POST http://x@evil.test/")),
    "two hosts": sized(b"Host: evil.test"),
    "no host": sized(head=LINE),
}

ACCEPTED = {
    "tab before a length": with_length(b"\t" + LENGTH),
    "tab before a coding": coded(b"\tchunked"),
    "a coding in any case": coded(b" cHuNkEd"),
    "space behind a coding": coded(b" chunked "),
    "an extension": in_chunks(b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)),
    "a header that only looks like one": sized(b"Transfer_Encoding: chunked"),
    "an empty line first": b"\r\n" + sized(),
    "a whole URL of the same host": sized(head=HEAD.replace(b"POST /", b"POST http://x/")),
    "a length among the headers of one hop": sized(b"Connection: Content-Length"),
}


async def talk(server_address: tuple[str, int], data: bytes, answers: int) -> tuple[list[int], bool]:
    """The statuses of the answers, at most so many, and whether the server closed."""
    reader, writer = await asyncio.open_connection(*server_address)
    writer.write(data)
    said, closed = b"", False
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(5):
            while said.count(b"HTTP/1.1 ") < answers and not closed:
                piece = await reader.read(65_536)
                said, closed = said + piece, not piece
    writer.close()
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", said)], closed


@pytest.mark.parametrize("case", REFUSED)
async def test_what_might_be_misread_is_refused(case: str) -> None:
    """One answer, a 400; then the end of the connection. No backend hears of it, nor of what stands behind it."""
    router = FakeRouter(fleet())
    async with served(router) as (_, address):
        statuses, closed = await talk(address, REFUSED[case] + SOUND, 9)
    assert statuses == [400]
    assert closed
    assert router.requests == []


@pytest.mark.parametrize("case", REFUSED)
async def test_byte_by_byte_it_is_the_same(case: str) -> None:
    """However the bytes arrive, the verdict is one."""
    router = FakeRouter(fleet())
    async with served(router) as (server, address):
        reader, writer = await asyncio.open_connection(*address)
        said = b""
        for place in range(len(REFUSED[case])):
            with contextlib.suppress(ConnectionError):
                writer.write(REFUSED[case][place : place + 1])
                await writer.drain()
            await asyncio.sleep(0)
            if _is_closing(server):
                break
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(5):
                writer.write(SOUND)
                said = await reader.read()
        writer.close()
    assert said.startswith(b"HTTP/1.1 400 ")
    assert router.requests == []


def _is_closing(server: Server) -> bool:
    return all(one.closing_since is not None for one in server.connections)


@pytest.mark.parametrize("case", ACCEPTED)
async def test_what_reads_only_one_way_is_one_request(case: str) -> None:
    """It, and the one behind it: two answers, and two requests as they were sent."""
    router = FakeRouter(fleet())
    async with served(router) as (_, address):
        statuses, _ = await talk(address, ACCEPTED[case] + SOUND, 2)
    assert statuses == [200, 200]
    assert [request.raw for request in router.requests] == [BODY, BODY]


async def test_what_follows_the_last_request_is_nobodys() -> None:
    """Behind `Connection: close` nothing is read, and the answer before it arrives whole."""
    router = FakeRouter(fleet())
    async with served(router) as (_, address):
        statuses, closed = await talk(address, sized(b"Connection: close") + SOUND, 9)
    assert (statuses, closed, len(router.requests)) == ([200], True, 1)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"127.0.0.1:8000", 200),
        (b"localhost", 200),
        (b"[::1]:8000", 200),
        (b"app.localhost:80", 200),
        (b"gateway.test", 200),
        (b"evil.test", 403),
        (b"127.0.0.1.evil.test", 403),
        (b"localhost.evil.test:8000", 403),
        (b"localhost@evil.test", 403),
        (b"0.0.0.0", 403),
        (b"", 403),
    ],
)
async def test_without_keys_only_the_loopbacks_names_are_answered(host: bytes, status: int) -> None:
    """A page whose domain points here cannot read a local gateway, its dashboard and metrics included."""
    router = FakeRouter(fleet())
    async with served(router) as (server, address):
        server.gateway.hosts = Hosts.of(["gateway.test"])
        for path in (b"/livez", b"/metrics", b"/v1/models"):
            request = b"GET %b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % (path, host)
            assert (await talk(address, request, 9))[0] == [status]
