"""Engines that misbehave byte by byte: a server of its own for each, in the event loop of whoever asks for them.

An engine answers chats, and what other APIs it is said to speak, with one known text, streamed or whole, continues it
where it is asked to, and has the paths that gateways look at. A `Site` is one or two of them; a fault befalls the one that is asked first, and the other one is
well, so that whoever tries again elsewhere gets an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import attrs

from tests.faults.tongues import CHAT, MODEL, TEXT, TONGUES, Tongue

SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n"
    b"connection: keep-alive\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


def whole(body: bytes, status: str = "200 OK", kind: str = "application/json", more: str = "") -> bytes:
    """A whole HTTP answer."""
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def refusal(status: str, message: str = "it went wrong", more: str = "") -> bytes:
    """An HTTP error as vLLM has them."""
    error = {"message": message, "type": "server_error", "param": None, "code": int(status[:3])}
    return whole(json.dumps({"error": error}).encode(), status, more=more)


class LeaveError(Exception):
    """Raised by a behaviour to end the connection; with a reset, or in an orderly way."""

    def __init__(self, *, resets: bool = False) -> None:
        super().__init__()
        self.resets = resets


@attrs.define
class Ask:
    """One request at an engine, and the wire to answer it on.

    Attributes:
        body: Parsed.
        number: From 1, of those that this engine got since the fault began.
        tongue: The API it was asked in.
        engine: Who was asked.
    """

    body: dict[str, Any]
    number: int
    tongue: Tongue
    engine: Engine
    writer: asyncio.StreamWriter
    reader: asyncio.StreamReader

    @property
    def stream(self) -> bool:
        """True if a stream was asked for."""
        return bool(self.body.get("stream"))

    async def say(self, *pieces: bytes) -> None:
        """Send bytes."""
        for piece in pieces:
            self.writer.write(piece)
        await self.writer.drain()

    async def silence(self) -> None:
        """Say nothing more, until the other side leaves."""
        while await self.reader.read(4096):
            pass
        raise LeaveError

    async def begin(self, tokens: int = 4) -> None:
        """Begin a right answer: a stream's first tokens, or the first half of a whole answer."""
        if self.stream:
            await self.say(SSE_HEAD, *map(chunk, self.tongue.beginning(tokens)))
            return
        said = whole(self.tongue.answer_of(TEXT))
        await self.say(said[: len(said) - 150])

    async def answer(self) -> None:
        """Answer as a healthy engine does, and go on from where an answer was broken off."""
        text = self._rest()
        if text is None:
            await self.say(refusal("400 Bad Request", "the last message is no beginning of the answer"))
        elif not self.stream:
            await self.say(whole(self.tongue.answer_of(text)))
        else:
            tokens = [text[i : i + 6] for i in range(0, len(text), 6)]
            await self.say(SSE_HEAD, *map(chunk, self.tongue.events_of(tokens)), LAST_CHUNK)

    def _rest(self) -> str | None:
        if not self.body.get("continue_final_message"):
            return TEXT
        said = self.body["messages"][-1]
        begun = said.get("content") if said.get("role") == "assistant" else None
        if self.body.get("add_generation_prompt") is not False or begun is None or not TEXT.startswith(begun):
            return None
        return TEXT[len(begun) :]


Behaviour = Callable[[Ask], Awaitable[None]]


async def healthily(ask: Ask) -> None:
    """Answer as one should."""
    await ask.answer()


@attrs.define(eq=False)
class Engine:
    """One backend.

    Attributes:
        site: Whose it is; decides how it behaves.
        port: Where it listens.
        chats: Answers it was asked for since the fault began.
    """

    site: Site
    port: int = 0
    chats: int = 0
    _server: asyncio.Server | None = None
    _open: set[asyncio.StreamWriter] = attrs.field(factory=set)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    async def listen(self) -> None:
        """Accept connections, on the same port as before."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, reuse_address=True)
            self.port = self._server.sockets[0].getsockname()[1]

    async def vanish(self) -> None:
        """Refuse connections, and close those that are open."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        self.hang_up()
        await asyncio.sleep(0)

    def hang_up(self) -> None:
        """Reset every connection."""
        for writer in list(self._open):
            _reset(writer)
        self._open.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                line, *fields = head.decode("latin-1").split("\r\n")
                sizes = [int(f.split(":")[1]) for f in fields if f.lower().startswith("content-length:")]
                body = await reader.readexactly(sizes[0] if sizes else 0)
                await self._answer(line.split(" "), body, reader, writer)
        except LeaveError as left:
            if left.resets:
                _reset(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(
        self, line: list[str], body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        method, path, *_ = line
        tongue = next((one for one in TONGUES if path == one.path), None)
        if path == "/tokenize" and self.site.tokenizes is not None:
            writer.write(whole(json.dumps({"tokens": self.site.tokenizes(json.loads(body)["prompt"])}).encode()))
            await writer.drain()
            return
        if method != "POST" or tongue is None or tongue not in self.site.tongues:
            writer.write(_page(path) if tongue is None else refusal("404 Not Found"))
            await writer.drain()
            return
        self.chats += 1
        ask = Ask(json.loads(body), self.chats, tongue, self, writer, reader)
        await self.site.behaviour_of(self)(ask)


def _page(path: str) -> bytes:
    """What gateways look at beside the chats."""
    if path.startswith("/v1/models"):
        listed = {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "wall"}]}
        return whole(json.dumps(listed).encode())
    told = {"model_path": MODEL, "tokenizer_path": MODEL, "is_generation": True, "served_model_name": MODEL}
    return whole(json.dumps(told).encode())


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@attrs.define(eq=False)
class Site:
    """One or two engines, one of which may be at fault, or with `is_everybody` all.

    Attributes:
        engines: All of them.
        behaviour: Of who is at fault.
        culprit: Who that is, once it is known.
        tongues: The APIs they speak.
        tokenizes: What they say at ``/tokenize``; nothing of use if None.
    """

    engines: list[Engine] = attrs.field(factory=list)
    behaviour: Behaviour = healthily
    culprit: Engine | None = None
    is_everybody: bool = False
    tongues: Sequence[Tongue] = (CHAT,)
    tokenizes: Callable[[str], Sequence[int]] | None = None

    def behaviour_of(self, engine: Engine) -> Behaviour:
        """How an engine that is asked now behaves: whoever is asked first is at fault."""
        self.culprit = self.culprit or engine
        return self.behaviour if self.is_everybody or engine is self.culprit else healthily

    async def befall(self, behaviour: Behaviour, *, refuses: bool = False) -> None:
        """From now on the engine that is asked first behaves so, or the first one refuses connections."""
        for engine in self.engines:
            engine.chats = 0
            await engine.listen()
        self.behaviour, self.culprit = behaviour, None
        if refuses:
            self.culprit = self.engines[0]
            await self.culprit.vanish()

    async def heal(self) -> None:
        """All is well again."""
        self.behaviour, self.culprit = healthily, None
        for engine in self.engines:
            await engine.listen()

    @property
    def chats(self) -> int:
        """How many chats all engines were asked for since the fault began."""
        return sum(engine.chats for engine in self.engines)


@contextlib.asynccontextmanager
async def site(engines: int, *tongues: Tongue) -> AsyncIterator[Site]:
    """Engines on free ports, for the length of a block; they speak chat and these."""
    one = Site(tongues=(CHAT, *tongues))
    one.engines = [Engine(one) for _ in range(engines)]
    for engine in one.engines:
        await engine.listen()
    try:
        yield one
    finally:
        for engine in one.engines:
            await engine.vanish()
