"""Budgets through a running gateway: OpenAI's own client, a real socket, the real router."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import attrs
import httpx
import openai
import pytest

from kvfleet.adapters.call import Call, Reply, Usage
from kvfleet.config.schema import (
    BudgetConfig,
    FleetConfig,
    GatewayConfig,
    KeyConfig,
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
async def serving(config: FleetConfig, adapter: FakeAdapter | None = None) -> AsyncIterator[tuple[str, Kept]]:
    """A gateway whose backend always reports 100 prompt and 100 answer tokens."""
    kept = Kept()
    adapter = adapter or FakeAdapter(model_id="big", script=FakeReply(usage=Usage(100, 100, 200)))
    router = Router(config, adapters={f"big@{MODEL.endpoint}": adapter}, sinks=[kept], polls=False)
    async with running(config, router=router) as served:
        yield served.url, kept


def client(url: str, key: str, **more: Any) -> openai.AsyncOpenAI:
    """OpenAI's client with somebody's key."""
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEYS[key], max_retries=0, **more)


async def ask(who: openai.AsyncOpenAI, what: str = "Hello") -> Any:
    """A short question with at most 200 tokens of answer."""
    async with who:
        return await who.chat.completions.create(
            model="auto", messages=[{"role": "user", "content": what}], max_tokens=200
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


OWN = {
    "people": KeyConfig(key="sk-people", tenant="a"),
    "ci": KeyConfig(
        sha256=hashlib.sha256(b"sk-ci").hexdigest(),
        tenant="a",
        budget=BudgetConfig(enabled=True, monthly_budget_usd=0.5, requests_per_minute=3),
    ),
    "narrow": KeyConfig(key="sk-narrow", tenant="b", max_concurrent=1),
    "loose": KeyConfig(key="sk-loose"),
    "root": KeyConfig(key="sk-root", role="admin"),
}


def keyed() -> FleetConfig:
    """Two tenants with budgets, and keys of their own kind."""
    gateway = GatewayConfig(keys=OWN, tenant_header="X-Tenant-ID")
    return attrs.evolve(fleet(monthly_budget_usd=10), gateway=gateway)


class TestKeys:
    """Keys with a tenant, a role and limits of their own."""

    async def test_two_keys_of_a_tenant_have_limits_of_their_own(self) -> None:
        """One is at its end, the other goes on with the tenant's money; the trace names the key, and holds it to both."""
        async with serving(keyed()) as (url, kept):
            await ask(user(url, "sk-ci"))
            await ask(user(url, "sk-ci"))
            with pytest.raises(openai.RateLimitError) as raised:
                await ask(user(url, "sk-ci"))
            assert raised.value.code == "insufficient_quota"
            await ask(user(url, "sk-people"))
        attributes = kept.traces[0].route.attributes
        assert (attributes["kvfleet.key"], attributes["kvfleet.tenant"]) == ("ci", "a")
        stage = next(span for span in kept.traces[0].stages if span.name == "kvfleet.admit.budget")
        assert stage.attributes["kvfleet.budget.accounts"] == ("tenant/a", "key/ci")
        refusal = next(span for span in kept.traces[2].stages if span.name == "kvfleet.admit.budget")
        assert str(refusal.attributes["kvfleet.admit.refusal"]).startswith("the budget key/ci of $0.50")
        assert "sk-" not in repr([trace.spans for trace in kept.traces])

    async def test_each_sees_what_is_its_own(self) -> None:
        """Its tenant's statement and its own, not another key's; an admin sees all; keys by their names alone."""
        async with serving(keyed()) as (url, _):
            await ask(user(url, "sk-ci"))
            seen = {key: await accounts(url, f"sk-{key}") for key in ("people", "ci", "narrow", "loose", "root")}
        spent = pytest.approx(0.2)
        assert seen == {
            "people": {"tenant/a": spent},
            "ci": {"tenant/a": spent, "key/ci": spent},
            "narrow": {"tenant/b": 0.0},
            "loose": {},
            "root": {"tenant/a": spent, "tenant/b": 0.0, "key/ci": spent},
        }

    @pytest.mark.parametrize("path", ["/metrics", "/dashboard/api/state"])
    async def test_what_tells_of_all_is_for_admins(self, path: str) -> None:
        """A client's key is refused, an admin's is not."""
        async with serving(keyed()) as (url, _), httpx.AsyncClient(base_url=url, trust_env=False) as http:
            refused = await http.get(path, headers={"Authorization": "Bearer sk-ci"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "operators_only")
            assert (await http.get(path, headers={"Authorization": "Bearer sk-root"})).status_code == 200

    async def test_nobody_speaks_in_anothers_name(self) -> None:
        """A client's key of another tenant, or of none, may not; an admin's may."""
        async with serving(keyed()) as (url, kept):
            for key in ("sk-people", "sk-loose"):
                with pytest.raises(openai.PermissionDeniedError) as raised:
                    await ask(user(url, key, default_headers={"X-Tenant-ID": "b"}))
                assert raised.value.code == "wrong_tenant"
            await ask(user(url, "sk-root", default_headers={"X-Tenant-ID": "b"}))
        assert kept.traces[-1].route.attributes["kvfleet.tenant"] == "b"

    async def test_a_key_is_held_to_its_requests_in_flight(self) -> None:
        """While its one request is under way the next is refused; another key's is not."""
        waiting = Waiting(model_id="big", script=FakeReply(usage=Usage(100, 100, 200)))
        async with serving(keyed(), waiting) as (url, _):
            held = asyncio.create_task(ask(user(url, "sk-narrow"), "Wait"))
            await waiting.began.wait()
            with pytest.raises(openai.RateLimitError, match="the key is at its limit of requests in flight"):
                await ask(user(url, "sk-narrow"))
            await ask(user(url, "sk-people"))
            waiting.goes_on.set()
            await held
            await ask(user(url, "sk-narrow"))


@attrs.define(kw_only=True)
class Waiting(FakeAdapter):
    """Answers "Wait" only when it is told to go on."""

    began: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    goes_on: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)

    async def send(self, call: Call) -> Reply:
        """Wait, if asked to."""
        if call.body["messages"][0]["content"] == "Wait":
            self.began.set()
            await self.goes_on.wait()
        return await FakeAdapter.send(self, call)


def user(url: str, key: str, **more: Any) -> openai.AsyncOpenAI:
    """OpenAI's client with a key."""
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, **more)


async def accounts(url: str, key: str) -> dict[str, float]:
    """What a key sees, by account."""
    async with httpx.AsyncClient(trust_env=False) as http:
        answer = await http.get(f"{url}/v1/tenants", headers={"Authorization": f"Bearer {key}"})
    return {account["account"]: account["spent_usd"] for account in answer.json()["data"]}
