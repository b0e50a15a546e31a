"""A stream that breaks is gone on with by another replica, where that is safe; and it is always said."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import attrs
import httpx
import openai
import pytest

from kvfleet.config.schema import (
    FallbackConfig,
    FleetConfig,
    ModelCapabilities,
    ModelConfig,
    TelemetryConfig,
    TraceStoreConfig,
)
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Trace
from tests.faults.catalogue import cut_at_random, stalls
from tests.faults.site import LAST_CHUNK, SSE_HEAD, Ask, Behaviour, LeaveError, Site, chunk, site
from tests.faults.tongues import MODEL, TEXT, TOKENS, delta, event

MESSAGES: Any = [{"role": "user", "content": "Say it."}]


@attrs.define
class Stage:
    """A gateway before two engines, the first asked of which misbehaves."""

    url: str
    engines: Site
    router: Router
    traces: list[Trace] = attrs.field(factory=list)

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)

    def sdk(self) -> openai.AsyncOpenAI:
        """OpenAI's client, unmodified, that does not try again by itself."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="x", max_retries=0)

    async def ask(self, **more: Any) -> str:
        """The bytes of one streamed answer."""
        body = {"messages": MESSAGES, "stream": True, **more}
        async with httpx.AsyncClient(timeout=5) as client:
            return (await client.post(f"{self.url}/v1/chat/completions", json=body)).text


@contextlib.asynccontextmanager
async def staged(
    behaviour: Behaviour, *, engines: int = 2, provider: str = "vllm", **fallback: Any
) -> AsyncIterator[Stage]:
    """A gateway with the option on."""
    async with site(engines) as one:
        await one.befall(behaviour)
        first, *others = [engine.url for engine in one.engines]
        model = ModelConfig(
            name=MODEL,
            endpoint=first,
            replicas=tuple(others),
            provider=provider,
            idle_timeout_seconds=0.2,
            capabilities=ModelCapabilities(supports_tools=True, supports_json_mode=True),
        )
        config = FleetConfig(
            models=(model,),
            fallback=FallbackConfig(**{"continue_streams": True, **fallback}),
            telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False), capture_content=True),
        )
        router = Router(config, polls=False)
        async with running(config, router=router) as serving:
            stage = Stage(serving.url, one, router)
            router.add_sink(stage)
            yield stage


def text_of(said: str) -> str:
    """What a stream came to; its last event must be the end."""
    assert said.endswith("data: [DONE]\n\n")
    chunks = [json.loads(line[5:]) for line in said.splitlines() if line.startswith("data: {")]
    assert not any("error" in one for one in chunks)
    assert sum("role" in one["choices"][0]["delta"] for one in chunks if one["choices"]) == 1
    assert len({one["id"] for one in chunks}) == 1
    return "".join(one["choices"][0]["delta"].get("content") or "" for one in chunks if one["choices"])


async def test_the_rest_comes_from_another_replica_and_that_is_said() -> None:
    """One text under one identifier; a comment in the stream, the trace and a metric tell."""
    async with staged(stalls) as stage:
        said = await stage.ask()
        assert text_of(said) == TEXT
        assert ": kvfleet: gone on with by another replica, attempt 2, after idle_timeout\n\n" in said
        explanation = Explanation(stage.traces[0])
        first, second = explanation.attempts
        assert (first.fault, second.reason, second.fault) == ("idle_timeout", "continuation", "")
        assert first.replica != second.replica
        route = stage.traces[0].route.attributes
        assert (route[names.CONTINUED], route[names.OUTCOME], route[names.ATTEMPT_SERVED]) == (1, "answered", 2)
        assert route[names.REPLICA_SERVED] == second.replica
        assert len(stage.traces) == 1
        kept = str(route[names.ANSWER])
        assert text_of(kept) == TEXT
        assert "kvfleet:" not in kept
        async with httpx.AsyncClient() as client:
            metrics = (await client.get(f"{stage.url}/metrics")).text
        assert f'kvfleet_stream_breaks_total{{model="{MODEL}",then="continued"}} 1.0' in metrics
        assert all(stage.router.services.load.in_flight(model.id) == 0 for model in stage.router.models)


async def test_openais_client_sees_one_stream() -> None:
    """It skips the comment, and gets the whole text."""
    async with staged(cut_at_random(5)) as stage, stage.sdk() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        said, finish = "", None
        async for one in stream:
            said += one.choices[0].delta.content or ""
            finish = one.choices[0].finish_reason or finish
    assert (said, finish) == (TEXT, "stop")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}, "response_format"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "Well, "}]}, "messages"),
    ],
)
async def test_where_it_is_not_safe_the_stream_ends_in_an_error(more: Any, why: str) -> None:
    """The client's library raises it; nobody else is asked, and the error says why."""
    async with staged(stalls) as stage:
        said = await stage.ask(**more)
    assert f"nobody went on with it (unsafe: {why})" in said
    assert "[DONE]" not in said
    assert stage.engines.chats == 1


