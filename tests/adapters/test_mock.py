"""The mock provider: OpenAI shapes, engine behaviour over virtual time, injected faults."""

from __future__ import annotations

import array
import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import anyio
import attrs
import pytest

from kvfleet.adapters.base import ChatMessage, ChatRequest
from kvfleet.adapters.call import Call, Limits, Operation, Reply, Usage
from kvfleet.adapters.mock import MockAdapter
from kvfleet.adapters.mock_content import sentence
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelCapabilities, ModelConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.sim.presets import PRESETS
from kvfleet.testing.fakes import VirtualTime

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


async def no_time(_: float) -> None:
    """A sleep that takes none."""
    await anyio.lowlevel.checkpoint()


def mock(**options: Any) -> MockAdapter:
    """An engine that is infinitely fast."""
    adapter = MockAdapter(endpoint="mock://one", model_id="demo", **options)
    adapter.sleep = no_time
    adapter.clock = FrozenClock()
    return adapter


def call(body: Mapping[str, Any], *, operation: Operation = Operation.CHAT, stream: bool = False, **rest: Any) -> Call:
    """One call."""
    return Call(operation=operation, body=body, stream=stream, **rest)


async def ask(adapter: MockAdapter, body: Mapping[str, Any], operation: Operation = Operation.CHAT) -> Any:
    """The whole answer, parsed."""
    return json.loads((await adapter.send(call(body, operation=operation))).body)


async def read(reply: Reply) -> list[Any]:
    """The data of every event."""
    assert reply.events is not None
    raw = b"".join([piece async for piece in reply.events])
    return [line[6:] for line in raw.decode().split("\n\n") if line]


async def stream(adapter: MockAdapter, body: Mapping[str, Any], operation: Operation = Operation.CHAT) -> list[Any]:
    """The chunks of a streamed answer, parsed."""
    lines = await read(await adapter.send(call({**body, "stream": True}, operation=operation, stream=True)))
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


