"""Both surfaces through a running gateway, by the SDKs of their owners: translated, passed through, and broken."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import attrs
import httpx
import openai
import orjson
import pytest

from kvfleet.adapters.call import Call, Reply, Tally, Usage
from kvfleet.adapters.translation import as_stream
from kvfleet.config.schema import (
    FallbackConfig,
    FleetConfig,
    GatewayConfig,
    ModelCapabilities,
    ModelConfig,
    TelemetryConfig,
    TraceStoreConfig,
)
from kvfleet.errors import Fault
from kvfleet.gateway.server import Serving, running
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace import names
from kvfleet.trace.spans import Trace
from tests.adapters.scripted import Engine, Request, Script, Wire, engine, streamed, whole

anthropic = pytest.importorskip("anthropic")

KEY = "sk-gateway"
CAPABLE = ModelCapabilities(supports_tools=True, supports_json_mode=True, supports_vision=True)
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALLED: Mapping[str, Any] = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1,
    "model": "llama",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}},
                    {"id": "t2", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}},
                ],
            },
            "finish_reason": "tool_calls",
        }
    ],
    "usage": {
        "prompt_tokens": 30,
        "completion_tokens": 9,
        "total_tokens": 39,
        "prompt_tokens_details": {"cached_tokens": 16},
    },
}


@attrs.frozen
class Stage:
    """A gateway, the traces it made, and a client of each SDK."""

    serving: Serving
    traces: list[Trace]
    claude: Any
    openai: openai.AsyncOpenAI
    http: httpx.AsyncClient

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)


@contextlib.asynccontextmanager
async def staged(config: FleetConfig, adapters: Mapping[str, Any] | None = None) -> AsyncIterator[Stage]:
    """Serve a fleet, and connect clients that do not try again by themselves."""
    router = Router(config, adapters=adapters, polls=False, seed=1)
    async with (
        running(config, router=router) as serving,
        anthropic.AsyncAnthropic(base_url=serving.url, api_key=KEY, max_retries=0) as claude,
        openai.AsyncOpenAI(base_url=f"{serving.url}/v1", api_key=KEY, max_retries=0) as sdk,
        httpx.AsyncClient(base_url=serving.url, headers={"authorization": f"Bearer {KEY}"}) as http,
    ):
        stage = Stage(serving, [], claude, sdk, http)
        router.add_sink(stage)
        yield stage


def fleet(*models: ModelConfig, **more: Any) -> FleetConfig:
    """A fleet that asks its models in their order."""
    return FleetConfig(
        models=models,
        strategy="static",
        fallback=FallbackConfig(max_attempts=3),
        gateway=GatewayConfig(api_key=KEY),
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
        **more,
    )


class Canned(FakeAdapter):
    """Gives one whole answer, as a stream too, its arguments in two pieces."""

    async def send(self, call: Call) -> Reply:
        if not call.stream:
            return await super().send(call)
        self.calls.append(call)
        told = as_stream(call.operation, CALLED, include_usage=False)
        cut = told.replace(b'{\\"city\\":\\"Rome\\"}', b'{\\"city\\":')
        assert cut != told
        rest = {"tool_calls": [{"index": 0, "function": {"arguments": '"Rome"}'}}]}
        last = orjson.dumps({"choices": [{"index": 0, "delta": rest, "finish_reason": None}]})
        first, second, *others = cut.split(b"\n\n")
        pieces = [first, b"data: " + last, second, *others[:-1]]

        async def events() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece + b"\n\n"

        return Reply(events=events(), tally=Tally(usage=Usage(30, 9, 39, 16)))


@contextlib.asynccontextmanager
async def faked(reply: FakeReply | Callable[[Call], FakeReply]) -> AsyncIterator[tuple[Stage, FakeAdapter]]:
    """A gateway before one engine that speaks chat alone, and follows a script."""
    model = ModelConfig(name="llama", endpoint="http://llama.internal:8000", capabilities=CAPABLE)
    is_canned = isinstance(reply, FakeReply) and reply.answer is CALLED
    kind = Canned if is_canned else FakeAdapter
    adapter = kind(endpoint=model.endpoint, model_id="llama", script=reply)
    async with staged(fleet(model), {model.id: adapter}) as stage:
        yield stage, adapter


ASK: Mapping[str, Any] = {"model": "llama", "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}]}


class TestMessagesTranslated:
    async def test_a_whole_answer(self) -> None:
        """Text, stop reason and usage as Anthropic counts; the identifier and the decision in the headers."""
        usage = Usage(20, 5, 25, cached_tokens=16)
        async with faked(FakeReply(text="Hello there.", usage=usage)) as (stage, adapter):
            raw = await stage.claude.messages.with_raw_response.create(**ASK, system="Be brief.")
        message = await raw.parse()
        assert [(block.type, block.text) for block in message.content] == [("text", "Hello there.")]
        assert (message.role, message.stop_reason) == ("assistant", "end_turn")
        told = message.usage
        assert (told.input_tokens, told.cache_read_input_tokens, told.output_tokens) == (4, 16, 5)
        assert message.id == raw.headers["x-request-id"] == raw.headers["request-id"] == message._request_id
        assert raw.headers["x-kvfleet-model"] == "llama"
        body = adapter.calls[0].body
        assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        assert body["max_tokens"] == 100
        assert stage.traces[0].route.attributes[names.OUTCOME] == "answered"

    async def test_a_stream(self) -> None:
        """The SDK's own stream puts it together; the usage comes with its end."""
        usage = Usage(20, 5, 25, cached_tokens=16)
        async with (
            faked(FakeReply(text="Hello there, you.", usage=usage)) as (stage, _),
            stage.claude.messages.stream(**ASK) as stream,
        ):
            said = [text async for text in stream.text_stream]
            message = await stream.get_final_message()
        assert "".join(said) == message.content[0].text == "Hello there, you."
        assert len(said) > 1
        assert message.stop_reason == "end_turn"
        assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (4, 16)
        assert message.usage.output_tokens == 5

    @pytest.mark.parametrize("stream", [False, True])
    async def test_calls_of_tools_both_ways(self, stream: bool) -> None:
        """Tools go to the engine as functions, its calls come back as blocks, and their results go to it again."""
        tools = [{"name": "weather", "description": "Weather.", "input_schema": WEATHER}]
        asked = {**ASK, "tools": tools, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
        async with faked(FakeReply(answer=CALLED)) as (stage, adapter):
            if stream:
                async with stage.claude.messages.stream(**asked) as events:
                    message = await events.get_final_message()
            else:
                message = await stage.claude.messages.create(**asked)
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "Sunny."}]}
                for block in message.content
            ]
            turns = [
                *ASK["messages"],
                {"role": "assistant", "content": [block.model_dump() for block in message.content]},
                {"role": "user", "content": [*results, {"type": "text", "text": "So?"}]},
            ]
            await stage.claude.messages.create(**{**asked, "messages": turns})
        assert message.stop_reason == "tool_use"
        assert [(b.type, b.id, b.name, b.input) for b in message.content] == [
            ("tool_use", "t1", "weather", {"city": "Rome"}),
            ("tool_use", "t2", "weather", {"city": "Oslo"}),
        ]
        first, second = (call.body for call in adapter.calls)
        function = {"name": "weather", "parameters": WEATHER, "description": "Weather."}
        assert first["tools"] == [{"type": "function", "function": function}]
        assert (first["tool_choice"], first["parallel_tool_calls"]) == ("required", False)
        assert second["messages"][1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":"Rome"}'}
        assert second["messages"][2:] == [
            {"role": "tool", "tool_call_id": "t1", "content": "Sunny."},
            {"role": "tool", "tool_call_id": "t2", "content": "Sunny."},
            {"role": "user", "content": [{"type": "text", "text": "So?"}]},
        ]

    async def test_a_refusal_is_anthropics(self) -> None:
        """Each error is the SDK's own exception, with what kvfleet says of the decision beside it."""
        async with faked(FakeReply(fail=Fault.RATE_LIMITED)) as (stage, _):
            with pytest.raises(anthropic.RateLimitError) as busy:
                await stage.claude.messages.create(**ASK)
            with pytest.raises(anthropic.BadRequestError, match="messages must be a list"):
                await stage.claude.messages.create(model="llama", max_tokens=1, messages=[])
            with pytest.raises(anthropic.NotFoundError, match="no model is called"):
                await stage.claude.messages.create(**{**ASK, "model": "nobody"})
            with pytest.raises(anthropic.AuthenticationError):
                await stage.claude.with_options(api_key="wrong").messages.create(**ASK)
        body: Any = busy.value.body
        assert (body["type"], body["error"]["type"]) == ("error", "rate_limit_error")
        assert body["request_id"] == busy.value.request_id
        assert body["error"]["kvfleet"]["attempts"]
        assert busy.value.response.headers["retry-after"] == "1"

    async def test_a_stream_that_dies_raises(self) -> None:
        """What came is there, then the SDK's exception; never a clean end."""
        reply = FakeReply(text="one two three four", fail=Fault.DISCONNECTED, fail_after=2)
        said = ""
        async with faked(reply) as (stage, _):
            with pytest.raises(anthropic.APIStatusError, match="stream_interrupted"):  # noqa: PT012 - how far it came
                async with stage.claude.messages.stream(**ASK) as stream:
                    async for text in stream.text_stream:
                        said += text
        assert said
        assert "one two three four".startswith(said)

    async def test_counting_tokens(self) -> None:
        """The estimate that routing uses, unless the engine can be asked; the header says which."""
        async with faked(FakeReply()) as (stage, adapter):
            raw = await stage.claude.messages.with_raw_response.count_tokens(
                model="llama", messages=[{"role": "user", "content": "word " * 400}]
            )
            assert adapter.calls == []
        assert 300 < (await raw.parse()).input_tokens < 700
        assert raw.headers["x-kvfleet-tokens"] == "estimate"

    async def test_a_dry_run(self) -> None:
        """The decision of a message without asking anybody."""
        async with faked(FakeReply()) as (stage, adapter):
            found = await stage.http.post("/v1/route/explain/messages", json=dict(ASK))
            assert adapter.calls == []
        assert found.json()["selected_model"] == "llama"


INPUT: Mapping[str, Any] = {"model": "llama", "input": "Hi"}
TOOL = {"type": "function", "name": "weather", "description": "Weather.", "parameters": WEATHER, "strict": True}


class TestResponsesTranslated:
    async def test_a_whole_answer(self) -> None:
        """Text, status and usage with its cached tokens."""
        usage = Usage(20, 5, 25, cached_tokens=16, reasoning_tokens=2)
        async with faked(FakeReply(text="Hello there.", usage=usage)) as (stage, adapter):
            response = await stage.openai.responses.create(**INPUT, instructions="Be brief.", max_output_tokens=50)
        assert (response.output_text, response.status, response.store) == ("Hello there.", "completed", False)
        assert response.usage is not None
        assert (response.usage.input_tokens, response.usage.input_tokens_details.cached_tokens) == (20, 16)
        assert response.usage.output_tokens_details.reasoning_tokens == 2
        assert response.id == response._request_id
        assert adapter.calls[0].body["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
        ]
        assert adapter.calls[0].body["max_tokens"] == 50

    async def test_a_stream(self) -> None:
        """The events of the API in their order, numbered without a gap, and the whole response at the end."""
        async with faked(FakeReply(text="Hello there, you.", usage=Usage(20, 5, 25))) as (stage, _):
            stream = await stage.openai.responses.create(**INPUT, stream=True)
            events = [event async for event in stream]
        kinds = [event.type for event in events]
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == "Hello there, you."
        assert len(deltas) > 1
        assert list(dict.fromkeys(kinds)) == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[-1].response.output_text == "Hello there, you."
        assert events[-1].response.usage.total_tokens == 25

    @pytest.mark.parametrize("stream", [False, True])
    async def test_calls_of_tools_both_ways(self, stream: bool) -> None:
        """Functions, their calls as items of the output, and their results as items of the input."""
        asked: Any = {**INPUT, "tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}}
        async with faked(FakeReply(answer=CALLED)) as (stage, adapter):
            if stream:
                async with stage.openai.responses.stream(**asked) as events:
                    response: Any = await events.get_final_response()
            else:
                response = await stage.openai.responses.create(**asked)
            items = [
                {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                *[item.model_dump(exclude_none=True) for item in response.output],
                *[
                    {"type": "function_call_output", "call_id": item.call_id, "output": "Sunny."}
                    for item in response.output
                ],
            ]
            await stage.openai.responses.create(**{**asked, "input": items})
        assert [(item.type, item.call_id, item.name, item.arguments) for item in response.output] == [
            ("function_call", "t1", "weather", '{"city":"Rome"}'),
            ("function_call", "t2", "weather", '{"city":"Oslo"}'),
        ]
        first, second = (call.body for call in adapter.calls)
        assert first["tools"][0]["function"]["strict"] is True
        assert first["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
        assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool", "tool"]
        assert [call["id"] for call in second["messages"][1]["tool_calls"]] == ["t1", "t2"]

    async def test_a_schema_and_an_answer_that_was_cut(self) -> None:
        """A structured format becomes a `response_format`; an answer at its limit is incomplete, and says why."""
        answer = {**CALLED, "choices": [{"message": {"content": "{"}, "finish_reason": "length"}]}
        form = {"type": "json_schema", "name": "city", "schema": WEATHER, "strict": True}
        async with faked(FakeReply(answer=answer)) as (stage, adapter):
            response: Any = await stage.openai.responses.create(**INPUT, text={"format": form})  # type: ignore[arg-type]
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert adapter.calls[0].body["response_format"] == {
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": WEATHER, "strict": True},
        }

    @pytest.mark.parametrize(
        "field",
        [
            {"store": True},
            {"previous_response_id": "resp_1"},
            {"conversation": "conv_1"},
            {"background": True},
            {"prompt": {"id": "p"}},
        ],
    )
    async def test_what_needs_a_memory_is_refused(self, field: dict[str, Any]) -> None:
        """By name, with what to do instead, and nobody is asked."""
        async with faked(FakeReply()) as (stage, adapter):
            with pytest.raises(openai.BadRequestError, match="the gateway keeps none") as caught:
                await stage.openai.responses.create(**INPUT, **field)
            assert adapter.calls == []
        assert caught.value.param == next(iter(field))

    async def test_a_stream_that_dies_raises(self) -> None:
        """The API's own `response.failed`, then an error that the SDK raises."""
        reply = FakeReply(text="one two three four", fail=Fault.DISCONNECTED, fail_after=2)
        kinds: list[str] = []
        async with faked(reply) as (stage, _):
            stream = await stage.openai.responses.create(**INPUT, stream=True)
            with pytest.raises(openai.APIError, match="the answer broke off") as caught:  # noqa: PT012 - how far it came
                async for event in stream:
                    kinds.append(event.type)  # noqa: PERF401 - those before the error are wanted
        assert kinds[-1] == "response.failed"
        assert "response.output_text.delta" in kinds
        assert caught.value.code == "stream_interrupted"


def sse(*events: Mapping[str, Any]) -> list[bytes]:
    """Events of either API, each with its type in front."""
    return [b"event: %b\ndata: %b\n\n" % (one["type"].encode(), orjson.dumps(one)) for one in events]


MESSAGE: Mapping[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "Hi.", "odd": 1}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 4, "cache_read_input_tokens": 16, "output_tokens": 3},
}
MESSAGE_STREAM = sse(
    {"type": "message_start", "message": {**MESSAGE, "content": [], "stop_reason": None}},
    {"type": "ping"},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi."}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}},
    {"type": "message_stop"},
)
RESPONSE: Mapping[str, Any] = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "model": "m",
    "status": "completed",
    "output": [
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Hi.", "annotations": []}],
        }
    ],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "usage": {
        "input_tokens": 20,
        "input_tokens_details": {"cached_tokens": 16},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 23,
    },
}
RESPONSE_STREAM = sse(
    {"type": "response.created", "sequence_number": 0, "response": {**RESPONSE, "status": "in_progress", "output": []}},
    {
        "type": "response.output_text.delta",
        "sequence_number": 1,
        "item_id": "msg_1",
        "output_index": 0,
        "content_index": 0,
        "delta": "Hi.",
        "logprobs": [],
    },
    {"type": "response.completed", "sequence_number": 2, "response": RESPONSE},
)
CHAT_ANSWER = b'{"id":"c","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"Chat."},"finish_reason":"stop"}]}'


