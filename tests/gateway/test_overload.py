"""A gateway that is offered twice what its engines can do: it serves as much as they can, and fairly."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import httpx
import orjson
import pytest

from kvfleet.adapters.call import Call, Reply
from kvfleet.config.overload import OverloadConfig, TenantShare
from kvfleet.config.schema import (
    FleetConfig,
    GatewayConfig,
    ModelConfig,
    TelemetryConfig,
    TenantConfig,
    TraceStoreConfig,
)
from kvfleet.errors import BackendError, Fault
from kvfleet.gateway.exchange import Exchange, Pairs
from kvfleet.gateway.server import Serving, running
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter

BODY = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}]}
SLOTS, SERVICE_S = 2, 0.2
"""What each of the two engines can do: so many requests at a time, each in so many seconds; 20 a second together."""


@attrs.define(kw_only=True)
class Engine(FakeAdapter):
    """Takes a while, and breaks down if it has more to do than it can."""

    service_s: float = SERVICE_S
    busy: int = 0
    thrashed: int = 0
    left: int = 0
    done: int = 0

    async def send(self, call: Call) -> Reply:
        self.busy += 1
        try:
            if self.busy > 2 * SLOTS:
                self.thrashed += 1
                raise BackendError(Fault.OVERLOADED, "it thrashes")
            await asyncio.sleep(self.service_s)
            self.done += 1
            return await super().send(call)
        except asyncio.CancelledError:
            self.left += 1
            raise
        finally:
            self.busy -= 1


@attrs.define
class World:
    """A gateway, its engines, and a client."""

    serving: Serving
    engines: tuple[Engine, ...]
    client: httpx.AsyncClient

    async def ask(self, tenant: str = "loud", priority: str = "", **more: Any) -> httpx.Response:
        headers = {"X-Tenant": tenant, "X-Priority": priority, **more.pop("headers", {})}
        kept = {name: value for name, value in headers.items() if value}
        return await self.client.post("/v1/chat/completions", json={**BODY, **more}, headers=kept)

    @property
    def done(self) -> int:
        """Calls that the engines have done."""
        return sum(engine.done for engine in self.engines)

    @property
    def queue(self) -> Any:
        return self.serving.router.state()["stages"]["admit.queue"]


@asynccontextmanager
async def world(*, service_s: float = SERVICE_S, **overload: Any) -> AsyncIterator[World]:
    """Two engines of two slots each."""
    endpoints = ("mock://a", "mock://b")
    config = FleetConfig(
        models=(ModelConfig(name="m", endpoint=endpoints[0], replicas=endpoints[1:], provider="mock"),),
        overload=OverloadConfig(max_in_flight_per_replica=SLOTS, priority_header="X-Priority", **overload),
        gateway=GatewayConfig(tenant_header="X-Tenant"),
        tenants={name: TenantConfig() for name in ("loud", "quiet", "vip")},
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )
    engines = tuple(Engine(endpoint=one, model_id="m", service_s=service_s) for one in endpoints)
    router = Router(config, adapters={f"m@{one.endpoint}": one for one in engines}, polls=False)
    limits = httpx.Limits(max_connections=None)
    async with (
        running(config, router=router) as serving,
        httpx.AsyncClient(base_url=serving.url, limits=limits, timeout=30) as client,
    ):
        yield World(serving, engines, client)


async def test_at_twice_its_capacity_its_engines_stay_busy_and_every_tenant_gets_its_share() -> None:
    """Two requests for each that the engines have done; how much is served is `benchmarks/overload.py`'s to say.

    Those that cannot be served are told so at once and when to come back; the tenant that asks for its share gets it,
    whatever the other one asks for; the important go first.
    """
    shares = {"vip": TenantShare(priority=1)}
    async with world(max_queue=12, max_wait_ms=20_000, tenants=shares) as here:
        for _ in range(8):
            await here.ask("loud")
        before, idle = here.done, 0
        wanted = (["loud"] * 11 + ["quiet"] * 4 + ["vip"]) * 8
        asked: list[tuple[str, asyncio.Task[httpx.Response]]] = []
        for i, tenant in enumerate(wanted):
            done = before + (i - 4 * SLOTS) // 2
            await until(lambda done=done: here.done > done or not here.queue["in_flight"])
            await asyncio.sleep(0.005)
            asked.append((tenant, asyncio.create_task(here.ask(tenant))))
            idle += here.queue["waiting"] > 0 and here.queue["in_flight"] < 2 * SLOTS
        answers = [(tenant, await task) for tenant, task in asked]
        assert idle <= 0.05 * len(wanted)
        assert sum(engine.thrashed for engine in here.engines) <= 0.05 * len(wanted)
        served = Counter(tenant for tenant, answer in answers if answer.status_code == 200)
        refused = [answer for _, answer in answers if answer.status_code != 200]
        assert served["vip"] == 8
        assert served["quiet"] >= 0.7 * wanted.count("quiet")
        assert served["loud"] < 0.6 * wanted.count("loud")
        assert {(one.status_code, one.json()["error"]["code"]) for one in refused} == {(503, "overloaded")}
        assert all(1 <= int(one.headers["retry-after"]) <= 30 for one in refused)
        assert all("x-should-retry" not in one.headers for one in refused)
        assert (here.queue["in_flight"], here.queue["waiting"]) == (0, 0)


async def test_the_wait_is_in_the_trace_and_is_spent_from_the_deadline() -> None:
    """A request that waits for longer than its deadline gets a 504 then, and leaves the queue."""
    async with world(refuse_late=False) as here:
        first = [asyncio.create_task(here.ask()) for _ in range(4)]
        await until(lambda: here.queue["in_flight"] == 4)
        late = await here.ask(headers={"X-KVFleet-Timeout": "50"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert here.queue["waiting"] == 0
        waits = await here.ask()
        shown = (await here.client.get(f"/dashboard/api/route/{waits.headers['x-kvfleet-trace']}")).json()
        stage = next(one for one in shown["stages"] if one["stage"] == "admit.queue")
        assert 0 < stage["waited_s"] < 5
        assert {one.status_code for one in await asyncio.gather(*first)} == {200}
        page = (await here.client.get("/metrics")).text
        assert 'kvfleet_queue_wait_seconds_count{priority="0"} 1.0' in page


async def test_a_client_that_leaves_the_queue_takes_no_place() -> None:
    """Its request is gone from the queue at once, and the engines never hear of it."""
    async with world(service_s=2.0) as here:
        first = [asyncio.create_task(here.ask()) for _ in range(4)]
        await until(lambda: here.queue["in_flight"] == 4)
        left = asyncio.create_task(here.ask())
        await until(lambda: here.queue["waiting"] == 1)
        left.cancel()
        await until(lambda: here.queue["waiting"] == 0)
        assert here.queue["in_flight"] == 4
        await asyncio.gather(*first)
        assert sum(len(engine.calls) for engine in here.engines) == 4
        assert here.queue["in_flight"] == 0


@attrs.define(eq=False)
class AtHand(Exchange):
    """A request whose body is there, and whose answer is taken at once: whoever waits, waits for something else."""

    said: bytes = b""
    answer: bytes = b""
    more: list[tuple[bytes, bytes]] = attrs.field(factory=list)

    async def body(self, limit: int) -> bytes:
        return self.said

    async def start(self, status: int, headers: Pairs) -> None:
        self.status, self.more = status, headers

    async def whole(self, status: int, body: bytes, headers: Pairs) -> None:
        self.status, self.answer, self.more = status, body, headers

    async def piece(self, body: bytes) -> None:
        self.answer += body

    async def end(self, body: bytes = b"") -> None:
        self.answer += body

    def watch(self) -> None: ...

    def unwatch(self) -> None: ...

    def finish(self) -> None: ...


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_refusal_waits_for_nothing(path: str, stream: bool) -> None:
    """From the body to the answer's bytes it is one turn of the event loop: nobody else runs in between."""
    async with world(service_s=0.5, max_queue=0) as here:
        first = [asyncio.create_task(here.ask()) for _ in range(4)]
        await until(lambda: here.queue["in_flight"] == 4)
        said = orjson.dumps({**BODY, "stream": stream, "max_tokens": 9})
        fields = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), (b"x-tenant", b"loud")]
        exchange = AtHand("POST", path, fields, said=said)
        answering = here.serving.gateway.handle(exchange)
        with pytest.raises(StopIteration):
            answering.send(None)  # else it would give what it waits for
        assert exchange.status == 503
        assert b"overloaded" in exchange.answer
        assert b"retry-after" in dict(exchange.more)
        assert {one.status_code for one in await asyncio.gather(*first)} == {200}


@pytest.mark.parametrize("priority", ["1", "9"])
async def test_a_client_cannot_make_itself_more_important_than_it_may(priority: str) -> None:
    """Without `max_priority` the header can only ask for less."""
    async with world() as here:
        first = [asyncio.create_task(here.ask()) for _ in range(4)]
        await until(lambda: here.queue["in_flight"] == 4)
        waits = asyncio.create_task(here.ask(priority=priority))
        await until(lambda: here.queue["waiting"] == 1)
        page = (await here.client.get("/metrics")).text
        assert 'kvfleet_queue_depth{priority="0"} 1.0' in page
        await asyncio.gather(*first, waits)


async def until(holds: Any) -> None:
    """Let the loop run until something holds."""
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.001)