class TestChat:
    async def test_an_answer_has_the_whole_openai_shape(self) -> None:
        """Every field of a chat completion, with a text that says what speaks and usage with cached tokens."""
        answer = await ask(mock(), HELLO)
        words = len(sentence("demo").split())
        assert answer == {
            "id": answer["id"],
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": "demo",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": sentence("demo")},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {
                "prompt_tokens": 9,
                "completion_tokens": words,
                "total_tokens": 9 + words,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        }
        assert answer["id"].startswith("chatcmpl-")

    async def test_a_stream_has_the_role_first_then_tokens_then_the_reason_then_done(self) -> None:
        """The chunks come in OpenAI's order, share one id, and add up to the whole answer."""
        chunks = await stream(mock(reply="One two three."), HELLO)
        assert chunks.pop() == "[DONE]"
        assert {c["id"] for c in chunks} == {chunks[0]["id"]}
        assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
        assert [(c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in chunks] == [
            ({"role": "assistant", "content": ""}, None),
            ({"content": "One "}, None),
            ({"content": "two "}, None),
            ({"content": "three."}, None),
            ({}, "stop"),
        ]

    async def test_usage_comes_last_and_alone_if_asked_for(self) -> None:
        """With include_usage the last chunk has no choices and the usage; all others have a null usage."""
        chunks = await stream(mock(reply="Hi."), {**HELLO, "stream_options": {"include_usage": True}})
        assert chunks[-1] == "[DONE]"
        assert chunks[-2]["choices"] == []
        assert chunks[-2]["usage"]["completion_tokens"] == 1
        assert [c["usage"] for c in chunks[:-2]] == [None] * 3

    async def test_without_being_asked_no_usage_is_in_the_stream_but_the_tally_has_it(self) -> None:
        """The usage of an engine of ours is learned without an event that the client did not ask for."""
        reply = await mock(reply="Hi.").send(call(HELLO, stream=True, ask_usage=True))
        lines = await read(reply)
        assert not any("usage" in line for line in lines)
        assert reply.tally.usage == Usage(9, 1, 10, 0)
        assert (reply.tally.is_complete, reply.tally.finish_reason, reply.tally.model) == (True, "stop", "demo")
        assert reply.tally.events == len(lines)

    async def test_nothing_of_the_prompt_is_repeated(self) -> None:
        """A prompt does not turn up in the answer, unless the engine is told to echo."""
        secret = {"messages": [{"role": "user", "content": "my code is 4711"}]}
        assert "4711" not in json.dumps(await ask(mock(), secret))
        assert (await ask(mock(echo=True), secret))["choices"][0]["message"]["content"] == "my code is 4711"

    @pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens"])
    async def test_max_tokens_cuts_the_answer(self, key: str) -> None:
        """The answer has so many tokens at most, and says that it was cut."""
        answer = await ask(mock(), {**HELLO, key: 3})
        assert answer["choices"][0] == {
            "index": 0,
            "message": {"role": "assistant", "content": "This is demo, "},
            "logprobs": None,
            "finish_reason": "length",
        }
        assert answer["usage"]["completion_tokens"] == 3

    @pytest.mark.parametrize("stop", ["engine", ["nowhere", "engine"]])
    async def test_stop_ends_the_answer_before_it(self, stop: Any) -> None:
        """The text ends before the first stop sequence."""
        answer = await ask(mock(), {**HELLO, "stop": stop})
        assert answer["choices"][0]["message"]["content"] == "This is demo, a mock "

    async def test_n_gives_so_many_choices(self) -> None:
        """Three choices, numbered, all counted in the usage; streamed, each has its own opening and end."""
        answer = await ask(mock(reply="Two words."), {**HELLO, "n": 3})
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
        assert answer["usage"]["completion_tokens"] == 6
        chunks = await stream(mock(reply="Two words."), {**HELLO, "n": 2})
        ends = [c["choices"][0]["index"] for c in chunks[:-1] if c["choices"][0]["finish_reason"]]
        assert ends == [0, 1]

    async def test_json_mode_gives_json(self) -> None:
        """The content parses as an object."""
        answer = await ask(mock(), {**HELLO, "response_format": {"type": "json_object"}})
        assert json.loads(answer["choices"][0]["message"]["content"]) == {"message": sentence("demo")}

    async def test_a_json_schema_is_obeyed(self) -> None:
        """The content is an instance of the schema: required properties, references, enums, lists."""
        schema = {
            "type": "object",
            "required": ["colour", "size", "tags", "inner"],
            "properties": {
                "colour": {"enum": ["red", "blue"]},
                "size": {"type": "integer", "minimum": 3},
                "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 2},
                "inner": {"$ref": "#/$defs/inner"},
                "extra": {"type": "string"},
            },
            "$defs": {"inner": {"type": "object", "properties": {"ok": {"type": ["boolean", "null"]}}}},
        }
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = await ask(mock(reply="abcdef"), {**HELLO, "response_format": wanted})
        content = json.loads(answer["choices"][0]["message"]["content"])
        assert content == {"colour": "red", "size": 3, "tags": ["abcd", "abcd"], "inner": {"ok": True}}

    async def test_a_schema_that_refers_to_itself_ends(self) -> None:
        """Recursion in a schema gives a value all the same."""
        schema = {"type": "object", "required": ["next"], "properties": {"next": {"$ref": "#"}}}
        wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
        answer = await ask(mock(), {**HELLO, "response_format": wanted})
        assert "next" in json.loads(answer["choices"][0]["message"]["content"])

    async def test_unknown_fields_and_parts_are_taken(self) -> None:
        """Unknown body fields, null content and parts that are not text do no harm."""
        messages = [
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}, {"text": "Hi"}]},
        ]
        answer = await ask(mock(), {"messages": messages, "logit_bias": {}, "x_unknown": [1]})
        assert answer["choices"][0]["finish_reason"] == "stop"

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "messages"),
            ({"messages": []}, "messages"),
            ({"messages": ["Hi"]}, "messages"),
            ({**HELLO, "max_tokens": 0}, "max_tokens"),
            ({**HELLO, "n": 0}, "n"),
            ({**HELLO, "tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice"),
        ],
    )
    async def test_a_wrong_body_is_the_callers_fault(self, body: dict[str, Any], param: str) -> None:
        """The refusal is a 400 that names the field."""
        with pytest.raises(BackendError) as caught:
            await ask(mock(), body)
        error = caught.value
        assert (error.kind, error.status) == (Fault.BAD_REQUEST, 400)
        assert error.body is not None
        assert error.body["param"] == param


