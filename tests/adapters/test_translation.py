"""What every translated engine shares, whatever is thrown at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.adapters.call import Call, Operation, Tally, Usage
from kvfleet.adapters.custom_http import CustomHTTPAdapter
from kvfleet.adapters.ollama import OllamaAdapter
from kvfleet.adapters.tgi import TGIAdapter
from kvfleet.adapters.translated import TranslatedAdapter, events_of
from kvfleet.adapters.translation import Chunks, Framing, as_stream
from kvfleet.adapters.triton import TritonAdapter
from kvfleet.errors import BackendError, Fault
from tests.adapters.told import call, deltas, events

NOWHERE = "http://127.0.0.1:1"
ADAPTERS: dict[str, TranslatedAdapter] = {
    "ollama": OllamaAdapter(endpoint=NOWHERE, model_id="m"),
    "tgi": TGIAdapter(endpoint=NOWHERE, model_id="m"),
    "tgi by its native route": TGIAdapter(endpoint=NOWHERE, model_id="m", chat_route="generate"),
    "triton": TritonAdapter(endpoint=NOWHERE, model_id="m"),
    "triton's vllm": TritonAdapter(endpoint=NOWHERE, model_id="m", dialect="vllm"),
    "custom": CustomHTTPAdapter(endpoint=NOWHERE, model_id="m", stream_format="sse"),
    "custom with paths": CustomHTTPAdapter(
        endpoint=NOWHERE,
        model_id="m",
        request_template={"p": "{prompt}"},
        response_content_key="a.0.b",
        stream_format="ndjson",
        finish_key="f",
    ),
}
WORDS = st.sampled_from(
    [
        *("text", "image_url", "url", "function", "arguments", "name", "id", "role", "user", "assistant", "tool"),
        *("content", "type", "tool_calls", "json_schema", "schema", "model", "index", "delta", "message", "token"),
        *(
            "choices",
            "usage",
            "done",
            "response",
            "text_output",
            "generated_text",
            "details",
            "finish_reason",
            "a",
            "b",
        ),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [
        *("messages", "prompt", "input", "tools", "tool_choice", "response_format", "stop", "max_tokens", "top_p"),
        *("stream_options", "options", "parameters", "n", "temperature", "reasoning_effort", "logprobs"),
    ]
)


def pieces_of(adapter: TranslatedAdapter, operation: Operation, *, stream: bool) -> Any:
    """A translation of an ordinary call."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi"}
    return adapter.translate(call(body, operation=operation, stream=stream))


def outcome(work: Callable[[], Any]) -> Any:
    """What the work gives, or the error it ends in; any other exception is the test's."""
    try:
        return work()
    except BackendError as error:
        return error


@pytest.mark.parametrize("name", ADAPTERS)
@settings(max_examples=60)
@given(body=st.dictionaries(FIELDS, JSON, max_size=5), operation=st.sampled_from(list(Operation)), stream=st.booleans())
def test_any_body_is_translated_or_refused(name: str, body: Any, operation: Operation, *, stream: bool) -> None:
    """And nothing else: no body makes an adapter fall over."""
    found = outcome(lambda: ADAPTERS[name]._told(Call(operation=operation, body=body, stream=stream)))
    if isinstance(found, BackendError):
        assert (found.kind, found.status) == (Fault.BAD_REQUEST, 400)
    else:
        told, sent = found
        assert told.path.startswith("/")
        assert isinstance(orjson.loads(sent), dict)