async def native(wire: Wire, request: Request) -> None:
    """An engine that speaks both APIs."""
    is_stream = orjson.loads(request.body)["stream"]
    if request.path == "/v1/messages":
        wire.send(streamed(*MESSAGE_STREAM) if is_stream else whole(orjson.dumps(MESSAGE)))
    elif request.path == "/v1/responses":
        wire.send(streamed(*RESPONSE_STREAM) if is_stream else whole(orjson.dumps(RESPONSE)))
    else:
        wire.send(whole(CHAT_ANSWER))


MARKED: Any = {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}


async def older(wire: Wire, request: Request) -> None:
    """An engine that speaks neither."""
    if request.path == "/v1/chat/completions":
        wire.send(whole(CHAT_ANSWER))
    else:
        wire.send(whole(b'{"detail":"Not Found"}', status="404 Not Found"))


@contextlib.asynccontextmanager
async def before(script: Script, provider: str, **more: Any) -> AsyncIterator[tuple[Stage, Engine]]:
    """A gateway before one engine on the wire."""
    async with engine(script) as backend:
        model = ModelConfig(
            name="m",
            provider=provider,
            endpoint=backend.url,
            api_key="key-1",
            capabilities=CAPABLE,
            max_retries=0,
            **more,
        )
        async with staged(fleet(model)) as stage:
            yield stage, backend