class TestTools:
    TOOLS = (
        {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}},
        {
            "type": "function",
            "function": {
                "name": "weather",
                "parameters": {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}},
            },
        },
    )

    @pytest.mark.parametrize(
        ("choice", "name", "arguments"),
        [
            ("required", "look", {}),
            ({"type": "function", "function": {"name": "weather"}}, "weather", {"city": "mock"}),
        ],
    )
    async def test_a_forced_tool_is_called(self, choice: Any, name: str, arguments: dict[str, Any]) -> None:
        """The message calls the tool with arguments its schema allows, whole and streamed alike."""
        body = {**HELLO, "tools": self.TOOLS, "tool_choice": choice}
        chosen = (await ask(mock(), body))["choices"][0]
        assert (chosen["finish_reason"], chosen["message"]["content"]) == ("tool_calls", None)
        (called,) = chosen["message"]["tool_calls"]
        assert (called["type"], called["function"]["name"]) == ("function", name)
        assert json.loads(called["function"]["arguments"]) == arguments

        deltas = [chunk["choices"][0]["delta"] for chunk in (await stream(mock(), body))[:-1]]
        assert deltas[0]["tool_calls"][0]["id"] == called["id"]
        assert deltas[0]["tool_calls"][0]["function"] == {"name": name, "arguments": ""}
        pieces = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", ())]
        assert json.loads("".join(pieces)) == arguments

    @pytest.mark.parametrize("choice", ["auto", "none", None])
    async def test_a_tool_that_is_merely_offered_is_not_called(self, choice: Any) -> None:
        """Without being forced, the engine answers in words."""
        answer = await ask(mock(), {**HELLO, "tools": self.TOOLS, "tool_choice": choice})
        assert answer["choices"][0]["message"]["content"] == sentence("demo")


