"""An HTTP API of one's own."""

from __future__ import annotations

from typing import Any

import attrs
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.base import ChatMessage, ChatRequest
from kvfleet.adapters.call import Operation, Usage
from kvfleet.adapters.custom_http import CustomHTTPAdapter
from kvfleet.adapters.custom_wire import ABSENT, fill, look_up, placeholders
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import FleetConfig, ModelConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.pipeline.build import build_adapters
from kvfleet.plugin.manager import discover
from tests.adapters.scripted import Engine, Request, Wire, answering, engine, streamed, whole
from tests.adapters.told import USER, call, deltas, drained, drained_until_it_fails, events, lines, sse

TEMPLATE = {"input": "{prompt}", "opts": {"n": "{max_tokens}", "t": "{temperature}"}, "who": "{model}", "v": 2}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


def adapter(there: Engine | None = None, **options: Any) -> CustomHTTPAdapter:
    """An adapter with a clock that stands still."""
    url = there.url if there else "http://127.0.0.1:1"
    made = CustomHTTPAdapter(endpoint=url, model_id="proprietary-model", **options)
    made._clock = FrozenClock()
    return made


# --- templates


def test_a_template_is_filled_with_values() -> None:
    """Whole values of any type; fields without a value are left out; what is no placeholder stays."""
    template = {**TEMPLATE, "list": ["{missing}", "{flag}", None], "curly": "{Not one} {}"}
    assert fill(template, {"prompt": "Hi", "max_tokens": 5, "model": "m", "flag": False}) == {
        "input": "Hi",
        "opts": {"n": 5},
        "who": "m",
        "v": 2,
        "list": [False, None],
        "curly": "{Not one} {}",
    }
    assert placeholders(template) == {"prompt", "max_tokens", "temperature", "model", "missing", "flag"}


@given(st.text())
def test_a_value_never_becomes_syntax_or_template(value: str) -> None:
    """Whatever a prompt says, it arrives as that text, and nothing else changes."""
    template = {"a": "{prompt}", "b": ["before {prompt} {model}"], "{prompt}": 1}
    found = orjson.loads(
        orjson.dumps(fill(template, {"prompt": value.encode("utf-8", "replace").decode(), "model": "m"}))
    )
    clean = value.encode("utf-8", "replace").decode()
    assert found == {"a": clean, "b": [f"before {clean} m"], "{prompt}": 1}


def test_only_texts_and_numbers_stand_amid_text() -> None:
    """A list in the middle of a sentence would be nobody's JSON."""
    assert fill("n={max_tokens}", {"max_tokens": 5}) == "n=5"
    with pytest.raises(BackendError) as caught:
        fill("m={messages}", {"messages": [USER]})
    assert caught.value.kind is Fault.BAD_REQUEST


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("data.0.text", "a"),
        ("data.-1.text", "b"),
        ("data.2.text", ABSENT),
        ("data.x", ABSENT),
        ("data.0.text.y", ABSENT),
    ],
)
def test_a_dotted_path_leads_through_objects_and_lists(path: str, found: Any) -> None:
    """And to nothing if a step is not there."""
    assert look_up({"data": [{"text": "a"}, {"text": "b"}]}, path) == found


def test_a_template_without_the_conversation_is_a_mistake() -> None:
    """Nobody means to send every prompt to nowhere."""
    with pytest.raises(ValueError, match="must have"):
        adapter(request_template={"model": "{model}"})


# --- calls


async def test_the_documented_call() -> None:
    """Paths, content key and headers as on the features page."""
    async with engine(answering(whole(b'{"output":"fine"}'))) as there:
        speaker = CustomHTTPAdapter(
            endpoint=there.url,
            model_id="proprietary-model",
            chat_path="/api/generate",
            health_path="/api/status",
            response_content_key="output",
            headers={"X-API-Key": "secret"},
        )
        found = await speaker.chat(ChatRequest(messages=[ChatMessage(role="user", content="Hi")]))
        health = await speaker.health_check()
        await speaker.aclose()
    asked, probed = there.requests
    assert (found.content, found.finish_reason) == ("fine", "stop")
    assert (asked.path, asked.headers["x-api-key"]) == ("/api/generate", "secret")
    assert (probed.path, probed.headers["x-api-key"], health.healthy) == ("/api/status", "secret", True)
    assert orjson.loads(asked.body) == {
        "model": "proprietary-model",
        "messages": [USER],
        "stream": False,
        "prompt": "Hi",
    }


