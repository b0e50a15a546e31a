"""Whatever arrives, a parser ends soon, in a value or in an error of kvfleet's own tree; and time grows with size alone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.call import Tally
from kvfleet.adapters.h1 import Connection
from kvfleet.adapters.translated import events_of
from kvfleet.adapters.translation import Framing
from kvfleet.cache.kv_drain import decode_drain
from kvfleet.cache.kv_events import decode
from kvfleet.config.loader import check_text
from kvfleet.errors import BackendError, BadRequestError, KVEventError
from kvfleet.gateway.connection import ClientConnection, Sizes
from kvfleet.gateway.surfaces.messages import Messages
from kvfleet.gateway.surfaces.responses import Responses
from kvfleet.policy.conditions import ConditionError, PolicyContext, parse
from tests.adapters.test_sse import DONE, FIRST, STOP, STREAMS, TEXT, USAGE, relay
from tests.fuzz.mutations import LONGEST_S, cut, fuzzed, grows_like, mutated
from tests.gateway.fleet import FakeRouter, fleet, gateway
from tests.gateway.test_smuggling import ACCEPTED, REFUSED, SOUND

ROOT = Path(__file__).parent.parent.parent
CUTS = st.lists(st.floats(0, 1), max_size=6)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """An event loop that lives as long as the tests, and complains of whatever nobody caught."""
    caught: list[dict[str, Any]] = []
    with asyncio.Runner() as made:
        made.get_loop().set_exception_handler(lambda _, context: caught.append(context))
        yield made
    assert not caught


@contextlib.contextmanager
def soon() -> Iterator[None]:
    """What is within takes little time."""
    began_s = time.process_time()
    yield
    assert time.process_time() - began_s < LONGEST_S


# Streams of events

EVENTS = mutated(
    [FIRST + TEXT + STOP + USAGE + DONE, *STREAMS.values()],
    [
        *(b"\n", b"\r\n", b"\n\n", b"\r", b"data:", b"data: ", b"event: error\n", b":", b"[DONE]", b"null", b"\0"),
        *(b'"finish_reason":"stop"', b'"error":{}', b'{"error":"x"}', b'"choices":7', b'"usage":[]', b'"index":{}'),
        *(b'"usage":{"prompt_tokens":"x"}', b'"usage":{"prompt_tokens":-1e999}', b"}\n\ndata: {", b"\xff\xfe", b'"'),
    ],
)


@fuzzed
@given(data=EVENTS, cuts=CUTS)
def test_a_stream_of_events(data: bytes, cuts: list[float]) -> None:
    """It is relayed byte by byte, or ends in a backend's error; it is never called complete without its end."""

    async def read() -> tuple[bytes, Tally, BackendError | None]:
        one, tally, _ = relay(*cut(data, cuts))
        out = b""
        try:
            async for piece in one:
                out += piece
        except BackendError as error:
            return out, tally, error
        return out, tally, None

    with soon():
        out, tally, error = asyncio.run(read())
    assert tally.is_complete is (error is None)
    if error is None:
        assert out.rstrip().endswith(b"[DONE]")
        assert b"finish_reason" in data or b"[DONE]" in data
    else:
        assert error.received is bool(out)


@fuzzed
@given(data=EVENTS, cuts=CUTS, framing=st.sampled_from([Framing.SSE, Framing.NDJSON]))
def test_events_of_another_tongue(data: bytes, cuts: list[float], framing: Framing) -> None:
    """Single events come out, whatever they hold; what is too long is a backend's error."""

    async def read() -> list[bytes]:
        return [one async for one in events_of(_body(cut(data, cuts)), framing)]

    with soon(), contextlib.suppress(BackendError):
        assert all(asyncio.run(read()))


async def _body(pieces: list[bytes]) -> Any:
    for piece in pieces:
        yield piece


# HTTP, on both sides


