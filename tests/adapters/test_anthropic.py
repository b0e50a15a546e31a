"""Anthropic's answers, streams, errors and lists. The shapes are those of the types of the `anthropic` package."""

from __future__ import annotations

from typing import Any

import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.anthropic import AnthropicAdapter
from kvfleet.adapters.anthropic_wire import AnthropicChat, usage_of
from kvfleet.adapters.call import Operation, Usage
from kvfleet.adapters.translation import Chunks
from kvfleet.errors import BackendError, Fault
from tests.adapters.scripted import STREAM_HEAD, Request, Wire, answering, chunk, engine, streamed, whole
from tests.adapters.test_conformance_and_sdk import client
from tests.adapters.told import USER, call, deltas, drained, drained_until_it_fails, events, told

USAGE = {
    "input_tokens": 5,
    "cache_read_input_tokens": 100,
    "cache_creation_input_tokens": 20,
    "output_tokens": 7,
    "output_tokens_details": {"thinking_tokens": 3},
}
OURS = Usage(125, 7, 132, 100, 20, 3)
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "sig"}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-x",
    "content": [
        THOUGHT,
        {"type": "text", "text": "Let me "},
        {"type": "text", "text": "see."},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": USAGE,
}


def chat(body: dict[str, Any] | None = None) -> AnthropicChat:
    """A chat call."""
    chunks = Chunks(operation=Operation.CHAT, model="claude", created=7, id="answer-1")
    return AnthropicChat.of(body or {"messages": [USER]}, {}, chunks)


def start(**usage: int) -> dict[str, Any]:
    """The first event of a stream."""
    message: dict[str, Any] = {"id": "msg_1", "model": "claude-x", "content": [], "stop_reason": None, "usage": usage}
    return {"type": "message_start", "message": message}


def block(index: int, begin: dict[str, Any], *pieces: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of one block."""
    said = [{"type": "content_block_delta", "index": index, "delta": piece} for piece in pieces]
    opened = {"type": "content_block_start", "index": index, "content_block": begin}
    return [opened, *said, {"type": "content_block_stop", "index": index}]


def text(*pieces: str, index: int = 0) -> list[dict[str, Any]]:
    """The events of a text block."""
    return block(index, {"type": "text", "text": ""}, *({"type": "text_delta", "text": piece} for piece in pieces))


def end(reason: str = "end_turn", **usage: int) -> list[dict[str, Any]]:
    """The last events of a stream."""
    delta = {"stop_reason": reason, "stop_sequence": None}
    return [{"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]


def sse(*items: dict[str, Any]) -> list[bytes]:
    """Events as Anthropic sends them, with their names."""
    return [b"event: %b\ndata: %b\n\n" % (item["type"].encode(), orjson.dumps(item)) for item in items]


WHOLE_STREAM = [
    start(input_tokens=5, cache_read_input_tokens=100, cache_creation_input_tokens=20, output_tokens=1),
    {"type": "ping"},
    *block(
        0,
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": "Hm"},
        {"type": "thinking_delta", "thinking": "."},
        {"type": "signature_delta", "signature": "sig"},
    ),
    *text("Let me ", "see.", index=1),
    *block(
        2,
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}},
        {"type": "input_json_delta", "partial_json": ""},
        {"type": "input_json_delta", "partial_json": '{"city":'},
        {"type": "input_json_delta", "partial_json": '"Paris"}'},
    ),
    *block(3, {"type": "tool_use", "id": "toolu_2", "name": "now", "input": {}}),
    *end("tool_use", output_tokens=7),
]


def test_a_whole_answer_becomes_a_chat_completion() -> None:
    """Text, thoughts (signed, to be sent back), tool calls, usage as OpenAI counts, and Anthropic's own stop reason."""
    made = chat()
    assert made.whole(MESSAGE) == {
        "stop_reason": "tool_use",
        "id": "msg_1",
        "object": "chat.completion",
        "created": 7,
        "model": "claude-x",
        "choices": [
            {
                "index": 0,
                "logprobs": None,
                "message": {
                    "role": "assistant",
                    "content": "Let me see.",
                    "reasoning_content": "Hm.",
                    "thinking_blocks": [THOUGHT],
                    "tool_calls": [
                        {
                            "id": "toolu_1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city":"Paris"}'},
                        }
                    ],
                },
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {
            "prompt_tokens": 125,
            "completion_tokens": 7,
            "total_tokens": 132,
            "prompt_tokens_details": {"cached_tokens": 100, "cache_creation_tokens": 20},
            "completion_tokens_details": {"reasoning_tokens": 3},
        },
    }
    assert (made.chunks.tally.usage, made.chunks.tally.response_id) == (OURS, "msg_1")


def test_blocks_openai_has_no_place_for_are_kept() -> None:
    """Whole and streamed alike: what Anthropic's own tools did, and what a text cites."""
    used = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "x"}}
    mark = {"type": "web_search_result_location", "url": "https://example.com", "cited_text": "c"}
    said = {"type": "text", "text": "Yes.", "citations": [mark]}
    message = chat().whole({**MESSAGE, "content": [used, said]})["choices"][0]["message"]
    assert (message["content_blocks"], message["citations"]) == ([used], [mark])
    found = deltas(
        told(
            chat(),
            [
                start(),
                *block(0, {**used, "input": {}}, {"type": "input_json_delta", "partial_json": '{"query":"x"}'}),
                *block(1, {"type": "text", "text": "Yes."}, {"type": "citations_delta", "citation": mark}),
                *end(),
            ],
        )
    )
    assert {"content_blocks": [{"index": 0, **used}]} in found
    assert {"citations": [{"index": 0, **mark}]} in found