async def test_the_custom_fields_of_a_fleet_file() -> None:
    """`custom_*` of the model, and further options under `options`, as a gateway reads them."""
    async with engine(answering(whole(b'{"r":[{"t":"fine"}],"why":"max_tokens","in":7,"out":2}'))) as there:
        model = ModelConfig(
            name="mine",
            endpoint=there.url,
            provider="custom_http",
            api_key="key",
            custom_headers={"X-Team": "ml"},
            custom_chat_path="/ask",
            custom_request_template=TEMPLATE,
            custom_content_key="r.0.t",
        )
        options = {"finish_key": "why", "prompt_tokens_key": "in", "completion_tokens_key": "out"}
        config = FleetConfig(models=(attrs.evolve(model, options=options),))
        (speaker,) = build_adapters(config, discover(), config.models).values()
        reply = await speaker.send(call({"messages": [USER], "max_tokens": 3}))
        await speaker.aclose()
    (request,) = there.requests
    assert (request.path, request.headers["x-team"], request.headers["authorization"]) == ("/ask", "ml", "Bearer key")
    assert orjson.loads(request.body) == {"input": "Hi", "opts": {"n": 3}, "who": "mine", "v": 2}
    answer = orjson.loads(reply.body)
    assert answer["choices"][0] == {
        "index": 0,
        "logprobs": None,
        "message": {"role": "assistant", "content": "fine"},
        "finish_reason": "length",
    }
    assert (reply.tally.usage, answer["usage"]["total_tokens"]) == (Usage(7, 2, 9), 9)


async def test_an_endpoint_is_taken_as_it_stands() -> None:
    """A ``/v1`` at its end is part of the API's own paths."""
    async with engine(answering(whole(b'{"t":"x"}'))) as there:
        speaker = CustomHTTPAdapter(endpoint=f"{there.url}/v1/", response_content_key="t")
        await speaker.send(call())
        await speaker.health_check()
        await speaker.aclose()
    assert [request.path for request in there.requests] == ["/v1/generate", "/v1/health"]


async def test_an_answer_in_openais_shape_is_passed_on_whole() -> None:
    """Without a content key; tool calls and unknown fields included."""
    choices = [{"index": 0, "message": {"role": "assistant", "tool_calls": [TOOL]}, "finish_reason": "tool_calls"}]
    answer = {"id": "x", "model": "m", "choices": choices, "extra": 1, "usage": {"prompt_tokens": 2}}
    async with engine(answering(whole(orjson.dumps(answer)))) as there:
        speaker = adapter(there)
        reply = await speaker.send(call({"messages": [USER], "tools": [TOOL]}))
        await speaker.aclose()
    assert orjson.loads(reply.body) == answer
    assert (reply.tally.finish_reason, reply.tally.usage) == ("tool_calls", Usage(2, 0, 2))
    assert orjson.loads(there.requests[0].body)["tools"] == [TOOL]


async def test_a_longer_conversation_is_written_by_its_format() -> None:
    """A single message is not: it is the prompt as it stands."""
    conversation = [{"role": "system", "content": "Be brief."}, USER]
    async with engine(answering(whole(b'{"t":"x"}'))) as there:
        speaker = adapter(there, request_template={"p": "{prompt}"}, response_content_key="t", prompt_format="chatml")
        await speaker.send(call({"messages": conversation}))
        await speaker.send(call({"prompt": ["Once"]}, operation=Operation.COMPLETION))
        await speaker.aclose()
    assert [orjson.loads(request.body)["p"] for request in there.requests] == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Once",
    ]


async def test_a_picture_goes_along_with_the_messages() -> None:
    """And is refused where the template has the text alone."""
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}
    async with engine(answering(whole(b'{"t":"x"}'))) as there:
        speaker = adapter(there, request_template={"m": "{messages}"}, response_content_key="t")
        await speaker.send(call({"messages": [picture]}))
        await speaker.aclose()
    assert orjson.loads(there.requests[0].body) == {"m": [picture]}
    with pytest.raises(BackendError) as caught:
        await adapter(request_template={"p": "{prompt}"}, response_content_key="t").send(call({"messages": [picture]}))
    assert caught.value.kind is Fault.BAD_REQUEST