class Wire(asyncio.Transport):
    """A transport that keeps what is written, and can be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.said = b""
        self.is_closed = False

    def write(self, data: Any) -> None:
        if not self.is_closed:
            self.said += bytes(data)

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nx: y\r\n\r\n"
TOKENS = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b";", b"content-length: 5\r\n", b"content-length: -1\r\n"),
    *(b"transfer-encoding: chunked\r\n", b"transfer-encoding: x\r\n", b"connection: close\r\n", b"upgrade: h2c\r\n"),
    *(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 101 X\r\n\r\n", b"HTTP/1.0", b"HTTP/9.9", b"0\r\n\r\n", b"fffffff"),
    *(b"%00", b"%", b"?", b"#", b"//", b"..", b"\xff", b"Expect: 100-continue\r\n", b"connection: upgrade\r\n"),
]


@fuzzed
@given(
    data=mutated([ANSWER, CHUNKED, b"HTTP/1.1 103 X\r\n\r\n" + ANSWER, ANSWER + CHUNKED], TOKENS),
    cuts=CUTS,
    is_lost=st.booleans(),
)
def test_an_answer_of_a_backend(runner: asyncio.Runner, data: bytes, cuts: list[float], is_lost: bool) -> None:
    """A body, or one of httpx's errors; and a body is complete only if its framing proves it."""

    async def read() -> None:
        ends: list[str] = []
        one = Connection(
            asyncio.get_running_loop(), on_free=lambda _: ends.append("free"), on_lost=lambda _: ends.append("lost")
        )
        wire = Wire()
        one.connection_made(wire)
        one.begin(b"GET / HTTP/1.1\r\n\r\n", b"", is_bodiless=False, first_by_s=one.now_s() + 9, idle_s=9)
        for piece in cut(data, cuts):
            if not wire.is_closed:
                one.data_received(piece)
        if is_lost or wire.is_closed:
            one.connection_lost(None)
        with contextlib.suppress(httpx.HTTPError):
            if one.take_head():
                for _ in range(100):
                    if not (piece := one.take()):
                        break
                assert one.is_complete or not ends or ends == ["lost"]
        one.abort()
        one.connection_lost(None)
        assert ends.count("lost") <= 1

    with soon():
        runner.run(read())


@fuzzed
@given(
    data=mutated([SOUND, SOUND + SOUND, *REFUSED.values(), *ACCEPTED.values()], TOKENS),
    cuts=CUTS,
)
def test_a_request_of_a_client(runner: asyncio.Runner, data: bytes, cuts: list[float]) -> None:
    """It is answered or refused in proper HTTP, the connection left in order, and no task stays behind."""
    with soon():
        runner.run(_serve(data, cuts))


async def _serve(data: bytes, cuts: list[float]) -> None:
    app = await gateway(FakeRouter(fleet()))
    host = Host(app)
    one, wire = ClientConnection(host), Wire()
    one.connection_made(wire)
    for piece in cut(data, cuts):
        if not wire.is_closed:
            one.data_received(piece)
        await asyncio.sleep(0)
    for _ in range(8):
        await asyncio.sleep(0)
    one.connection_lost(None)
    if host.tasks:
        await asyncio.wait(host.tasks, timeout=5)
    assert not host.connections
    assert all(task.done() and task.exception() is None for task in host.tasks)
    await app.stop()
    assert not wire.said or wire.said.startswith(b"HTTP/1.1 ")


class Host:
    """What a connection needs of a server."""

    def __init__(self, app: Any) -> None:
        self.loop = asyncio.get_running_loop()
        self.connections: set[Any] = set()
        self.date_line = b"date: now\r\n"
        self.is_stopping = False
        self.sizes = Sizes()
        self.app = app
        self.tasks: set[asyncio.Task[None]] = set()

    def begin(self, exchange: Any) -> asyncio.Task[None]:
        task = self.loop.create_task(self.app.handle(exchange))
        self.tasks.add(task)
        return task

    def ended(self, task: Any) -> None:
        pass

    def gone(self, connection: Any) -> None:
        self.connections.discard(connection)


# Files and conditions

