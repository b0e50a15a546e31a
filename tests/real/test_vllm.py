"""A vLLM on the CPU, through its adapter and through the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import attrs
import openai
import orjson
import pytest

from kvfleet.adapters.openai_compat import OpenAICompatAdapter
from kvfleet.adapters.vllm import VLLMAdapter
from kvfleet.errors import BackendError, Fault
from tests.real.contract import ASK, ASK_COUNT, HELLO, AdapterContract, GatewayContract, chat, completion, whole
from tests.real.engines import Engine
from tests.real.gateways import gateway as gateway_of
from tests.real.gateways import model


@pytest.fixture(scope="module")
def engine(vllm: Engine) -> Engine:
    """The engine of this module."""
    return vllm


@pytest.fixture
async def adapter(engine: Engine) -> AsyncIterator[VLLMAdapter]:
    """Its adapter."""
    made = VLLMAdapter(endpoint=engine.url, model_id="tiny")
    yield made
    await made.aclose()


@pytest.fixture(scope="module")
def gateway(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A gateway in front of it."""
    made = gateway_of([model(engine, "vllm")], tmp_path_factory.mktemp("gateway"))
    made.start()
    yield made
    made.stop()


class TestAdapter(AdapterContract):
    """What every engine must do, and what this one alone does."""

    async def test_load_and_cache(self, adapter: VLLMAdapter) -> None:
        """Queue, batch, the KV cache's size and use, and its hits, from the metrics page."""
        await whole(adapter, chat())
        load = await adapter.get_load()
        assert (load.running, load.waiting) == (0, 0)
        assert (load.cache_blocks, load.block_tokens) == (512, 32)
        assert load.kv_usage is not None
        assert 0 <= load.kv_usage < 1
        assert load.prefix_queries_tokens
        state = await adapter.get_cache_state()
        assert state.keys() >= {"kv_cache_usage_pct", "num_requests_running", "prefix_cache_hit_rate"}
        assert (await adapter.get_metrics())["vllm:prompt_tokens_total"] > 0

    async def test_an_unknown_model_is_not_found(self, engine: Engine) -> None:
        """The engine knows its models by name."""
        stranger = VLLMAdapter(endpoint=f"{engine.url}/v1", model_id="nobody")
        with pytest.raises(BackendError) as caught:
            await stranger.send(attrs.evolve(chat(), raw=b""))
        await stranger.aclose()
        assert (caught.value.kind, caught.value.status) == (Fault.NOT_FOUND, 404)

    async def test_several_choices(self, adapter: OpenAICompatAdapter) -> None:
        """Whole, and streamed: the stream is over when both are."""
        answer = await whole(adapter, chat(n=2, temperature=0.01))
        assert [choice["message"]["content"] for choice in answer["choices"]] == [HELLO, HELLO]
        reply = await adapter.send(chat(n=2, temperature=0.01, stream=True))
        assert reply.events is not None
        said = b"".join([piece async for piece in reply.events])
        events = [orjson.loads(line[6:]) for line in said.splitlines() if line.startswith(b"data: {")]
        choices = [event["choices"][0] for event in events]
        assert sorted(choice["index"] for choice in choices if choice["finish_reason"]) == [0, 1]

    async def test_several_prompts(self, adapter: OpenAICompatAdapter) -> None:
        """A text completion may have many."""
        answer = await whole(adapter, completion(prompt=["zero", "count"], max_tokens=2))
        assert [choice["text"] for choice in answer["choices"]] == [" one two", " one two"]

    async def test_fields_of_its_own_survive(self, adapter: OpenAICompatAdapter) -> None:
        """In both directions: vLLM's own sampling options and answers."""
        asked = chat(ASK_COUNT, max_tokens=10, stop_token_ids=[], min_tokens=2, return_token_ids=True, cache_salt="a")
        answer = await whole(adapter, asked)
        assert answer["prompt_token_ids"]
        assert len(answer["choices"][0]["token_ids"]) == 10


class TestGateway(GatewayContract):
    """The same through the gateway."""

    def test_fields_of_its_own_survive(self, routed: openai.OpenAI) -> None:
        """Given as the `openai` package lets one, in both directions."""
        found = routed.chat.completions.create(
            model="tiny", messages=ASK, temperature=0, extra_body={"return_token_ids": True, "priority": 0}
        )
        assert len(found.model_dump()["choices"][0]["token_ids"]) == 7