@pytest.mark.parametrize(
    "asked",
    [{"tools": [TOOL]}, {"response_format": {"type": "json_object"}}, {"n": 2}, {"logprobs": True}],
)
async def test_what_the_template_has_no_place_for_is_refused(asked: dict[str, Any]) -> None:
    """Unless there is a placeholder for it."""
    (name,) = asked
    body = {"messages": [USER], **asked}
    with pytest.raises(BackendError) as caught:
        await adapter(request_template={"p": "{prompt}"}, response_content_key="t").send(call(body))
    assert (caught.value.kind, caught.value.status) == (Fault.BAD_REQUEST, 400)
    async with engine(answering(whole(b'{"t":"x"}'))) as there:
        speaker = adapter(there, request_template={"p": "{prompt}", "x": f"{{{name}}}"}, response_content_key="t")
        await speaker.send(call(body))
        await speaker.aclose()
    assert orjson.loads(there.requests[0].body)["x"] == asked[name]


@pytest.mark.parametrize(
    ("key", "answer", "kind", "says"),
    [
        ("", b'{"output":"x"}', Fault.PROTOCOL, "['output']; set custom_content_key"),
        ("text", b'{"output":"x"}', Fault.PROTOCOL, "nothing at 'text'; it has ['output']"),
        ("output", b'{"output":{"a":1}}', Fault.PROTOCOL, "not a text"),
        ("output", b"<html>", Fault.PROTOCOL, "not JSON"),
        ("output", b'{"error":"boom"}', Fault.SERVER_ERROR, "the backend failed"),
    ],
)
async def test_an_answer_of_another_shape_says_what_is_wrong(key: str, answer: bytes, kind: Fault, says: str) -> None:
    """With the fields that are there, and without what stands in them."""
    async with engine(answering(whole(answer))) as there:
        speaker = adapter(there, response_content_key=key)
        with pytest.raises(BackendError) as caught:
            await speaker.send(call())
        await speaker.aclose()
    assert caught.value.kind is kind
    assert says in caught.value.message


@pytest.mark.parametrize("operation", [Operation.EMBEDDING, Operation.RERANK])
async def test_other_operations_are_refused(operation: Operation) -> None:
    """There is no template for them."""
    with pytest.raises(BackendError) as caught:
        await adapter().send(call({"input": "a"}, operation=operation))
    assert caught.value.kind is Fault.BAD_REQUEST


# --- streams


async def test_an_api_that_cannot_stream_is_told_as_a_stream() -> None:
    """The whole answer in one piece, with tool calls numbered and usage where it was asked for."""
    tool = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": "Hi", "tool_calls": [tool]}
    usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    head = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
    choices = [{"index": 0, "message": message, "finish_reason": "tool_calls"}]
    async with engine(answering(whole(orjson.dumps({**head, "choices": choices, "usage": usage})))) as there:
        speaker = adapter(there)
        body = {"messages": [USER], "stream": True, "stream_options": {"include_usage": True}}
        out = await drained(await speaker.send(call(body, stream=True)))
        await speaker.aclose()
    sent = orjson.loads(there.requests[0].body)
    assert (sent["stream"], "stream_options" in sent) == (False, False)
    assert deltas(out) == [
        {"role": "assistant", "content": "Hi", "tool_calls": [{"index": 0, **tool}]},
        ({}, "tool_calls"),
        {"usage": usage},
        "[DONE]",
    ]
    assert {event["object"] for event in events(out)[:-1]} == {"chat.completion.chunk"}


async def test_a_text_completion_that_cannot_stream_is_told_as_one_too() -> None:
    """An answer that leaves out what OpenAI always says is still one; one without texts is not."""
    asked = call({"prompt": "Once"}, operation=Operation.COMPLETION, stream=True)
    async with engine(answering(whole(b'{"choices":[{"text":" upon"}]}'))) as there:
        speaker = adapter(there)
        out = await drained(await speaker.send(asked))
        with pytest.raises(BackendError) as caught:
            await speaker.send(call(stream=True))
        await speaker.aclose()
    assert deltas(out) == [" upon", ("", "stop"), "[DONE]"]
    assert caught.value.kind is Fault.PROTOCOL


STREAMS: dict[str, tuple[dict[str, Any], list[bytes]]] = {
    "sse": (
        {"stream_format": "sse", "stream_content_key": "delta.t"},
        [b": hello\n\n", *sse({"begin": 1}, {"delta": {"t": "Hel"}}, {"delta": {"t": "lo"}})],
    ),
    "sse with an end mark": (
        {"stream_format": "sse", "response_content_key": "t", "stream_end": "[DONE]"},
        sse({"t": "Hel"}, {"t": "lo"}, "[DONE]"),
    ),
    "ndjson": (
        {"stream_format": "ndjson", "response_content_key": "t", "stream_end": "END"},
        [*lines({"t": "Hel"}, {"t": "lo"}), b"END\n"],
    ),
    "text": ({"stream_format": "text"}, [b"Hello"]),
}


