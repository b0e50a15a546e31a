"""OpenAI's own Python client, unmodified, against a gateway on a real socket with the real router."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import anyio.to_thread
import attrs
import openai
import pytest

from kvfleet.adapters.call import Call
from kvfleet.config.schema import (
    AliasConfig,
    FleetConfig,
    GatewayConfig,
    ModelCapabilities,
    ModelConfig,
    PolicyConfig,
    PolicyRule,
    TelemetryConfig,
    TraceStoreConfig,
)
from kvfleet.errors import Fault
from kvfleet.gateway.server import Serving, running
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply

KEY = "sk-gateway-canary"
ASK: Any = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}]}


def model(name: str, kind: str = "chat", *, endpoint: str = "", **more: Any) -> ModelConfig:
    """A model on one replica."""
    return ModelConfig(
        name=name,
        endpoint=endpoint or f"http://{name}.internal:8000",
        provider="openai_compat",
        capabilities=ModelCapabilities(model_type=kind),
        **more,
    )


LLAMA = model("llama", quality_score=0.9)
FLEET = FleetConfig(
    models=(LLAMA, model("embed", "embedding"), model("rank", "rerank")),
    aliases={"smart": AliasConfig(strategy="quality_first")},
    gateway=GatewayConfig(api_key=KEY),
    telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
)


@attrs.frozen
class Stage:
    """A gateway, what answers behind it, and a client."""

    serving: Serving
    adapters: Mapping[str, FakeAdapter]
    client: openai.AsyncOpenAI

    @property
    def llama(self) -> FakeAdapter:
        """The adapter of the chat model."""
        return self.adapters[LLAMA.id]


@contextlib.asynccontextmanager
async def staged(
    config: FleetConfig = FLEET,
    scripts: Mapping[str, FakeReply | Callable[[Call], FakeReply]] | None = None,
    **client: Any,
) -> AsyncIterator[Stage]:
    """Serve a fleet whose adapters follow scripts, by model name."""
    scripts = scripts or {}
    adapters = {
        one.id: FakeAdapter(endpoint=one.endpoint, model_id=one.name, script=scripts.get(one.name, FakeReply()))
        for one in config.models
    }
    router = Router(config, adapters=adapters, polls=False, seed=1)
    async with (
        running(config, router=router) as serving,
        openai.AsyncOpenAI(base_url=f"{serving.url}/v1", api_key=KEY, **client) as sdk,
    ):
        yield Stage(serving, adapters, sdk)


class TestAnswers:
    async def test_chat(self) -> None:
        """A whole answer, as the client's own type, and who gave it in the headers."""
        async with staged() as stage:
            raw = await stage.client.chat.completions.with_raw_response.create(**ASK)
        answer = raw.parse()
        assert answer.choices[0].message.content == "This is a fake answer."
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert raw.headers["x-kvfleet-model"] == "llama"
        assert raw.headers["x-kvfleet-replica"] == "llama#1"
        assert raw.headers["x-kvfleet-strategy"] == "hybrid_score"
        assert len(raw.headers["x-kvfleet-trace"]) == 32
        assert raw.headers["server-timing"].startswith("route;dur=")
        assert answer._request_id == raw.headers["x-request-id"]

    async def test_chat_streamed(self) -> None:
        """Chunks, and no usage unless it was asked for."""
        async with staged() as stage:
            stream = await stage.client.chat.completions.create(**ASK, stream=True)
            chunks = [chunk async for chunk in stream]
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == "This is a fake answer."
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert all(chunk.usage is None for chunk in chunks)

    async def test_chat_streamed_with_usage(self) -> None:
        """With `include_usage` the last chunk has the usage and no choice."""
        async with staged() as stage:
            stream = await stage.client.chat.completions.create(
                **ASK, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens > 0

    async def test_completions(self) -> None:
        """The older endpoint, whole and streamed."""
        async with staged() as stage:
            whole = await stage.client.completions.create(model="llama", prompt="Once upon a time")
            stream = await stage.client.completions.create(model="llama", prompt="Once upon a time", stream=True)
            said = "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])
        assert whole.choices[0].text == said == "This is a fake answer."

    async def test_embeddings(self) -> None:
        """One vector for each input, from the model that embeds."""
        async with staged() as stage:
            raw = await stage.client.embeddings.with_raw_response.create(
                model="auto", input=["a", "b"], encoding_format="float"
            )
        assert [len(one.embedding) for one in raw.parse().data] == [8, 8]
        assert raw.headers["x-kvfleet-model"] == "embed"

    async def test_rerank(self) -> None:
        """OpenAI has no rerank; the client's generic call reaches it."""
        async with staged() as stage:
            found: Any = await stage.client.post(
                "/rerank", body={"model": "rank", "query": "a", "documents": ["b", "c"]}, cast_to=object
            )
        assert {one["index"] for one in found["results"]} == {0, 1}

    async def test_models(self) -> None:
        """The list and one entry, as the client's own types."""
        async with staged() as stage:
            names = [one.id async for one in stage.client.models.list()]
            one = await stage.client.models.retrieve("llama")
        assert names == ["auto", "smart", "llama", "embed", "rank"]
        assert (one.id, one.owned_by) == ("llama", "kvfleet")

    async def test_the_synchronous_client(self) -> None:
        """The blocking client works the same, streamed too."""
        async with staged() as stage:

            def talk() -> tuple[str | None, str]:
                with openai.OpenAI(base_url=f"{stage.serving.url}/v1", api_key=KEY) as sdk:
                    whole = sdk.chat.completions.create(**ASK)
                    stream = sdk.chat.completions.create(**ASK, stream=True)
                    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
                return whole.choices[0].message.content, said

            assert await anyio.to_thread.run_sync(talk) == ("This is a fake answer.", "This is a fake answer.")

    async def test_unknown_fields_reach_the_backend(self) -> None:
        """Tools, content parts and fields nobody knows arrive as they were sent."""
        parts = [{"type": "text", "text": "Hi"}, {"type": "mystery", "x": 1}]
        body = {"messages": [{"role": "user", "content": parts, "odd": True}], "unknown": {"deep": [None]}}
        async with staged() as stage:
            await stage.client.post("/chat/completions", body=body, cast_to=object)
            call = stage.llama.calls[0]
        assert {key: call.body[key] for key in body} == body

    async def test_an_alias_and_a_strategy_header(self) -> None:
        """An alias brings its strategy; the header wins over it; an unknown strategy lists those there are."""
        async with staged() as stage:
            create = stage.client.chat.completions.with_raw_response.create
            by_alias = await create(**{**ASK, "model": "smart"})
            by_header = await create(**ASK, extra_headers={"X-KVFleet-Strategy": "cost_first"})
            with pytest.raises(openai.BadRequestError, match=r"unknown strategy 'best'; known: .*cost_first"):
                await create(**ASK, extra_headers={"X-KVFleet-Strategy": "best"})
        assert by_alias.headers["x-kvfleet-strategy"] == "quality_first"
        assert by_header.headers["x-kvfleet-strategy"] == "cost_first"

    async def test_a_dry_run_agrees_with_the_live_decision(self) -> None:
        """`/v1/route/explain` names the model and strategy that the same request then gets, and calls nobody."""
        async with staged() as stage:
            explained: Any = await stage.client.post("/route/explain", body=ASK, cast_to=object)
            assert stage.llama.calls == []
            raw = await stage.client.chat.completions.with_raw_response.create(**ASK)
        assert explained["selected_model"] == raw.headers["x-kvfleet-model"]
        assert explained["strategy"] == raw.headers["x-kvfleet-strategy"]
        assert "internal:8000" not in str(explained)


class TestErrors:
    @pytest.mark.parametrize(
        ("body", "error", "code"),
        [
            ({"messages": []}, openai.BadRequestError, "invalid_request"),
            ({**ASK, "model": "nobody"}, openai.NotFoundError, "model_not_found"),
        ],
    )
    async def test_a_wrong_request(self, body: Any, error: type[openai.APIStatusError], code: str) -> None:
        """Each refusal is the client's own exception, with its code and identifier."""
        async with staged() as stage:
            with pytest.raises(error) as caught:
                await stage.client.chat.completions.create(**{"model": "auto", **body})
        assert caught.value.code == code
        assert caught.value.request_id

    async def test_a_wrong_key(self) -> None:
        """401 is an AuthenticationError."""
        async with staged() as stage:
            with pytest.raises(openai.AuthenticationError) as caught:
                await stage.client.with_options(api_key="sk-wrong").chat.completions.create(**ASK)
        assert caught.value.code == "invalid_api_key"

    async def test_a_request_the_policy_excludes(self) -> None:
        """403 is a PermissionDeniedError that says which rule dropped whom."""
        rule = PolicyRule(name="stay", condition="data_class == confidential", action="require_private")
        config = attrs.evolve(FLEET, policy=PolicyConfig(enabled=True, rules=(rule,)))
        async with staged(config) as stage:
            with pytest.raises(openai.PermissionDeniedError) as caught:
                await stage.client.chat.completions.create(
                    **ASK, extra_headers={"X-KVFleet-Data-Class": "confidential"}
                )
        assert caught.value.code == "policy_excluded_all"
        body: Any = caught.value.body
        assert body["kvfleet"]["excluded"]["llama"]["by"] == "filter.policy"
        assert body["kvfleet"]["excluded"]["llama"]["rule"] == "stay"

    async def test_a_condition_may_read_a_header(self) -> None:
        """A rule that speaks of a request header sees it, whatever its case."""
        rule = PolicyRule(name="tests", condition="headers.x-purpose == test", action="require_private")
        config = attrs.evolve(FLEET, policy=PolicyConfig(enabled=True, rules=(rule,)))
        async with staged(config) as stage:
            create = stage.client.chat.completions.create
            await create(**ASK, extra_headers={"X-Purpose": "work"})
            with pytest.raises(openai.PermissionDeniedError):
                await create(**ASK, extra_headers={"X-Purpose": "test"})

    async def test_a_backends_verdict_is_not_retried_and_comes_back(self) -> None:
        """A 400 of the backend is the client's BadRequestError after one attempt."""
        async with staged(scripts={"llama": FakeReply(fail=Fault.BAD_REQUEST)}) as stage:
            with pytest.raises(openai.BadRequestError, match="injected fault: bad_request"):
                await stage.client.chat.completions.create(**ASK)
            assert len(stage.llama.calls) == 1

    async def test_a_failed_request_is_not_multiplied_by_the_client(self) -> None:
        """The gateway has tried twice; `x-should-retry: false` keeps the client from having it do so two more times."""
        async with staged(scripts={"llama": FakeReply(fail=Fault.SERVER_ERROR)}, max_retries=2) as stage:
            with pytest.raises(openai.InternalServerError) as caught:
                await stage.client.chat.completions.create(**ASK)
            assert len(stage.llama.calls) == 2
        assert caught.value.response.headers["x-should-retry"] == "false"

    async def test_an_adapter_that_breaks_is_a_failed_attempt(self) -> None:
        """An adapter's defect is a 502 that says nothing of it, and its request is not in flight for ever."""

        def broken(call: Call) -> FakeReply:
            raise KeyError("canary")

        async with staged(scripts={"llama": broken}) as stage:
            with pytest.raises(openai.InternalServerError, match="the adapter failed: KeyError") as caught:
                await stage.client.chat.completions.create(**ASK)
            assert stage.serving.router.services.load.in_flight(LLAMA.id) == 0
        assert caught.value.status_code == 502
        assert "canary" not in caught.value.response.text

    async def test_a_busy_backend_says_when_to_come_back(self) -> None:
        """429 is a RateLimitError with a Retry-After, which the client obeys when it may retry."""
        async with staged(scripts={"llama": FakeReply(fail=Fault.RATE_LIMITED)}, max_retries=0) as stage:
            with pytest.raises(openai.RateLimitError) as caught:
                await stage.client.chat.completions.create(**ASK)
        assert caught.value.response.headers["retry-after"] == "1"

    async def test_a_stream_that_dies(self) -> None:
        """What came is there, then an APIError; never a clean end."""
        reply = FakeReply(text="one two three four", fail=Fault.DISCONNECTED, fail_after=2)
        said = ""
        async with staged(scripts={"llama": reply}) as stage:
            stream = await stage.client.chat.completions.create(**ASK, stream=True)
            with pytest.raises(openai.APIError, match="the answer broke off") as caught:  # noqa: PT012 - how far it came
                async for chunk in stream:
                    said += chunk.choices[0].delta.content or ""
        assert caught.value.code == "stream_interrupted"
        assert "one two three four".startswith(said)
        assert said


class TestLeaving:
    async def test_leaving_a_stream_stops_the_engine(self) -> None:
        """The client closes amid the stream, and the adapter's call is closed long before the answer's end."""
        async with staged(scripts={"llama": FakeReply(text="word " * 100_000)}) as stage:
            stream = await stage.client.chat.completions.create(**ASK, stream=True)
            await anext(aiter(stream))
            await stream.close()
            async with asyncio.timeout(20):
                while not stage.llama.cancelled:  # noqa: ASYNC110 - the fake has no event
                    await asyncio.sleep(0.001)
        assert stage.llama.cancelled == 1


async def test_a_hundred_streams_at_once() -> None:
    """Each of a hundred concurrent streams gets its own answer, whole."""

    def echo(call: Call) -> FakeReply:
        return FakeReply(text=call.body["messages"][0]["content"])

    async with staged(scripts={"llama": echo}) as stage:

        async def talk(number: int) -> str:
            content = f"this is number {number} " * 20
            stream = await stage.client.chat.completions.create(
                model="auto", messages=[{"role": "user", "content": content}], stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices]) if content else ""

        said = await asyncio.gather(*(talk(number) for number in range(100)))
    assert said == [f"this is number {number} " * 20 for number in range(100)]
