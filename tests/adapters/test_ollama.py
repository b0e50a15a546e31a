"""Ollama's native API. The native shapes are those of its documentation and of ``api/types.go``; nothing is recorded."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from kvfleet.adapters.base import ChatMessage, ChatRequest
from kvfleet.adapters.call import Operation, Usage
from kvfleet.adapters.ollama import OllamaAdapter
from kvfleet.adapters.ollama_wire import OllamaChat, OllamaCompletion, OllamaEmbedding
from kvfleet.adapters.translation import Chunks
from kvfleet.clock import FrozenClock
from kvfleet.errors import BackendError, Fault
from tests.adapters.scripted import Request, Wire, answering, chunk, engine, streamed, whole
from tests.adapters.told import USER, call, deltas, drained, drained_until_it_fails, events, lines, told

CREATED = 1795398907
HEAD = {"model": "llama3", "created_at": "2026-11-23T01:55:07.123456789Z"}
COUNTS = {"prompt_eval_count": 11, "eval_count": 3, "total_duration": 5_000_000, "eval_duration": 1_000_000}
DONE = {**HEAD, "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop", **COUNTS}


def chunks(operation: Operation = Operation.CHAT) -> Chunks:
    """A writer with a known id."""
    return Chunks(operation=operation, model="llama3", created=7, id="answer-1")


def chat(body: dict[str, Any] | None = None, *, is_stream: bool = True) -> OllamaChat:
    """A chat call."""
    return OllamaChat.of(body or {"messages": [USER]}, chunks(), is_stream=is_stream, defaults={})


def piece(content: str = "", **message: Any) -> dict[str, Any]:
    """One line of a chat stream."""
    return {**HEAD, "message": {"role": "assistant", "content": content, **message}, "done": False}


# --- from Ollama to OpenAI


def test_a_whole_answer_becomes_a_chat_completion() -> None:
    """Thoughts, tool calls with arguments as text, usage, the time, and Ollama's own figures."""
    message = {
        "role": "assistant",
        "content": "",
        "thinking": "Paris, then.",
        "tool_calls": [{"id": "call_9", "function": {"index": 0, "name": "get_weather", "arguments": {"city": "P"}}}],
    }
    found = chat(is_stream=False).whole({**DONE, "message": message})
    assert found == {
        "total_duration": 5_000_000,
        "eval_duration": 1_000_000,
        "id": "answer-1",
        "object": "chat.completion",
        "created": CREATED,
        "model": "llama3",
        "choices": [
            {
                "index": 0,
                "logprobs": None,
                "message": {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "Paris, then.",
                    "tool_calls": [
                        {
                            "id": "call_9",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": '{"city":"P"}'},
                        }
                    ],
                },
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
    }


def test_log_probabilities_stand_where_openai_has_them() -> None:
    """Ollama's entries have OpenAI's shape already."""
    entry = {"token": "Hi", "logprob": -0.1, "bytes": [72, 105], "top_logprobs": []}
    found = chat(is_stream=False).whole({**DONE, "message": {"content": "Hi"}, "logprobs": [entry]})
    assert found["choices"][0]["logprobs"] == {"content": [entry]}
    streamed_ = told(chat(), [{**piece("Hi"), "logprobs": [entry]}, DONE])
    assert [event["choices"][0]["logprobs"] for event in events(streamed_)[:-1]] == [None, {"content": [entry]}, None]


def test_a_stream_becomes_openai_chunks() -> None:
    """Role first, then thoughts and text as they come, the finish reason, and ``[DONE]``; usage was not asked for."""
    call_ = chat()
    said = told(call_, [piece(thinking="Hm."), piece("Hel"), piece("lo"), DONE])
    assert deltas(said) == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm."},
        {"content": "Hel"},
        {"content": "lo"},
        ({}, "stop"),
        "[DONE]",
    ]
    heads = {(e["id"], e["object"], e["created"], e["model"]) for e in events(said)[:-1]}
    assert heads == {("answer-1", "chat.completion.chunk", CREATED, "llama3")}
    assert events(said)[-2]["total_duration"] == 5_000_000
    tally = call_.chunks.tally
    assert (tally.usage, tally.finish_reason, tally.is_complete) == (Usage(11, 3, 14), "stop", True)


def test_usage_comes_at_the_end_if_it_was_asked_for() -> None:
    """One event without choices before ``[DONE]``, and a null usage in all others, as OpenAI does it."""
    said = told(chat({"messages": [USER], "stream_options": {"include_usage": True}}), [piece("Hi"), DONE])
    assert deltas(said)[-2:] == [{"usage": Usage(11, 3, 14).to_openai()}, "[DONE]"]
    assert [event["usage"] for event in events(said)[:-2]] == [None, None, None]


def test_streamed_tool_calls_are_numbered_and_end_the_turn() -> None:
    """Calls that come in several lines count on, get an id if Ollama gave none, and set the finish reason."""
    one = {"function": {"name": "a", "arguments": {}}}
    said = deltas(told(chat(), [piece(tool_calls=[one]), piece(tool_calls=[one, one]), DONE]))
    calls = [tool for delta in said if isinstance(delta, dict) for tool in delta.get("tool_calls", ())]
    assert [tool["index"] for tool in calls] == [0, 1, 2]
    assert len({tool["id"] for tool in calls}) == 3
    assert {tool["function"]["arguments"] for tool in calls} == {"{}"}
    assert said[-2] == ({}, "tool_calls")


def test_an_answer_cut_by_its_limit_says_length() -> None:
    """Also where it called a tool before."""
    assert deltas(told(chat(), [piece("x"), {**DONE, "done_reason": "length"}]))[-2] == ({}, "length")


def test_a_completion_has_text_instead_of_messages() -> None:
    """Whole and streamed."""
    made = OllamaCompletion.of({"prompt": "a"}, chunks(Operation.COMPLETION), is_stream=True, defaults={})
    last = {**HEAD, "response": "", "done": True, "done_reason": "stop", "context": [1, 2], **COUNTS}
    assert deltas(told(made, [{**HEAD, "response": "b", "done": False}, last])) == ["b", ("", "stop"), "[DONE]"]
    made = OllamaCompletion.of({"prompt": "a"}, chunks(Operation.COMPLETION), is_stream=False, defaults={})
    found = made.whole({**last, "response": "bc"})
    assert found["choices"] == [{"index": 0, "logprobs": None, "text": "bc", "finish_reason": "stop"}]
    assert (found["object"], found["context"]) == ("text_completion", [1, 2])


@pytest.mark.parametrize(("wanted", "vector"), [("float", [1.0, -2.0]), ("base64", "AACAPwAAAMA=")])
def test_embeddings_come_in_the_encoding_asked_for(wanted: str, vector: Any) -> None:
    """The `openai` package asks for base64 unless it is told otherwise."""
    made = OllamaEmbedding.of({"input": "a", "encoding_format": wanted}, chunks(Operation.EMBEDDING), defaults={})
    found = made.whole({"model": "e", "embeddings": [[1.0, -2.0]], "prompt_eval_count": 4, "load_duration": 9})
    assert found == {
        "load_duration": 9,
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": vector}],
        "model": "e",
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }


def test_a_cut_stream_never_ends_cleanly() -> None:
    """Without Ollama's last line there is no ``[DONE]``, even if HTTP says that the body is whole."""
    with pytest.raises(BackendError) as caught:
        told(chat(), [piece("Hel")], is_whole=True)
    assert (caught.value.kind, caught.value.received) == (Fault.DISCONNECTED, True)


@pytest.mark.parametrize("line", [{"message": 7}, {"message": {"tool_calls": [{}]}}, [1], 7])
def test_a_line_of_the_wrong_shape_is_a_protocol_error(line: Any) -> None:
    """And no exception of Python's."""
    with pytest.raises(BackendError) as caught:
        chat().read_event(orjson.dumps(line))
    assert caught.value.kind is Fault.PROTOCOL


# --- over the wire


def adapter(url: str, **options: Any) -> OllamaAdapter:
    """An adapter with a clock that stands still."""
    made = OllamaAdapter(endpoint=url, model_id="llama3", api_key="k", **options)
    made._clock = FrozenClock()
    return made


async def test_chat_goes_there_and_back() -> None:
    """The documented call: a `ChatRequest` in, a `ChatResponse` out, the key and the caller's headers on the wire."""
    answer = orjson.dumps({**DONE, "message": {"role": "assistant", "content": "Rust is a language."}})
    async with engine(answering(whole(answer))) as there:
        speaker = adapter(there.url, keep_alive="-1")
        found = await speaker.chat(ChatRequest(messages=[ChatMessage(role="user", content="What is Rust?")]))
        await speaker.aclose()
    assert (found.content, found.finish_reason, found.usage) == ("Rust is a language.", "stop", Usage(11, 3, 14))
    (request,) = there.requests
    assert (request.method, request.path) == ("POST", "/api/chat")
    assert request.headers["authorization"] == "Bearer k"
    assert orjson.loads(request.body) == {
        "model": "llama3",
        "stream": False,
        "messages": [{"role": "user", "content": "What is Rust?"}],
        "truncate": False,
        "keep_alive": -1,
    }


async def test_a_stream_is_relayed_as_it_comes() -> None:
    """However the network cuts the lines."""
    said = b"".join(lines(piece("Hel"), piece("lo"), DONE))
    async with engine(answering(streamed(said[:40], said[40:90], said[90:]))) as there:
        speaker = adapter(there.url)
        reply = await speaker.send(call(stream=True))
        out = await drained(reply)
        await speaker.aclose()
    assert deltas(out)[1:] == [{"content": "Hel"}, {"content": "lo"}, ({}, "stop"), "[DONE]"]
    assert reply.tally.usage == Usage(11, 3, 14)


async def test_an_engine_that_dies_amid_its_answer_is_an_error() -> None:
    """What came before is handed on, and no ``[DONE]``."""

    async def dies(wire: Wire, _: Request) -> None:
        wire.send(streamed(*lines(piece("Hel")))[: -len(b"0\r\n\r\n")])
        wire.close()

    async with engine(dies) as there:
        speaker = adapter(there.url)
        out, error = await drained_until_it_fails(await speaker.send(call(stream=True)))
        await speaker.aclose()
    assert deltas(out) == [{"role": "assistant", "content": ""}, {"content": "Hel"}]
    assert error is not None
    assert (error.kind, error.received) == (Fault.DISCONNECTED, True)


async def test_an_error_amid_the_stream_is_an_error() -> None:
    """Ollama says it in a line of its own under the 200."""
    async with engine(answering(streamed(*lines(piece("Hel"), {"error": "an error was encountered"})))) as there:
        speaker = adapter(there.url)
        out, error = await drained_until_it_fails(await speaker.send(call(stream=True)))
        await speaker.aclose()
    assert b"[DONE]" not in out
    assert error is not None
    assert (error.kind, error.received) == (Fault.SERVER_ERROR, True)


async def test_an_error_said_first_fails_the_call_itself() -> None:
    """So that another replica may be tried: nothing has been handed on."""
    async with engine(answering(streamed(*lines({"error": "model runner has crashed"})))) as there:
        speaker = adapter(there.url)
        with pytest.raises(BackendError) as caught:
            await speaker.send(call(stream=True))
        await speaker.aclose()
    assert (caught.value.kind, caught.value.received) == (Fault.SERVER_ERROR, False)


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        ("404 Not Found", "model 'llama3' not found", Fault.NOT_FOUND),
        (
            "503 Service Unavailable",
            "server busy, please try again.  maximum pending requests exceeded",
            Fault.OVERLOADED,
        ),
        ("400 Bad Request", '"llama3" does not support thinking', Fault.BAD_REQUEST),
        ("400 Bad Request", "the input length exceeds the context length", Fault.CONTEXT_LENGTH),
        (
            "400 Bad Request",
            "the prompt is longer than the context length currently available to the model; shorten the prompt",
            Fault.CONTEXT_LENGTH,
        ),
        ("500 Internal Server Error", "llama runner process has terminated", Fault.SERVER_ERROR),
        ("401 Unauthorized", "unauthorized", Fault.UNAUTHORIZED),
    ],
)
async def test_refusals_are_in_the_one_taxonomy(status: str, text: str, kind: Fault) -> None:
    """The texts are those of Ollama's source."""
    async with engine(answering(whole(orjson.dumps({"error": text}), status=status))) as there:
        speaker = adapter(there.url)
        with pytest.raises(BackendError) as caught:
            await speaker.send(call())
        await speaker.aclose()
    assert caught.value.kind is kind


