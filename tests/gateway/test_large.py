"""Bodies and events of megabytes, and fleets with much to tell, which are dealt with in turns of the event loop."""

from __future__ import annotations

import attrs
import httpx
import orjson
import pytest

from kvfleet.config.access import BudgetConfig
from kvfleet.config.schema import (
    FleetConfig,
    GatewayConfig,
    ModelConfig,
    PolicyConfig,
    TelemetryConfig,
    TenantConfig,
    TraceStoreConfig,
)
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Trace
from tests.gateway.upstream import SSE_HEAD, chunk, upstream, whole

PATH = "/v1/chat/completions"
QUIET = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False))
LONG = "Say it again, and slowly. " * 60_000
ANSWER = whole(
    orjson.dumps(
        {
            "id": "c",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
        }
    )
)


@attrs.define
class Seen:
    """What was decided."""

    explanations: list[Explanation] = attrs.field(factory=list)

    def write(self, trace: Trace) -> None:
        self.explanations.append(Explanation(trace))


def fleet(url: str, name: str) -> FleetConfig:
    """One engine, which knows its model by another name."""
    model = ModelConfig(name=name, model_id="served", endpoint=url, provider="openai_compat")
    return FleetConfig(models=(model,), telemetry=QUIET, policy=PolicyConfig(enabled=True, pii_detection=True))


@pytest.mark.parametrize("surface", [PATH, "/v1/messages"])
async def test_a_prompt_of_megabytes_arrives_as_it_was_sent(surface: str) -> None:
    """Byte by byte, but for the model's name; and the next one with that beginning is expected where it was."""
    async with upstream(ANSWER) as engine:
        seen = Seen()
        router = Router(fleet(engine.url, "m"), polls=False, sinks=[seen])
        async with running(router.config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            messages = [{"role": "user", "content": LONG}]
            raw = orjson.dumps({"model": "m", "messages": messages, "max_tokens": 9})
            for _ in range(2):
                answer = await client.post(surface, content=raw, headers={"content-type": "application/json"})
                assert answer.status_code == 200
            got = engine.requests[-1].partition(b"\r\n\r\n")[2]
            if surface == PATH:
                assert got == raw.replace(b'"model":"m"', b'"model":"served"')
            else:
                assert orjson.loads(got)["messages"] == messages
            assert seen.explanations[-1].candidates[0].cached_tokens == pytest.approx(len(LONG) / 4, rel=0.01)


async def test_events_of_a_megabyte_pass_whole() -> None:
    """Each of them, with the request's identifier, and what ends the stream."""
    text = 'He said "no".\n' * 70_000
    plain = {"id": "c", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    last = {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    sent = [b"data: " + orjson.dumps(one) + b"\n\n" for one in (plain, plain, plain, last)]
    says = SSE_HEAD + b"".join(map(chunk, (*sent, b"data: [DONE]\n\n"))) + b"0\r\n\r\n"
    async with upstream(says) as engine:
        router = Router(fleet(engine.url, "m"), polls=False)
        async with running(router.config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            ask = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
            answer = await client.post(PATH, json=ask, headers={"x-request-id": "mine-0001"})
    *events, done = answer.content.removesuffix(b"\n\n").split(b"\n\n")
    assert done == b"data: [DONE]"
    assert [orjson.loads(one[6:]) for one in events] == [
        {**one, "id": "mine-0001"} for one in (plain, plain, plain, last)
    ]


async def test_of_many_tenants_the_dashboard_has_the_first_and_statements_all() -> None:
    """The page shows 50 lines and how many more there are; who asks for statements gets every one."""
    tenants = {f"t{i:03}": TenantConfig(budget=BudgetConfig(enabled=True, monthly_budget_usd=5)) for i in range(120)}
    config = FleetConfig(
        models=(ModelConfig(name="m", provider="mock"),),
        telemetry=QUIET,
        tenants=tenants,
        gateway=GatewayConfig(tenant_header="X-Tenant"),
    )
    async with running(config) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        shown = (await client.get("/dashboard/api/state")).json()["stages"]["admit.budget"]
        told = (await client.get("/v1/tenants")).json()
    assert [one["tenant"] for one in told["data"]] == sorted(tenants)
    assert (
        shown["accounts"] == told["data"][:50] or [one["tenant"] for one in shown["accounts"]] == sorted(tenants)[:50]
    )
    assert shown["accounts_more"] == 70
