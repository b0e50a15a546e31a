"""llama.cpp's server, through its adapter and through the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import orjson
import pytest

from kvfleet.adapters.llama_cpp import LlamaCppAdapter
from kvfleet.errors import BackendError, Fault
from tests.adapters.told import drained_until_it_fails
from tests.real import engines
from tests.real.contract import ASK, ASK_COUNT, HELLO, AdapterContract, GatewayContract, chat, whole
from tests.real.engines import Engine
from tests.real.gateways import gateway as gateway_of
from tests.real.gateways import model


@pytest.fixture(scope="module")
def engine(llama_cpp: Engine) -> Engine:
    """The engine of this module."""
    return llama_cpp


@pytest.fixture
async def adapter(engine: Engine) -> AsyncIterator[LlamaCppAdapter]:
    """Its adapter."""
    made = LlamaCppAdapter(endpoint=engine.url, model_id="tiny")
    yield made
    await made.aclose()


@pytest.fixture(scope="module")
def gateway(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A gateway in front of it."""
    made = gateway_of([model(engine, "llama_cpp")], tmp_path_factory.mktemp("gateway"))
    made.start()
    yield made
    made.stop()


class TestAdapter(AdapterContract):
    """What every engine must do, and what this one alone does."""

    async def test_load_and_cache(self, adapter: LlamaCppAdapter) -> None:
        """Slots, and the share of prompt tokens that were found in their caches."""
        await whole(adapter, chat())
        await whole(adapter, chat())
        load = await adapter.get_load()
        assert (load.running, load.waiting) == (0, 0)
        assert load.prefix_hit_rate is not None
        assert 0 < load.prefix_hit_rate < 1
        metrics = await adapter.get_metrics()
        assert metrics["total_slots"] == 2
        assert metrics["llamacpp:prompt_tokens_total"] > 0

    async def test_fields_of_its_own_survive(self, adapter: LlamaCppAdapter) -> None:
        """In both directions: an option of llama.cpp is honoured, and its timings come back."""
        answer = await whole(adapter, chat(ASK_COUNT, max_tokens=50, n_predict=2, id_slot=1, cache_prompt=False))
        assert answer["timings"]["cache_n"] == 0
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


class TestGateway(GatewayContract):
    """The same through the gateway."""


def test_embeddings(tmp_path: Path) -> None:
    """One text and several, in both encodings, the same direct and through the gateway."""
    embedder = engines.llama_cpp(embeddings=True)
    embedder.start()
    made = gateway_of([model(embedder, "llama_cpp", capabilities={"model_type": "embedding"})], tmp_path)
    try:
        made.start()
        direct, routed = (
            openai.OpenAI(base_url=f"{one.url}/v1", api_key="none", max_retries=0) for one in (embedder, made)
        )
        for encoding in ("float", "base64"):
            one, other = (
                client.embeddings.create(model="tiny", input=["Hello", "count to ten"], encoding_format=encoding)
                for client in (direct, routed)
            )
            assert [entry.embedding for entry in other.data] == [entry.embedding for entry in one.data]
            assert other.usage == one.usage
        plain = routed.embeddings.create(model="tiny", input="Hello")  # the package asks for base64 and unpacks it
        assert [len(entry.embedding) for entry in plain.data] == [256]
        assert plain.usage.prompt_tokens > 0
    finally:
        made.stop()
        embedder.stop()


async def test_an_engine_that_is_killed_amid_its_answer_is_an_error() -> None:
    """What came is handed on; there is no ``[DONE]``; and the next call cannot connect."""
    doomed = engines.llama_cpp()
    doomed.start()
    made = LlamaCppAdapter(endpoint=doomed.url, model_id="tiny")
    try:
        reply = await made.send(chat(ASK_COUNT, stream=True, max_tokens=3500))
        assert reply.events is not None
        await anext(aiter(reply.events))
        doomed.kill()
        said, error = await drained_until_it_fails(reply)
        assert error is not None
        assert (error.kind, error.received) == (Fault.DISCONNECTED, True)
        assert b"[DONE]" not in said
        with pytest.raises(BackendError) as refused:
            await made.send(chat())
        assert refused.value.kind is Fault.CONNECT
        assert not (await made.health_check()).healthy
    finally:
        await made.aclose()
        doomed.stop()


def test_a_dead_replica_is_left_out_of_it(engine: Engine, tmp_path: Path) -> None:
    """The gateway has two replicas, one of which is not there: every request is answered, by the other."""
    gone = f"http://127.0.0.1:{engines.free_port()}"
    made = gateway_of([model(engine, "llama_cpp", replicas=[gone])], tmp_path)
    made.start()
    try:
        client = openai.OpenAI(base_url=f"{made.url}/v1", api_key="none", max_retries=0)
        for _ in range(8):
            raw = client.chat.completions.with_raw_response.create(model="tiny", messages=ASK, temperature=0)
            assert raw.parse().choices[0].message.content == HELLO
    finally:
        made.stop()


def test_a_gateway_stream_whose_engine_dies_ends_in_an_error(tmp_path: Path) -> None:
    """The client is told: an error event and no ``[DONE]``."""
    doomed = engines.llama_cpp()
    doomed.start()
    made = gateway_of([model(doomed, "llama_cpp")], tmp_path)
    try:
        made.start()
        client = openai.OpenAI(base_url=f"{made.url}/v1", api_key="none", max_retries=0)
        with client.chat.completions.with_streaming_response.create(
            model="tiny", messages=ASK_COUNT, stream=True, max_tokens=3500
        ) as response:
            lines = response.iter_lines()
            first = next(lines)
            doomed.kill()
            said = [line for line in lines if line.startswith("data:")]
        assert first.startswith("data:")
        assert "error" in orjson.loads(said[-1].removeprefix("data:"))
        assert not any("[DONE]" in line for line in said)
    finally:
        made.stop()
        doomed.stop()