FILES = [path.read_bytes() for path in sorted((ROOT / "pipelines").glob("*.yaml"))]


@fuzzed
@given(
    data=mutated(
        FILES,
        [
            *(
                b"\n",
                b"  ",
                b"- ",
                b": ",
                b"{",
                b"}",
                b"[",
                b"]",
                b"&a ",
                b"*a",
                b"<<: ",
                b"!!python/object:os.system ",
            ),
            *(
                b"|\n",
                b">\n",
                b'"',
                b"'",
                b"#",
                b"%YAML 9.9\n",
                b"---\n",
                b"...\n",
                b"null",
                b"~",
                b"1e999",
                b"0x",
                b"\t",
            ),
            *(b"? ", b"\xc2\x85", b"\xff", b"models:", b"env:HOME", b"file:/etc/passwd", b"\0", "\u2028".encode()),
        ],
    )
)
def test_a_fleet_file(data: bytes) -> None:
    """A configuration, or findings that say where; nothing else, and no secret of the environment in them."""
    with soon():
        config, findings = check_text(data.decode("utf-8", "replace"), environ={"HOME": "CANARY"})
    assert config is not None or findings
    assert "CANARY" not in "".join(map(str, findings))
    assert all(finding.line is None or finding.line >= 0 for finding in findings)


@fuzzed
@given(
    data=mutated(
        [
            b"data_class == confidential and (tokens > 10 or not has_pii)",
            b"tags.team in (red, 'blue') and headers.x-env != prod",
            b"pii contains email or domain == coding and tenant == 'a b'",
        ],
        [*(b"(", b")", b"'", b'"', b"and ", b"or ", b"not ", b"in ", b"==", b">", b",", b".", b"tokens", b"9" * 30)],
    )
)
def test_a_condition(data: bytes) -> None:
    """A test that says yes or no, or an error that says where."""
    with soon(), contextlib.suppress(ConditionError):
        assert parse(data.decode("utf-8", "replace"))(PolicyContext(data_class="public")) in (True, False)


def test_a_file_of_brackets() -> None:
    """Looking for a key behind each of them takes longest where a line is as long as a key may be; then it is bounded."""
    for count in (1024, 50_000):
        with soon():
            config, findings = check_text("a: " + "[" * count)
        assert config is None
        assert "nested deeper" in str(findings[0])


# Engines' events

BATCHES = [
    msgspec.msgpack.encode(batch)
    for batch in (
        [
            1.5,
            [
                ["BlockStored", [1, 2], None, list(range(32)), 16, None, "GPU"],
                ["BlockRemoved", [1]],
                ["AllBlocksCleared"],
            ],
            0,
        ],
        {
            "ts": 1,
            "events": [{"type": "BlockStored", "block_hashes": [b"a" * 32], "token_ids": [1] * 16, "block_size": 16}],
        },
    )
]


@fuzzed
@given(
    data=mutated(BATCHES, [b"\xdd\xff\xff\xff\xff", b"\xc0", b"\x91", b"\xcf" + b"\xff" * 8, b"\xd9\x0bBlockStored"])
)
def test_events_of_a_cache(data: bytes) -> None:
    """A batch, or kvfleet's own error."""
    with soon(), contextlib.suppress(KVEventError):
        decode(data)


_STORED = b'{"event_id":1,"data":{"type":"stored","blocks":[{"block_hash":5,"tokens":[{"token_id":1}]}]}}'
_REMOVED = b'{"event_id":2,"data":{"type":"removed","block_hashes":[5]}}'
DRAINED = [b"[" + _STORED + b"," + _REMOVED + b"]"]


@fuzzed
@given(data=mutated(DRAINED, [b"null", b"[]", b"{}", b"-1", b"1e400", b'"', b"9" * 40, b"true"]))
def test_events_that_are_drained(data: bytes) -> None:
    """The same for what TensorRT-LLM says."""
    with soon(), contextlib.suppress(KVEventError):
        decode_drain(data)


# Other APIs

