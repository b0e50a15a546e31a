"""Triton's generate extension. The samples were recorded from Triton 2.51; `record.py` of the real-engine tests made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from kvfleet.adapters.base import ChatMessage, ChatRequest, EngineLoad
from kvfleet.adapters.call import Operation, Usage
from kvfleet.adapters.prompting import TEMPLATES
from kvfleet.adapters.translation import Chunks
from kvfleet.adapters.triton import TritonAdapter
from kvfleet.adapters.triton_wire import DIALECTS, Dialect, GenerateCall, generate_body
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault
from tests.adapters.scripted import Engine, Request, Wire, answering, engine, streamed, whole
from tests.adapters.told import USER, call, deltas, drained, drained_until_it_fails, told

SAMPLES = Path(__file__).with_name("samples")
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def sample(name: str) -> bytes:
    """What Triton said."""
    return (SAMPLES / f"triton_{name}").read_bytes()


def said(name: str) -> list[Any]:
    """The events of a recorded stream."""
    return [orjson.loads(line[6:]) for line in sample(name).splitlines() if line.startswith(b"data: ")]


def body(given: dict[str, Any], *, dialect: str = "plain", is_stream: bool = False) -> dict[str, Any]:
    """The generate body for an OpenAI one."""
    asked = {"model": "gpt", "messages": [USER], **given}
    return generate_body(asked, "Hi", text_input="text_input", is_stream=is_stream, dialect=DIALECTS[dialect])


def made(dialect: Dialect = DIALECTS["plain"], *, include_usage: bool = False, is_stream: bool = True) -> GenerateCall:
    """A chat call with a known id."""
    return GenerateCall.of(
        Operation.CHAT,
        "/v2/models/words/generate",
        {"stream_options": {"include_usage": include_usage}},
        "Hi",
        Chunks(operation=Operation.CHAT, model="words", created=7, id="answer-1"),
        is_stream=is_stream,
        text_input="text_input",
        text_output="text_output",
        dialect=dialect,
    )


# --- from OpenAI to Triton


def test_plain_models_are_asked_in_openais_words() -> None:
    """The newer name of the token limit, and the stop texts as a list; unknown fields go along."""
    given = {
        "max_completion_tokens": 5,
        "max_tokens": 9,
        "stop": "END",
        "temperature": 0,
        "beam_width": 2,
        "user": None,
    }
    assert body(given) == {
        "text_input": "Hi",
        "max_tokens": 5,
        "stop": ["END"],
        "temperature": 0,
        "beam_width": 2,
    }


def test_tensorrt_llm_models_are_asked_in_theirs() -> None:
    """The ensemble has `stop_words` and `stream`; the LLM API model puts a prefix before each parameter."""
    given = {"max_tokens": 5, "stop": ["a", "b"]}
    assert body(given, dialect="tensorrt_llm", is_stream=True) == {
        "text_input": "Hi",
        "stream": True,
        "max_tokens": 5,
        "stop_words": ["a", "b"],
    }
    assert body(given, dialect="tensorrt_llm_api") == {
        "text_input": "Hi",
        "streaming": False,
        "sampling_param_exclude_input_from_output": True,
        "return_finish_reason": True,
        "sampling_param_max_tokens": 5,
        "sampling_param_stop": ["a", "b"],
    }


def test_vllm_models_take_their_parameters_as_one_text() -> None:
    """And are asked for the finish reason and the counts."""
    found = body({"max_tokens": 5, "stop": "END"}, dialect="vllm", is_stream=True)
    assert orjson.loads(found.pop("sampling_parameters")) == {"max_tokens": 5, "stop": ["END"]}
    assert found == {
        "text_input": "Hi",
        "stream": True,
        "exclude_input_in_output": True,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }


def test_tritons_own_parameters_go_along() -> None:
    """``parameters`` is the extension's own field."""
    assert body({"parameters": {"priority": 1}})["parameters"] == {"priority": 1}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_the_extension_has_no_place_for_is_refused(given: dict[str, Any], param: str) -> None:
    """Never left out in silence."""
    with pytest.raises(BackendError) as caught:
        body(given)
    assert (caught.value.kind, caught.value.status) == (Fault.BAD_REQUEST, 400)
    assert caught.value.body is not None
    assert caught.value.body["param"] == param