class TestOtherOperations:
    async def test_a_completion_has_sixteen_tokens_by_default(self) -> None:
        """Text completions are cut as OpenAI cuts them, one choice for each prompt."""
        answer = await ask(mock(), {"prompt": ["One", "Two"]}, Operation.COMPLETION)
        assert answer["object"] == "text_completion"
        assert [(c["index"], len(c["text"].split()), c["finish_reason"]) for c in answer["choices"]] == [
            (0, 16, "length"),
            (1, 16, "length"),
        ]

    async def test_a_completion_streams_texts(self) -> None:
        """Chunks carry text and not deltas; the last has the reason."""
        chunks = await stream(mock(reply="Hi there."), {"prompt": [1, 2, 3], "echo": False}, Operation.COMPLETION)
        assert [c["choices"][0]["text"] for c in chunks[:-1]] == ["Hi ", "there.", ""]
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"

    async def test_an_echoed_completion_begins_with_the_prompt(self) -> None:
        """`echo` of the body is honoured."""
        answer = await ask(mock(reply="!"), {"prompt": "Hello", "echo": True}, Operation.COMPLETION)
        assert answer["choices"][0]["text"] == "Hello!"

    async def test_embeddings_are_unit_vectors_and_nearer_for_shared_words(self) -> None:
        """Vectors have length one, are the same each time, and texts that share words are closer."""
        body = {"input": ["the red apple", "a red apple", "quarterly tax report"], "dimensions": 32}
        answer = await ask(mock(), body, Operation.EMBEDDING)
        one, two, three = (item["embedding"] for item in answer["data"])
        assert [len(one), answer["object"], answer["data"][2]["index"]] == [32, "list", 2]
        assert math.fsum(x * x for x in one) == pytest.approx(1)
        assert sum(a * b for a, b in zip(one, two, strict=True)) > sum(a * b for a, b in zip(one, three, strict=True))
        assert (await ask(mock(), body, Operation.EMBEDDING))["data"] == answer["data"]
        assert answer["usage"] == {"prompt_tokens": 12, "total_tokens": 12}

    async def test_base64_embeddings_are_the_same_numbers(self) -> None:
        """The base64 form holds the floats of the list form, as 32-bit little-endian."""
        plain = await ask(mock(), {"input": "red apple"}, Operation.EMBEDDING)
        packed = await ask(mock(), {"input": "red apple", "encoding_format": "base64"}, Operation.EMBEDDING)
        floats = array.array("f", base64.b64decode(packed["data"][0]["embedding"]))
        assert list(floats) == pytest.approx(plain["data"][0]["embedding"], abs=1e-6)
        assert len(floats) == 64

    async def test_rerank_orders_by_shared_words(self) -> None:
        """The best document is first, with its place in the list, and top_n cuts."""
        body = {"query": "red apple", "documents": ["a pear", {"text": "one red apple"}, "red car"], "top_n": 2}
        answer = await ask(mock(), body, Operation.RERANK)
        assert answer["results"] == [
            {"index": 1, "document": {"text": "one red apple"}, "relevance_score": 1.0},
            {"index": 2, "document": {"text": "red car"}, "relevance_score": 0.5},
        ]
        bare = await ask(mock(), {**body, "return_documents": False}, Operation.RERANK)
        assert bare["results"][0] == {"index": 1, "relevance_score": 1.0}

    @pytest.mark.parametrize(
        ("operation", "body"),
        [
            (Operation.COMPLETION, {"prompt": 5}),
            (Operation.EMBEDDING, {"input": []}),
            (Operation.EMBEDDING, {"input": "x", "dimensions": 0}),
            (Operation.RERANK, {"documents": ["x"]}),
            (Operation.RERANK, {"query": "x", "documents": "y"}),
        ],
    )
    async def test_wrong_bodies_are_refused(self, operation: Operation, body: dict[str, Any]) -> None:
        """What no engine takes is a bad request."""
        with pytest.raises(BackendError) as caught:
            await ask(mock(), body, operation)
        assert caught.value.kind is Fault.BAD_REQUEST


def timed(**options: Any) -> tuple[MockAdapter, VirtualTime]:
    """An engine on virtual time."""
    time = VirtualTime()
    adapter = MockAdapter(endpoint="mock://one", model_id="demo", **options)
    adapter.sleep, adapter.clock = time.sleep, time
    return adapter, time