async def test_openais_client_raises_what_ends_a_stream() -> None:
    """With nobody to go on, it is an `APIError` after what was said."""
    async with staged(stalls, engines=1) as stage, stage.sdk() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        said = ""
        with pytest.raises(openai.APIError, match="nobody_left") as caught:  # noqa: PT012 - how far it came
            async for one in stream:
                said += one.choices[0].delta.content or ""
        assert stage.traces[0].route.attributes[names.OUTCOME] == "failed"
    assert caught.value.code == "stream_interrupted"
    assert said == "".join(TOKENS[:4])


async def test_more_than_text_is_not_gone_on_with() -> None:
    """A model that thinks aloud cannot be made to think the same again."""

    async def thinks(ask: Ask) -> None:
        thought = delta("")
        thought["choices"][0]["delta"] = {"reasoning_content": "hm"}
        await ask.say(SSE_HEAD, chunk(event(delta())), chunk(event(thought)))
        raise LeaveError

    async with staged(thinks) as stage:
        said = await stage.ask()
        assert "unsafe: the answer is more than a text" in said
        assert stage.engines.chats == 1


async def test_before_a_word_was_said_anybody_may_begin_anew() -> None:
    """Also where going on would not be safe, or the engine could not: the client has seen nothing but a role."""

    async def begins(ask: Ask) -> None:
        await ask.say(SSE_HEAD, chunk(event(delta())), chunk(b": hm\n\n"))
        raise LeaveError

    async with staged(begins, provider="openai_compat") as stage:
        assert text_of(await stage.ask(logprobs=True)) == TEXT


async def test_an_engine_that_cannot_is_not_asked() -> None:
    """Nobody knows whether any OpenAI-compatible engine would go on with a text or answer it."""
    async with staged(stalls, provider="openai_compat") as stage:
        assert "(nobody_left)" in await stage.ask()
        assert stage.engines.chats == 1


async def test_it_is_paid_from_the_retry_budget() -> None:
    """With nothing left there, the stream ends in an error."""
    async with staged(stalls, retry_ratio=0.0, min_retries_per_second=0.0) as stage:
        assert "(model_budget)" in await stage.ask()
        assert stage.engines.chats == 1


@pytest.mark.parametrize("can_count", [True, False])
async def test_limits_and_usage_are_those_of_one_answer(can_count: bool) -> None:
    """What was said counts for `max_tokens`, and is no part of the prompt that the client is told of.

    A busy engine puts several tokens into one event, so who goes on is asked how many there are; if it can be.
    """
    asked: list[dict[str, Any]] = []

    async def counts(ask: Ask) -> None:
        asked.append(ask.body)
        if len(asked) == 1:
            pieces = ["".join(TOKENS[:3]), TOKENS[3]] if can_count else TOKENS[:4]
            await ask.say(SSE_HEAD, chunk(event(delta())), *(chunk(event(delta(one))) for one in pieces))
            raise LeaveError
        rest = delta("".join(TOKENS[4:]))
        usage = {"choices": [], "usage": {"prompt_tokens": 24, "completion_tokens": 6, "total_tokens": 30}}
        last = [rest, delta(finish="stop"), {"id": "c-1", **usage}]
        await ask.say(SSE_HEAD, *[chunk(event(one)) for one in last], chunk(event("[DONE]")), LAST_CHUNK)

    async with staged(counts) as stage:
        stage.engines.is_everybody = True
        if can_count:
            stage.engines.tokenizes = lambda text: list(range(len(text) // 6))
        said = await stage.ask(max_tokens=50, stream_options={"include_usage": True})
    assert text_of(said) == TEXT
    usage = json.loads([line for line in said.splitlines() if '"usage":{' in line][-1][5:])["usage"]
    assert usage == {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30}
    assert [one["max_tokens"] for one in asked] == [50, 46]
    assert asked[1]["messages"][-1] == {"role": "assistant", "content": "".join(TOKENS[:4])}


async def test_a_client_that_leaves_closes_the_books_once() -> None:
    """Amid what another replica writes, too."""
    async with staged(stalls) as stage, httpx.AsyncClient() as client:
        body = {"messages": MESSAGES, "stream": True}
        async with client.stream("POST", f"{stage.url}/v1/chat/completions", json=body) as answer:
            stage.engines.is_everybody = True
            said = b""
            async for piece in answer.aiter_raw():
                said += piece
                if b"gone on with" in said:
                    break
        async with asyncio.timeout(2):
            while not stage.traces:  # noqa: ASYNC110 - nobody announces it
                await asyncio.sleep(0.01)
        assert [trace.route.attributes[names.OUTCOME] for trace in stage.traces] == ["cancelled"]
        assert all(stage.router.services.load.in_flight(model.id) == 0 for model in stage.router.models)