SCALARS = st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats(allow_nan=False) | st.text(max_size=6)
KINDS = st.sampled_from(
    [
        *(
            "text",
            "image",
            "document",
            "tool_use",
            "tool_result",
            "thinking",
            "search_result",
            "input_text",
            "function",
        ),
        *("output_text", "input_image", "function_call", "function_call_output", "reasoning", "message", "json_schema"),
    ]
)
NAMES = st.sampled_from(
    [
        *(
            "type",
            "text",
            "content",
            "role",
            "source",
            "id",
            "name",
            "input",
            "tool_use_id",
            "data",
            "media_type",
            "url",
        ),
        *("signature", "thinking", "cache_control", "call_id", "arguments", "output", "image_url", "summary", "format"),
    ]
)
JSON = st.recursive(
    SCALARS | KINDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=12,
)
BLOCK = st.fixed_dictionaries({"type": KINDS}, optional=dict.fromkeys(("text", "content", "source", "id"), JSON)) | JSON
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.lists(BLOCK, max_size=3)})
FIELDS = ("system", "tools", "tool_choice", "metadata", "stop_sequences", "output_config", "thinking", "max_tokens")
MORE = ("instructions", "text", "reasoning", "include", "store", "stream", "top_logprobs", "parallel_tool_calls")