@pytest.mark.parametrize("name", ADAPTERS)
@settings(max_examples=60)
@given(answers=st.lists(JSON, min_size=1, max_size=4))
def test_any_stream_is_translated_or_an_error(name: str, answers: list[Any]) -> None:
    """Whatever an engine says, what comes out is OpenAI's events or one kind of error; and ``[DONE]`` comes last."""
    told = pieces_of(ADAPTERS[name], Operation.CHAT, stream=True)
    out = b""

    def read() -> None:
        nonlocal out
        for answer in answers:
            out += told.read_event(orjson.dumps(answer))
            if told.chunks.tally.is_complete:
                return
        out += told.end()

    is_error = outcome(read) is not None
    assert (events(out)[-1:] == ["[DONE]"]) is not is_error
    assert out.count(b"[DONE]") <= 1


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("operation", [Operation.CHAT, Operation.COMPLETION])
@settings(max_examples=60)
@given(answer=JSON)
def test_any_answer_is_translated_or_an_error(name: str, operation: Operation, answer: Any) -> None:
    """The same for whole answers."""
    told = pieces_of(ADAPTERS[name], operation, stream=False)
    found = outcome(lambda: orjson.loads(told.read_whole(orjson.dumps(answer), 200)))
    if isinstance(found, BackendError):
        assert found.kind in (Fault.PROTOCOL, Fault.SERVER_ERROR)
    else:
        assert "choices" in found


def test_a_stream_with_nothing_to_say_still_opens() -> None:
    """Role, finish, usage, the end: an answer of no words is one."""
    tally = Tally()
    chunks = Chunks(operation=Operation.CHAT, model="m", created=1, include_usage=True, tally=tally, id="x")
    said = chunks.finish("stop", Usage(3, 0, 3), load_duration=5, id="theirs")
    assert deltas(said) == [
        {"role": "assistant", "content": ""},
        ({}, "stop"),
        {"usage": {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}},
        "[DONE]",
    ]
    assert [event["id"] for event in events(said)[:-1]] == ["x", "x", "x"]
    assert events(said)[1]["load_duration"] == 5
    assert tally == Tally(Usage(3, 0, 3), "stop", "m", "x", 3, is_complete=True)


def test_an_answer_gets_an_id_of_its_kind() -> None:
    """A new one each time."""
    ids = [Chunks(operation=operation, model="m", created=1).id for operation in Operation for _ in range(2)]
    assert len(set(ids)) == len(ids)
    assert ids[0].startswith("chatcmpl-")
    assert ids[2].startswith("cmpl-")


def test_a_whole_answer_of_several_choices_is_told_as_a_stream() -> None:
    """Each choice has its own pieces and its own finish."""
    choices = [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "a"},
            "finish_reason": "stop",
            "logprobs": {"content": []},
        },
        {"index": 1, "message": {"role": "assistant", "content": "b"}, "finish_reason": "length"},
    ]
    answer = {"id": "x", "object": "chat.completion", "choices": choices, "usage": {"prompt_tokens": 1}}
    said = as_stream(Operation.CHAT, answer, include_usage=False)
    assert [(event["choices"][0]["index"], event["choices"][0]["finish_reason"]) for event in events(said)[:-1]] == [
        (0, None),
        (0, "stop"),
        (1, None),
        (1, "length"),
    ]
    assert events(said)[0]["choices"][0]["logprobs"] == {"content": []}
    assert b"usage" not in said


CUTS: dict[str, tuple[Framing, list[bytes], list[bytes]]] = {
    "events of two ends": (
        Framing.SSE,
        [b"data: a\n", b"\nevent: x\r\ndata:b\r\n", b"data: c\r\n\r\n: hi\n\ndata: d"],
        [b"a", b"b\nc", b"d"],
    ),
    "a bare answer where events should be": (Framing.SSE, [b'{"error":', b'"x"}\n'], [b'{"error":"x"}']),
    "lines": (Framing.NDJSON, [b'{"a"', b":1}\n\n", b'  \n{"b":2}'], [b'{"a":1}', b'{"b":2}']),
    "text": (Framing.TEXT, [b"a\n", b"b"], [b"a\n", b"b"]),
}


@pytest.mark.parametrize("name", CUTS)
async def test_a_stream_is_divided_whatever_the_network_did(name: str) -> None:
    """Comments and empty lines are no events; a last event without its end is one if it can be read."""
    framing, pieces, wanted = CUTS[name]

    async def body() -> Any:
        for piece in pieces:
            yield piece

    assert [event async for event in events_of(body(), framing)] == wanted
