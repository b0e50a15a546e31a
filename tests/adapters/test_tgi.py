"""Text Generation Inference. The native shapes are those of its router's source; nothing is recorded."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from kvfleet.adapters.base import ChatMessage, ChatRequest, EngineLoad
from kvfleet.adapters.call import Operation, Usage
from kvfleet.adapters.tgi import TGIAdapter
from kvfleet.adapters.tgi_wire import GenerateCall, MessagesCall, generate_body, messages_body
from kvfleet.adapters.translation import Chunks
from kvfleet.clock import FrozenClock
from kvfleet.errors import BackendError, Fault
from tests.adapters.scripted import Request, Wire, answering, engine, streamed, whole
from tests.adapters.told import USER, call, deltas, drained, drained_until_it_fails, events, sse, told

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}}


def chunks(operation: Operation = Operation.CHAT) -> Chunks:
    """A writer with a known id."""
    return Chunks(operation=operation, model="mistral-7b", created=7, id="answer-1")


def messages(body: dict[str, Any], *, is_stream: bool = False) -> dict[str, Any]:
    """The Messages API's body for an OpenAI one."""
    return messages_body({"model": "gpt", "messages": [USER], **body}, model="mistral-7b", is_stream=is_stream)


def chat(body: dict[str, Any] | None = None, *, ask_usage: bool = False, is_stream: bool = True) -> MessagesCall:
    """A chat call by the Messages API."""
    given = {"messages": [USER], **(body or {})}
    return MessagesCall.of(given, chunks(), is_stream=is_stream, ask_usage=ask_usage)


def chunk(delta: dict[str, Any], reason: str | None = None, **rest: Any) -> dict[str, Any]:
    """One chunk of TGI's OpenAI route: no id, and the role every time."""
    choice = {"index": 0, "delta": {"role": "assistant", **delta}, "logprobs": None, "finish_reason": reason}
    head = {"object": "chat.completion.chunk", "id": "", "created": 9, "model": "mistral-7b"}
    return {**head, "system_fingerprint": "3.3.6-native", "choices": [choice], **rest}


def token(text: str, *, special: bool = False, **last: Any) -> dict[str, Any]:
    """One event of the native route."""
    one = {"id": 1, "text": text, "logprob": -0.1, "special": special}
    return {"index": 1, "token": one, "generated_text": None, "details": None, **last}


LAST = {
    "generated_text": "Hello",
    "details": {"finish_reason": "eos_token", "generated_tokens": 3, "seed": None, "input_length": 4},
}


# --- the Messages API


def test_an_ordinary_chat_body_is_passed_on() -> None:
    """Unknown fields and pictures included; the model's name becomes TGI's own."""
    picture = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}
    given = {"messages": [{"role": "user", "content": [picture]}], "temperature": 0.5, "tool_prompt": "x", "new": [1]}
    assert messages(given) == {**given, "model": "mistral-7b", "stream": False}


def test_what_tgi_reads_otherwise_is_put_right() -> None:
    """One stop as a list, no top_p of one, one token limit, the schema under ``value``, no field that is null."""
    given = {
        "stop": "END",
        "top_p": 1.0,
        "max_tokens": 5,
        "max_completion_tokens": 6,
        "seed": None,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    }
    assert messages(given) == {
        "model": "mistral-7b",
        "stream": False,
        "messages": [USER],
        "stop": ["END"],
        "max_completion_tokens": 6,
        "response_format": {"type": "json", "value": SCHEMA},
    }


@pytest.mark.parametrize(
    ("wanted", "theirs"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "json", "value": {"type": "object"}}),
        ({"type": "regex", "value": "[a-z]+"}, {"type": "regex", "value": "[a-z]+"}),
    ],
)
def test_response_formats(wanted: dict[str, Any], theirs: dict[str, Any] | None) -> None:
    """JSON mode becomes a schema for any object; TGI's own formats are left alone."""
    assert messages({"response_format": wanted}).get("response_format") == theirs


