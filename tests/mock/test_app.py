"""The HTTP face of a mock engine: OpenAI's shapes, vLLM's pages, and what becomes of a client that leaves."""

from __future__ import annotations

import asyncio
import json

import pytest

from kvfleet.adapters.vllm import VLLMAdapter
from kvfleet.config.schema import GatewayConfig
from kvfleet.gateway.auth import Keys
from tests.mock.serving import HELLO, ask, served, until

STREAM = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}


class TestInference:
    async def test_a_chat_is_answered(self) -> None:
        """As OpenAI's API has it, with the cached tokens in the usage."""
        async with served() as server:
            await ask(server, body=HELLO)
            answer = await ask(server, body={**HELLO, "messages": [{"role": "user", "content": "x" * 640}]})
            again = await ask(server, body={**HELLO, "messages": [{"role": "user", "content": "x" * 640}]})
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert answer.json["object"] == "chat.completion"
        assert answer.json["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        assert again.json["usage"]["prompt_tokens_details"] == {"cached_tokens": 160}
        assert len(answer.json["choices"][0]["message"]["content"].split()) == 6

    async def test_a_stream_has_its_events_and_its_usage(self) -> None:
        """Role, tokens, reason, usage, and the end."""
        async with served() as server:
            answer = await ask(server, body=STREAM)
        *chunks, usage, done = answer.events
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert (done, answer.is_whole) == ("[DONE]", True)
        assert usage["usage"]["completion_tokens"] == 6
        assert sum(bool(chunk["choices"][0]["delta"].get("content")) for chunk in chunks) == 6

    @pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens"])
    async def test_an_answer_is_as_long_as_a_benchmark_wants_it(self, key: str) -> None:
        """With vLLM's `ignore_eos` it has exactly as many tokens as are allowed, each of four bytes."""
        async with served() as server:
            answer = (await ask(server, body={**HELLO, key: 50, "ignore_eos": True})).json
        assert answer["usage"]["completion_tokens"] == 50
        assert len(answer["choices"][0]["message"]["content"]) == 200
        assert answer["choices"][0]["finish_reason"] == "stop"

    async def test_the_next_turn_finds_all_but_the_last_block(self) -> None:
        """Prompt and answer of one turn are the beginning of the next one's prompt, token by token."""
        async with served(answer_tokens=64) as server:
            messages = [{"role": "user", "content": "y" * 1000}]
            first = (await ask(server, body={**HELLO, "messages": messages})).json
            said = first["choices"][0]["message"]
            more = [*messages, said, {"role": "user", "content": "And then?"}]
            usage = (await ask(server, body={**HELLO, "messages": more})).json["usage"]
        computed = first["usage"]["prompt_tokens"] + 64 - 1
        assert usage["prompt_tokens_details"]["cached_tokens"] == computed // 16 * 16

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/v1/rerank", "/rerank"])
    async def test_the_other_calls_are_answered(self, path: str) -> None:
        """Completions, embeddings and reranking."""
        body = {"model": "demo", "prompt": "One", "input": "One", "query": "One", "documents": ["Two"]}
        async with served() as server:
            assert (await ask(server, path, body)).status == 200

    @pytest.mark.parametrize(
        ("body", "status", "kind", "param"),
        [
            ({**HELLO, "model": "nobody"}, 404, "NotFoundError", "model"),
            ({"model": "demo"}, 400, "BadRequestError", "messages"),
            ({**HELLO, "max_tokens": 90_000, "ignore_eos": True}, 400, "BadRequestError", None),
            ([1], 400, "BadRequestError", None),
        ],
    )
    async def test_a_wrong_call_is_refused_as_vllm_does(
        self, body: object, status: int, kind: str, param: str | None
    ) -> None:
        """The error object has vLLM's type, and the status as its code."""
        async with served() as server:
            answer = await ask(server, body=body)
        error = answer.json["error"]
        assert (answer.status, error["type"], error["code"], error["param"]) == (status, kind, status, param)

    async def test_a_prompt_too_long_says_so_in_vllms_words(self) -> None:
        """Clients that look for the words find them."""
        async with served(context_tokens=64) as server:
            answer = await ask(server, body={**HELLO, "messages": [{"role": "user", "content": "x" * 400}]})
        assert answer.json["error"]["message"].startswith("This model's maximum context length is 64 tokens")

    async def test_a_full_queue_is_told_with_retry_after(self) -> None:
        """One more than batch and queue hold gets 503, and when to come again."""
        async with served(max_batch=1, max_queue=0, speed=1.0, decode_ms_per_token=1000) as server:
            first = asyncio.create_task(ask(server, body=STREAM))
            await until(lambda: server.engine.adapter.live.load().running)
            answer = await ask(server, body=HELLO)
            first.cancel()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")

    async def test_a_key_is_asked_for(self) -> None:
        """With a key, calls under /v1 need it; health does not."""
        async with served(keys=Keys.of(GatewayConfig(), "secret", tenants=())) as server:
            refused, healthy = await ask(server, body=HELLO), await ask(server, "/health")
            answered = await ask(server, body=HELLO, headers="authorization: Bearer secret\r\n")
        assert (refused.status, healthy.status, answered.status) == (401, 200, 200)

    async def test_a_client_that_leaves_frees_the_engine(self) -> None:
        """Its request is cancelled at once, and counted as aborted."""
        async with served(speed=1.0, decode_ms_per_token=200, answer_tokens=1000) as server:
            reading = asyncio.create_task(ask(server, body=STREAM))
            live = server.engine.adapter.live
            await until(lambda: live.load().running)
            reading.cancel()
            await until(lambda: not live.load().running)
            assert live.load().kv_usage == 0.0
            assert server.engine.metrics.ended["abort"] == 1

    async def test_a_salt_keeps_caches_apart(self) -> None:
        """With `cache_salt`, vLLM's word for it, the same prompt under another salt is not found."""
        body = {**HELLO, "messages": [{"role": "user", "content": "z" * 640}]}
        async with served() as server:
            found = []
            for salt in ("a", "b", "a"):
                usage = (await ask(server, body={**body, "cache_salt": salt})).json["usage"]
                found.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert found == [0, 0, 160]


class TestPages:
    async def test_models_version_and_health(self) -> None:
        """What a router asks first."""
        async with served(context_tokens=4096) as server:
            models = (await ask(server, "/v1/models")).json
            assert [(m["id"], m["max_model_len"]) for m in models["data"]] == [("demo", 4096)]
            assert (await ask(server, "/version")).json["version"].startswith("0.32.0")
            assert (await ask(server, "/health")).status == (await ask(server, "/ping")).status == 200
            assert (await ask(server, "/load")).json == {"server_load": 0}
            assert (await ask(server, "/nowhere")).status == 404

    async def test_tokens_are_those_of_the_prompt(self) -> None:
        """Tokenizing and rendering give the same numbers, and a longer conversation begins with a shorter one's."""
        turn = {"role": "user", "content": "Hello, how are you doing?"}
        reply = {"role": "assistant", "content": "Fine."}
        async with served() as server:
            one = (await ask(server, "/tokenize", {"messages": [turn]})).json
            rendered = (await ask(server, "/v1/chat/completions/render", {"messages": [turn]})).json
            two = (await ask(server, "/tokenize", {"messages": [turn, reply]})).json
            bare = (await ask(server, "/tokenize", {"messages": [turn], "add_generation_prompt": False})).json
            usage = (await ask(server, body={"messages": [turn]})).json["usage"]
            text = (await ask(server, "/v1/completions/render", {"prompt": ["a", "b" * 9]})).json
        assert one["tokens"] == rendered["token_ids"]
        assert one["count"] == usage["prompt_tokens"] == len(one["tokens"])
        assert two["tokens"][: one["count"] - 1] == one["tokens"][:-1]
        assert bare["count"] < one["count"]
        assert [len(prompt["token_ids"]) for prompt in text] == [1, 3]

    async def test_the_cache_is_reset_when_nobody_runs(self) -> None:
        """`/reset_prefix_cache` forgets everything; while a request runs it is refused."""
        body = {**HELLO, "messages": [{"role": "user", "content": "x" * 640}]}
        async with served() as server:
            await ask(server, body=body)
            assert (await ask(server, "/reset_prefix_cache", {})).status == 200
            usage = (await ask(server, body=body)).json["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0

    async def test_the_vllm_adapter_reads_it(self) -> None:
        """What kvfleet reads from vLLM's pages it reads here."""
        async with served() as server:
            adapter = VLLMAdapter(endpoint=server.url, model_id="demo")
            await ask(server, body={**HELLO, "messages": [{"role": "user", "content": "x" * 640}]})
            load = await adapter.get_load()
            health = await adapter.health_check()
            await adapter.aclose()
        assert (load.running, load.waiting, load.kv_usage) == (0, 0, 0.0)
        assert (load.cache_blocks, load.block_tokens, load.prefix_queries_tokens) == (2048, 16, 168.0)
        assert health.healthy

    async def test_what_is_no_http_1_is_survived(self) -> None:
        """A peer that begins with HTTP/2 is told off, and the next one is served."""
        async with served() as server:
            port = int(server.url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            assert (await reader.read()).startswith(b"HTTP/1.1 400")
            writer.close()
            assert (await ask(server, "/health")).status == 200


class TestCommands:
    async def test_the_state_says_what_it_is_and_does(self) -> None:
        """Its model, its pace, its load, its faults."""
        async with served(speed=3.0) as server:
            state = (await ask(server, "/mock")).json
        assert (state["model"], state["spec"]["speed"], state["faults"]) == ("demo", 3.0, [])
        assert state["load"]["running"] == 0

    async def test_its_speed_can_be_changed_while_it_runs(self) -> None:
        """A stream that would take minutes is over at once when the engine is told to hurry."""
        async with served(speed=1.0, decode_ms_per_token=1000, answer_tokens=500) as server:
            slow = asyncio.create_task(ask(server, body=STREAM))
            await until(lambda: server.engine.adapter.live.load().running)
            state = (await ask(server, "/mock/speed", {"speed": 1e6})).json
            assert state["spec"]["speed"] == 1e6
            assert (await slow).events[-1] == "[DONE]"
            assert (await ask(server, "/mock/speed", {"speed": 0})).status == 400

    async def test_commands_are_json(self) -> None:
        """What is no JSON is refused, in words."""
        async with served() as server:
            port = int(server.url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /mock/faults HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\nconnection: close\r\n\r\n{x}")
            body = (await reader.read()).partition(b"\r\n\r\n")[2]
            writer.close()
        assert json.loads(body)["error"]["message"].startswith("the body is not JSON")
