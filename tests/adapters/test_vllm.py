"""vLLM, from what version 0.32 was recorded to say, and from the names older ones use."""

from __future__ import annotations

import attrs
import httpx
import pytest

from kvfleet.adapters.base import EngineLoad
from kvfleet.adapters.call import Operation
from kvfleet.adapters.connections import Connections
from kvfleet.adapters.vllm import VLLMAdapter
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault
from tests.adapters.paged import paged, sample

TWO_ENGINES = b"""
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 5.0
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:num_requests_waiting{engine="1",model_name="m"} 7.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 1.0
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0
vllm:prefix_cache_queries_total{engine="1",model_name="m"} 300.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 50.0
vllm:prefix_cache_hits_total{engine="1",model_name="m"} 250.0
vllm:generation_tokens_total{engine="0",model_name="m"} 1000.0
vllm:generation_tokens_total{engine="1",model_name="m"} 500.0
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="900"} 1.0
"""

OLD = b"""
vllm:num_requests_running{model_name="m"} 1.0
vllm:num_requests_waiting{model_name="m"} 2.0
vllm:gpu_cache_usage_perc{model_name="m"} 0.25
vllm:cpu_cache_usage_perc{model_name="m"} 0.125
vllm:gpu_prefix_cache_queries{model_name="m"} 10.0
vllm:gpu_prefix_cache_hits{model_name="m"} 5.0
vllm:avg_generation_throughput_toks_per_s{model_name="m"} 42.5
vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0
"""


async def test_load_of_a_recorded_engine() -> None:
    """The current names, on a page as the engine wrote it."""
    adapter, asked = paged(VLLMAdapter, {"/metrics": sample("vllm_metrics.txt")})
    assert await adapter.get_load() == EngineLoad(
        running=0,
        waiting=0,
        kv_usage=0.0,
        cache_blocks=16384,
        block_tokens=32,
        cache_tokens=524_288,
        prefix_queries_tokens=0.0,
        prefix_hits_tokens=0.0,
    )
    assert asked == ["/metrics"]


async def test_several_engines_of_one_process() -> None:
    """Requests, tokens and blocks are summed, the use of the cache is their mean."""
    adapter, _ = paged(VLLMAdapter, {"/metrics": TWO_ENGINES})
    load = await adapter.get_load()
    assert load == EngineLoad(
        running=8,
        waiting=7,
        kv_usage=0.75,
        cache_blocks=1900,
        block_tokens=16,
        prefix_queries_tokens=400.0,
        prefix_hits_tokens=300.0,
    )
    assert load.prefix_hit_rate == 0.75


async def test_one_rank_of_an_engine() -> None:
    """Has figures of its own on the page, and its requests say whose they are."""
    model = ModelConfig(name="m", endpoint="http://gpu-1:8000/v1#1", provider="vllm", custom_headers={"x-team": "ml"})
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=TWO_ENGINES)

    adapter = VLLMAdapter.from_config(model, connections=Connections(transport=httpx.MockTransport(handler)))
    load = await adapter.get_load()
    assert attrs.evolve(load, tokens_per_second=None) == EngineLoad(
        running=5,
        waiting=7,
        kv_usage=1.0,
        cache_blocks=900,
        block_tokens=16,
        prefix_queries_tokens=300.0,
        prefix_hits_tokens=250.0,
    )
    (asked,) = seen
    assert str(asked.url) == "http://gpu-1:8000/metrics"
    assert (asked.headers["x-data-parallel-rank"], asked.headers["x-team"]) == ("1", "ml")


async def test_one_rank_of_an_engine_without_metrics() -> None:
    """What the engine says of all its ranks together is not the load of one."""
    adapter, asked = paged(VLLMAdapter, {"/load": b'{"server_load": 9}'}, endpoint="http://gpu-1:8000#0")
    assert await adapter.get_load() == EngineLoad()
    assert asked == ["/metrics"]


async def test_throughput_between_two_readings() -> None:
    """Generated tokens per second, from one reading of the counter to the next."""
    clock = FrozenClock()
    pages = {"/metrics": TWO_ENGINES}
    adapter, _ = paged(VLLMAdapter, pages, clock)
    assert (await adapter.get_load()).tokens_per_second is None
    clock.advance(2.0)
    pages["/metrics"] = TWO_ENGINES.replace(b" 500.0", b" 700.0")
    assert (await adapter.get_load()).tokens_per_second == 100.0


async def test_the_page_is_shared() -> None:
    """Two models of one server cost one page, twice a second at most."""
    clock = FrozenClock()
    adapter, asked = paged(VLLMAdapter, {"/metrics": TWO_ENGINES}, clock)
    other = VLLMAdapter(endpoint="http://gpu-1:8000", model_id="lora", connections=adapter.connections)
    await adapter.get_load()
    await other.get_load()
    assert asked == ["/metrics"]
    clock.advance(1.0)
    await other.get_load()
    assert asked == ["/metrics", "/metrics"]


async def test_older_names() -> None:
    """Engines from before 0.11 speak of the GPU's cache, and have gauges that went away."""
    adapter, _ = paged(VLLMAdapter, {"/metrics": OLD})
    assert await adapter.get_load() == EngineLoad(
        running=1,
        waiting=2,
        kv_usage=0.25,
        block_tokens=16,
        prefix_queries_tokens=10.0,
        prefix_hits_tokens=5.0,
        tokens_per_second=42.5,
    )


