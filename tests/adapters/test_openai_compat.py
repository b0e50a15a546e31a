"""The OpenAI-compatible adapter, against an engine on loopback."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from kvfleet.adapters.base import ChatMessage, ChatRequest
from kvfleet.adapters.call import Call, Limits, Operation, Reply, Tally, Usage
from kvfleet.adapters.openai_compat import READ_WHOLE_BELOW_BYTES, OpenAICompatAdapter
from kvfleet.errors import BackendError, Fault
from tests.adapters.paged import paged
from tests.adapters.scripted import (
    STREAM_HEAD,
    Engine,
    Request,
    Script,
    Wire,
    answering,
    chunk,
    engine,
    streamed,
    until,
    whole,
)

SAMPLES = Path(__file__).with_name("samples")
CHAT = (SAMPLES / "vllm_chat.json").read_bytes()
STREAM = (SAMPLES / "vllm_stream.sse").read_bytes()
BODY = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "top_k": 5, "guided": {"a": [1]}}


def call(operation: Operation = Operation.CHAT, *, stream: bool = False, **options: Any) -> Call:
    """A call as the gateway makes it."""
    body = {**BODY, "stream": True} if stream else BODY
    return Call(operation=operation, body=body, raw=orjson.dumps(body), stream=stream, **options)


@contextlib.asynccontextmanager
async def speaking(script: Script, **options: Any) -> AsyncIterator[tuple[OpenAICompatAdapter, Engine]]:
    """An adapter for a scripted engine."""
    async with engine(script) as at:
        adapter = OpenAICompatAdapter(endpoint=at.url, model_id="theirs", api_key="key", **options)
        yield adapter, at
        await adapter.aclose()


async def events_of(reply: Reply) -> bytes:
    """The whole stream."""
    assert reply.events is not None
    return b"".join([piece async for piece in reply.events])


ANSWERS = {
    Operation.CHAT: (CHAT, "/v1/chat/completions"),
    Operation.COMPLETION: (b'{"choices":[{"text":"x","finish_reason":"stop"}]}', "/v1/completions"),
    Operation.EMBEDDING: (b'{"data":[{"embedding":[0.5]}],"usage":{"prompt_tokens":2,"total_tokens":2}}', "/v1/embeddings"),
    Operation.RERANK: (b'{"results":[{"index":0,"relevance_score":0.9}]}', "/v1/rerank"),
}  # fmt: skip


@pytest.mark.parametrize("operation", Operation)
async def test_whole_answers_come_back_as_they_are(operation: Operation) -> None:
    """Each operation has its path; the body goes out patched and the answer comes back byte by byte."""
    answer, path = ANSWERS[operation]
    async with speaking(answering(whole(answer))) as (adapter, at):
        reply = await adapter.send(call(operation, headers=(("x-request-id", "r1"),)))
        assert (reply.status, reply.body, reply.events) == (200, answer, None)
        assert reply.headers["content-type"] == "application/json"
        (asked,) = at.requests
        assert (asked.method, asked.path, asked.headers["x-request-id"]) == ("POST", path, "r1")
        assert asked.headers["authorization"] == "Bearer key"
        assert orjson.loads(asked.body) == {**BODY, "model": "theirs"}


async def test_what_is_learned_of_a_whole_answer() -> None:
    """Usage, finish reason, the engine's own model name and id."""
    async with speaking(answering(whole(CHAT))) as (adapter, _):
        reply = await adapter.send(call())
        assert reply.tally == Tally(
            Usage(12, 5, 17, 0), "length", "tiny-qwen2", "chatcmpl-bd62f8315ac57c41", 0, is_complete=True
        )


