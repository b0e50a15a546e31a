"""HTTP/1.1 as the gateway's own server speaks it, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.adapters.call import Reply
from kvfleet.gateway.guard import Patience
from kvfleet.gateway.httpd import Server
from kvfleet.gateway.listening import bind
from kvfleet.plugin.contract import RouteRequest
from tests.gateway.fleet import FakeRouter, events, fleet, gateway, hello

BODY = b'{"messages":[{"role":"user","content":"Hi"}]}'
STREAM = b'{"stream":true,"messages":[{"role":"user","content":"Hi"}]}'


@contextlib.asynccontextmanager
async def served(
    router: FakeRouter | None = None,
    patience: Patience | None = None,
    *,
    drain_s: float = 1,
    first_words_s: float = 0.1,
    key: str = "",
) -> AsyncIterator[tuple[Server, tuple[str, int]]]:
    """A gateway on a free port."""
    app = await gateway(router or FakeRouter(fleet()), key=key)
    sockets = bind("127.0.0.1", 0)
    patience = patience or Patience()
    server = Server(app, drain_s=drain_s, patience=patience, sweep_s=0.02, first_words_s=first_words_s)
    await server.start(sockets)
    task = asyncio.create_task(server.run())
    try:
        yield server, sockets[0].getsockname()
    finally:
        server.stop()
        await task


@attrs.define
class Client:
    """A client that sends what it is told, and reads answers one by one."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def to(cls, address: tuple[str, int]) -> Client:
        return cls(*await asyncio.open_connection(*address))

    def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    async def answer(self, *, is_head: bool = False) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer."""
        async with asyncio.timeout(5):
            head = await self.reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode().strip().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            body = b"" if is_head else await self._body(headers)
        return int(first.split()[1]), headers, body

    async def _body(self, headers: dict[str, str]) -> bytes:
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        if "transfer-encoding" not in headers:
            return b""
        body = b""
        while size := int(await self.reader.readline(), 16):
            body += await self.reader.readexactly(size)
            await self.reader.readline()
        await self.reader.readline()
        return body

    async def rest(self) -> bytes:
        """What comes until the server closes."""
        async with asyncio.timeout(5):
            return await self.reader.read()

    def close(self) -> None:
        self.writer.close()


def post(body: bytes, *headers: bytes, version: bytes = b"1.1") -> bytes:
    """A chat request."""
    lines = [b"POST /v1/chat/completions HTTP/" + version, b"Host: x", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def get(path: bytes, *headers: bytes, version: bytes = b"1.1", method: bytes = b"GET") -> bytes:
    """A request without a body."""
    return b"\r\n".join([method + b" " + path + b" HTTP/" + version, b"Host: x", *headers]) + b"\r\n\r\n"


async def test_a_connection_serves_one_request_after_the_other() -> None:
    """Whole answers and streams, over one connection, each properly framed and dated."""
    async with served() as (_, address):
        client = await Client.to(address)
        for body, kind in ((BODY, "application/json"), (STREAM, "text/event-stream; charset=utf-8"), (BODY, "")):
            client.send(post(body))
            status, headers, answer = await client.answer()
            assert status == 200
            assert headers["content-type"].startswith(kind)
            assert headers["date"].endswith("GMT")
            assert "connection" not in headers
            assert answer.startswith(b"data: " if body is STREAM else b"{")
        client.close()


async def test_requests_sent_at_once_are_answered_in_turn() -> None:
    """Pipelined requests get their answers in their order, each its own, also when the first takes longest."""
    seen: list[str] = []

    async def later_is_quicker(request: RouteRequest) -> Reply:
        seen.append(request.request_id)
        for _ in range(20 if request.request_id == "r0" else 1):
            await asyncio.sleep(0)
        return Reply(body=json.dumps({"id": request.request_id}).encode())

    async with served(FakeRouter(fleet(), later_is_quicker)) as (_, address):
        client = await Client.to(address)
        client.send(*[post(BODY, b"X-Request-ID: r%d" % n) for n in range(5)])
        answers = [await client.answer() for _ in range(5)]
        client.close()
    assert [json.loads(body)["id"] for _, _, body in answers] == seen == [f"r{n}" for n in range(5)]


async def test_only_so_much_is_read_ahead() -> None:
    """What a client sends behind a request that is being answered stays with it beyond 64 KB, and is answered later."""
    first, done = asyncio.Event(), asyncio.Event()

    async def slow(request: RouteRequest) -> Reply:
        first.set()
        await done.wait()
        return Reply(body=json.dumps({"length": len(request.raw)}).encode())

    large = json.dumps({"messages": [{"role": "user", "content": "x" * 4_000_000}]}).encode()
    async with served(FakeRouter(fleet(), slow)) as (server, address):
        client = await Client.to(address)
        client.send(post(BODY), post(large), post(BODY))
        await first.wait()
        (connection,) = server.connections
        async with asyncio.timeout(5):
            while not connection.is_read_paused:  # noqa: ASYNC110 - nobody announces it
                await asyncio.sleep(0)
        done.set()
        lengths = [json.loads((await client.answer())[2])["length"] for _ in range(3)]
        client.close()
    assert lengths == [len(BODY), len(large), len(BODY)]


async def test_a_body_may_come_in_any_pieces() -> None:
    """Chunks and packets are the transport's matter: the body is what was sent."""
    bodies: list[bytes] = []

    async def keep(request: RouteRequest) -> Reply:
        bodies.append(request.raw)
        return Reply(body=b"{}")

    async with served(FakeRouter(fleet(), keep)) as (_, address):
        client = await Client.to(address)
        client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, len(BODY), 7):
            part = BODY[at : at + 7]
            client.send(b"%x\r\n%b\r\n" % (len(part), part))
            await client.writer.drain()
            await asyncio.sleep(0)
        client.send(b"0\r\n\r\n")
        assert (await client.answer())[0] == 200
        client.close()
    assert bodies == [BODY]