def test_tools_that_must_not_be_called_do_no_harm() -> None:
    """`tool_choice: none` asks for what Triton does anyway."""
    assert body({"tools": [TOOL], "tool_choice": "none"}) == {"text_input": "Hi"}


def test_a_conversation_is_written_by_a_template() -> None:
    """Contents are put in as they are, whatever they look like."""
    conversation = [
        {"role": "developer", "content": "Be {role}."},
        {"role": "user", "content": [{"type": "text", "text": "{content}"}, {"type": "text", "text": "!"}]},
    ]
    plain, llama = (TEMPLATES[name].render(conversation, "it") for name in ("plain", "llama3"))
    assert plain == "system: Be {role}.\nuser: {content}\n!\nassistant: "
    assert llama == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe {role}.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n{content}\n!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]},
        {"role": "tool", "content": "sunny", "tool_call_id": "a"},
        "Hi",
    ],
)
def test_what_is_no_text_is_refused(message: Any) -> None:
    """Pictures, tool calls and their results have no place in a text."""
    with pytest.raises(BackendError) as caught:
        TEMPLATES["plain"].render([message], "it")
    assert caught.value.kind is Fault.BAD_REQUEST


# --- from Triton to OpenAI


def test_a_recorded_answer_becomes_a_chat_completion() -> None:
    """With Triton's further fields; usage is unknown, and not nought."""
    assert made(is_stream=False).whole(orjson.loads(sample("generate.json"))) == {
        "model_name": "words",
        "model_version": "1",
        "id": "answer-1",
        "object": "chat.completion",
        "created": 7,
        "model": "words",
        "choices": [
            {
                "index": 0,
                "logprobs": None,
                "message": {"role": "assistant", "content": "a b c "},
                "finish_reason": "stop",
            }
        ],
    }


def test_a_recorded_answer_of_a_vllm_model_is_counted() -> None:
    """Tokens and the finish reason."""
    call_ = made(DIALECTS["vllm"], is_stream=False)
    found = call_.whole(orjson.loads(sample("vllm_generate.json")))
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}


def test_a_recorded_stream_becomes_chunks() -> None:
    """It ends with the body, which has no last word."""
    assert deltas(told(made(), said("stream.sse"))) == [
        {"role": "assistant", "content": ""},
        {"content": "a "},
        {"content": "b "},
        {"content": "c "},
        ({}, "stop"),
        "[DONE]",
    ]


def test_a_recorded_stream_of_a_vllm_model_counts_its_pieces() -> None:
    """Output tokens come piece by piece; the reason is a printed None until the end."""
    call_ = made(DIALECTS["vllm"], include_usage=True)
    found = deltas(told(call_, said("vllm_stream.sse")))
    assert found[-3:] == [({}, "length"), {"usage": Usage(4, 3, 7).to_openai()}, "[DONE]"]
    assert (call_.chunks.tally.usage, call_.chunks.tally.finish_reason) == (Usage(4, 3, 7), "length")


@pytest.mark.parametrize(
    ("dialect", "name", "keep", "is_whole"),
    [("plain", "stream.sse", 2, False), ("plain", "stream.sse", 0, True), ("vllm", "vllm_stream.sse", 2, True)],
)
def test_a_cut_stream_never_ends_cleanly(dialect: str, name: str, keep: int, *, is_whole: bool) -> None:
    """Cut by the network; without a word; without the finish reason that its model always gives."""
    with pytest.raises(BackendError) as caught:
        told(made(DIALECTS[dialect]), said(name)[:keep], is_whole=is_whole)
    assert caught.value.kind is Fault.DISCONNECTED


# --- over the wire


