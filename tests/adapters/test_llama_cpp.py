"""llama.cpp's server, from what it was recorded to say."""

from __future__ import annotations

import httpx
import orjson
import pytest

from kvfleet.adapters.base import EngineLoad
from kvfleet.adapters.call import Call, Operation, Usage
from kvfleet.adapters.connections import Connections
from kvfleet.adapters.llama_cpp import LlamaCppAdapter
from kvfleet.clock import FrozenClock
from kvfleet.errors import BackendError, Fault
from tests.adapters.paged import paged, sample


async def test_load_of_a_recorded_server() -> None:
    """Slots at work, what waits for one, and how much of the prompts came from the cache."""
    clock = FrozenClock()
    adapter, _ = paged(LlamaCppAdapter, {"/metrics": sample("llamacpp_metrics.txt")}, clock)
    load = await adapter.get_load()
    assert load == EngineLoad(running=0, waiting=0, prefix_queries_tokens=172.0, prefix_hits_tokens=28.0)
    assert load.prefix_hit_rate == pytest.approx(28 / 172)
    clock.advance(1.0)
    assert (await adapter.get_load()).tokens_per_second == 0.0


@pytest.mark.parametrize("metrics", [404, 501])
async def test_slots_tell_where_metrics_are_off(metrics: int) -> None:
    """Without `--metrics` the slots are counted; without those nothing is known."""
    slots = sample("llamacpp_slots.json").replace(b'"is_processing":false', b'"is_processing":true', 1)
    adapter, _ = paged(LlamaCppAdapter, {"/metrics": metrics, "/slots": slots})
    assert await adapter.get_load() == EngineLoad(running=1)
    adapter, _ = paged(LlamaCppAdapter, {"/metrics": metrics, "/slots": 501})
    assert await adapter.get_load() == EngineLoad()


async def test_a_server_that_loads_its_model() -> None:
    """While it loads, the server is not healthy, and the reason says why."""

    def handler(request: httpx.Request) -> httpx.Response:
        body = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
        return httpx.Response(503, json=body)

    connections = Connections(transport=httpx.MockTransport(handler), clock=FrozenClock())
    adapter = LlamaCppAdapter(endpoint="http://gpu-1:8080", model_id="m", connections=connections)
    found = await adapter.health_check()
    assert (found.healthy, found.error) == (False, "the engine is still loading its model")
    with pytest.raises(BackendError) as raised:
        await adapter.send(Call(operation=Operation.CHAT, body={}))
    assert raised.value.kind is Fault.OVERLOADED


async def test_metrics_and_props() -> None:
    """The page's figures, and the slots that there are."""
    props = b'{"default_generation_settings":{"n_ctx":8192},"total_slots":2}'
    adapter, _ = paged(LlamaCppAdapter, {"/metrics": sample("llamacpp_metrics.txt"), "/props": props})
    found = await adapter.get_metrics()
    assert (found["total_slots"], found["n_ctx"]) == (2.0, 8192.0)
    assert found["llamacpp:prompt_tokens_cached_total"] == 28.0


@pytest.mark.parametrize(
    ("usage", "timings", "cached"),
    [
        ({"prompt_tokens": 12, "completion_tokens": 3}, {"cache_n": 11}, 11),
        ({"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}, {"cache_n": 11}, 4),
        ({"prompt_tokens": 12, "completion_tokens": 3}, None, None),
    ],
)  # fmt: skip
def test_cached_tokens(usage: dict[str, object], timings: object, cached: int | None) -> None:
    """From the usage, and with older servers from the timings."""
    adapter = LlamaCppAdapter(endpoint="http://x", model_id="m")
    assert adapter.read_usage({"usage": usage, "timings": timings}) == Usage(12, 3, 15, cached)


async def test_a_recorded_answer() -> None:
    """A recorded chat goes through, and its cached tokens are known to be none."""
    answer = sample("llamacpp_chat.json")
    connections = Connections(
        transport=httpx.MockTransport(
            lambda _: httpx.Response(200, content=answer, headers={"content-type": "application/json; charset=utf-8"})
        )
    )
    adapter = LlamaCppAdapter(endpoint="http://x", model_id="m", connections=connections)
    reply = await adapter.send(Call(operation=Operation.CHAT, body={"model": "a"}, raw=b'{"model":"a"}'))
    assert (reply.body, reply.tally.usage) == (answer, Usage(12, 5, 17, 0))
    assert orjson.loads(reply.body)["timings"]["cache_n"] == 0


async def test_prompt_tokens() -> None:
    """A chat is laid out first, and its text tokenised."""
    pages = {"/apply-template": b'{"prompt":"<|im_start|>user"}', "/tokenize": b'{"tokens":[1,1841]}'}
    adapter, asked = paged(LlamaCppAdapter, pages)
    assert await adapter.prompt_tokens(Operation.CHAT, {"messages": []}) == [1, 1841]
    assert await adapter.prompt_tokens(Operation.COMPLETION, {"prompt": "Hi"}) == [1, 1841]
    assert await adapter.prompt_tokens(Operation.COMPLETION, {"prompt": [1]}) is None
    assert asked == ["/apply-template", "/tokenize", "/tokenize"]