def test_text_beside_tool_calls_becomes_a_message_of_its_own() -> None:
    """TGI reads either the content or the tool calls of a message, and would lose the calls."""
    calls = [{"id": "0", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    both = {"role": "assistant", "content": "Let me see.", "tool_calls": calls}
    alone = {"role": "assistant", "content": None, "tool_calls": calls}
    found = messages({"messages": [USER, both, alone]})["messages"]
    bare = {"role": "assistant", "tool_calls": calls}
    assert found == [USER, {"role": "assistant", "content": "Let me see."}, bare, bare]


@pytest.mark.parametrize("body", [{"n": 2}, {"response_format": {"type": "lark"}}, {"messages": "Hi"}])
def test_what_the_messages_api_ignores_is_refused(body: dict[str, Any]) -> None:
    """TGI would answer as if it had not been said."""
    with pytest.raises(BackendError) as caught:
        messages(body)
    assert caught.value.kind is Fault.BAD_REQUEST


def test_a_chat_completion_gets_an_id_and_openais_finish_reason() -> None:
    """TGI leaves the id empty, and says which stop it was; older versions have arguments as an object."""
    calls = [{"id": "0", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    message = {"role": "assistant", "tool_calls": calls}
    usage = {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
    choices = [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop_sequence"}]
    answer = {"object": "chat.completion", "id": "", "created": 9, "model": "mistral-7b", "choices": choices}
    made = chat(is_stream=False)
    found = made.whole(orjson.loads(orjson.dumps({**answer, "usage": usage})))
    assert found["id"] == "answer-1"
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a":1}'}
    assert (made.chunks.tally.usage, made.chunks.tally.finish_reason) == (Usage(4, 2, 6), "stop")


def test_a_chat_stream_is_passed_on_with_the_same_repairs() -> None:
    """An id for all events, the finish reason, and the tool calls of older versions as a list."""
    old = {"tool_calls": {"index": 0, "id": "0", "type": "function", "function": {"name": "f", "arguments": "{"}}}
    said = told(chat(), [chunk({"content": "Hi"}), chunk(old), chunk({"content": ""}, "eos_token"), "[DONE]"])
    assert {event["id"] for event in events(said)[:-1]} == {"answer-1"}
    assert deltas(said) == [
        {"role": "assistant", "content": "Hi"},
        {"role": "assistant", "tool_calls": [old["tool_calls"]]},
        ({"role": "assistant", "content": ""}, "stop"),
        "[DONE]",
    ]


def test_usage_that_only_the_router_asked_for_is_taken_out() -> None:
    """It is asked for, counted, and not shown; a client that asked sees it."""
    usage = {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
    pieces = [chunk({"content": "Hi"}), chunk({}, "length"), chunk({}, usage=usage) | {"choices": []}, "[DONE]"]
    hidden = chat(ask_usage=True)
    assert hidden.body["stream_options"] == {"include_usage": True}
    assert [event for event in deltas(told(hidden, pieces)) if isinstance(event, dict) and "usage" in event] == []
    assert hidden.chunks.tally.usage == Usage(4, 2, 6)
    shown = deltas(told(chat({"stream_options": {"include_usage": True}}), pieces))
    assert shown[-2:] == [{"usage": usage}, "[DONE]"]


def test_an_older_stream_without_done_ends_by_its_finish_reason() -> None:
    """If HTTP proves that the body is whole; otherwise something may be missing."""
    pieces = [chunk({"content": "Hi"}), chunk({}, "length")]
    assert deltas(told(chat(), pieces))[-1] == "[DONE]"
    for cut, is_whole in ((pieces, False), (pieces[:1], True)):
        with pytest.raises(BackendError) as caught:
            told(chat(), cut, is_whole=is_whole)
        assert caught.value.kind is Fault.DISCONNECTED


# --- the native route


def test_a_completion_says_its_parameters_in_tgis_words() -> None:
    """Unknown fields go where TGI's own parameters are."""
    given = {"prompt": "Once", "max_tokens": 5, "temperature": 0.7, "top_p": 1, "stop": ["a"], "seed": 3, "top_k": 9}
    assert generate_body(given, "Once") == {
        "inputs": "Once",
        "parameters": {
            "max_new_tokens": 5,
            "temperature": 0.7,
            "stop": ["a"],
            "seed": 3,
            "top_k": 9,
            "do_sample": True,
            "details": True,
        },
    }


def test_a_temperature_of_nought_means_no_sampling() -> None:
    """TGI takes no temperature of nought; and given parameters it does not sample unless it is told to."""
    assert generate_body({"temperature": 0}, "x")["parameters"] == {"do_sample": False, "details": True}
    assert generate_body({}, "x")["parameters"] == {"do_sample": True, "details": True}


@pytest.mark.parametrize("body", [{"n": 2}, {"tools": [TOOL]}, {"logprobs": 1}, {"echo": True}])
def test_what_the_native_route_cannot_do_is_refused(body: dict[str, Any]) -> None:
    """A 400 in OpenAI's shape."""
    with pytest.raises(BackendError) as caught:
        generate_body(body, "x")
    assert (caught.value.kind, caught.value.status) == (Fault.BAD_REQUEST, 400)


def test_a_native_answer_becomes_a_text_completion() -> None:
    """The prompt's tokens stand in a header, the answer's in the details."""
    made = GenerateCall.of(Operation.COMPLETION, {}, "Once", chunks(Operation.COMPLETION), is_stream=False)
    made.headers = {"x-prompt-tokens": "4"}
    found = made.whole({"generated_text": " upon", "details": {"finish_reason": "length", "generated_tokens": 2}})
    assert found == {
        "id": "answer-1",
        "object": "text_completion",
        "created": 7,
        "model": "mistral-7b",
        "choices": [{"index": 0, "logprobs": None, "text": " upon", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6},
    }


def test_a_native_stream_becomes_chunks() -> None:
    """Special tokens are not text; the last token comes with the reason and the counts."""
    given = {"stream_options": {"include_usage": True}}
    made = GenerateCall.of(Operation.CHAT, given, "Hi", chunks(), is_stream=True)
    said = deltas(told(made, [token("Hel"), token("lo"), token("</s>", special=True, **LAST)]))
    usage = {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert said == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        ({}, "stop"),
        {"usage": usage},
        "[DONE]",
    ]


def test_a_native_stream_without_its_last_token_is_cut() -> None:
    """TGI's last event has the whole text: without it there is no end."""
    made = GenerateCall.of(Operation.CHAT, {}, "Hi", chunks(), is_stream=True)
    with pytest.raises(BackendError) as caught:
        told(made, [token("Hel")])
    assert caught.value.kind is Fault.DISCONNECTED


# --- over the wire


def adapter(url: str, **options: Any) -> TGIAdapter:
    """An adapter with a clock that stands still."""
    made = TGIAdapter(endpoint=url, model_id="mistral-7b", **options)
    made._clock = FrozenClock()
    return made


async def test_chat_goes_by_the_messages_api() -> None:
    """The documented call."""
    choices = [{"index": 0, "message": {"role": "assistant", "content": "Short."}, "finish_reason": "stop"}]
    answer = {"object": "chat.completion", "id": "", "created": 9, "model": "mistral-7b", "choices": choices}
    async with engine(answering(whole(orjson.dumps(answer)))) as there:
        speaker = adapter(there.url)
        found = await speaker.chat(ChatRequest(messages=[ChatMessage(role="user", content="Summarize")]))
        await speaker.aclose()
    assert (found.content, there.requests[0].path) == ("Short.", "/v1/chat/completions")


async def test_chat_of_an_old_tgi_goes_by_the_native_route() -> None:
    """As one text, by the template asked for."""
    async with engine(answering(streamed(*sse(token("Hi", **LAST))))) as there:
        speaker = adapter(there.url, chat_route="generate", prompt_format="chatml")
        out = await drained(await speaker.send(call(stream=True)))
        await speaker.aclose()
    assert deltas(out) == [{"role": "assistant", "content": ""}, {"content": "Hi"}, ({}, "stop"), "[DONE]"]
    (request,) = there.requests
    assert request.path == "/generate_stream"
    assert orjson.loads(request.body)["inputs"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


async def test_a_text_completion_goes_by_the_native_route() -> None:
    """Not streamed."""
    answer = whole(orjson.dumps({"generated_text": " upon", "details": LAST["details"]}))
    async with engine(answering(answer)) as there:
        speaker = adapter(there.url)
        reply = await speaker.send(call({"prompt": "Once"}, operation=Operation.COMPLETION))
        await speaker.aclose()
    assert (orjson.loads(reply.body)["choices"][0]["text"], there.requests[0].path) == (" upon", "/generate")


@pytest.mark.parametrize(
    ("status", "text", "word", "kind"),
    [
        ("429 Too Many Requests", "Model is overloaded", "overloaded", Fault.OVERLOADED),
        ("424 Failed Dependency", "Request failed during generation: out of memory", "generation", Fault.SERVER_ERROR),
        ("422 Unprocessable Entity", "Input validation error: `best_of` must be 1", "validation", Fault.BAD_REQUEST),
        (
            "422 Unprocessable Entity",
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens",
            "validation",
            Fault.CONTEXT_LENGTH,
        ),
        ("500 Internal Server Error", "Incomplete generation", "incomplete_generation", Fault.SERVER_ERROR),
        ("503 Service Unavailable", "unhealthy", "healthcheck", Fault.OVERLOADED),
    ],
)
async def test_refusals_are_in_the_one_taxonomy(status: str, text: str, word: str, kind: Fault) -> None:
    """TGI's 429 means a full queue, and its 424 the engine's own failure."""
    body = orjson.dumps({"error": text, "error_type": word})
    async with engine(answering(whole(body, status=status))) as there:
        speaker = adapter(there.url)
        with pytest.raises(BackendError) as caught:
            await speaker.send(call())
        await speaker.aclose()
    assert caught.value.kind is kind


async def test_an_error_under_a_200_keeps_its_meaning() -> None:
    """The native stream says validation errors as its first event; nothing was handed on, so the call itself fails."""
    error = {"error": "Input validation error: `inputs` must have less than 10 tokens", "error_type": "validation"}
    async with engine(answering(streamed(*sse(error)))) as there:
        speaker = adapter(there.url)
        with pytest.raises(BackendError) as caught:
            await speaker.send(call({"prompt": "Once"}, operation=Operation.COMPLETION, stream=True))
        await speaker.aclose()
    assert (caught.value.kind, caught.value.received) == (Fault.CONTEXT_LENGTH, False)


async def test_an_error_amid_a_chat_stream_ends_it() -> None:
    """The OpenAI route has an error object of its own there."""
    pieces = sse(chunk({"content": "Hi"}), {"error": {"message": "boom", "http_status_code": 422}})
    async with engine(answering(streamed(*pieces))) as there:
        speaker = adapter(there.url)
        out, error = await drained_until_it_fails(await speaker.send(call(stream=True)))
        await speaker.aclose()
    assert deltas(out) == [{"role": "assistant", "content": "Hi"}]
    assert error is not None
    assert (error.kind, error.received) == (Fault.SERVER_ERROR, True)


PAGES: dict[str, bytes] = {
    "/health": b"",
    "/info": orjson.dumps({"model_id": "mistralai/Mistral-7B", "max_total_tokens": 4096, "version": "3.3.6"}),
    "/metrics": b"# TYPE tgi_queue_size gauge\ntgi_queue_size 3\n# TYPE tgi_batch_current_size gauge\n"
    b"tgi_batch_current_size 2\ntgi_request_count 17\n",
}


async def test_health_models_and_load() -> None:
    """``/health``, ``/info`` and ``/metrics``."""

    async def pages(wire: Wire, request: Request) -> None:
        wire.send(whole(PAGES[request.path]))

    async with engine(pages) as there:
        speaker = adapter(there.url)
        health, models = await speaker.health_check(), await speaker.list_models()
        load, metrics = await speaker.get_load(), await speaker.get_metrics()
        await speaker.aclose()
    assert (health.healthy, health.queue_depth, health.active_requests) == (True, 3, 2)
    assert models == ("mistralai/Mistral-7B",)
    assert load == EngineLoad(running=2, waiting=3)
    assert metrics == {"tgi_queue_size": 3.0, "tgi_batch_current_size": 2.0, "tgi_request_count": 17.0}


@pytest.mark.parametrize("operation", [Operation.EMBEDDING, Operation.RERANK])
async def test_other_operations_are_refused(operation: Operation) -> None:
    """TGI generates text and nothing else."""
    with pytest.raises(BackendError) as caught:
        await adapter("http://127.0.0.1:1").send(call({"input": "a"}, operation=operation))
    assert caught.value.kind is Fault.BAD_REQUEST
