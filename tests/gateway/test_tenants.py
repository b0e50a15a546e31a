"""Budgets through a running gateway: OpenAI's own client, a real socket, the real router."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from kvfleet.adapters.call import Usage
from kvfleet.config.schema import (
    BudgetConfig,
    FleetConfig,
    GatewayConfig,
    ModelConfig,
    TelemetryConfig,
    TenantConfig,
    TraceStoreConfig,
)
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace.spans import Trace

KEYS = {"a": "sk-key-of-a", "b": "sk-key-of-b", "operator": "sk-key-of-operator"}
MODEL = ModelConfig(
    name="big", endpoint="http://big.internal:8000", cost_per_1k_input_tokens=1.0, cost_per_1k_output_tokens=1.0
)


class Kept:
    """A sink that keeps traces."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)


def fleet(**budget: Any) -> FleetConfig:
    """Two tenants with a key each, and the operator's."""
    tenant = TenantConfig(budget=BudgetConfig(enabled=True, **budget))
    return FleetConfig(
        models=(MODEL,),
        tenants={"a": tenant, "b": tenant},
        gateway=GatewayConfig(api_keys=KEYS, tenant_header="X-Tenant-ID"),
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )


@contextlib.asynccontextmanager
async def serving(config: FleetConfig) -> AsyncIterator[tuple[str, Kept]]:
    """A gateway whose backend always reports 100 prompt and 100 answer tokens."""
    kept = Kept()
    adapter = FakeAdapter(model_id="big", script=FakeReply(usage=Usage(100, 100, 200)))
    router = Router(config, adapters={f"big@{MODEL.endpoint}": adapter}, sinks=[kept], polls=False)
    async with running(config, router=router) as served:
        yield served.url, kept


def client(url: str, key: str, **more: Any) -> openai.AsyncOpenAI:
    """OpenAI's client with somebody's key."""
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEYS[key], max_retries=0, **more)


async def ask(who: openai.AsyncOpenAI) -> Any:
    """A short question with at most 200 tokens of answer."""
    async with who:
        return await who.chat.completions.create(
            model="auto", messages=[{"role": "user", "content": "Hello"}], max_tokens=200
        )


async def statement(url: str, key: str) -> dict[str, Any]:
    """What a key sees."""
    async with httpx.AsyncClient(trust_env=False) as http:
        answer = await http.get(f"{url}/v1/tenants", headers={"Authorization": f"Bearer {KEYS[key]}"})
    assert answer.status_code == 200
    body: dict[str, Any] = answer.json()
    return {account["tenant"]: account["spent_usd"] for account in body["data"]}


async def test_a_tenants_key_spends_its_tenants_money_until_it_is_gone() -> None:
    """429 with OpenAI's code, and no use in trying again today; the other tenant goes on; the trace says why."""
    async with serving(fleet(monthly_budget_usd=0.5)) as (url, kept):
        await ask(client(url, "a"))
        await ask(client(url, "a"))
        with pytest.raises(openai.RateLimitError) as raised:
            await ask(client(url, "a"))
        assert raised.value.code == "insufficient_quota"
        assert int(raised.value.response.headers["retry-after"]) > 0
        assert raised.value.response.headers["x-should-retry"] == "false"
        await ask(client(url, "b"))
        assert await statement(url, "a") == {"a": pytest.approx(0.4)}
        assert await statement(url, "operator") == {"a": pytest.approx(0.4), "b": pytest.approx(0.2)}
    refused = kept.traces[2]
    assert refused.route.attributes["kvfleet.outcome"] == "refused"
    stage = next(span for span in refused.stages if span.name == "kvfleet.admit.budget")
    assert str(stage.attributes["kvfleet.admit.refusal"]).startswith("the budget tenant/a of $0.50")
    assert kept.traces[0].route.attributes["kvfleet.cost"] == pytest.approx(0.2)


async def test_requests_per_minute_are_held_to() -> None:
    """429 with the code for which clients wait."""
    async with serving(fleet(requests_per_minute=1)) as (url, _):
        await ask(client(url, "a"))
        with pytest.raises(openai.RateLimitError) as raised:
            await ask(client(url, "a"))
        assert raised.value.code == "rate_limit_exceeded"
        assert 0 < int(raised.value.response.headers["retry-after"]) <= 61


async def test_a_tenants_key_cannot_speak_for_another() -> None:
    """403, whatever the header says; the operator's key may."""
    async with serving(fleet()) as (url, _):
        with pytest.raises(openai.PermissionDeniedError) as raised:
            await ask(client(url, "a", default_headers={"X-Tenant-ID": "b"}))
        assert raised.value.code == "wrong_tenant"
        await ask(client(url, "operator", default_headers={"X-Tenant-ID": "b"}))
        assert await statement(url, "operator") == {"a": 0.0, "b": pytest.approx(0.2)}


async def test_statements_need_a_key() -> None:
    """Nobody without one sees what is spent."""
    async with serving(fleet()) as (url, _), httpx.AsyncClient(trust_env=False) as http:
        assert (await http.get(f"{url}/v1/tenants")).status_code == 401