def adapter(there: Engine, **options: Any) -> TritonAdapter:
    """An adapter with a clock that stands still."""
    made_ = TritonAdapter(endpoint=there.url, model_id=options.pop("model_id", "words"), **options)
    made_._clock = FrozenClock()
    return made_


async def test_chat_goes_there_and_back() -> None:
    """To the model's generate endpoint, as one text."""
    async with engine(answering(whole(sample("generate.json")))) as there:
        speaker = adapter(there, dialect="tensorrt_llm")
        request = ChatRequest(messages=[ChatMessage(role="user", content="Hi")], max_tokens=3)
        found = await speaker.chat(request)
        await speaker.aclose()
    assert (found.content, found.finish_reason, found.usage) == ("a b c ", "stop", None)
    assert there.requests[0].path == "/v2/models/words/generate"
    assert orjson.loads(there.requests[0].body) == {"text_input": PROMPT, "stream": False, "max_tokens": 3}


async def test_a_model_names_its_inputs_as_it_likes() -> None:
    """Text input and output, single parameters, the version, and the model's name in the path are options."""
    async with engine(answering(whole(b'{"OUT":["x"]}'))) as there:
        speaker = adapter(
            there,
            model_id="my/model",
            text_input="IN",
            text_output="OUT",
            model_version="3",
            prompt_format="plain",
            message_template="[{role}] {content}\n",
            answer_template="[bot]",
            parameter_names={"max_tokens": "request_output_len"},
        )
        reply = await speaker.send(call({"messages": [USER], "max_tokens": 3}))
        await speaker.aclose()
    assert there.requests[0].path == "/v2/models/my%2Fmodel/versions/3/generate"
    assert orjson.loads(there.requests[0].body) == {"IN": "[user] Hi\n[bot]", "request_output_len": 3}
    assert orjson.loads(reply.body)["choices"][0]["message"]["content"] == "x"


async def test_a_recorded_stream_is_relayed_however_it_is_cut() -> None:
    """The body's proper end is the stream's."""
    data = sample("stream.sse")
    async with engine(answering(streamed(data[:5], data[5:100], data[100:]))) as there:
        speaker = adapter(there)
        out = await drained(await speaker.send(call({"prompt": "a b"}, operation=Operation.COMPLETION, stream=True)))
        await speaker.aclose()
    assert deltas(out) == ["a ", "b ", "c ", ("", "stop"), "[DONE]"]
    assert there.requests[0].path == "/v2/models/words/generate_stream"


async def test_a_connection_lost_amid_the_stream_is_no_end() -> None:
    """Without the last, empty chunk of HTTP the body is not whole."""
    async with engine(answering(streamed(sample("stream.sse"))[: -len(b"0\r\n\r\n")], close=True)) as there:
        speaker = adapter(there)
        out, error = await drained_until_it_fails(await speaker.send(call(stream=True)))
        await speaker.aclose()
    assert b"[DONE]" not in out
    assert error is not None
    assert (error.kind, error.received) == (Fault.DISCONNECTED, True)


async def test_a_recorded_error_amid_the_stream_is_an_error() -> None:
    """Under a 200, as an event: the extension's documentation warns of it."""
    async with engine(answering(streamed(sample("stream_error.sse")))) as there:
        speaker = adapter(there)
        out, error = await drained_until_it_fails(await speaker.send(call(stream=True)))
        await speaker.aclose()
    assert [delta["content"] for delta in deltas(out)[1:]] == ["a ", "b "]
    assert error is not None
    assert (error.kind, error.received) == (Fault.SERVER_ERROR, True)


