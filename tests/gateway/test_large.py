"""Bodies and events of megabytes, and fleets with much to tell, which are dealt with in turns of the event loop."""

from __future__ import annotations

import attrs
import httpx
import orjson
import pytest

from kvfleet.adapters.call import LARGE_BYTES
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
NATIVE = whole(
    orjson.dumps(
        {
            "id": "c",
            "type": "message",
            "role": "assistant",
            "content": [{"type": "text", "text": "Yes."}],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 5, "output_tokens": 2},
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


BODIES = {
    PATH: {"messages": [{"role": "user", "content": LONG}], "max_tokens": 9},
    "/v1/messages": {"messages": [{"role": "user", "content": LONG}], "max_tokens": 9},
    "/v1/responses": {"input": LONG, "max_output_tokens": 9},
    "/v1/completions": {"prompt": LONG, "max_tokens": 9},
}


@pytest.mark.parametrize("path", BODIES)
async def test_a_prompt_of_megabytes_arrives_as_it_was_sent(path: str) -> None:
    """Byte by byte, but for the model's name; and the next one with that beginning is expected where it was."""
    async with upstream(ANSWER) as engine:
        seen = Seen()
        router = Router(fleet(engine.url, "m"), polls=False, sinks=[seen])
        async with running(router.config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            raw = orjson.dumps({"model": "m", **BODIES[path]})
            for _ in range(2):
                answer = await client.post(path, content=raw, headers={"content-type": "application/json"})
                assert answer.status_code == 200, answer.text
            got = engine.requests[-1].partition(b"\r\n\r\n")[2]
            if path in (PATH, "/v1/completions"):
                assert got == raw.replace(b'"model":"m"', b'"model":"served"')
            else:
                assert orjson.loads(got)["messages"] == [{"role": "user", "content": LONG}]
            assert seen.explanations[-1].candidates[0].cached_tokens == pytest.approx(len(LONG) / 4, rel=0.01)


CALLS = 3000


@pytest.mark.parametrize("speaks", [True, False])
async def test_an_agents_long_conversation_is_the_same_large_or_small(speaks: bool) -> None:
    """Thousands of calls of tools over Anthropic's API, to an engine that has it and to one that has chats alone."""
    said: list[dict[str, object]] = [{"role": "user", "content": "Go on."}]
    for number in range(CALLS):
        call = {"type": "tool_use", "id": f"t{number}", "name": "read", "input": {"path": f"a/{number}"}}
        result = {"type": "tool_result", "tool_use_id": f"t{number}", "content": [{"type": "text", "text": "x" * 200}]}
        said += [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    body = {"model": "m", "max_tokens": 9, "messages": said}
    assert len(orjson.dumps(body)) > LARGE_BYTES
    async with upstream(NATIVE if speaks else ANSWER) as engine:
        config = fleet(engine.url, "m")
        if speaks:
            model = attrs.evolve(config.models[0], options={"surfaces": ["messages"]})
            config = attrs.evolve(config, models=(model,))
        router = Router(config, polls=False)
        async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            answer = await client.post("/v1/messages", json=body)
            assert answer.status_code == 200, answer.text
            got = orjson.loads(engine.requests[-1].partition(b"\r\n\r\n")[2])
    if speaks:
        assert got["messages"] == said
    else:
        asked, *rest = got["messages"]
        assert asked == said[0]
        assert [one["role"] for one in rest] == ["assistant", "tool"] * CALLS
        assert [one["tool_call_id"] for one in rest[1::2]] == [f"t{number}" for number in range(CALLS)]
        assert {one["content"] for one in rest[1::2]} == {"x" * 200}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", PATH])
async def test_a_large_body_is_checked_as_a_small_one(path: str) -> None:
    """What is wrong is said in the words of the path, whoever looks; also of what is nested too deep."""
    deep: object = "x"
    for _ in range(100):
        deep = [deep]
    wrong = {"messages": [{"role": "user", "content": LONG}, {"role": "user", "content": 5}], "input": [5, LONG]}
    kept = {"/v1/responses": ["input"]}.get(path, ["messages"])
    async with running(fleet("http://127.0.0.1:9", "m")) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        bad = await client.post(path, json={"model": "m", **{key: wrong[key] for key in kept}})
        nested = await client.post(path, json={"model": "m", **BODIES[path], "deep": deep})
    assert (bad.status_code, nested.status_code) == (400, 400)
    assert bad.json()["error"]["message"].startswith(("messages[1]", "input[0]"))
    assert nested.json()["error"]["message"] == "the request body is nested deeper than 64 levels"


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
