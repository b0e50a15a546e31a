"""The gateway does not grow by the requests it answers. `benchmarks/soak.py` is the long version of this."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter

import httpx

from kvfleet.config.overload import OverloadConfig
from kvfleet.config.schema import CacheAffinityConfig, FleetConfig, ModelConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter

ROUND = 120


def objects() -> Counter[type]:
    """What Python keeps, by type."""
    gc.collect()
    return Counter(map(type, gc.get_objects()))


async def test_what_is_kept_does_not_grow_with_the_requests() -> None:
    """After what is remembered is full, 240 more requests (whole, streamed, given up, wrong) leave no objects behind."""
    config = FleetConfig(
        models=(ModelConfig(name="m", endpoint="mock://a", provider="mock"),),
        overload=OverloadConfig(max_in_flight=8, max_queue=8),
        cache_affinity=CacheAffinityConfig(enabled=False),  # it has a bound of its own, and a far one
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )
    engine = FakeAdapter(endpoint="mock://a", model_id="m")
    router = Router(config, adapters={"m@mock://a": engine}, polls=False, seed=1)
    async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:

        async def one(number: int) -> None:
            body = {"messages": [{"role": "user", "content": f"Question {number % 20}"}], "stream": number % 3 == 1}
            if number % 10 == 9:
                body["model"] = "nobody"
            if number % 3 == 2:
                async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
                    await anext(answer.aiter_lines())
                return
            await client.post("/v1/chat/completions", json=body)

        async def several(count: int) -> Counter[type]:
            for first in range(0, count, 5):
                await asyncio.gather(*(one(first + i) for i in range(5)))
            await router.settled()
            await asyncio.sleep(0.05)
            engine.calls.clear()
            return objects()

        await several(2 * ROUND)
        before = await several(ROUND)
        after = await several(2 * ROUND)
        grown = {kind: count for kind, count in (after - before).items() if count > ROUND / 2}
        assert not grown
        assert after.total() - before.total() < 2 * ROUND