@given(cuts=st.lists(st.integers(0, 400), max_size=6))
@settings(max_examples=25, deadline=None)
def test_however_the_network_cuts_it(cuts: list[int]) -> None:
    """Wherever packets end, two requests are two requests."""

    async def check() -> None:
        data = post(BODY) + post(STREAM) + get(b"/livez?x=1")
        places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
        async with served() as (_, address):
            client = await Client.to(address)
            for begin, end in itertools.pairwise(places):
                client.send(data[begin:end])
                await client.writer.drain()
                await asyncio.sleep(0)
            answers = [await client.answer() for _ in range(3)]
            client.close()
        assert [status for status, _, _ in answers] == [200, 200, 200]
        assert answers[1][2].endswith(b"data: [DONE]\n\n")
        assert json.loads(answers[2][2]) == {"status": "ok"}

    asyncio.run(check())


async def test_white_space_around_a_value_counts_for_nothing() -> None:
    """A proxy may leave some behind it (RFC 9110, 5.5)."""
    asked: list[RouteRequest] = []

    async def keep(request: RouteRequest) -> Reply:
        asked.append(request)
        return Reply(body=b"{}")

    async with served(FakeRouter(fleet(), keep)) as (_, address):
        client = await Client.to(address)
        client.send(post(BODY, b"X-KVFleet-Timeout: \t 50000 \t", b"X-Session-ID:  mine ", b"X-Request-ID: r1 "))
        status, headers, _ = await client.answer()
        client.close()
    assert (status, headers["x-request-id"]) == (200, "r1")
    assert (asked[0].timeout_s, asked[0].session) == (50.0, "mine")


async def test_an_old_client_gets_no_chunks() -> None:
    """HTTP/1.0 knows none: a stream ends with the connection, and is kept open only if it asks and can be."""
    async with served() as (_, address):
        client = await Client.to(address)
        client.send(post(BODY, b"Connection: keep-alive", version=b"1.0"))
        _, headers, _ = await client.answer()
        assert headers["connection"] == "keep-alive"
        client.send(post(STREAM, b"Connection: keep-alive", version=b"1.0"))
        _, headers, _ = await client.answer()
        assert "transfer-encoding" not in headers
        assert headers["connection"] == "close"
        assert (await client.rest()).endswith(b"data: [DONE]\n\n")
        client.close()


@pytest.mark.parametrize(
    "head", [get(b"/livez", b"Connection: close"), get(b"/livez", version=b"1.0"), get(b"/livez", b"connection: Close")]
)
async def test_who_wants_to_close_is_closed(head: bytes) -> None:
    """Said by the request, or by its version."""
    async with served() as (_, address):
        client = await Client.to(address)
        client.send(head)
        status, headers, _ = await client.answer()
        assert (status, headers["connection"], await client.rest()) == (200, "close", b"")
        client.close()