@pytest.mark.parametrize(
    ("status", "body_", "kind"),
    [
        ("404 Not Found", sample("unknown_model.json"), Fault.NOT_FOUND),
        ("400 Bad Request", sample("bad_parameter.json"), Fault.BAD_REQUEST),
        ("503 Service Unavailable", b'{"error":"Server is shutting down"}', Fault.OVERLOADED),
        ("500 Internal Server Error", b'{"error":"boom"}', Fault.SERVER_ERROR),
        ("200 OK", b'{"error":"generate expects model to produce exactly 1 response"}', Fault.SERVER_ERROR),
        ("200 OK", b'{"other_output":"x"}', Fault.PROTOCOL),
        ("200 OK", b'{"text_output":7}', Fault.PROTOCOL),
        ("200 OK", b"<html>", Fault.PROTOCOL),
    ],
)
async def test_refusals_are_in_the_one_taxonomy(status: str, body_: bytes, kind: Fault) -> None:
    """Those under a 200 too."""
    async with engine(answering(whole(body_, status=status))) as there:
        speaker = adapter(there)
        with pytest.raises(BackendError) as caught:
            await speaker.send(call())
        await speaker.aclose()
    assert caught.value.kind is kind


async def test_health_asks_the_server_and_the_model() -> None:
    """A server may be ready and the model not loaded."""
    ready = {"/v2/health/ready", "/v2/models/words/ready"}

    async def pages(wire: Wire, request: Request) -> None:
        found = request.path in ready
        wire.send(whole(b"" if found else b'{"error":"x"}', status="200 OK" if found else "400 Bad Request"))

    async with engine(pages) as there:
        speaker, other = adapter(there), adapter(there, model_id="nobody")
        found = [(await one.health_check()).healthy for one in (speaker, other)]
        await speaker.aclose()
        await other.aclose()
    assert found == [True, False]


async def test_models_are_those_that_are_ready() -> None:
    """By the repository index; models that are not loaded are not served."""
    index = [*orjson.loads(sample("index.json")), {"name": "cold", "state": "UNAVAILABLE"}]
    async with engine(answering(whole(orjson.dumps(index)))) as there:
        speaker = adapter(there)
        found = await speaker.list_models()
        await speaker.aclose()
    assert found == ("words", "wordy")
    assert (there.requests[0].method, there.requests[0].path) == ("POST", "/v2/repository/index")


TRT_PAGE = b"""nv_inference_pending_request_count{model="words",version="1"} 2
nv_inference_pending_request_count{model="other",version="1"} 40
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 3
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 5
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="tensorrt_llm",version="1"} 0.25
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 100
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 64
"""


async def test_load_is_read_from_the_metrics_port() -> None:
    """Requests that wait for this model; the batch and the KV cache where the TensorRT-LLM backend shows them."""
    async with engine(answering(whole(sample("metrics.txt")))) as plain, engine(answering(whole(TRT_PAGE))) as trt:
        speakers = [adapter(plain, metrics_url=f"{there.url}/metrics", api_key="secret") for there in (plain, trt)]
        found = [await speaker.get_load() for speaker in speakers]
        metrics = await speakers[0].get_metrics()
        for speaker in speakers:
            await speaker.aclose()
    assert found == [
        EngineLoad(waiting=0),
        EngineLoad(running=5, waiting=5, kv_usage=0.25, cache_blocks=100, block_tokens=64),
    ]
    assert metrics["nv_inference_count"] == 6
    assert "authorization" not in trt.requests[0].headers


async def test_without_a_metrics_url_nothing_is_known_of_the_load() -> None:
    """And nobody is asked."""
    speaker = TritonAdapter(endpoint="http://127.0.0.1:1", model_id="words")
    assert (await speaker.get_load(), await speaker.get_metrics()) == (EngineLoad(), {})


async def test_embeddings_are_refused() -> None:
    """The extension gives text."""
    speaker = TritonAdapter(endpoint="http://127.0.0.1:1", model_id="words")
    with pytest.raises(BackendError) as caught:
        await speaker.send(call({"input": "a"}, operation=Operation.EMBEDDING))
    assert caught.value.kind is Fault.BAD_REQUEST


def test_the_options_of_a_fleet_file_reach_the_adapter() -> None:
    """By `from_config`."""
    model = ModelConfig(name="m", endpoint="http://127.0.0.1:8000", provider="triton", model_id="words")
    speaker = TritonAdapter.from_config(model, dialect="vllm")
    assert (speaker.dialect, speaker.model_id) == ("vllm", "words")
