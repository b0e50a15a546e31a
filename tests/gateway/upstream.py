"""An HTTP server that says exactly what a test wants, and notices when it is left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import attrs

JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def whole(body: bytes, status: bytes = b"200 OK") -> bytes:
    """A whole JSON answer."""
    return JSON_HEAD.replace(b"200 OK", status) % len(body) + body


def chunk(event: bytes) -> bytes:
    """One chunk of a chunked answer."""
    return b"%x\r\n%s\r\n" % (len(event), event)


@attrs.define
class Upstream:
    """A backend made of bytes.

    Attributes:
        says: Sent in answer to each request; it then waits to be left.
        asked: Set when a request has come and everything was said.
        left: Set when the caller has closed the connection.
        requests: What was received.
        url: Where it is.
    """

    says: Sequence[bytes] = ()
    asked: asyncio.Event = attrs.field(factory=asyncio.Event)
    left: asyncio.Event = attrs.field(factory=asyncio.Event)
    requests: list[bytes] = attrs.field(factory=list)
    url: str = ""
    writers: list[asyncio.StreamWriter] = attrs.field(factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer on one connection."""
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
                )
                self.requests.append(head + await reader.readexactly(length))
                for part in self.says:
                    writer.write(part)
                await writer.drain()
                self.asked.set()
        self.left.set()
        writer.close()


@contextlib.asynccontextmanager
async def upstream(*says: bytes) -> AsyncIterator[Upstream]:
    """A backend on a free port."""
    one = Upstream(says)
    server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    one.url = f"http://{host}:{port}"
    async with server:
        try:
            yield one
        finally:
            for writer in one.writers:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
