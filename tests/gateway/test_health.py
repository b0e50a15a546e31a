"""Health behind a running gateway: breakers, panic and slow start, as clients, traces and metrics see them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import httpx
import pytest

from kvfleet.adapters.call import Call, Reply
from kvfleet.clock import FrozenClock
from kvfleet.config.health import HealthConfig
from kvfleet.config.overload import OverloadConfig
from kvfleet.config.schema import FleetConfig, ModelConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter
from tests.faults.site import Site, site
from tests.faults.tongues import CHAT, MODEL

ASK = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}]}
NO_QUEUE = OverloadConfig()
ENDPOINTS = tuple(f"mock://gpu-{i}" for i in range(3))


@attrs.define(kw_only=True)
class Engine(FakeAdapter):
    """Answers at once, or, with `waits`, fails once its gate is opened."""

    waits: bool = False
    gate: asyncio.Event = attrs.field(factory=asyncio.Event)

    async def send(self, call: Call) -> Reply:
        if self.waits:
            self.calls.append(call)
            await self.gate.wait()
            raise BackendError(Fault.SERVER_ERROR, "it broke")
        return await super().send(call)


@attrs.define
class World:
    """A gateway with fake engines, and a client."""

    router: Router
    clock: FrozenClock
    client: httpx.AsyncClient
    engines: tuple[Engine, ...]

    async def ask(self) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json=ASK)

    def fail(self, number: int, fault: Fault = Fault.CONNECT) -> None:
        """Open a replica's breaker."""
        for _ in range(3):
            self.router.services.health.record_failure(ENDPOINTS[number], fault)

    async def first_called(self) -> int:
        """The number of the first engine that is called."""
        while True:
            for number, engine in enumerate(self.engines):
                if engine.calls:
                    return number
            await asyncio.sleep(0.001)

    async def explained(self) -> dict[str, Any]:
        return (await self.client.post("/v1/route/explain", json=ASK)).json()


@asynccontextmanager
async def world(*, waits: bool = False, overload: OverloadConfig = NO_QUEUE, **health: Any) -> AsyncIterator[World]:
    """Three replicas of one model."""
    config = FleetConfig(
        models=(ModelConfig(name="m", endpoint=ENDPOINTS[0], replicas=ENDPOINTS[1:], provider="mock"),),
        strategy="round_robin",
        health=HealthConfig(**health),
        overload=overload,
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )
    clock = FrozenClock()
    engines = tuple(Engine(endpoint=endpoint, model_id="m", waits=waits) for endpoint in ENDPOINTS)
    adapters = {f"m@{one.endpoint}": one for one in engines}
    router = Router(config, clock=clock, adapters=adapters, polls=False, seed=3)
    async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        yield World(router, clock, client, engines)


async def test_panic_uses_all_and_says_so() -> None:
    """With two of three down, all are used; the trace names the model, and a metric counts the requests."""
    async with world(panic_threshold_percent=50) as here:
        here.fail(0)
        here.fail(1)
        stages = (await here.explained())["stages"]
        assert next(stage for stage in stages if stage["stage"] == "filter.health")["panic"] == ["m"]
        assert [(await here.ask()).status_code for _ in range(6)] == [200] * 6
        assert sum(len(engine.calls) for engine in here.engines[:2]) >= 1
        assert not here.router.services.health.panicking, "an answer closes a breaker, and two of three are no panic"
        page = (await here.client.get("/metrics")).text
        counted = re.search(r'kvfleet_panic_routes_total\{model="m"\} (\d)', page)
        assert counted is not None
        assert 1 <= int(counted[1]) <= 3
        assert f'kvfleet_ejections_total{{cause="calls",endpoint="{ENDPOINTS[0]}"}} 1.0' in page


async def test_without_panic_the_rest_serves_and_the_state_is_shown() -> None:
    """Nobody goes to what is down; health, share and metrics show what is out and what comes back."""
    async with world(slow_start_seconds=10) as here:
        here.fail(0)
        here.fail(1)
        for _ in range(4):
            assert (await here.ask()).status_code == 200
        assert [len(engine.calls) for engine in here.engines] == [0, 0, 4]
        here.clock.advance(61)
        health = here.router.services.health
        health.begin(ENDPOINTS[0])
        health.record_success(ENDPOINTS[0])
        here.clock.advance(5)
        shown = (await here.client.get("/health")).json()["endpoints"]
        assert [shown[f"m#{i}"]["share"] for i in (1, 3)] == [0.5, 1.0]
        assert shown["m#2"]["breaker"] == "half_open"
        page = (await here.client.get("/metrics")).text
        assert f'kvfleet_replica_share{{endpoint="{ENDPOINTS[0]}",model="m"}} 0.5' in page