def bodies(conversation: str, items: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies of an API that has its conversation there."""
    fields = [field for field in (*FIELDS, *MORE) if field not in ("messages", "input")]
    return st.fixed_dictionaries(
        {conversation: st.lists(items, max_size=3) | JSON}, optional=dict.fromkeys(fields, JSON)
    )


BODIES = st.tuples(bodies("messages", TURN), st.just(Messages())) | st.tuples(
    bodies("input", TURN | BLOCK), st.just(Responses())
)


@fuzzed
@given(asking=BODIES)
def test_a_body_of_another_api(asking: tuple[dict[str, Any], Any]) -> None:
    """It is a chat, or the client's own mistake; and it is not changed."""
    body, surface = asking
    before = orjson.dumps(body)
    with soon(), contextlib.suppress(BadRequestError):
        asked = surface.read(body, ())
        assert asked.chat["messages"]
        orjson.dumps(asked.chat)
    assert orjson.dumps(body) == before


# Time

LINEAR = 1.5  # an exponent of 2 is what is looked for; a busy machine blurs what is in proportion


def _relayed(pieces: list[bytes]) -> Callable[[], object]:
    async def read() -> None:
        one, _, _ = relay(*pieces)
        with contextlib.suppress(BackendError):
            async for _ in one:
                pass

    return lambda: asyncio.run(read())


def _answered(data: bytes, step: int) -> Callable[[], object]:
    async def read() -> None:
        one = Connection(asyncio.get_running_loop(), on_free=lambda _: None, on_lost=lambda _: None)
        one.connection_made(Wire())
        one.begin(b"", b"", is_bodiless=False, first_by_s=one.now_s() + 9, idle_s=9)
        with contextlib.suppress(httpx.HTTPError):
            for place in range(0, len(data), step):
                one.data_received(data[place : place + step])
            while one.take():
                pass
        one.abort()

    return lambda: asyncio.run(read())


def _requested(data: bytes, step: int) -> Callable[[], object]:
    async def serve() -> None:
        host = Host(await gateway(FakeRouter(fleet())))
        one, wire = ClientConnection(host), Wire()
        one.connection_made(wire)
        for place in range(0, len(data), step):
            if not wire.is_closed:
                one.data_received(data[place : place + step])
        for _ in range(8):
            await asyncio.sleep(0)
        one.connection_lost(None)
        if host.tasks:
            await asyncio.wait(host.tasks)
        await host.app.stop()

    return lambda: asyncio.run(serve())


def _written(surface: Any, chunks: list[dict[str, Any]]) -> Callable[[], object]:
    def write() -> None:
        body = {"messages": [{"role": "user", "content": "a"}]} if isinstance(surface, Messages) else {"input": "a"}
        writer = surface.writer(surface.read(body, ()), "id")
        for chunk in chunks:
            writer.feed(chunk)
        writer.finish(None)

    return write


def _deltas(count: int, *, tools: bool) -> list[dict[str, Any]]:
    def delta(number: int) -> dict[str, Any]:
        if not tools:
            return {"content": "word "}
        return {"tool_calls": [{"index": number % 50, "id": "c", "function": {"name": "f", "arguments": "1"}}]}

    return [{"choices": [{"index": 0, "delta": delta(number)}]} for number in range(count)]


def _decoding(count: int) -> Callable[[], object]:
    stored = ["BlockStored", list(range(count)), None, [1] * 16 * count, 16]
    payload = msgspec.msgpack.encode([1, [stored]])
    return lambda: decode(payload)


def _parsed(text: str) -> None:
    with contextlib.suppress(ConditionError):
        parse(text)


GROWING: dict[str, tuple[Callable[[int], Callable[[], object]], int]] = {
    "events, one after the other": (lambda n: _relayed([FIRST, *[TEXT] * n, STOP, DONE]), 500),
    "an event in single bytes": (lambda n: _relayed([b"x"] * n), 4000),
    "events in single bytes": (lambda n: _relayed([bytes([b]) for b in TEXT * n]), 30),
    "events in one piece": (lambda n: _relayed([TEXT * n]), 800),
    "line ends without an event": (lambda n: _relayed([b"\r\n"] * n), 2000),
    "an answer in single bytes": (lambda n: _answered(ANSWER.replace(b": 5", b": %d" % n)[:-5] + b"x" * n, 1), 5000),
    "an answer in single chunks": (lambda n: _answered(CHUNKED.partition(b"5;")[0] + b"1\r\na\r\n" * n, 999), 3000),
    "a request in single bytes": (
        lambda n: _requested(SOUND.partition(b"Content")[0] + b"Content-Length: %d\r\n\r\n" % n + b" " * n, 1),
        5000,
    ),
    "requests at once": (lambda n: _requested(SOUND * n, 4096), 20),
    "a file of many models": (
        lambda n: (
            lambda: check_text("models:\n" + "".join(f"- {{name: m{i}, endpoint: 'http://h{i}'}}\n" for i in range(n)))
        ),
        60,
    ),
    "a file that is deep": (lambda n: lambda: check_text("a: " + "{a: " * n), 2000),
    "a file of unknown keys": (lambda n: lambda: check_text("".join(f"key{i}: 1\n" for i in range(n))), 200),
    "a condition of many parts": (lambda n: lambda: _parsed(" or ".join(["tokens > 1"] * n)), 200),
    "a condition that is deep": (lambda n: lambda: _parsed("(" * n + "has_pii" + ")" * n), 300),
    "a condition of one word": (lambda n: lambda: _parsed("tags." + "a" * n + " == '" + "b" * n), 4000),
    "blocks of a cache": (_decoding, 500),
    "a message in pieces": (lambda n: _written(Messages(), _deltas(n, tools=False)), 500),
    "a message of calls": (lambda n: _written(Messages(), _deltas(n, tools=True)), 500),
    "a response in pieces": (lambda n: _written(Responses(), _deltas(n, tools=False)), 500),
    "a response of calls": (lambda n: _written(Responses(), _deltas(n, tools=True)), 500),
    "a message of many blocks": (
        lambda n: (
            lambda: Messages().read(
                {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * n}] * 3}, ()
            )
        ),
        2000,
    ),
    "a response of many items": (
        lambda n: (
            lambda: Responses().read(
                {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}] * n}, ()
            )
        ),
        2000,
    ),
}


@pytest.mark.parametrize("case", GROWING)
def test_time_grows_with_size_alone(case: str) -> None:
    """Eight times as much takes about eight times as long, and not sixty-four."""
    prepare, size = GROWING[case]
    exponent = min(grows_like(prepare, size) for _ in range(2))
    assert exponent < LINEAR, f"time grows with the power {exponent:.1f} of the size"
