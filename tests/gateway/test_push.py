"""Events that go to the client as they arrive: the same bytes, in the same order, as those that are waited for."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence

import attrs
import pytest

from kvfleet.gateway.http_exchange import HTTPExchange
from tests.gateway.test_leaving import Caller, gateway_to
from tests.gateway.upstream import SSE_HEAD, chunk


def event(text: str, finish: str | None = None, **more: object) -> bytes:
    """One event of a stream."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    data = json.dumps({"id": "1", "choices": [choice], **more}, separators=(",", ":"))
    return f"data: {data}\n\n".encode()


@contextlib.asynccontextmanager
async def engine(parts: Sequence[bytes], gap_s: float) -> AsyncIterator[str]:
    """An engine that sends its answer in these parts, one after the other; gives its URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            await reader.readexactly(next(int(line[15:]) for line in lines if line.startswith(b"content-length:")))
            for part in (SSE_HEAD, *parts, b"0\r\n\r\n"):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(gap_s)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server:
        yield f"http://{host}:{port}"


async def read_answer(caller: Caller) -> list[bytes]:
    """The chunks of a streamed answer."""
    await caller.reader.readuntil(b"\r\n\r\n")
    found = []
    while size := int(await caller.reader.readline(), 16):
        found.append(await caller.reader.readexactly(size))
        await caller.reader.readexactly(2)
    return found


def texts(chunks: Sequence[bytes]) -> list[str]:
    """The texts of the events, in order."""
    lines = b"".join(chunks).split(b"\n\n")
    events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    return [one["choices"][0]["delta"].get("content", "") for one in events if one.get("choices")]


@attrs.define
class Pushes:
    """Whether each piece that was pushed went out, and the most bytes that then waited for the client to read."""

    went: list[bool] = attrs.field(factory=list)
    most_waiting: int = 0


@pytest.fixture
def pushes(monkeypatch: pytest.MonkeyPatch) -> Pushes:
    """What is pushed from now on."""
    seen, real = Pushes(), HTTPExchange.push

    def push(self: HTTPExchange, body: bytes) -> bool:
        seen.went.append(real(self, body))
        seen.most_waiting = max(seen.most_waiting, self.connection.unsent_bytes)
        return seen.went[-1]

    monkeypatch.setattr(HTTPExchange, "push", push)
    return seen


async def answer_of(parts: Sequence[bytes], gap_s: float = 0.005) -> list[bytes]:
    """What the client gets of such an answer."""
    async with engine(parts, gap_s) as url, gateway_to(url) as serving:
        caller = await Caller.of(serving, stream=True)
        try:
            return await read_answer(caller)
        finally:
            caller.hang_up()


async def test_plain_events_go_through_in_order(pushes: Pushes) -> None:
    """Plain ones are pushed; a cut one, one with a quotation mark, the last one and the end are not; none is lost."""
    cut = event("cut in two")
    parts = [chunk(event(f"word {i} ")) for i in range(20)]
    parts += [chunk(cut[:30]), chunk(cut[30:]), chunk(event('say "x"')), chunk(event("on") + event("and on"))]
    parts += [chunk(event(f"more {i} ")) for i in range(20)]
    usage = {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}
    parts += [chunk(event("", "stop", usage=usage)), chunk(b"data: [DONE]\n\n")]
    found = await answer_of(parts)
    expected = [f"word {i} " for i in range(20)] + ["cut in two", 'say "x"', "on", "and on"]
    assert texts(found) == [*expected, *(f"more {i} " for i in range(20)), ""]
    assert found[-1].endswith(b"data: [DONE]\n\n")
    assert sum(pushes.went) >= 30


async def test_a_broken_stream_still_ends_in_an_error(pushes: Pushes) -> None:
    """What breaks after many pushed events is told as ever."""
    parts = [
        *(chunk(event(f"word {i} ")) for i in range(10)),
        chunk(b'data: {"error":{"message":"out of memory"}}\n\n'),
    ]
    found = await answer_of(parts)
    assert texts(found)[:10] == [f"word {i} " for i in range(10)]
    assert b'"error"' in found[-1]
    assert any(pushes.went)


async def test_a_client_that_does_not_read_holds_the_engine_up(pushes: Pushes) -> None:
    """What it has not read is not collected in the gateway's memory; later everything is there, in order."""
    word = "x" * 4000
    parts = [chunk(event(f"{i} {word}")) for i in range(2000)]
    parts += [chunk(event("", "stop")), chunk(b"data: [DONE]\n\n")]
    async with engine(parts, 0) as url, gateway_to(url) as serving:
        caller = await Caller.of(serving, stream=True)
        await asyncio.sleep(0.3)
        found = await read_answer(caller)
        caller.hang_up()
    assert [text.partition(" ")[0] for text in texts(found)[:-1]] == [str(i) for i in range(2000)]
    assert pushes.most_waiting < sum(len(part) for part in parts) / 8
