"""The section `slo` behind a running gateway: an engine that says how busy it is, and clients that are told when to return."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import attrs
import httpx
import orjson

from kvfleet.config.schema import (
    FleetConfig,
    GatewayConfig,
    ModelConfig,
    SLOConfig,
    StageConfig,
    TelemetryConfig,
    TenantConfig,
    TraceStoreConfig,
)
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Trace
from tests.gateway.upstream import whole

ASK = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}]}
ANSWER = {
    "object": "chat.completion",
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2},
}


@attrs.define
class Engine:
    """As much of vLLM as tells of its load and answers."""

    running: int = 0
    waiting: int = 0
    url: str = ""
    answered: int = 0
    writers: list[asyncio.StreamWriter] = attrs.field(factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer on one connection."""
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                lengths = (int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(next(lengths, 0))
                writer.write(self._says(head))
                await writer.drain()
        writer.close()

    def _says(self, head: bytes) -> bytes:
        if b" /metrics" in head:
            labels = '{model_name="m"}'
            told = (
                f"vllm:num_requests_running{labels} {self.running}\nvllm:num_requests_waiting{labels} {self.waiting}\n"
            )
            return whole(told.encode()).replace(b"application/json", b"text/plain")
        if head.startswith(b"post"):
            self.answered += 1
            return whole(orjson.dumps(ANSWER))
        return whole(b"{}")


@contextlib.asynccontextmanager
async def engine() -> AsyncIterator[Engine]:
    """An engine on a free port."""
    one = Engine()
    server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    one.url = f"http://{host}:{port}"
    async with server:
        try:
            yield one
        finally:
            for writer in one.writers:
                writer.close()


async def until(client: httpx.AsyncClient, status: int) -> httpx.Response:
    """Ask until the gateway has read how busy the engine is."""
    for _ in range(200):
        got = await client.post("/v1/chat/completions", json=ASK)
        if got.status_code == status:
            return got
        await asyncio.sleep(0.05)
    raise AssertionError(f"still {got.status_code}: {got.text}")


async def test_a_full_engine_gets_nothing_more_and_clients_are_told_to_come_back() -> None:
    """429 with Retry-After while as many wait as are served; answers again once the queue is gone."""
    async with engine() as busy:
        config = _fleet(busy)
        async with running(config) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            assert (await until(client, 200)).json()["choices"][0]["message"]["content"] == "Hi."
            busy.running, busy.waiting = 12, 30
            refused = await until(client, 429)
            assert int(refused.headers["retry-after"]) >= 1
            error: dict[str, Any] = refused.json()["error"]
            assert error["code"] == "rate_limit_exceeded"
            assert "30 requests wait beside 12 that it works on" in error["message"]
            asked = busy.answered
            assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 429
            assert busy.answered == asked
            busy.waiting = 0
            await until(client, 200)


def _fleet(one: Engine) -> FleetConfig:
    telemetry = TelemetryConfig(load_poll_interval_seconds=0.05, trace_store=TraceStoreConfig(enabled=False))
    model = ModelConfig(name="m", endpoint=one.url, provider="vllm")
    return FleetConfig(models=(model,), slo=SLOConfig(enabled=True), telemetry=telemetry)


class Kept:
    """A sink that keeps traces."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)


async def test_each_tenant_gets_the_cheapest_that_keeps_its_promise() -> None:
    """By quality and by time; after a failure the next cheapest that does, and the trace says the strategy."""
    models = [
        ModelConfig(
            name=name,
            provider="mock",
            endpoint=f"mock://{name}",
            quality_score=quality,
            latency_p50_ms=latency_ms,
            cost_per_1k_input_tokens=usd,
            cost_per_1k_output_tokens=usd,
            max_retries=0,
            options={"speed": 1000, **({"fail": "server_error"} if name == "medium" else {})},
        )
        for name, quality, latency_ms, usd in (
            ("small", 0.6, 200, 0.0001),
            ("medium", 0.8, 300, 0.001),
            ("large", 0.95, 300, 0.01),
        )
    ]
    promised = {"min_quality": 0.5, "tenants": {"writers": {"min_quality": 0.75}, "critics": {"min_quality": 0.9}}}
    config = FleetConfig(
        models=models,
        pipeline=(
            *(StageConfig(use=f"score.{name}") for name in ("cost", "latency", "quality")),
            StageConfig(use="filter.tenant"),
            StageConfig(use="select.slo", options=promised),
            StageConfig(use="execute.fallback"),
        ),
        gateway=GatewayConfig(tenant_header="X-Tenant-ID"),
        tenants={name: TenantConfig() for name in ("batch", "writers", "critics")},
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )
    sink = Kept()
    router = Router(config, polls=False, sinks=[sink])
    async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        for tenant, model in (("batch", "small"), ("writers", "large"), ("critics", "large")):
            answer = await client.post("/v1/chat/completions", json=ASK, headers={"X-Tenant-ID": tenant})
            assert (answer.status_code, answer.headers["x-kvfleet-model"]) == (200, model)
        await router.settled()
    chains = [[a.model for a in Explanation(trace).attempts] for trace in sink.traces]
    assert chains == [["small"], ["medium", "large"], ["large"]]
    assert {Explanation(trace).strategy for trace in sink.traces} == {"slo"}