async def test_while_the_only_probe_is_under_way_others_are_told_to_come_back() -> None:
    """If there is nobody else, those that are not the probe get a 503 that says when to try again."""
    async with world() as here:
        for number in range(3):
            here.fail(number)
        here.clock.advance(61)
        assert all(here.router.services.health.begin(endpoint) for endpoint in ENDPOINTS)
        answer = await here.ask()
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], answer.headers["retry-after"]) == (503, "no_candidates", "1")
        assert [len(engine.calls) for engine in here.engines] == [0, 0, 0]


@pytest.mark.parametrize("comes_back", [True, False])
async def test_with_a_queue_those_beside_a_probe_wait_for_its_outcome(comes_back: bool) -> None:
    """They are answered if the engine is back, and else told when to come again."""
    async with world(overload=OverloadConfig(max_in_flight=100, max_wait_ms=60_000)) as here:
        for number in range(3):
            here.fail(number)
        here.clock.advance(61)
        health = here.router.services.health
        assert all(health.begin(endpoint) for endpoint in ENDPOINTS)
        asking = [asyncio.create_task(here.ask()) for _ in range(5)]
        while (await here.client.get("/metrics")).text.count('kvfleet_queue_depth{priority="0"} 5.0') == 0:
            assert not any(task.done() for task in asking)
            await asyncio.sleep(0.001)
        if comes_back:
            health.record_success(ENDPOINTS[0])
        else:
            for number in range(3):
                here.fail(number)
        answers = await asyncio.gather(*asking)
        assert [answer.status_code for answer in answers] == [200 if comes_back else 503] * 5
        assert [answer.headers.get("retry-after") for answer in answers] == [None if comes_back else "60"] * 5
        assert len(here.engines[0].calls) == 5 * comes_back


async def test_a_request_that_was_decided_before_does_not_become_a_second_probe() -> None:
    """Its fallback would go where a probe is under way: the attempt is not made, and the error says so."""
    async with world(waits=True) as here:
        asking = asyncio.create_task(here.ask())
        busy = await here.first_called()
        for number in {0, 1, 2} - {busy}:
            here.fail(number)
        here.clock.advance(61)
        health = here.router.services.health
        assert all(health.begin(ENDPOINTS[number]) for number in {0, 1, 2} - {busy})
        here.engines[busy].gate.set()
        answer = await asking
        attempts = answer.json()["error"]["kvfleet"]["attempts"]
        assert [one["fault"] for one in attempts] == ["server_error", "circuit_open", "circuit_open", "server_error"]
        assert [len(engine.calls) for engine in here.engines] == [2 * (number == busy) for number in range(3)]
        assert not health.begin(ENDPOINTS[(busy + 1) % 3]), "what was not called says nothing of the probe"


def unlike(one: Site, *names: str) -> FleetConfig:
    """A vLLM engine for each model; all of them serve ``mock``."""
    models = tuple(
        ModelConfig(name=name, provider="vllm", endpoint=engine.url)
        for name, engine in zip(names, one.engines, strict=True)
    )
    return FleetConfig(models=models, telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)))


async def test_an_engine_that_serves_another_model_is_not_asked_and_that_is_said() -> None:
    """Its neighbour answers; whoever wants its model is told what it serves, and so is whoever looks at health."""
    async with site(2) as one:
        config = unlike(one, "other", MODEL)
        router = Router(config, polls=False)
        async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            await router.health_check_all()
            assert [(await client.post(CHAT.path, json=ASK)).status_code for _ in range(4)] == [200] * 4
            assert [engine.chats for engine in one.engines] == [0, 4]
            refused = await client.post(CHAT.path, json={**ASK, "model": "other"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_candidates")
            excluded = refused.json()["error"]["kvfleet"]["excluded"]["other"]
            assert excluded == {"by": "filter.health", "rule": "model", "reason": "the engine serves mock, not other"}
            shown = (await client.get("/health")).json()
            assert (shown["status"], shown["models"]["other"]["usable"]) == ("degraded", 0)
            assert shown["endpoints"]["other#1"]["reason"] == "the engine serves mock, not other"
            assert (await client.get("/readyz")).status_code == 200
    async with site(1) as one:
        config = unlike(one, "other")
        router = Router(config, polls=False)
        async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            await router.health_check_all()
            assert (await client.get("/readyz")).status_code == 503
