"""What must hold for every engine that speaks OpenAI's API: through its adapter, and through the gateway in front of it.

The tiny model says what `make_model.py` wrote into it, so whole answers are compared. A test module of an engine takes
over these classes and gives the fixtures `engine`, `adapter` and `gateway`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import attrs
import openai
import orjson
import pytest

from kvfleet.adapters.base import ChatMessage, ChatRequest
from kvfleet.adapters.call import Call, Limits, Operation, Usage
from kvfleet.adapters.openai_compat import OpenAICompatAdapter
from kvfleet.errors import BackendError, Fault
from tests.real.engines import Engine

HELLO = "Hello from a tiny model."
COUNTING = " one two three four five six seven eight nine ten"
ASK: list[Any] = [{"role": "user", "content": "Say something."}]
ASK_COUNT: list[Any] = [{"role": "user", "content": "Please count for me."}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather somewhere.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        },
    },
}
TOOL_TURN: list[Any] = [
    *ASK,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]
LIMITS = Limits(connect_s=5, first_byte_s=60, idle_s=60)
# What differs from one answer to the next by its nature.
VOLATILE = frozenset({"id", "created", "system_fingerprint", "timings"})


def chat(messages: Sequence[Any] = ASK, **more: Any) -> Call:
    """A chat call; the answers of greedy decoding are the same each time."""
    body = {"model": "tiny", "messages": list(messages), "temperature": 0, "max_tokens": 64, **more}
    return Call(
        operation=Operation.CHAT, body=body, raw=orjson.dumps(body), stream=bool(more.get("stream")), limits=LIMITS
    )


def completion(**body: Any) -> Call:
    """A text completion."""
    asked = {"model": "tiny", "temperature": 0, **body}
    return Call(operation=Operation.COMPLETION, body=asked, raw=orjson.dumps(asked), limits=LIMITS)


async def whole(adapter: OpenAICompatAdapter, call: Call) -> dict[str, Any]:
    """A whole answer."""
    answer: dict[str, Any] = orjson.loads((await adapter.send(call)).body)
    return answer


def without_volatile(data: Any) -> Any:
    """The data without what differs from one answer to the next, for comparing all the rest."""
    if isinstance(data, dict):
        kept = {key: without_volatile(value) for key, value in data.items() if key not in VOLATILE}
        if "tool_calls" in kept:  # the ids of calls are made up each time
            kept["tool_calls"] = kept["tool_calls"] and [
                {key: value for key, value in call.items() if key != "id"} for call in kept["tool_calls"]
            ]
        return kept
    return [without_volatile(item) for item in data] if isinstance(data, list) else data


async def eventually(found: Callable[[], Awaitable[bool]]) -> bool:
    """Whether it becomes true within some seconds; an engine tells its load only when asked."""
    for _ in range(60):
        if await found():
            return True
        await asyncio.sleep(0.25)
    return False


class AdapterContract:
    """The adapter against the engine itself."""

    async def test_a_whole_answer(self, adapter: OpenAICompatAdapter) -> None:
        """Text, finish reason, usage and model, as a Python program gets them."""
        found = await adapter.chat(ChatRequest(messages=[ChatMessage(role="user", content="Hi")], temperature=0.0))
        assert (found.content, found.finish_reason, found.model) == (HELLO, "stop", "tiny")
        assert found.usage is not None
        assert found.usage.completion_tokens == 7
        assert found.usage.total_tokens == found.usage.prompt_tokens + 7

    async def test_a_streamed_answer(self, adapter: OpenAICompatAdapter) -> None:
        """Piece by piece, with usage at the end, and a tally that knows it all."""
        reply = await adapter.send(chat(stream=True, stream_options={"include_usage": True}))
        assert reply.events is not None
        said = b"".join([piece async for piece in reply.events])
        events = [orjson.loads(line[6:]) for line in said.splitlines() if line.startswith(b"data: {")]
        choices = [event["choices"][0] for event in events if event["choices"]]
        assert "".join(choice["delta"].get("content") or "" for choice in choices) == HELLO
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
        assert len(choices) > 5
        assert Usage.from_openai(events[-1]["usage"]) == reply.tally.usage
        assert said.endswith(b"data: [DONE]\n\n")
        assert (reply.tally.finish_reason, reply.tally.is_complete) == ("stop", True)

    async def test_usage_that_only_the_router_wants(self, adapter: OpenAICompatAdapter) -> None:
        """It is counted, and the client does not see it."""
        reply = await adapter.send(attrs.evolve(chat(stream=True), ask_usage=True))
        assert reply.events is not None
        said = b"".join([piece async for piece in reply.events])
        assert reply.tally.usage is not None
        assert reply.tally.usage.completion_tokens == 7
        assert b'"choices":[]' not in said

    async def test_a_tool_is_called(self, adapter: OpenAICompatAdapter) -> None:
        """And after its result the model speaks."""
        answer = await whole(adapter, chat(tools=[TOOL]))
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert orjson.loads(call["function"]["arguments"]) == {"city": "Paris"}
        told = await whole(adapter, chat(TOOL_TURN, tools=[TOOL]))
        assert told["choices"][0]["message"]["content"] == HELLO

    async def test_a_streamed_tool_call(self, adapter: OpenAICompatAdapter) -> None:
        """Its arguments come in pieces that make up the object."""
        reply = await adapter.send(chat(tools=[TOOL], stream=True))
        assert reply.events is not None
        said = b"".join([piece async for piece in reply.events])
        events = [orjson.loads(line[6:]) for line in said.splitlines() if line.startswith(b"data: {")]
        deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
        calls = [call["function"] for delta in deltas for call in delta.get("tool_calls") or ()]
        assert "".join(call.get("name") or "" for call in calls) == "get_weather"
        assert orjson.loads("".join(call.get("arguments") or "" for call in calls)) == {"city": "Paris"}
        assert reply.tally.finish_reason == "tool_calls"

    @pytest.mark.parametrize("wanted", [{"type": "json_object"}, SCHEMA], ids=["object", "schema"])
    async def test_json_mode(self, adapter: OpenAICompatAdapter, wanted: Any) -> None:
        """The grammar holds the model to JSON."""
        answer = await whole(adapter, chat(response_format=wanted))
        assert orjson.loads(answer["choices"][0]["message"]["content"]) == {"ok": True}

    async def test_a_text_completion(self, adapter: OpenAICompatAdapter) -> None:
        """No template: the model counts, until its limit."""
        answer = await whole(adapter, completion(prompt="zero", max_tokens=10))
        assert answer["choices"][0]["text"] == COUNTING
        assert answer["choices"][0]["finish_reason"] == "length"

    async def test_parameters_reach_the_engine(self, adapter: OpenAICompatAdapter) -> None:
        """A limit, a stop text, log probabilities."""
        answer = await whole(adapter, chat(ASK_COUNT, stop=[" four"], logprobs=True, top_logprobs=2))
        choice = answer["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (" one two three", "stop")
        assert [entry["token"] for entry in choice["logprobs"]["content"][:3]] == [" one", " two", " three"]
        limited = await whole(adapter, chat(ASK_COUNT, max_tokens=3))
        assert limited["choices"][0]["finish_reason"] == "length"
        assert limited["usage"]["completion_tokens"] == 3

    async def test_cached_tokens_are_reported(self, adapter: OpenAICompatAdapter) -> None:
        """The second of two conversations that begin alike is mostly cached."""
        long = {"role": "system", "content": "What is the weather in Paris? " * 40}
        await whole(adapter, chat([long, *ASK]))
        answer = await whole(adapter, chat([long, *ASK_COUNT], max_tokens=4))
        usage = Usage.from_openai(answer["usage"])
        assert usage is not None
        assert usage.cached_tokens is not None
        assert usage.cached_tokens > usage.prompt_tokens * 0.8

    async def test_a_prompt_that_is_too_long(self, adapter: OpenAICompatAdapter) -> None:
        """The caller's own fault, and one that a model with a longer window may not have."""
        with pytest.raises(BackendError) as caught:
            await adapter.send(chat([{"role": "user", "content": "What is the weather? " * 3000}]))
        assert caught.value.kind is Fault.CONTEXT_LENGTH
        assert caught.value.status == 400

    async def test_a_bad_request_comes_back_as_one(self, adapter: OpenAICompatAdapter) -> None:
        """With the engine's own words about it."""
        with pytest.raises(BackendError) as caught:
            await adapter.send(chat("Hi", temperature="hot"))  # type: ignore[arg-type]
        assert caught.value.kind is Fault.BAD_REQUEST
        assert caught.value.body is not None
        assert caught.value.body["message"]

    async def test_health_and_models(self, adapter: OpenAICompatAdapter) -> None:
        """It is up, idle, and serves the model."""
        health = await adapter.health_check()
        assert (health.healthy, health.error, health.queue_depth) == (True, "", 0)
        assert health.latency_ms > 0
        assert "tiny" in await adapter.list_models()

    async def test_a_client_that_leaves_stops_the_engine(self, adapter: OpenAICompatAdapter) -> None:
        """The load goes up with a request that counts for ever, and down as soon as its reply is closed."""

        async def is_busy() -> bool:
            return bool((await adapter.get_load()).running)

        async def is_idle() -> bool:
            return not await is_busy()

        reply = await adapter.send(chat(ASK_COUNT, stream=True, max_tokens=3500))
        assert reply.events is not None
        await anext(aiter(reply.events))
        assert await eventually(is_busy)
        await reply.close()
        assert await eventually(is_idle)

    async def test_many_at_once(self, adapter: OpenAICompatAdapter) -> None:
        """Answers do not get mixed up."""
        calls = [chat() if place % 2 else chat(ASK_COUNT, max_tokens=10) for place in range(12)]
        answers = await asyncio.gather(*(whole(adapter, call) for call in calls))
        texts = [answer["choices"][0]["message"]["content"] for answer in answers]
        assert texts == [COUNTING, HELLO] * 6