@pytest.mark.parametrize(
    ("page", "state"),
    [
        (
            OLD,
            {
                "kv_cache_usage_pct": 25.0,
                "cpu_cache_usage_pct": 12.5,
                "num_requests_running": 1.0,
                "num_requests_waiting": 2.0,
                "prefix_cache_hit_rate": 0.5,
            },
        ),
        (
            TWO_ENGINES,
            {
                "kv_cache_usage_pct": 75.0,
                "num_requests_running": 8.0,
                "num_requests_waiting": 7.0,
                "prefix_cache_hit_rate": 0.75,
            },
        ),
        (b"", {}),
    ],
)
async def test_cache_state(page: bytes, state: dict[str, float]) -> None:
    """The documented keys; what the engine does not say is absent."""
    adapter, _ = paged(VLLMAdapter, {"/metrics": page})
    assert await adapter.get_cache_state() == state


async def test_health_with_load() -> None:
    """A healthy engine's check tells its queue too."""
    adapter, asked = paged(VLLMAdapter, {"/health": b"", "/metrics": TWO_ENGINES})
    found = await adapter.health_check()
    assert (found.healthy, found.queue_depth, found.active_requests, found.kv_usage) == (True, 7, 8, 0.75)
    assert asked == ["/health", "/metrics"]


@pytest.mark.parametrize("metrics", [404, 500])
async def test_health_without_metrics(metrics: int) -> None:
    """An engine that is up is healthy, whatever becomes of its metrics."""
    adapter, _ = paged(VLLMAdapter, {"/health": b"", "/metrics": metrics})
    found = await adapter.health_check()
    assert (found.healthy, found.queue_depth) == (True, None)


async def test_a_sick_engine_is_not_asked_for_more() -> None:
    """Its metrics would only cost another timeout."""
    adapter, asked = paged(VLLMAdapter, {"/health": 503})
    found = await adapter.health_check()
    assert (found.healthy, found.error) == (False, "the backend is overloaded (status 503)")
    assert asked == ["/health"]


async def test_load_without_a_metrics_page() -> None:
    """`/load` stands in, where it is switched on; else nothing is known, which is not zero."""
    adapter, _ = paged(VLLMAdapter, {"/load": b'{"server_load":4}'})
    assert await adapter.get_load() == EngineLoad(running=4)
    adapter, _ = paged(VLLMAdapter, {})
    assert await adapter.get_load() == EngineLoad()
    assert await adapter.get_metrics() == {}


async def test_a_broken_metrics_page_is_an_error() -> None:
    """A page that should be there and is not tells so."""
    adapter, _ = paged(VLLMAdapter, {"/metrics": 500})
    with pytest.raises(BackendError) as raised:
        await adapter.get_load()
    assert raised.value.kind is Fault.SERVER_ERROR


async def test_metrics_by_their_own_names() -> None:
    """Every figure of the engine's own, summed over its engines; the process's own figures are not its."""
    adapter, _ = paged(VLLMAdapter, {"/metrics": sample("vllm_metrics.txt")})
    found = await adapter.get_metrics()
    assert found["vllm:num_requests_running"] == 0.0
    assert found["vllm:cache_config_info"] == 1.0
    assert not any(name.endswith(("_bucket", "_created")) or not name.startswith("vllm:") for name in found)


async def test_prompt_tokens() -> None:
    """What the engine makes of a chat, and of a text; several texts at once have no one prompt."""
    adapter, asked = paged(VLLMAdapter, {"/tokenize": b'{"count":2,"max_model_len":8192,"tokens":[1,1841]}'})
    body = {"model": "mine", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    assert await adapter.prompt_tokens(Operation.CHAT, body) == [1, 1841]
    assert await adapter.prompt_tokens(Operation.COMPLETION, {"prompt": "Hi"}) == [1, 1841]
    assert await adapter.prompt_tokens(Operation.COMPLETION, {"prompt": ["Hi", "you"]}) is None
    assert await adapter.prompt_tokens(Operation.EMBEDDING, {"input": "Hi"}) is None
    assert asked == ["/tokenize"] * 2


@pytest.mark.parametrize("answer", [b"{}", b"[]", b'{"tokens":["a"]}', b'{"tokens":[true]}'])
async def test_an_answer_without_tokens(answer: bytes) -> None:
    """Is none."""
    adapter, _ = paged(VLLMAdapter, {"/tokenize": answer})
    with pytest.raises(BackendError) as raised:
        await adapter.prompt_tokens(Operation.CHAT, {"messages": []})
    assert raised.value.kind is Fault.PROTOCOL


async def test_the_size_of_a_hybrid_models_cache() -> None:
    """Is what vLLM itself reckons: its blocks are those of several groups of layers, so their tokens are too many."""
    page = b'vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="110",kv_cache_size_tokens="1184"} 1\n'
    adapter, _ = paged(VLLMAdapter, {"/metrics": page})
    load = await adapter.get_load()
    assert (load.cache_blocks, load.block_tokens, load.capacity_tokens) == (110, 32, 1184)
