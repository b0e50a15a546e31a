"""Every built-in adapter keeps the kit's contract, and the `openai` package reads what the translated ones give."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import httpx
import openai
import orjson
import pytest

from kvfleet.adapters.base import InferenceAdapter
from kvfleet.adapters.call import Call, Limits, Operation
from kvfleet.adapters.custom_http import CustomHTTPAdapter
from kvfleet.adapters.ollama import OllamaAdapter
from kvfleet.adapters.tgi import TGIAdapter
from kvfleet.adapters.triton import TritonAdapter
from kvfleet.builtin.adapters import kvfleet_components
from kvfleet.plugin.component import Component
from kvfleet.testing.conformance import check_component
from tests.adapters.scripted import Request, Script, Wire, engine, streamed, whole
from tests.adapters.told import USER, lines, sse

SAMPLES = Path(__file__).with_name("samples")
COMPONENTS = {component.name: component for component in kvfleet_components()}
TOOL_CALL = {"function": {"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}}}
HEAD = {"model": "m", "created_at": "2026-11-23T01:55:07Z"}
COUNTS = {"prompt_eval_count": 11, "eval_count": 3}


@pytest.mark.parametrize("component", COMPONENTS.values(), ids=COMPONENTS.keys())
def test_the_conformance_kit_finds_nothing(component: Component) -> None:
    """Options documented and defaulted, round trips through YAML, errors in the one taxonomy, closing twice."""
    check_component(component)


@attrs.define
class Through(httpx.AsyncBaseTransport):
    """Answers the requests of an HTTP client by an adapter, as a gateway would."""

    adapter: InferenceAdapter

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = orjson.loads(await request.aread())
        operation = next(one for one in Operation if request.url.path == one.path)
        is_stream = bool(body.get("stream"))
        call = Call(operation=operation, body=body, stream=is_stream, limits=Limits())
        reply = await self.adapter.send(call)
        if reply.events is None:
            return httpx.Response(200, content=reply.body, headers={"content-type": "application/json"})
        return httpx.Response(200, content=reply.events, headers={"content-type": "text/event-stream"})


@contextlib.asynccontextmanager
async def client(cls: type[InferenceAdapter], script: Script, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """The unmodified client, with an adapter and a scripted engine behind it."""
    async with engine(script) as there:
        adapter = cls(endpoint=there.url, model_id="m", **options)
        http = httpx.AsyncClient(transport=Through(adapter))
        async with openai.AsyncOpenAI(base_url="http://gateway/v1", api_key="k", http_client=http) as made:
            yield made
        await adapter.aclose()


async def ollama(wire: Wire, request: Request) -> None:
    """Thinks, speaks and calls a tool; embeds; completes."""
    is_stream = orjson.loads(request.body).get("stream")
    if request.path == "/api/embed":
        wire.send(whole(orjson.dumps({"model": "m", "embeddings": [[0.5, -1.0]], "prompt_eval_count": 2})))
        return
    if request.path == "/api/generate":
        wire.send(whole(orjson.dumps({**HEAD, "response": " upon", "done": True, "done_reason": "length", **COUNTS})))
        return
    last = {**HEAD, "done": True, "done_reason": "stop", **COUNTS}
    message = {"role": "assistant", "content": "Hi", "thinking": "Hm.", "tool_calls": [TOOL_CALL]}
    if not is_stream:
        wire.send(whole(orjson.dumps({**last, "message": message})))
        return
    pieces = [{"thinking": "Hm."}, {"content": "H"}, {"content": "i"}, {"content": "", "tool_calls": [TOOL_CALL]}]
    said = [{**HEAD, "message": {"role": "assistant", **piece}, "done": False} for piece in pieces]
    wire.send(streamed(*lines(*said, {**last, "message": {"role": "assistant", "content": ""}})))


async def test_ollama_whole() -> None:
    """Text, thoughts, a tool call and usage, typed."""
    async with client(OllamaAdapter, ollama) as sdk:
        found = await sdk.chat.completions.create(model="m", messages=[USER])  # type: ignore[list-item]
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == ("Hi", "tool_calls")
    assert choice.message.model_dump()["reasoning_content"] == "Hm."
    assert choice.message.tool_calls is not None
    function = choice.message.tool_calls[0].model_dump()["function"]
    assert function == {"name": "get_weather", "arguments": '{"city":"Paris"}'}
    assert found.usage is not None
    assert found.usage.total_tokens == 14


async def test_ollama_streamed() -> None:
    """The package's own stream helper puts the pieces together again."""
    async with (
        client(OllamaAdapter, ollama) as sdk,
        sdk.chat.completions.stream(  # type: ignore[call-overload]
            model="m", messages=[USER], stream_options={"include_usage": True}
        ) as stream,
    ):
        found = await stream.get_final_completion()
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == ("Hi", "tool_calls")
    assert choice.message.tool_calls[0].function.arguments == '{"city":"Paris"}'
    assert found.usage.completion_tokens == 3


async def test_ollama_embeddings_and_completions() -> None:
    """The package asks for base64 and unpacks it."""
    async with client(OllamaAdapter, ollama) as sdk:
        vectors = await sdk.embeddings.create(model="m", input="a")
        text = await sdk.completions.create(model="m", prompt="Once")
    assert vectors.data[0].embedding == [0.5, -1.0]
    assert (text.choices[0].text, text.choices[0].finish_reason) == (" upon", "length")


def token(text: str, **last: Any) -> dict[str, Any]:
    """One event of TGI's native route."""
    one = {"id": 1, "text": text, "logprob": -0.1, "special": False}
    return {"index": 1, "token": one, "generated_text": None, "details": None, **last}


async def tgi(wire: Wire, _: Request) -> None:
    """Streams two tokens by the native route."""
    details = {"finish_reason": "length", "generated_tokens": 2, "seed": None, "input_length": 3}
    wire.send(streamed(*sse(token("H"), token("i", generated_text="Hi", details=details))))


async def triton(wire: Wire, _: Request) -> None:
    """Plays the recorded stream."""
    wire.send(streamed((SAMPLES / "triton_vllm_stream.sse").read_bytes()))


async def custom(wire: Wire, _: Request) -> None:
    """Answers whole."""
    wire.send(whole(b'{"output":"Hi","in":3,"out":2}'))


STREAMS: dict[str, tuple[type[InferenceAdapter], Script, dict[str, Any], str, int]] = {
    "tgi": (TGIAdapter, tgi, {"chat_route": "generate"}, "Hi", 5),
    "triton": (TritonAdapter, triton, {"dialect": "vllm"}, "a b c ", 7),
    "custom": (
        CustomHTTPAdapter,
        custom,
        {"response_content_key": "output", "prompt_tokens_key": "in", "completion_tokens_key": "out"},
        "Hi",
        5,
    ),
}


@pytest.mark.parametrize("name", STREAMS)
async def test_streams_of_the_others(name: str) -> None:
    """Text and usage arrive."""
    cls, script, options, text, tokens = STREAMS[name]
    async with client(cls, script, **options) as sdk:
        stream: Any = await sdk.chat.completions.create(  # type: ignore[call-overload]
            model="m", messages=[USER], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.total_tokens == tokens