async def test_a_client_that_leaves_stops_the_engine() -> None:
    """Closing the reply amid the stream closes the connection."""

    async def never_ends(wire: Wire, _: Request) -> None:
        wire.send(streamed(*lines(piece("Hel")))[: -len(b"0\r\n\r\n")])
        await wire.gone.wait()

    async with engine(never_ends) as there:
        speaker = adapter(there.url)
        reply = await speaker.send(call(stream=True))
        await reply.close()
        await reply.close()
        await there.wires[0].gone.wait()
        await speaker.aclose()


async def test_reranking_is_refused() -> None:
    """Ollama has no endpoint for it."""
    with pytest.raises(BackendError) as caught:
        await adapter("http://127.0.0.1:1").send(call({"query": "a", "documents": []}, operation=Operation.RERANK))
    assert caught.value.kind is Fault.BAD_REQUEST


PAGES = {
    "/api/version": {"version": "0.12.0"},
    "/api/tags": {"models": [{"name": "llama3:latest", "model": "llama3:latest"}, {"name": "qwen3:8b"}]},
    "/api/ps": {
        "models": [
            {"name": "llama3:latest", "model": "llama3:latest", "size": 9, "size_vram": 8, "context_length": 4096}
        ]
    },
}


async def test_health_models_and_state_are_asked_for_where_ollama_has_them() -> None:
    """``/api/version``, ``/api/tags`` and ``/api/ps``."""

    async def pages(wire: Wire, request: Request) -> None:
        wire.send(whole(orjson.dumps(PAGES[request.path])))

    async with engine(pages) as there:
        speaker = adapter(there.url)
        health = await speaker.health_check()
        metrics, load = await speaker.get_metrics(), await speaker.get_load()
        await speaker.aclose()
    assert (health.healthy, health.models) == (True, ("llama3:latest", "qwen3:8b"))
    assert metrics == {
        "loaded_models": 1,
        "is_loaded": 1,
        "size_bytes": 9,
        "size_vram_bytes": 8,
        "context_length": 4096,
    }
    assert (load.running, load.waiting, load.kv_usage) == (None, None, None)


async def test_an_engine_that_is_not_there_is_unhealthy() -> None:
    """And that is no exception."""
    health = await adapter("http://127.0.0.1:1").health_check()
    assert (health.healthy, health.endpoint) == (False, "http://127.0.0.1:1")
    assert health.error


async def test_a_stream_kept_open_after_its_last_line_is_over() -> None:
    """Ollama has said that it is done: nobody waits for the connection to end."""

    async def lingers(wire: Wire, _: Request) -> None:
        head, _, _ = streamed().partition(b"0\r\n")
        wire.send(head, *(chunk(line) for line in lines(piece("Hi"), DONE)))
        await wire.gone.wait()

    async with engine(lingers) as there:
        speaker = adapter(there.url)
        reply = await speaker.send(call(stream=True))
        assert deltas(await drained(reply))[-1] == "[DONE]"
        await reply.close()
        await speaker.aclose()