async def test_the_head_of_an_answer_alone() -> None:
    """HEAD gets the same headers and no body, and the connection goes on."""
    async with served() as (_, address):
        client = await Client.to(address)
        client.send(get(b"/livez", method=b"HEAD"))
        _, headers, _ = await client.answer(is_head=True)
        client.send(get(b"/livez"))
        _, same, body = await client.answer()
        client.close()
    assert headers["content-length"] == same["content-length"] == str(len(body))


async def test_who_asks_before_sending_is_told_to_go_on() -> None:
    """`Expect: 100-continue` is answered when the body is wanted, and not when the request is refused anyway."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    async with served(key="k") as (_, address):
        client = await Client.to(address)
        client.send(head.replace(b"Host: x", b"Host: x\r\nAuthorization: Bearer k") % len(BODY))
        async with asyncio.timeout(5):
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(BODY)
        assert (await client.answer())[0] == 200
        client.send(head % len(BODY))
        status, headers, _ = await client.answer()
        client.close()
    assert (status, headers["connection"]) == (401, "close")


async def test_an_offer_to_upgrade_is_ignored() -> None:
    """Java's client offers HTTP/2 with its first request; that is answered in HTTP/1.1, body and all."""
    offer = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAEAAEAAAAIAAAAA")
    async with served() as (_, address):
        client = await Client.to(address)
        client.send(post(BODY, *offer))
        status, _, body = await client.answer()
        assert (status, json.loads(body)["object"]) == (200, "chat.completion")
        client.send(get(b"/livez"))
        assert (await client.answer())[0] == 200
        client.send(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n")
        assert (await client.answer())[0] == 400
        client.close()


async def test_a_refusal_is_read_though_the_body_is_still_coming() -> None:
    """What is announced as too long is refused at once; the client can read so although it goes on sending."""
    router = FakeRouter(fleet(max_body_bytes=1000))
    async with served(router) as (_, address):
        client = await Client.to(address)
        client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n")
        for _ in range(8):
            client.send(b"x" * 65_536)
            await client.writer.drain()
        status, headers, body = await client.answer()
        assert (status, headers["connection"]) == (413, "close")
        assert json.loads(body)["error"]["code"] == "body_too_large"
        client.close()


async def test_a_long_body_without_a_length_is_refused() -> None:
    """Chunks are counted as they come."""
    async with served(FakeRouter(fleet(max_body_bytes=1000))) as (_, address):
        client = await Client.to(address)
        client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.send(b"400\r\n%b\r\n" % (b"x" * 1024), b"400\r\n")
        assert (await client.answer())[0] == 413
        client.close()


async def test_a_connection_nobody_uses_is_closed() -> None:
    """After its time, and not before there was an answer."""
    async with served(patience=Patience(idle_s=0.05)) as (server, address):
        client = await Client.to(address)
        client.send(get(b"/livez"))
        assert (await client.answer())[0] == 200
        assert await client.rest() == b""
        client.close()
        assert not server.connections


async def test_a_stop_closes_what_is_idle_and_finishes_what_is_not() -> None:
    """An idle connection ends at once; a stream under way ends as it should, and the port is free."""
    asked, go = asyncio.Event(), asyncio.Event()

    async def slow(request: RouteRequest) -> Reply:
        asked.set()
        await go.wait()
        return Reply(events=events(b'data: {"a":1}\n\n', b"data: [DONE]\n\n"))

    async with served(FakeRouter(fleet(), slow), drain_s=5) as (server, address):
        idle, busy = await Client.to(address), await Client.to(address)
        idle.send(get(b"/livez"))
        await idle.answer()
        busy.send(post(STREAM))
        await asked.wait()
        server.stop()
        assert await idle.rest() == b""
        with pytest.raises(ConnectionRefusedError):
            await Client.to(address)
        go.set()
        _, headers, body = await busy.answer()
        assert (headers["connection"], body[-14:]) == ("close", b"data: [DONE]\n\n")
        idle.close()
        busy.close()


async def test_what_comes_after_a_stop_on_an_open_connection_is_answered() -> None:
    """A client that nobody has told yet is told with its next answer, and only then closed, however late it asks."""
    go = asyncio.Event()

    async def streams(request: RouteRequest) -> Reply:
        async def until_told() -> AsyncIterator[bytes]:
            yield b'data: {"a":1}\n\n'
            await go.wait()
            yield b"data: [DONE]\n\n"

        return Reply(events=until_told()) if request.stream else await hello(request)

    async with served(FakeRouter(fleet(), streams), drain_s=60, first_words_s=60) as (server, address):
        idle, new, busy = [await Client.to(address) for _ in range(3)]
        idle.send(get(b"/livez"))
        await idle.answer()
        busy.send(post(STREAM))
        head = await busy.reader.readuntil(b"\r\n\r\n")  # it promises to keep the connection
        server.stop()
        with contextlib.suppress(ConnectionRefusedError):
            while True:  # until nobody else is let in
                (await Client.to(address)).close()
        for client in (idle, new):
            client.send(post(BODY))
            status, headers, _ = await client.answer()
            assert (status, headers["connection"]) == (200, "close")
            assert await client.rest() == b""
        go.set()
        await busy.reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n")
        busy.send(post(BODY))
        status, headers, _ = await busy.answer()
        assert (b"connection: close" in head, status, headers["connection"]) == (False, 200, "close")
        for client in (idle, new, busy):
            client.close()


async def test_who_waits_to_be_accepted_at_a_stop_is_answered() -> None:
    """Connections that the system has made and nobody has accepted, with a request each, are all answered."""
    async with served() as (server, address):
        waiting = [socket.create_connection(address) for _ in range(64)]  # the event loop does not run meanwhile
        for one in waiting:
            one.sendall(post(BODY))
        server.stop()
        clients = [Client(*await asyncio.open_connection(sock=one)) for one in waiting]
        answers = [await client.answer() for client in clients]
        for client in clients:
            client.close()
    assert [(status, headers["connection"]) for status, headers, _ in answers] == [(200, "close")] * 64


async def test_who_keeps_connecting_does_not_hold_up_a_stop() -> None:
    """With others connecting all the time a stop comes to its end, and each of them is answered or refused."""
    ends: Counter[str] = Counter()

    async def connect_again_and_again(address: tuple[str, int]) -> None:
        with contextlib.suppress(ConnectionRefusedError):
            while True:
                client = await Client.to(address)
                client.send(post(BODY))
                status, headers, _ = await client.answer()
                ends[f"{status} {headers.get('connection', '')}"] += 1
                client.close()
        ends["refused"] += 1

    async with asyncio.timeout(60), served(drain_s=60) as (server, address), asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(connect_again_and_again(address))
        while not ends["200 "]:  # noqa: ASYNC110 - those who ask set nothing
            await asyncio.sleep(0)
        server.stop()
    assert set(ends) - {"200 close"} == {"200 ", "refused"}
    assert ends["refused"] == 8


async def test_the_last_answer_is_read_though_more_was_asked_behind_it() -> None:
    """Who has sent more than is answered after a stop gets its answer, and an end instead of a reset."""
    asked, go = asyncio.Event(), asyncio.Event()

    async def slow(request: RouteRequest) -> Reply:
        asked.set()
        await go.wait()
        return await hello(request)

    async with served(FakeRouter(fleet(), slow), drain_s=60) as (server, address):
        client = await Client.to(address)
        client.send(post(BODY) * 2000)
        await asked.wait()
        server.stop()
        while not server.is_stopping:  # noqa: ASYNC110 - who stops sets nothing
            await asyncio.sleep(0)
        go.set()
        status, headers, _ = await client.answer()
        assert (status, headers["connection"], await client.rest()) == (200, "close", b"")
        client.close()


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://x/livez", 200),
        (b"/livez?a=%zz", 200),
        (b"/%6civez", 200),
        (b"/liv%65z#x", 200),
        (b"*", 404),
        (b"/\xc3\xa4", 400),
        (b"livez", 400),
    ],
)
async def test_targets(target: bytes, status: int) -> None:
    """A path, with or without escapes and a query, or a whole URL; everything else is refused."""
    async with served() as (_, address):
        client = await Client.to(address)
        client.send(get(target, method=b"OPTIONS" if target == b"*" else b"GET"))
        assert (await client.answer())[0] == status
        client.close()
