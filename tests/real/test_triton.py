"""Triton Inference Server with two text models of the python backend, through its adapter and through the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import httpx
import openai
import orjson
import pytest

from kvfleet.adapters.base import ChatMessage, ChatRequest
from kvfleet.adapters.call import Operation, Usage
from kvfleet.adapters.triton import TritonAdapter
from kvfleet.errors import BackendError, Fault
from tests.adapters.told import call, deltas, drained, drained_until_it_fails
from tests.real.engines import Engine
from tests.real.gateways import gateway as gateway_of

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "words": {"dialect": "tensorrt_llm", "message_template": "{role} {content} ", "answer_template": "end"},
    "wordy": {"dialect": "vllm", "message_template": "{role} {content} ", "answer_template": "end"},
}
ECHO = "user a b end "


def speaker_of(engine: Engine, name: str) -> TritonAdapter:
    """An adapter for one of the models."""
    return TritonAdapter(endpoint=engine.url, model_id=name, metrics_url=engine.metrics_url, **OPTIONS[name])


@pytest.fixture(params=["words", "wordy"])
async def speaker(triton: Engine, request: pytest.FixtureRequest) -> AsyncIterator[TritonAdapter]:
    """An adapter for each of the models: one as the TensorRT-LLM backend has them, one as the vLLM backend has them."""
    made = speaker_of(triton, request.param)
    yield made
    await made.aclose()


@pytest.fixture
async def words(triton: Engine) -> AsyncIterator[TritonAdapter]:
    """An adapter for the model that can fail."""
    made = speaker_of(triton, "words")
    yield made
    await made.aclose()


@pytest.fixture(scope="module")
def gateway(triton: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A gateway in front of it."""
    models = [
        {"name": name, "endpoint": triton.url, "provider": "triton", "options": dict(options)}
        for name, options in OPTIONS.items()
    ]
    made = gateway_of(models, tmp_path_factory.mktemp("gateway"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def routed(gateway: Engine) -> openai.OpenAI:
    """The unmodified client of the gateway."""
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def prompt(text: str, **more: Any) -> dict[str, Any]:
    """A text completion's body."""
    return {"prompt": text, **more}


async def test_a_whole_answer(speaker: TritonAdapter) -> None:
    """The template's text goes in, the model's text comes out."""
    found = await speaker.chat(ChatRequest(messages=[ChatMessage(role="user", content="a b")]))
    assert (found.content, found.finish_reason, found.model) == (ECHO, "stop", speaker.model_id)


async def test_a_streamed_answer(speaker: TritonAdapter) -> None:
    """One chunk for each response of the decoupled model."""
    chunks = [chunk async for chunk in speaker.chat_stream(ChatRequest([ChatMessage(role="user", content="a b")]))]
    assert [chunk.content for chunk in chunks if chunk.content] == ["user ", "a ", "b ", "end "]
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]


async def test_a_limit_reaches_the_model(speaker: TritonAdapter) -> None:
    """As an input tensor of the one, within the sampling parameters of the other."""
    reply = await speaker.send(call(prompt("a b c d", max_tokens=3), operation=Operation.COMPLETION))
    assert orjson.loads(reply.body)["choices"][0]["text"] == "a b c "


async def test_a_list_reaches_the_model(words: TritonAdapter) -> None:
    """Stop texts are an input with several elements."""
    reply = await words.send(call(prompt("a b c d", stop=["x", "c"]), operation=Operation.COMPLETION))
    assert orjson.loads(reply.body)["choices"][0]["text"] == "a b "


async def test_a_model_that_counts_is_believed(triton: Engine) -> None:
    """Usage and the finish reason, whole and streamed."""
    wordy = speaker_of(triton, "wordy")
    asked = prompt("a b c d", max_tokens=3, stream_options={"include_usage": True})
    reply = await wordy.send(call(asked, operation=Operation.COMPLETION))
    assert (reply.tally.usage, reply.tally.finish_reason) == (Usage(4, 3, 7), "length")
    reply = await wordy.send(call(asked, operation=Operation.COMPLETION, stream=True))
    found = deltas(await drained(reply))
    await wordy.aclose()
    assert found == ["a ", "b ", "c ", ("", "length"), {"usage": Usage(4, 3, 7).to_openai()}, "[DONE]"]


async def test_a_model_that_fails_at_once(words: TritonAdapter) -> None:
    """The call fails."""
    with pytest.raises(BackendError):
        await words.send(call(prompt("fail"), operation=Operation.COMPLETION))


async def test_a_model_that_fails_amid_its_stream(words: TritonAdapter) -> None:
    """What came is handed on, and then it is an error."""
    reply = await words.send(call(prompt("a b fail"), operation=Operation.COMPLETION, stream=True))
    said, error = await drained_until_it_fails(reply)
    assert deltas(said) == ["a ", "b "]
    assert error is not None
    assert (error.kind, error.received) == (Fault.SERVER_ERROR, True)


async def test_what_it_cannot_do_is_refused(words: TritonAdapter, triton: Engine) -> None:
    """An unknown model by Triton, a parameter of the wrong kind by Triton, tools by the adapter."""
    stranger = TritonAdapter(endpoint=triton.url, model_id="nobody")
    faults = []
    for speaker, body in (
        (stranger, prompt("a")),
        (words, prompt("a", metadata={"a": 1})),
        (words, prompt("a", tools=[{"type": "function", "function": {"name": "f"}}])),
    ):
        with pytest.raises(BackendError) as caught:
            await speaker.send(call(body, operation=Operation.COMPLETION))
        faults.append(caught.value.kind)
    await stranger.aclose()
    assert faults == [Fault.NOT_FOUND, Fault.BAD_REQUEST, Fault.BAD_REQUEST]


async def test_health_models_and_load(words: TritonAdapter, triton: Engine) -> None:
    """Of the server and of the model."""
    stranger = TritonAdapter(endpoint=triton.url, model_id="nobody")
    assert (await words.health_check()).healthy
    assert not (await stranger.health_check()).healthy
    assert set(await words.list_models()) == {"words", "wordy"}
    await words.send(call(prompt("a"), operation=Operation.COMPLETION))
    assert (await words.get_load()).waiting == 0
    assert (await words.get_metrics())["nv_inference_count"] > 0
    await stranger.aclose()


async def test_a_model_that_is_unloaded_is_unhealthy(triton: Engine) -> None:
    """The server is ready, and the model is not; when it is loaded again, it is healthy again."""
    found = []
    async with httpx.AsyncClient(base_url=triton.url, trust_env=False, timeout=30) as client:
        for what in ("unload", "load"):
            assert (await client.post(f"/v2/repository/models/wordy/{what}")).status_code == 200
            speaker = speaker_of(triton, "wordy")
            found.append((await speaker.health_check()).healthy)
            await speaker.aclose()
    assert found == [False, True]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_openai_package_through_the_gateway(routed: openai.OpenAI, name: str) -> None:
    """Triton speaks no OpenAI; the gateway does."""
    found = routed.chat.completions.create(model=name, messages=[{"role": "user", "content": "a b"}])
    assert (found.choices[0].message.content, found.choices[0].finish_reason, found.object) == (
        ECHO,
        "stop",
        "chat.completion",
    )
    chunks = routed.chat.completions.create(model=name, messages=[{"role": "user", "content": "a b"}], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ECHO


def test_tools_find_nobody_who_can(routed: openai.OpenAI) -> None:
    """No model of this fleet takes tools: an honest refusal, and not an answer without them."""
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with pytest.raises(openai.APIStatusError) as caught:
        routed.chat.completions.create(model="words", messages=[{"role": "user", "content": "a"}], tools=[tool])
    assert caught.value.status_code in (400, 503)