async def test_a_large_answer_is_not_read_for_its_usage() -> None:
    """Megabytes of vectors go through unparsed; the usage at their end is found."""
    vectors = b",".join([b"0.123456"] * (READ_WHOLE_BELOW_BYTES // 8))
    answer = b'{"data":[{"embedding":[%b]}],"model":"e","usage":{"prompt_tokens":7,"total_tokens":7}}' % vectors
    async with speaking(answering(whole(answer))) as (adapter, _):
        reply = await adapter.send(call(Operation.EMBEDDING))
        assert (reply.body, reply.tally.usage) == (answer, Usage(7, 0, 7))
    async with speaking(answering(whole(answer[:-20]))) as (adapter, _):
        with pytest.raises(BackendError) as raised:
            await adapter.send(call(Operation.EMBEDDING))
        assert raised.value.kind is Fault.PROTOCOL


@pytest.mark.parametrize("operation", [Operation.CHAT, Operation.COMPLETION, Operation.EMBEDDING])
@pytest.mark.parametrize("size", [300_000, 2_000_000])
@pytest.mark.parametrize(
    "error",
    [
        b'{"error":{"message":"%b","code":503}}',
        b' { "error" : "%b" }',
        b'{"object":"error","message":"%b","code":503}',
        b'{"message":"%b","code":503}',
        b'{"detail":"%b \\"choices\\" \\"data\\""}',
    ],
)
async def test_a_large_error_under_a_200_is_one(operation: Operation, size: int, error: bytes) -> None:
    """Megabytes of it are no answer either."""
    async with speaking(answering(whole(error % (b"x" * size)))) as (adapter, _):
        with pytest.raises(BackendError) as raised:
            await adapter.send(call(operation))
        assert raised.value.kind in {Fault.OVERLOADED, Fault.SERVER_ERROR}


async def test_a_stream_is_relayed() -> None:
    """Events pass as they are; what they say is counted; the connection is used again."""
    async with speaking(answering(streamed(*STREAM.splitlines(keepends=True)))) as (adapter, at):
        for _ in range(2):
            reply = await adapter.send(call(stream=True))
            assert await events_of(reply) == STREAM
            assert reply.tally.usage == Usage(12, 3, 15, 0)
            assert reply.tally.is_complete
            await reply.close()
        assert len(at.wires) == 1
        assert orjson.loads(at.requests[0].body) == {**BODY, "model": "theirs", "stream": True}


async def test_usage_is_asked_for_and_hidden() -> None:
    """The engine is asked for usage on our account; the client sees a stream as it would be without that."""
    async with speaking(answering(streamed(STREAM))) as (adapter, at):
        reply = await adapter.send(call(stream=True, ask_usage=True))
        got = await events_of(reply)
        assert orjson.loads(at.requests[0].body)["stream_options"] == {"include_usage": True}
        events = STREAM.split(b"\n\n")
        assert got == b"\n\n".join(event for event in events if b'"choices":[]' not in event)
        assert reply.tally.usage == Usage(12, 3, 15, 0)


async def test_a_stream_is_given_piece_by_piece() -> None:
    """The first event is there while the engine still works on the second."""
    gate = asyncio.Event()
    first, rest = STREAM.split(b"\n\n", 1)

    async def script(wire: Wire, asked: Request) -> None:
        wire.send(STREAM_HEAD, chunk(first + b"\n\n"))
        await gate.wait()
        wire.send(chunk(rest), b"0\r\n\r\n")

    async with speaking(script) as (adapter, _):
        reply = await adapter.send(call(stream=True))
        assert reply.events is not None
        assert await anext(reply.events) == first + b"\n\n"
        gate.set()
        assert await events_of(reply) == rest


async def test_a_truncated_stream_is_a_disconnect() -> None:
    """An engine that dies amid the stream never gives a clean end, whichever way its connection ends."""
    head = STREAM[: STREAM.index(b"\n\n") + 2]
    for script in (answering(STREAM_HEAD, chunk(head), close=True), answering(streamed(head))):
        async with speaking(script) as (adapter, _):
            reply = await adapter.send(call(stream=True))
            assert reply.events is not None
            assert await anext(reply.events) == head
            with pytest.raises(BackendError) as raised:
                await anext(reply.events)
            assert (raised.value.kind, raised.value.received) == (Fault.DISCONNECTED, True)
            assert not reply.tally.is_complete


async def test_a_whole_answer_that_breaks_off_was_not_received() -> None:
    """Half an answer has reached nobody: the call may be made again."""
    async with speaking(answering(whole(CHAT)[:-9], close=True)) as (adapter, _):
        with pytest.raises(BackendError) as raised:
            await adapter.send(call())
        assert (raised.value.kind, raised.value.received) == (Fault.DISCONNECTED, False)


async def test_a_stream_until_the_end_of_the_connection() -> None:
    """Without framing, [DONE] is what tells a whole stream from a cut one."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    async with speaking(answering(head, STREAM, close=True)) as (adapter, _):
        assert await events_of(await adapter.send(call(stream=True))) == STREAM
    async with speaking(answering(head, STREAM[:400], close=True)) as (adapter, _):
        with pytest.raises(BackendError):
            await events_of(await adapter.send(call(stream=True)))


async def test_closing_a_stream_reaches_the_engine() -> None:
    """A client's departure closes the engine's connection within 100 ms."""

    async def script(wire: Wire, asked: Request) -> None:
        wire.send(STREAM_HEAD, chunk(STREAM[: STREAM.index(b"\n\n") + 2]))
        await wire.gone.wait()

    async with speaking(script) as (adapter, at):
        reply = await adapter.send(call(stream=True))
        assert reply.events is not None
        await anext(reply.events)
        await reply.close()
        async with asyncio.timeout(0.1):
            await at.wires[0].gone.wait()
        await reply.close()


async def test_a_cancelled_call_reaches_the_engine() -> None:
    """So does a cancellation before the first byte."""

    async def script(wire: Wire, asked: Request) -> None:
        await wire.gone.wait()

    async with speaking(script) as (adapter, at):
        task = asyncio.ensure_future(adapter.send(call()))
        await until(lambda: at.requests)
        task.cancel()
        async with asyncio.timeout(0.1):
            await at.wires[0].gone.wait()
        with pytest.raises(asyncio.CancelledError):
            await task


ERROR = b'{"error":{"message":"too many tokens","type":"t","param":null,"code":"context_length_exceeded"}}'


@pytest.mark.parametrize(
    ("answer", "stream", "kind"),
    [
        (whole(ERROR, status="400 Bad Request"), False, Fault.CONTEXT_LENGTH),
        (whole(ERROR, status="400 Bad Request"), True, Fault.CONTEXT_LENGTH),
        (whole(b'{"error":{"message":"x","code":429}}'), False, Fault.RATE_LIMITED),
        (whole(b'{"error":{"message":"x","code":429}}'), True, Fault.RATE_LIMITED),
        (whole(b'{"object":"error","message":"x","code":400}'), False, Fault.BAD_REQUEST),
        (whole(CHAT), True, Fault.PROTOCOL),
        (whole(b"<html>", kind=b"text/html"), False, Fault.PROTOCOL),
        (whole(b"<html>", kind=b"text/html"), True, Fault.PROTOCOL),
        (whole(b"<html>", kind=b"text/plain"), False, Fault.PROTOCOL),
        (whole(b'{"choices":'), False, Fault.PROTOCOL),
        (whole(b"[]"), False, Fault.PROTOCOL),
        (whole(b"{}"), False, Fault.PROTOCOL),
        (whole(b'{"choices":null}'), False, Fault.PROTOCOL),
        (whole(b"data: x", kind=b"text/event-stream"), False, Fault.PROTOCOL),
        (whole(CHAT, headers=b"content-encoding: gzip\r\n"), False, Fault.PROTOCOL),
        (whole(b"{}", status="503 Busy", headers=b"retry-after: 2\r\n"), True, Fault.OVERLOADED),
    ],
)
async def test_refusals_under_any_status(answer: bytes, stream: bool, kind: Fault) -> None:
    """An error is one, whatever status it comes under; an answer of another kind is a protocol error."""
    async with speaking(answering(answer)) as (adapter, _):
        with pytest.raises(BackendError) as raised:
            await adapter.send(call(stream=stream))
        assert (raised.value.kind, raised.value.received) == (kind, False)


@pytest.mark.parametrize("kind", [b"text/plain", b"application/octet-stream", b""])
async def test_sloppy_types_are_forgiven(kind: bytes) -> None:
    """An engine that does not name its answer's type properly is understood by what it says."""
    async with speaking(answering(whole(CHAT, kind=kind))) as (adapter, _):
        assert (await adapter.send(call())).body == CHAT
    async with speaking(answering(whole(STREAM, kind=kind))) as (adapter, _):
        assert await events_of(await adapter.send(call(stream=True))) == STREAM


async def test_rate_headers_are_kept() -> None:
    """What the backend says of its limits is there for whoever tracks them."""
    answer = whole(CHAT, headers=b"X-RateLimit-Remaining-Requests: 7\r\n")
    async with speaking(answering(answer)) as (adapter, _):
        assert (await adapter.send(call())).headers["x-ratelimit-remaining-requests"] == "7"


async def test_another_api_prefix() -> None:
    """A provider whose API lies elsewhere is reached there."""
    async with speaking(answering(whole(CHAT)), api_prefix="/openai/v1beta") as (adapter, at):
        await adapter.send(call())
        assert at.requests[0].path == "/openai/v1beta/chat/completions"


async def test_list_models() -> None:
    """Names from a recorded list; anything else is a protocol error."""
    async with speaking(answering(whole((SAMPLES / "llamacpp_models.json").read_bytes()))) as (adapter, at):
        assert await adapter.list_models() == ("models/tiny-qwen2.gguf",)
        assert at.requests[0].headers["authorization"] == "Bearer key"
    async with speaking(answering(whole(b'{"models":[]}'))) as (adapter, _):
        with pytest.raises(BackendError):
            await adapter.list_models()


async def test_health_of_a_provider() -> None:
    """A provider without `/health` is asked for its models, with the key."""

    async def script(wire: Wire, asked: Request) -> None:
        is_known = asked.path == "/v1/models"
        wire.send(whole(b'{"data":[]}') if is_known else whole(b"{}", status="404 Not Found"))

    async with speaking(script) as (adapter, at):
        found = await adapter.health_check()
        assert (found.healthy, found.error) == (True, "")
        assert [asked.path for asked in at.requests] == ["/health", "/v1/models"]


async def test_documented_use() -> None:
    """`chat` and `chat_stream`, as Python programs use them."""

    async def script(wire: Wire, asked: Request) -> None:
        wire.send(streamed(STREAM) if b'"stream":true' in asked.body else whole(CHAT))

    request = ChatRequest(messages=[ChatMessage(role="user", content="Hello!")])
    async with speaking(script) as (adapter, _):
        response = await adapter.chat(request)
        assert (response.content, response.finish_reason) == ("CIICIICIICIICII", "length")
        texts = [part.content async for part in adapter.chat_stream(request)]
        assert "".join(texts) == "CIICIICII"


async def test_two_hundred_streams_at_a_time() -> None:
    """Two hundred streams through one adapter each get their whole answer."""
    async with speaking(answering(streamed(*STREAM.splitlines(keepends=True)))) as (adapter, _):

        async def one() -> bytes:
            return await events_of(await adapter.send(call(stream=True)))

        assert set(await asyncio.gather(*(one() for _ in range(200)))) == {STREAM}


async def test_an_engine_that_goes_on_after_done() -> None:
    """The answer ends with [DONE], not when the engine deigns to close."""

    async def script(wire: Wire, asked: Request) -> None:
        wire.send(STREAM_HEAD, chunk(STREAM))
        await wire.gone.wait()

    async with speaking(script) as (adapter, _):
        reply = await adapter.send(call(stream=True, limits=Limits(idle_s=30)))
        async with asyncio.timeout(1):
            assert await events_of(reply) == STREAM


async def test_kv_events_are_drained() -> None:
    """From where TensorRT-LLM has them; an engine that has none refuses."""
    adapter, asked = paged(OpenAICompatAdapter, {"/kv_cache_events": b"[]"})
    assert await adapter.drain_kv_events() == b"[]"
    assert asked == ["/kv_cache_events"]
    assert await adapter.prompt_tokens(Operation.CHAT, {"messages": []}) is None
    refusing, _ = paged(OpenAICompatAdapter, {})
    with pytest.raises(BackendError):
        await refusing.drain_kv_events()