class TestTime:
    async def test_prefill_and_decode_take_their_time(self) -> None:
        """100 tokens of prompt at 100 a second in a step of 50 ms, and such a step before every further token."""
        adapter, time = timed(
            prefill_tokens_per_s=100.0, decode_ms_per_token=50.0, decode_slowdown=0, reply="One two three four."
        )
        body = {"prompt": "x" * 400}
        moments = []

        async def read_it() -> None:
            reply = await adapter.send(call(body, operation=Operation.COMPLETION, stream=True))
            assert reply.events is not None
            moments.extend([round(time.now_s() - 1000, 3) async for _ in reply.events])

        async with anyio.create_task_group() as group:
            group.start_soon(read_it)
            await time.pass_s(10)
        assert moments == [1.05, 1.1, 1.15, 1.2, 1.2, 1.2]

    async def test_speed_divides_every_time(self) -> None:
        """Ten times the speed, a tenth of the time."""
        adapter, time = timed(prefill_tokens_per_s=100.0, decode_ms_per_token=0, speed=10.0)
        ended = []

        async def ask_it() -> None:
            await ask(adapter, {"prompt": "x" * 400}, Operation.COMPLETION)
            ended.append(time.now_s() - 1000)

        async with anyio.create_task_group() as group:
            group.start_soon(ask_it)
            await time.pass_s(10)
        assert ended == [pytest.approx(0.1, abs=0.001)]

    async def test_the_queue_is_seen_and_served(self) -> None:
        """With a batch of one, two more wait and are counted; in the end all have been answered."""
        adapter, time = timed(max_batch=1, prefill_tokens_per_s=100.0, decode_ms_per_token=100.0, reply="A b c.")
        done = []

        async def ask_it(number: int) -> None:
            await ask(adapter, {"prompt": f"{number}" * 400}, Operation.COMPLETION)
            done.append(number)

        async with anyio.create_task_group() as group:
            for number in range(3):
                group.start_soon(ask_it, number)
            await time.pass_s(1.15)
            load = await adapter.get_load()
            assert (load.running, load.waiting, load.tokens_per_second) == (1, 2, pytest.approx(10.0))
            assert load.kv_usage == pytest.approx(7 / 2048)
            health = await adapter.health_check()
            assert (health.queue_depth, health.active_requests, health.healthy) == (2, 1, True)
            state = await adapter.get_cache_state()
            assert state["num_requests_waiting"] == 2.0
            await time.pass_s(10)
        assert done == [0, 1, 2]

    async def test_the_second_turn_has_the_first_one_in_the_cache(self) -> None:
        """A conversation that goes on finds its beginning, the engine's own answer included."""
        adapter = mock()
        first = [{"role": "user", "content": "x" * 640}]
        answer = await ask(adapter, {"messages": first})
        said = answer["choices"][0]["message"]
        second = await ask(adapter, {"messages": [*first, said, {"role": "user", "content": "And then?"}]})
        usage = second["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= answer["usage"]["prompt_tokens"]
        metrics = await adapter.get_metrics()
        assert metrics["prefix_hits_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]

    async def test_closing_a_stream_frees_the_engine_at_once(self) -> None:
        """The place and the blocks are free right after close, and what still reads is told."""
        adapter = mock()
        reply = await adapter.send(call(HELLO, stream=True))
        assert reply.events is not None
        await anext(reply.events)
        assert (await adapter.get_load()).running == 1
        await reply.close()
        await reply.close()
        load = await adapter.get_load()
        assert (load.running, load.kv_usage) == (0, 0.0)
        with pytest.raises(BackendError) as caught:
            await anext(reply.events)
        assert caught.value.kind is Fault.CANCELLED

    @pytest.mark.parametrize("is_stream", [True, False])
    async def test_a_cancelled_task_frees_the_engine(self, is_stream: bool) -> None:
        """Cancelled while it waits for tokens, a request gives everything back."""
        adapter, time = timed(decode_ms_per_token=1000.0)

        async def ask_it() -> None:
            reply = await adapter.send(call(HELLO, stream=is_stream))
            assert reply.events is not None
            async for _ in reply.events:
                pass

        async with anyio.create_task_group() as group:
            group.start_soon(ask_it)
            await time.pass_s(2.5)
            assert (await adapter.get_load()).running == 1
            group.cancel_scope.cancel()
        assert (await adapter.get_load()).running == 0

    async def test_a_wait_beyond_the_limit_is_a_timeout(self) -> None:
        """A caller that will not wait gets a timeout, and the engine is free again."""
        adapter, _ = timed(prefill_tokens_per_s=1.0)
        with pytest.raises(BackendError) as caught:
            await adapter.send(call(HELLO, stream=True, limits=Limits(first_byte_s=0)))
        assert caught.value.kind is Fault.TIMEOUT
        assert (await adapter.get_load()).running == 0


class TestFaults:
    @pytest.mark.parametrize("fault", [f for f in Fault if f not in (Fault.CANCELLED, Fault.DEADLINE)])
    async def test_every_fault_can_be_injected(self, fault: Fault) -> None:
        """The error has the fault's kind, and the status a real engine would send."""
        with pytest.raises(BackendError) as caught:
            await mock(fail=fault.value).send(call(HELLO))
        error = caught.value
        assert (error.kind, error.received) == (fault, False)
        assert (error.body is not None) == fault.is_callers

    async def test_only_every_third_request_may_fail(self) -> None:
        """`fail_every: 3` spares two of three."""
        adapter = mock(fail="server_error", fail_every=3)
        ends = []
        for _ in range(6):
            try:
                await adapter.send(call(HELLO))
                ends.append("ok")
            except BackendError:
                ends.append("failed")
        assert ends == ["ok", "ok", "failed"] * 2

    async def test_a_fault_may_come_amid_a_stream(self) -> None:
        """After two tokens the stream breaks, says that something had arrived, and frees the engine."""
        adapter = mock(fail="disconnected", fail_after_tokens=2)
        reply = await adapter.send(call(HELLO, stream=True))
        assert reply.events is not None
        for _ in range(3):
            await anext(reply.events)
        with pytest.raises(BackendError) as caught:
            await anext(reply.events)
        assert (caught.value.kind, caught.value.received) == (Fault.DISCONNECTED, True)
        assert reply.tally.is_complete is False
        assert (await adapter.get_load()).running == 0

    @pytest.mark.parametrize(
        ("fault", "silence_s"), [("connect_timeout", 2.0), ("timeout", 7.0), ("idle_timeout", 11.0), ("connect", 0.0)]
    )
    async def test_a_timeout_takes_its_time(self, fault: str, silence_s: float) -> None:
        """Injected timeouts last as long as the caller's own limit for them."""
        adapter, time = timed(fail=fault)
        limits = Limits(connect_s=2, first_byte_s=7, idle_s=11)
        async with anyio.create_task_group() as group:
            group.start_soon(_fails_after, adapter, call(HELLO, limits=limits), time, silence_s)
            await time.pass_s(20)

    async def test_an_engine_that_refuses_connections_is_down(self) -> None:
        """Health says so; everything else cannot be asked."""
        adapter = mock(fail="connect")
        health = await adapter.health_check()
        assert (health.healthy, health.error) == (False, "injected fault: connect")
        for question in (adapter.list_models, adapter.get_load, adapter.get_metrics):
            with pytest.raises(BackendError):
                await question()
        assert await mock().list_models() == ("demo",)

    async def test_a_full_queue_refuses(self) -> None:
        """With nowhere to wait, the second request is refused as overloaded, and the first is answered."""
        adapter = mock(max_queue=0, max_batch=1)
        reply = await adapter.send(call(HELLO, stream=True))
        with pytest.raises(BackendError) as caught:
            await adapter.send(call(HELLO))
        assert caught.value.kind is Fault.OVERLOADED
        assert (await read(reply))[-1] == "[DONE]"


async def _fails_after(adapter: MockAdapter, asked: Call, time: VirtualTime, silence_s: float) -> None:
    began = time.now_s()
    with pytest.raises(BackendError):
        await adapter.send(asked)
    assert time.now_s() - began == silence_s


class TestConfiguration:
    def test_the_context_is_the_models_own(self) -> None:
        """A declared context window is the engine's, unless the options say otherwise."""
        model = ModelConfig(name="m", provider="mock", capabilities=ModelCapabilities(max_context_window=100))
        assert MockAdapter.from_config(model).spec.context_tokens == 100
        assert MockAdapter.from_config(model, context_tokens=50).spec.context_tokens == 50
        assert MockAdapter.from_config(attrs.evolve(model, capabilities=ModelCapabilities())).spec == attrs.evolve(
            MockAdapter().spec, context_tokens=8192
        )

    async def test_it_is_a_documented_adapter(self) -> None:
        """The Python face of every adapter, `chat` and `chat_stream`, works on it."""
        adapter = mock(reply="Hello there.")
        request = ChatRequest([ChatMessage("user", "Hi")])
        answer = await adapter.chat(request)
        assert (answer.content, answer.finish_reason, answer.endpoint) == ("Hello there.", "stop", "mock://one")
        pieces = [chunk.content async for chunk in adapter.chat_stream(request)]
        assert "".join(pieces) == "Hello there."

    def test_a_preset_is_a_real_engines_pace_and_size(self) -> None:
        """Named in the options; block size, context, queue and speed stay one's own."""
        spec = MockAdapter(preset="h100-8b", block_tokens=32, context_tokens=4096, max_queue=7, speed=2.0).spec
        expected = attrs.evolve(
            PRESETS["h100-8b"].spec, block_tokens=32, cache_blocks=12_812, context_tokens=4096, max_waiting=7, speed=2.0
        )
        assert spec == expected