@pytest.mark.parametrize(
    ("reason", "ours"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("pause_turn", "stop"),
    ],
)
def test_reasons_to_stop(reason: str, ours: str) -> None:
    """OpenAI's word for each, and Anthropic's kept beside it."""
    last = events(told(chat(), [start(), *text("a"), *end(reason, output_tokens=1)]))[-2]
    assert (last["choices"][0]["finish_reason"], last["stop_reason"]) == (ours, reason)


def test_a_stream_becomes_openai_chunks() -> None:
    """Nothing before the first piece (an overload may still come); then each piece as it comes, and the usage at last."""
    made = chat({"messages": [USER], "stream_options": {"include_usage": True}})
    assert [made.event(event) for event in WHOLE_STREAM[:3]] == [b"", b"", b""]
    said = told(chat({"messages": [USER], "stream_options": {"include_usage": True}}), WHOLE_STREAM)
    usage = {**OURS.to_openai()}
    del usage["completion_tokens_details"]
    assert deltas(said) == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm"},
        {"reasoning_content": "."},
        {"thinking_blocks": [{"index": 0, **THOUGHT}]},
        {"content": "Let me "},
        {"content": "see."},
        {
            "tool_calls": [
                {"index": 0, "id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}]},
        {
            "tool_calls": [
                {"index": 1, "id": "toolu_2", "type": "function", "function": {"name": "now", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        ({}, "tool_calls"),
        {"usage": usage},
        "[DONE]",
    ]
    assert {(event["id"], event["model"]) for event in events(said)[:-1]} == {("msg_1", "claude-x")}


COUNT = st.none() | st.integers(0, 10**7)


@given(fresh=COUNT, read=COUNT, written=COUNT, said=COUNT)
def test_usage_is_normalised_once_and_adds_up(
    fresh: int | None, read: int | None, written: int | None, said: int | None
) -> None:
    """Prompt tokens are all of the prompt, whatever was cached; the parts sum to the whole, and survive a round trip."""
    theirs = {
        "input_tokens": fresh,
        "cache_read_input_tokens": read,
        "cache_creation_input_tokens": written,
        "output_tokens": said,
    }
    usage = usage_of(theirs)
    assert usage is not None
    assert usage.prompt_tokens == (fresh or 0) + (usage.cached_tokens or 0) + (usage.cache_creation_tokens or 0)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert (usage.cached_tokens, usage.cache_creation_tokens) == (read, written)
    assert Usage.from_openai(usage.to_openai()) == usage


@given(early=st.integers(0, 1000), late=st.integers(0, 1000), says_input=st.booleans())
def test_a_streams_usage_is_cumulative(early: int, late: int, says_input: bool) -> None:
    """The last word counts; what it leaves out stands as it was said first."""
    made = chat()
    last: Any = {"output_tokens": late, **({"input_tokens": 11} if says_input else {})}
    told(made, [start(input_tokens=9, cache_read_input_tokens=4, output_tokens=early), *text("a"), *end(**last)])
    assert made.chunks.tally.usage == Usage(15 if says_input else 13, late, (15 if says_input else 13) + late, 4)


# --- over HTTP


def adapter(url: str, **options: Any) -> AnthropicAdapter:
    """An adapter for a scripted service."""
    return AnthropicAdapter(endpoint=url, model_id="claude", api_key="key-1", **options)


async def test_a_call_carries_the_key_and_the_version() -> None:
    """In Anthropic's headers, not as a bearer; the answer's headers are kept for request id and rate limits."""
    extra = b"request-id: req_1\r\nanthropic-ratelimit-requests-remaining: 4\r\n"
    async with engine(answering(whole(orjson.dumps(MESSAGE), headers=extra))) as there:
        made = adapter(there.url)
        reply = await made.send(call({"model": "any", "messages": [USER]}, headers=(("x-api-key", "clients"),)))
        await made.aclose()
    (asked,) = there.requests
    assert (asked.method, asked.path) == ("POST", "/v1/messages")
    assert (asked.headers["x-api-key"], asked.headers["anthropic-version"]) == ("key-1", "2023-06-01")
    assert "authorization" not in asked.headers
    assert orjson.loads(asked.body) == {"model": "claude", "max_tokens": 4096, "messages": [USER]}
    assert (reply.headers["request-id"], reply.headers["anthropic-ratelimit-requests-remaining"]) == ("req_1", "4")
    assert reply.tally.usage == OURS


async def test_a_stream_over_http() -> None:
    """However the network cuts it."""
    raw = b"".join(sse(*WHOLE_STREAM))
    pieces = [raw[at : at + 17] for at in range(0, len(raw), 17)]
    async with engine(answering(streamed(*pieces))) as there:
        made = adapter(there.url)
        reply = await made.send(call(stream=True))
        said = await drained(reply)
        await made.aclose()
    assert deltas(said)[-2:] == [({}, "tool_calls"), "[DONE]"]
    assert reply.tally.is_complete
    assert reply.tally.usage == Usage(125, 7, 132, 100, 20)


ERRORS = [
    (400, "invalid_request_error", "messages: at least one message is required", Fault.BAD_REQUEST),
    (400, "invalid_request_error", "prompt is too long: 205110 tokens > 200000 maximum", Fault.CONTEXT_LENGTH),
    (400, "invalid_request_error", "Your credit balance is too low to access the API.", Fault.UNAUTHORIZED),
    (401, "authentication_error", "invalid x-api-key", Fault.UNAUTHORIZED),
    (402, "billing_error", "pay", Fault.UNAUTHORIZED),
    (403, "permission_error", "not yours", Fault.UNAUTHORIZED),
    (404, "not_found_error", "model: claude-z", Fault.NOT_FOUND),
    (413, "request_too_large", "Request exceeds the maximum size", Fault.BAD_REQUEST),
    (429, "rate_limit_error", "slow down", Fault.RATE_LIMITED),
    (500, "api_error", "Internal server error", Fault.SERVER_ERROR),
    (504, "timeout_error", "too slow", Fault.SERVER_ERROR),
    (529, "overloaded_error", "Overloaded", Fault.OVERLOADED),
]


@pytest.mark.parametrize(("status", "kind", "message", "fault"), ERRORS)
async def test_errors_by_status(status: int, kind: str, message: str, fault: Fault) -> None:
    """Each has its fault, keeps how long to wait, and shows the caller only what is the caller's own."""
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
    answer = whole(orjson.dumps(body), status=f"{status} X", headers=b"retry-after: 3\r\n")
    async with engine(answering(answer)) as there:
        made = adapter(there.url)
        with pytest.raises(BackendError) as caught:
            await made.send(call(stream=True))
        await made.aclose()
    error = caught.value
    assert (error.kind, error.status) == (fault, status)
    assert (error.body is not None) == fault.is_callers
    if fault is Fault.RATE_LIMITED:
        assert error.retry_after_s == 3


@pytest.mark.parametrize(("status", "kind", "message", "fault"), [one for one in ERRORS if "credit" not in one[2]])
async def test_errors_in_a_stream_before_any_piece(status: int, kind: str, message: str, fault: Fault) -> None:
    """They are the call's own, though a 200 and `message_start` came before: another replica may be asked."""
    said = {"type": "error", "error": {"type": kind, "message": message}}
    async with engine(answering(streamed(*sse(start(), {"type": "ping"}, said)))) as there:
        made = adapter(there.url)
        with pytest.raises(BackendError) as caught:
            await made.send(call(stream=True))
        await made.aclose()
    assert (caught.value.kind, caught.value.status, caught.value.received) == (fault, status, False)


async def test_an_error_amid_a_stream_ends_it() -> None:
    """What had come is handed on, then the error; no ``[DONE]``."""
    said = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    async with engine(answering(streamed(*sse(start(), *text("Hel")[:2], said)))) as there:
        made = adapter(there.url)
        out, error = await drained_until_it_fails(await made.send(call(stream=True)))
        await made.aclose()
    assert deltas(out)[-1] == {"content": "Hel"}
    assert error is not None
    assert (error.kind, error.received) == (Fault.OVERLOADED, True)


@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_stream_without_its_last_word_is_no_answer(is_whole: bool) -> None:
    """Even where the connection ended as it should."""
    pieces = sse(start(), *text("Hel"))
    raw = streamed(*pieces) if is_whole else STREAM_HEAD + b"".join(chunk(piece) for piece in pieces)
    async with engine(answering(raw, close=True)) as there:
        made = adapter(there.url)
        _, error = await drained_until_it_fails(await made.send(call(stream=True)))
        await made.aclose()
    assert error is not None
    assert error.kind is Fault.DISCONNECTED


async def test_events_nobody_knows_are_passed_over() -> None:
    """New kinds of event may come; Anthropic's documentation says so."""
    pieces = sse(start(), {"type": "surprise", "x": 1}, *text("a"), *end(output_tokens=1))
    async with engine(answering(streamed(*pieces))) as there:
        made = adapter(there.url)
        said = await drained(await made.send(call(stream=True)))
        await made.aclose()
    assert deltas(said)[1] == {"content": "a"}


@pytest.mark.parametrize("operation", [Operation.EMBEDDING, Operation.COMPLETION, Operation.RERANK])
async def test_other_operations_are_refused(operation: Operation) -> None:
    """Before anything is sent."""
    made = AnthropicAdapter(model_id="claude")
    assert made.endpoint == "https://api.anthropic.com"
    with pytest.raises(BackendError, match=f"no {operation.value} endpoint"):
        await made.send(call({"input": "a"}, operation=operation))


async def service(wire: Wire, request: Request) -> None:
    """Lists its models for one key."""
    if request.headers.get("x-api-key") != "key-1":
        wire.send(whole(b'{"type":"error","error":{"type":"authentication_error"}}', status="401 Unauthorized"))
        return
    assert request.path == "/v1/models?limit=1000"
    page = {"data": [{"type": "model", "id": "claude-a"}, {"type": "model", "id": "claude-b"}], "has_more": False}
    wire.send(whole(orjson.dumps(page)))


async def test_health_and_models() -> None:
    """Up with the models the key may use; down, and saying why, with a wrong key."""
    async with engine(service) as there:
        made, stranger = adapter(there.url), AnthropicAdapter(endpoint=there.url, api_key="wrong")
        health, refusal = await made.health_check(), await stranger.health_check()
        await made.aclose()
        await stranger.aclose()
    assert (health.healthy, health.models) == (True, ("claude-a", "claude-b"))
    assert not refusal.healthy
    assert "credential" in refusal.error
    assert "key-1" not in repr(made)


# --- as the `openai` package reads it


async def test_the_openai_package_reads_whole_answers_and_streams() -> None:
    """Typed, with the package's own stream helper putting the pieces together."""

    async def script(wire: Wire, request: Request) -> None:
        is_stream = orjson.loads(request.body).get("stream")
        wire.send(streamed(*sse(*WHOLE_STREAM)) if is_stream else whole(orjson.dumps(MESSAGE)))

    async with client(AnthropicAdapter, script) as sdk:
        found: Any = await sdk.chat.completions.create(model="m", messages=[USER])  # type: ignore[list-item]
        async with sdk.chat.completions.stream(
            model="m",
            messages=[USER],  # type: ignore[list-item]
            stream_options={"include_usage": True},
        ) as stream:
            pieced: Any = await stream.get_final_completion()
    assert isinstance(found, openai.types.chat.ChatCompletion)
    answers: tuple[Any, ...] = (found, pieced)
    for answer in answers:
        (choice,) = answer.choices
        assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
        assert choice.message.tool_calls[0].function.arguments == '{"city":"Paris"}'
        assert choice.message.model_dump()["reasoning_content"] == "Hm."
        assert answer.usage.prompt_tokens == 125
        assert answer.usage.prompt_tokens_details.cached_tokens == 100