class GatewayContract:
    """The unmodified `openai` package, once to the engine itself and once through the gateway: the same fields."""

    @pytest.fixture
    def direct(self, engine: Engine) -> openai.OpenAI:
        """A client of the engine."""
        return openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0)

    @pytest.fixture
    def routed(self, gateway: Engine) -> openai.OpenAI:
        """A client of the gateway."""
        return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)

    @pytest.mark.parametrize(
        "more",
        [
            {},
            {"tools": [TOOL]},
            {"messages": TOOL_TURN, "tools": [TOOL]},
            {"response_format": SCHEMA},
            {"logprobs": True, "top_logprobs": 2},
            {"messages": ASK_COUNT, "max_tokens": 5, "stop": [" three"]},
        ],
        ids=["text", "tools", "results", "schema", "logprobs", "limits"],
    )
    def test_chat(self, direct: openai.OpenAI, routed: openai.OpenAI, more: Any) -> None:
        """A whole answer, with every field the engine gives."""
        asked = {"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 64, **more}
        # the first call warms the engine's cache, so that both of the others find the same
        direct.chat.completions.create(**asked)
        one, other = (client.chat.completions.create(**asked) for client in (direct, routed))
        assert without_volatile(other.model_dump()) == without_volatile(one.model_dump())

    @pytest.mark.parametrize(
        "more",
        [{}, {"tools": [TOOL]}, {"stream_options": {"include_usage": True}}],
        ids=["text", "tools", "usage"],
    )
    def test_streamed_chat(self, direct: openai.OpenAI, routed: openai.OpenAI, more: Any) -> None:
        """Chunk for chunk; none is added, and none is missing."""
        asked = {"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 64, "stream": True, **more}
        list(direct.chat.completions.create(**asked))
        one, other = (
            [without_volatile(chunk.model_dump()) for chunk in client.chat.completions.create(**asked)]
            for client in (direct, routed)
        )
        assert other == one
        assert len(one) > 4

    def test_text_completion(self, direct: openai.OpenAI, routed: openai.OpenAI) -> None:
        """Whole and streamed."""
        asked: Any = {"model": "tiny", "prompt": "zero", "temperature": 0, "max_tokens": 10}
        direct.completions.create(**asked)
        one, other = (client.completions.create(**asked) for client in (direct, routed))
        assert without_volatile(other.model_dump()) == without_volatile(one.model_dump())
        pieces = [chunk.choices[0].text for chunk in routed.completions.create(stream=True, **asked) if chunk.choices]
        assert "".join(pieces) == COUNTING

    def test_the_model_may_be_left_to_the_pipeline(self, routed: openai.OpenAI) -> None:
        """``auto``, and the answer's headers say who gave it."""
        raw = routed.chat.completions.with_raw_response.create(model="auto", messages=ASK, temperature=0)
        assert raw.parse().choices[0].message.content == HELLO
        assert raw.headers["x-kvfleet-model"] == "tiny"
        assert raw.headers["x-request-id"]

    def test_the_list_of_models(self, routed: openai.OpenAI) -> None:
        """The fleet's models."""
        assert [model.id for model in routed.models.list() if model.id == "tiny"] == ["tiny"]

    def test_a_prompt_that_is_too_long(self, direct: openai.OpenAI, routed: openai.OpenAI) -> None:
        """The engine's refusal comes back as what it is."""
        found = []
        for client in (direct, routed):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "What is " * 6000}])
            found.append(caught.value)
        assert found[1].status_code == found[0].status_code == 400

    def test_an_unknown_model(self, routed: openai.OpenAI) -> None:
        """Is not found."""
        with pytest.raises(openai.NotFoundError) as caught:
            routed.chat.completions.create(model="nobody", messages=ASK)
        assert caught.value.code == "model_not_found"

    def test_a_client_that_leaves_frees_the_engine(self, engine: Engine, routed: openai.OpenAI) -> None:
        """The next request is answered at once, though the first would have counted for minutes."""
        stream = routed.chat.completions.create(model="tiny", messages=ASK_COUNT, stream=True, max_tokens=3500)
        next(iter(stream))
        stream.close()
        found = routed.chat.completions.create(model="tiny", messages=ASK, temperature=0)
        assert found.choices[0].message.content == HELLO

    def test_why_it_went_there_can_be_asked(self, gateway: Engine, routed: openai.OpenAI) -> None:
        """The decision as JSON, without asking the engine for an answer."""
        found = routed.post("/route/explain", body={"messages": ASK}, cast_to=object)
        assert isinstance(found, dict)
        assert found["selected_model"] == "tiny"
