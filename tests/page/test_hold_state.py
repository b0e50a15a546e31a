"""What must hold of state: it is bounded, it belongs to one loop, and much of it costs little."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import httpx

from kvfleet.config.schema import FleetConfig, ModelConfig
from kvfleet.gateway.server import running
from kvfleet.pipeline.engine import Decision
from kvfleet.plugin.contract import RouteRequest
from kvfleet.runtime import Router
from kvfleet.sdk.sync_client import SyncFleetClient
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace.spans import Span, Trace
from tests.page.living import CHAT, QUIET, question
from tests.page.printed import TABLE
from tests.page.timing import takes_less_than_a_millisecond

MODEL = ModelConfig(name="m", endpoint="http://m", provider="vllm")


async def test_routers_in_two_event_loops_do_not_disturb_each_other() -> None:
    """A gateway here, a client with a loop of its own, and a router in a thread with another: all at once, each whole."""
    config = FleetConfig(models=(MODEL,), telemetry=QUIET)

    def router(says: str) -> Router:
        return Router(
            config,
            table=TABLE,
            adapters={MODEL.id: FakeAdapter(model_id="m", script=FakeReply(text=says))},
            polls=False,
        )

    heard: Counter[str] = Counter()

    async def in_a_loop_of_its_own() -> None:
        async with router("thread") as own:
            answers = await asyncio.gather(*(own.route(prompt=f"Hello {i}") for i in range(40)))
            heard.update(response.content for response, _ in answers)

    def talk(client: SyncFleetClient) -> None:
        heard.update(client.chat(f"Hello {i}").content for i in range(40))

    async with running(config, router=router("gateway")) as serving, httpx.AsyncClient(base_url=serving.url) as http:
        with SyncFleetClient(lambda: router("client")) as client:
            threads = [
                threading.Thread(target=asyncio.run, args=(in_a_loop_of_its_own(),)),
                threading.Thread(target=talk, args=(client,)),
            ]
            for thread in threads:
                thread.start()
            answers = await asyncio.gather(*(http.post(CHAT, json=question(f"Hello {i}")) for i in range(40)))
            heard.update(answer.json()["choices"][0]["message"]["content"] for answer in answers)
            await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in threads))
    assert heard == {"gateway": 40, "client": 40, "thread": 40}


async def test_500_models_decide_in_less_than_a_millisecond() -> None:
    """The default pipeline with its record, for a prompt of 2 KB."""
    models = tuple(
        ModelConfig(
            name=f"model-{i}",
            endpoint=f"http://gpu-{i}:8000",
            provider="vllm",
            quality_score=0.5 + (i % 5) / 10,
            latency_p50_ms=100 + 10 * (i % 11),
        )
        for i in range(500)
    )
    async with Router(FleetConfig(models=models, telemetry=QUIET), table=TABLE, polls=False) as router:
        asked = RouteRequest(body=question("word " * 400), request_id="r")

        async def decide() -> None:
            ctx, select = router.prepare(asked)
            trace = Trace("0" * 32, [Span("kvfleet.route", router.clock.time_ns())])
            await Decision(router.pipeline, ctx, trace, router.clock).run(select)

        assert await takes_less_than_a_millisecond(decide)
