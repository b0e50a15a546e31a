"""A loopback engine that does on the wire what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import attrs


@attrs.define
class Request:
    """One request as it came over the wire."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@attrs.define(eq=False)
class Wire(asyncio.Protocol):
    """The engine's end of one connection: what the script writes, and what it learns of the other side."""

    engine: Engine
    transport: asyncio.Transport = attrs.field(init=False)
    gone: asyncio.Event = attrs.field(factory=asyncio.Event)
    resumed: asyncio.Event = attrs.field(factory=asyncio.Event)
    held: bytes = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.resumed.set()
        self.engine.wires.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        self.resumed.set()

    def pause_writing(self) -> None:
        self.resumed.clear()

    def resume_writing(self) -> None:
        self.resumed.set()

    def data_received(self, data: bytes) -> None:
        self.held += data
        while (request := self._whole_request()) is not None:
            self.engine.requests.append(request)
            self.engine.run(self, request)

    def _whole_request(self) -> Request | None:
        head, end, rest = self.held.partition(b"\r\n\r\n")
        if not end:
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = int(headers.get("content-length", 0))
        if len(rest) < size:
            return None
        self.held = rest[size:]
        return Request(method, path, headers, rest[:size])

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.transport.write(piece)

    def close(self) -> None:
        self.transport.close()

    def reset(self) -> None:
        self.transport.abort()


Script = Callable[[Wire, Request], Awaitable[None]]


@attrs.define(eq=False)
class Engine:
    """What has happened at the engine.

    Attributes:
        script: Called for each request.
        requests: Every request that came, in order.
        wires: Every connection that was made, in order.
    """

    script: Script
    scheme: str = "http"
    port: int = 0
    requests: list[Request] = attrs.field(factory=list)
    wires: list[Wire] = attrs.field(factory=list)
    failures: list[BaseException] = attrs.field(factory=list)
    tasks: set[asyncio.Task[None]] = attrs.field(factory=set)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def run(self, wire: Wire, request: Request) -> None:
        task = asyncio.ensure_future(self._run(wire, request))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _run(self, wire: Wire, request: Request) -> None:
        try:
            await self.script(wire, request)
        except Exception as error:  # noqa: BLE001 - the test shows it
            self.failures.append(error)
            wire.reset()


@contextlib.asynccontextmanager
async def engine(script: Script, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Engine]:
    """Run a scripted engine on a free port of loopback."""
    made = Engine(script, "https" if tls else "http")
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Wire(made), "127.0.0.1", 0, ssl=tls, backlog=512)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        for task in tuple(made.tasks):
            task.cancel()
        await asyncio.gather(*made.tasks, return_exceptions=True)
        for wire in made.wires:
            wire.reset()
            await wire.gone.wait()
        await server.wait_closed()
        assert not made.failures, made.failures


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop go round until the condition holds."""
    while not condition():  # noqa: ASYNC110 - nothing here can tell
        await asyncio.sleep(0)


def answering(*pieces: bytes, close: bool = False) -> Script:
    """A script that answers every request with the same bytes."""

    async def script(wire: Wire, request: Request) -> None:
        wire.send(*pieces)
        if close:
            wire.close()

    return script


def whole(body: bytes, *, status: str = "200 OK", kind: bytes = b"application/json", headers: bytes = b"") -> bytes:
    """An answer with a length."""
    return b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b\r\n%b" % (
        status.encode(),
        kind,
        len(body),
        headers,
        body,
    )


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def streamed(*pieces: bytes) -> bytes:
    """A whole chunked stream of events, one chunk for each piece."""
    return STREAM_HEAD + b"".join(chunk(piece) for piece in pieces) + STREAM_END


class Bare(asyncio.Protocol):
    """The least of a server, for what `Engine` is too well-behaved to do: override `data_received`."""

    def __init__(self, opened: list[asyncio.Transport]) -> None:
        self.opened = opened
        self.seen = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.opened.append(self.transport)

    def data_received(self, data: bytes) -> None:
        self.seen += data


@contextlib.asynccontextmanager
async def listening(protocol: type[Bare]) -> AsyncIterator[int]:
    """Serve a bare protocol on a free port of loopback; gives the port."""
    opened: list[asyncio.Transport] = []
    server = await asyncio.get_running_loop().create_server(lambda: protocol(opened), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for transport in opened:
            transport.abort()
        await asyncio.sleep(0)
        await server.wait_closed()
