"""SGLang, from what version 0.5.23 was recorded to say."""

from __future__ import annotations

import pytest

from kvfleet.adapters.base import EngineLoad
from kvfleet.adapters.call import Operation
from kvfleet.adapters.sglang import SGLangAdapter
from kvfleet.errors import BackendError
from tests.adapters.paged import paged, sample

RANKS = b"""
sglang:num_running_reqs{dp_rank="0",tp_rank="0",pp_rank="0"} 2.0
sglang:num_running_reqs{dp_rank="0",tp_rank="1",pp_rank="0"} 2.0
sglang:num_running_reqs{dp_rank="1",tp_rank="0",pp_rank="0"} 3.0
sglang:num_queue_reqs{dp_rank="0",tp_rank="0",pp_rank="0"} 1.0
sglang:num_queue_reqs{dp_rank="1",tp_rank="0",pp_rank="0"} 4.0
sglang:token_usage{dp_rank="0",tp_rank="0",pp_rank="0"} 0.5
sglang:token_usage{dp_rank="1",tp_rank="0",pp_rank="0"} 0.25
sglang:cache_config_info{num_pages="512",page_size="1"} 1.0
"""


async def test_load_of_a_recorded_engine() -> None:
    """The radix cache's size, use and hits, on a page as the engine wrote it."""
    adapter, asked = paged(SGLangAdapter, {"/metrics": sample("sglang_metrics.txt")})
    load = await adapter.get_load()
    assert load == EngineLoad(
        running=0,
        waiting=0,
        kv_usage=0.16,
        cache_blocks=1024,
        block_tokens=16,
        prefix_queries_tokens=35015.0,
        prefix_hits_tokens=23104.0,
        tokens_per_second=8.780760766606218,
    )
    assert load.prefix_hit_rate == pytest.approx(0.66, abs=0.01)
    assert asked == ["/metrics"]


async def test_ranks() -> None:
    """Data-parallel ranks are summed; tensor-parallel ones repeat the same figures."""
    adapter, _ = paged(SGLangAdapter, {"/metrics": RANKS})
    assert await adapter.get_load() == EngineLoad(
        running=5, waiting=5, kv_usage=0.375, cache_blocks=512, block_tokens=1
    )


async def test_one_rank() -> None:
    """Has its own figures, on the page and without it."""
    adapter, _ = paged(SGLangAdapter, {"/metrics": RANKS}, endpoint="http://gpu-1:8000#1")
    one = await adapter.get_load()
    both = await paged(SGLangAdapter, {"/metrics": RANKS})[0].get_load()
    other = await paged(SGLangAdapter, {"/metrics": RANKS}, endpoint="http://gpu-1:8000#0")[0].get_load()
    assert (one.running or 0) + (other.running or 0) == both.running
    assert one.running != other.running
    adapter, _ = paged(SGLangAdapter, {"/v1/loads?include=core": LOADS}, endpoint="http://gpu-1:8000#1")
    assert await adapter.get_load() == EngineLoad(running=3, waiting=0, kv_usage=0.1, tokens_per_second=5.5)


LOADS = (
    b'{"loads":[{"dp_rank":0,"num_running_reqs":2,"num_waiting_reqs":1,"token_usage":0.5,"gen_throughput":10.0},'
    b'{"dp_rank":1,"num_running_reqs":3,"num_waiting_reqs":0,"token_usage":0.1,"gen_throughput":5.5}]}'
)


@pytest.mark.parametrize(
    ("pages", "load"),
    [
        ({"/v1/loads?include=core": LOADS}, EngineLoad(running=5, waiting=1, kv_usage=0.3, tokens_per_second=15.5)),
        ({"/get_load": b'[{"dp_rank":0,"num_reqs":5,"num_waiting_reqs":2,"num_tokens":9}]'}, EngineLoad(running=3, waiting=2)),
        ({"/get_load": b"null"}, EngineLoad()),
    ],
)  # fmt: skip
async def test_load_without_a_metrics_page(pages: dict[str, bytes | int], load: EngineLoad) -> None:
    """Without `--enable-metrics` the load endpoints tell, the newer one first."""
    adapter, _ = paged(SGLangAdapter, pages)
    assert await adapter.get_load() == load


async def test_an_engine_without_any_load() -> None:
    """Where neither the page nor the endpoints are there, asking is an error."""
    adapter, _ = paged(SGLangAdapter, {})
    with pytest.raises(BackendError):
        await adapter.get_load()
    adapter, _ = paged(SGLangAdapter, {"/v1/loads?include=core": 500, "/get_load": b"[]"})
    with pytest.raises(BackendError):
        await adapter.get_load()


async def test_models_and_health() -> None:
    """The recorded list of models; a health check that tells the load."""
    pages = {"/v1/models": sample("sglang_models.json"), "/health": b"", "/metrics": RANKS}
    adapter, _ = paged(SGLangAdapter, pages)
    assert await adapter.list_models() == ("tiny-sgl",)
    found = await adapter.health_check()
    assert (found.healthy, found.queue_depth, found.active_requests) == (True, 5, 5)


async def test_prompt_tokens() -> None:
    """Of a plain prompt; of a chat it cannot say."""
    adapter, asked = paged(SGLangAdapter, {"/v1/tokenize": b'{"tokens":[1,2],"count":2}'})
    assert await adapter.prompt_tokens(Operation.COMPLETION, {"prompt": "Hi"}) == [1, 2]
    assert await adapter.prompt_tokens(Operation.CHAT, {"messages": []}) is None
    assert asked == ["/v1/tokenize"]