@pytest.mark.parametrize("name", STREAMS)
async def test_streams_of_each_kind(name: str) -> None:
    """Events without a text are passed over; the end is the mark, or the body's proper end."""
    options, pieces = STREAMS[name]
    async with engine(answering(streamed(*pieces))) as there:
        speaker = adapter(there, stream_path="/stream", **options)
        out = await drained(await speaker.send(call(stream=True)))
        await speaker.aclose()
    found = deltas(out)
    assert (found[0], found[-2:]) == ({"role": "assistant", "content": ""}, [({}, "stop"), "[DONE]"])
    assert "".join(delta["content"] for delta in found[1:-2]) == "Hello"
    assert there.requests[0].path == "/stream"
    assert orjson.loads(there.requests[0].body)["stream"] is True


async def test_a_letter_cut_in_two_by_the_network_is_one_letter() -> None:
    """In a plain text stream there are no events to hold it together."""
    letter = "é".encode()
    async with engine(answering(streamed(b"caf" + letter[:1], letter[1:]))) as there:
        speaker = adapter(there, stream_format="text")
        out = await drained(await speaker.send(call(stream=True)))
        await speaker.aclose()
    assert "".join(delta["content"] for delta in deltas(out)[1:-2]) == "café"


async def test_a_stream_in_openais_shape_is_passed_on() -> None:
    """Without content keys; it needs its own ``[DONE]``, or the body's proper end."""
    choice = {"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}
    chunk_ = {"choices": [choice], "model": "m"}
    async with engine(answering(streamed(*sse(chunk_, "[DONE]")))) as there:
        speaker = adapter(there, stream_format="sse", stream_end="[DONE]")
        out = await drained(await speaker.send(call(stream=True)))
        await speaker.aclose()
    assert events(out) == [chunk_, "[DONE]"]


CUT: dict[str, tuple[dict[str, Any], bytes, Fault]] = {
    "the mark is missing": (
        {"stream_format": "sse", "response_content_key": "t", "stream_end": "[DONE]"},
        streamed(*sse({"t": "Hel"})),
        Fault.DISCONNECTED,
    ),
    "the body is cut": ({"stream_format": "text"}, streamed(b"Hel")[: -len(b"0\r\n\r\n")], Fault.DISCONNECTED),
    "an error amid it": (
        {"stream_format": "sse", "response_content_key": "t"},
        streamed(*sse({"t": "Hel"}, {"error": "boom"})),
        Fault.SERVER_ERROR,
    ),
}


@pytest.mark.parametrize("name", CUT)
async def test_a_broken_stream_never_ends_cleanly(name: str) -> None:
    """What came is handed on, and then it is an error."""
    options, said, kind = CUT[name]

    async def script(wire: Wire, _: Request) -> None:
        wire.send(said)
        wire.close()

    async with engine(script) as there:
        speaker = adapter(there, **options)
        out, error = await drained_until_it_fails(await speaker.send(call(stream=True)))
        await speaker.aclose()
    assert deltas(out) == [{"role": "assistant", "content": ""}, {"content": "Hel"}]
    assert error is not None
    assert (error.kind, error.received) == (kind, True)


async def test_a_stream_without_any_text_says_where_it_looked() -> None:
    """Most likely the key is wrong."""
    async with engine(answering(streamed(*sse({"text": "Hi"})))) as there:
        speaker = adapter(there, stream_format="sse", response_content_key="token")
        with pytest.raises(BackendError, match="'token'") as caught:
            await speaker.send(call(stream=True))
        await speaker.aclose()
    assert caught.value.kind is Fault.PROTOCOL


async def test_a_stream_notes_what_its_events_count() -> None:
    """Finish reason and tokens, wherever they come."""
    pieces = sse({"t": "Hi"}, {"why": "length", "usage": {"prompt_tokens": 4, "completion_tokens": 1}})
    async with engine(answering(streamed(*pieces))) as there:
        speaker = adapter(there, stream_format="sse", response_content_key="t", finish_key="why")
        body = {"messages": [USER], "stream_options": {"include_usage": True}}
        reply = await speaker.send(call(body, stream=True))
        found = deltas(await drained(reply))
        await speaker.aclose()
    assert found[-3:] == [({}, "length"), {"usage": Usage(4, 1, 5).to_openai()}, "[DONE]"]
    assert reply.tally.usage == Usage(4, 1, 5)
