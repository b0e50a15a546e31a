"""Anthropic behind a running gateway: an OpenAI client's request over HTTP, and the trace of it."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import orjson

from kvfleet.config.schema import FallbackConfig, FleetConfig, ModelConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Span, Trace
from tests.adapters.scripted import Request, Wire, engine, streamed, whole
from tests.adapters.test_anthropic import MESSAGE, WHOLE_STREAM, sse, start

QUESTION = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is the weather?"}]


class Kept:
    """A sink that keeps traces."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)


def attempts(trace: Trace) -> list[Span]:
    """The trace's calls of backends, in their order."""
    return [span for span in trace.spans if names.GEN_AI_REQUEST_MODEL in span.attributes]


def fleet(*urls: str) -> FleetConfig:
    """One replica of a Claude model for each address, asked in this order."""
    models = tuple(
        ModelConfig(name=f"claude-{place}", provider="anthropic", endpoint=url, api_key="key-1", max_retries=0)
        for place, url in enumerate(urls)
    )
    telemetry = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False))
    fallback = FallbackConfig(max_attempts=2)
    return FleetConfig(models=models, strategy="static", fallback=fallback, telemetry=telemetry)


async def healthy(wire: Wire, request: Request) -> None:
    """Answers whole or as a stream."""
    is_stream = orjson.loads(request.body).get("stream")
    wire.send(streamed(*sse(*WHOLE_STREAM)) if is_stream else whole(orjson.dumps(MESSAGE)))


async def overloaded(wire: Wire, request: Request) -> None:
    """Begins a stream, and only then says that it is overloaded."""
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    wire.send(streamed(*sse(start(input_tokens=5), error)))


async def test_an_openai_client_is_answered_by_anthropic(tmp_path: Path) -> None:
    """The `openai` package reads whole answers and streams; the trace has the tokens read from and written to caches."""
    sink = Kept()
    async with engine(healthy) as there:
        config = fleet(there.url)
        router = Router(config, sinks=[sink], polls=False, state_dir=tmp_path)
        async with (
            running(config, router=router) as serving,
            openai.AsyncOpenAI(base_url=f"{serving.url}/v1", api_key="none") as sdk,
        ):
            found = await sdk.chat.completions.create(model="auto", messages=QUESTION)  # type: ignore[arg-type]
            stream = await sdk.chat.completions.create(  # type: ignore[call-overload]
                model="auto", messages=QUESTION, stream=True, stream_options={"include_usage": True}
            )
            pieces = [piece async for piece in stream]
            await router.settled()
    assert found.choices[0].message.content == "Let me see."
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == "Let me see."
    assert pieces[-1].usage.prompt_tokens_details.cached_tokens == 100
    asked = orjson.loads(there.requests[0].body)
    assert (asked["model"], asked["system"], asked["messages"]) == ("claude-0", "Be kind.", QUESTION[1:])
    for trace in sink.traces:
        (attempt,) = attempts(trace)
        assert attempt.attributes[names.GEN_AI_INPUT_TOKENS] == 125
        assert attempt.attributes[names.GEN_AI_CACHED_TOKENS] == 100
        assert attempt.attributes[names.GEN_AI_CACHE_WRITTEN_TOKENS] == 20
        assert attempt.attributes[names.GEN_AI_RESPONSE_ID] == "msg_1"
        assert "key-1" not in repr(trace)


async def test_an_overload_said_in_the_stream_moves_the_request_on(tmp_path: Path) -> None:
    """It comes under a 200, after the message has begun; the client never sees it, the trace does."""
    sink = Kept()
    async with engine(overloaded) as first, engine(healthy) as second:
        config = fleet(first.url, second.url)
        router = Router(config, sinks=[sink], polls=False, state_dir=tmp_path)
        async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            body = {"model": "auto", "messages": QUESTION, "stream": True}
            answer = await client.post("/v1/chat/completions", json=body)
            await router.settled()
    assert answer.status_code == 200
    assert answer.text.rstrip().endswith("data: [DONE]")
    (trace,) = sink.traces
    explanation = Explanation(trace)
    assert explanation.served_by == "claude-1"
    assert [attempt.attributes.get(names.ERROR_TYPE) for attempt in attempts(trace)] == ["overloaded", None]