BOTH = {"surfaces": ["messages", "responses"]}


class TestPassedThrough:
    @pytest.mark.parametrize("provider", ["vllm", "sglang", "anthropic"])
    async def test_a_message_in_its_own_words(self, provider: str) -> None:
        """What the client said arrives as it said it, but for the model's name; the answer comes as it was."""
        ask = {
            **ASK,
            "model": "m",
            "system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
            "extra_body": {"odd": {"deep": [1]}},
        }
        async with before(native, provider) as (stage, backend):
            message = await stage.claude.messages.create(**ask, extra_headers={"anthropic-beta": "some-beta"})
            async with stage.claude.messages.stream(**ask) as stream:
                streamed_ = await stream.get_final_message()
        assert message.content[0].odd == 1
        assert streamed_.content[0].text == "Hi."
        assert streamed_.usage.cache_read_input_tokens == 16
        sent = orjson.loads(backend.requests[0].body)
        assert sent["system"] == ask["system"]
        assert (sent["odd"], sent["stream"], sent["model"]) == ({"deep": [1]}, False, "m")
        assert backend.requests[0].headers["anthropic-beta"] == "some-beta"
        assert KEY not in str(backend.requests)
        for trace in stage.traces:
            span = trace.spans[-1]
            assert span.attributes["gen_ai.usage.input_tokens"] == 20
            assert span.attributes["gen_ai.usage.output_tokens"] == 3
            assert trace.route.attributes[names.OUTCOME] == "answered"

    async def test_a_response_in_its_own_words(self) -> None:
        """Likewise, and the engine is told to keep nothing."""
        async with before(native, "openai_compat", options=BOTH) as (stage, backend):
            response = await stage.openai.responses.create(model="m", input="Hi", tools=[{"type": "web_search"}])
            stream = await stage.openai.responses.create(model="m", input="Hi", stream=True)
            events = [event async for event in stream]
        assert response.output_text == "Hi."
        assert [event.type for event in events] == [
            "response.created",
            "response.output_text.delta",
            "response.completed",
        ]
        sent = orjson.loads(backend.requests[0].body)
        assert (sent["store"], sent["tools"]) == (False, [{"type": "web_search"}])

    async def test_an_older_engine_is_asked_as_a_chat(self) -> None:
        """A 404 of the path is found out once; from then on the requests are translated."""
        async with before(older, "vllm") as (stage, backend):
            for _ in range(2):
                message = await stage.claude.messages.create(**{**ASK, "model": "m", "messages": [MARKED]})
                assert message.content[0].text == "Chat."
        paths = [request.path for request in backend.requests]
        assert paths == ["/v1/messages", "/v1/chat/completions", "/v1/chat/completions"]
        has_marks = [b"cache_control" in request.body for request in backend.requests]
        assert has_marks == [True, False, False], "a chat has no marks that only Anthropic reads"

    async def test_what_only_the_api_itself_can_do_goes_to_who_speaks_it(self) -> None:
        """A built-in tool drops those who speak chat alone, and the error says so if that is everybody."""
        async with before(native, "openai_compat") as (stage, backend):
            with pytest.raises(openai.APIStatusError) as caught:
                await stage.openai.responses.create(model="m", input="Hi", tools=[{"type": "web_search"}])
            assert backend.requests == []
        assert "does not speak the responses API itself, which web_search needs" in str(caught.value)

    @pytest.mark.parametrize("count", [1, 3, 5])
    async def test_a_stream_that_is_cut_is_not_an_end(self, count: int) -> None:
        """A stream that ends cleanly by HTTP, and not by its own last event, is an error; early enough, another's turn."""

        async def cut(wire: Wire, request: Request) -> None:
            wire.send(streamed(*MESSAGE_STREAM[:count]))

        async with before(cut, "anthropic") as (stage, _):
            with pytest.raises(anthropic.APIStatusError) as caught:
                async with stage.claude.messages.stream(**{**ASK, "model": "m"}) as stream:
                    await stream.get_final_message()
            assert "overloaded" not in str(caught.value)
        assert stage.traces[0].route.attributes[names.OUTCOME] == "failed"

    async def test_an_overload_behind_the_opening_is_anothers_turn(self) -> None:
        """Nothing is sent before the answer itself begins, so the next replica may answer, in its own way."""

        async def overloaded(wire: Wire, request: Request) -> None:
            error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
            wire.send(streamed(MESSAGE_STREAM[0], *sse(error)))

        async with engine(overloaded) as first, engine(older) as second:
            models = (
                ModelConfig(name="a", provider="anthropic", endpoint=first.url, max_retries=0),
                ModelConfig(name="b", provider="openai_compat", endpoint=second.url, max_retries=0),
            )
            async with staged(fleet(*models)) as stage:
                message = await stage.claude.messages.create(**{**ASK, "model": "auto"})
        assert message.content[0].text == "Chat."

    async def test_leaving_a_stream_closes_the_engines_connection(self) -> None:
        """A client that leaves stops the engine's work."""

        async def endless(wire: Wire, request: Request) -> None:
            wire.send(streamed(*MESSAGE_STREAM[:4])[:-5])
            await wire.gone.wait()

        async with before(endless, "vllm") as (stage, backend):
            stream = await stage.claude.messages.create(**{**ASK, "model": "m"}, stream=True)
            await anext(aiter(stream))
            await stream.close()
            await backend.wires[0].gone.wait()
