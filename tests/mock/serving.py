"""Mock engines for the tests, and a client that sees every byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import attrs

from kvfleet.adapters.mock import MockAdapter
from kvfleet.gateway.auth import Keys
from kvfleet.mock.engine import MockEngine
from kvfleet.mock.kv_publisher import KVPublisher
from kvfleet.mock.server import MockServer, serving

NOBODY_ASKS = Keys()
HELLO = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}


@contextlib.asynccontextmanager
async def served(
    *, publisher: KVPublisher | None = None, keys: Keys = NOBODY_ASKS, **options: Any
) -> AsyncIterator[MockServer]:
    """One engine, so fast that nobody waits for it, on a free port."""
    adapter = MockAdapter(endpoint="mock://one", model_id="demo", **{"speed": 1e6, "answer_tokens": 6, **options})
    async with serving([MockEngine(adapter, publisher)], keys=keys) as servers:
        yield servers[0]


async def until(condition: Callable[[], object]) -> None:
    """Wait until something in the engine has happened."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - there is nothing to be told by
            await asyncio.sleep(0.005)


@attrs.frozen
class Answer:
    """What came back, byte by byte."""

    status: int
    headers: dict[str, str]
    body: bytes
    is_whole: bool

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events."""
        lines = [line[6:] for line in self.body.decode().split("\n\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def ask(
    server: MockServer,
    path: str = "/v1/chat/completions",
    body: Any = None,
    *,
    method: str | None = None,
    headers: str = "",
    patience_s: float = 30.0,
) -> Answer:
    """One request on a connection of its own.

    Raises:
        OSError: if the connection is refused or reset.
        EOFError: if it is closed without an answer.
    """
    port = int(server.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = b"" if body is None else json.dumps(body).encode()
    verb = method or ("GET" if body is None else "POST")
    head = f"{verb} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n{headers}\r\n"
    writer.write(head.encode() + data)
    try:
        async with asyncio.timeout(patience_s):
            return await _read(reader)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _read(reader: asyncio.StreamReader) -> Answer:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        raise EOFError(error.partial) from error
    first, *lines = head.decode().strip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    body, is_whole = await (_chunks(reader) if "transfer-encoding" in headers else _counted(reader, headers))
    return Answer(int(first.split()[1]), headers, body, is_whole)


async def _counted(reader: asyncio.StreamReader, headers: dict[str, str]) -> tuple[bytes, bool]:
    size = int(headers["content-length"])
    body = await reader.read(size)
    return body, len(body) == size


async def _chunks(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    body = b""
    while line := (await reader.readline()).strip():
        size = int(line, 16)
        if not size:
            return body, True
        try:
            body += await reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            return body + error.partial, False
        await reader.readline()
    return body, False
