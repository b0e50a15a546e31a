"""Gateway Enhancements (v0.10): E-1 to E-10."""

from __future__ import annotations

import asyncio
import json

import pytest

from kvfleet.errors import Fault
from kvfleet.testing.fakes import FakeReply
from tests.page.fleets import QUICKSTART
from tests.page.living import live, question
from tests.page.loopback import Served, serving
from tests.page.printed import curl, fleet, run, run_apart

# E-1 -----------------------------------------------------------------------------------------------------------------

PASSTHROUGH = """\
# fleet.yaml
gateway:
  passthrough_headers:
    - X-Access-Token
    - X-Correlation-ID
    - X-Trace-Parent
"""

SENDS = """\
curl http://localhost:8000/v1/chat/completions \\
  -H "X-Access-Token: tok_abc123" \\
  -H "X-Correlation-ID: req-789" \\
  -H "Content-Type: application/json" \\
  -d '{"messages": [{"role": "user", "content": "Hello"}]}'
"""

# E-2, E-8 ------------------------------------------------------------------------------------------------------------

CAPABLE = """\
models:
  - name: gpt-4o
    capabilities:
      supports_tools: true
      supports_json_mode: true
  - name: llama-3-8b
    capabilities:
      supports_tools: false
      supports_json_mode: false
"""

PLACES = """\
models:
  - {name: gpt-4o, endpoint: "https://api.openai.com", latency_p50_ms: 4000}
  - {name: llama-3-8b, endpoint: "http://gpu-1:8000", provider: vllm}
"""
"""Where the page's models are; gpt-4o is so slow that it is chosen only if it must be."""

TOOLS = """
# This request will only be routed to gpt-4o (has tool support)
response = client.chat.completions.create(
    model="auto",
    messages=[{"role": "user", "content": "What's the weather?"}],
    tools=[{
        "type": "function",
        "function": {"name": "get_weather", "parameters": {}}
    }],
)
"""

JSON_MODE = """
# This request will only go to JSON-capable models
response = client.chat.completions.create(
    model="auto",
    messages=[{"role": "user", "content": "List 3 colors as JSON"}],
    response_format={"type": "json_object"},
)
"""

# E-3, E-4, E-5, E-9, E-10 --------------------------------------------------------------------------------------------

STRATEGY_HEADER = """\
gateway:
  strategy_header: X-KVFleet-Strategy  # default
"""

STRATEGY = """\
# Force cost-first for this request, even if fleet uses hybrid_score
curl http://localhost:8000/v1/chat/completions \\
  -H "X-KVFleet-Strategy: cost_first" \\
  -H "Content-Type: application/json" \\
  -d '{"messages": [{"role": "user", "content": "Quick test"}]}'
"""

SUPPORTED = (
    "cost_first, latency_first, quality_first, hybrid_score, cheap_cascade, round_robin, weighted, random, semantic, "
    "domain, epsilon_greedy, ucb1, thompson_sampling, exp3"
)

ALLOWLIST = """\
# Only consider these two models for this request
curl http://localhost:8000/v1/chat/completions \\
  -H "X-KVFleet-Models: llama-3-70b, gpt-4o" \\
  -H "Content-Type: application/json" \\
  -d '{"messages": [{"role": "user", "content": "Important task"}]}'
"""

TENANT_HEADER = """\
gateway:
  tenant_header: X-Tenant-ID
"""

TENANT = """\
curl http://localhost:8000/v1/chat/completions \\
  -H "X-Tenant-ID: team-ml" \\
  -H "Content-Type: application/json" \\
  -d '{"messages": [{"role": "user", "content": "Hello"}]}'
# → Routes according to team-ml's model preferences and budget
"""

TIMEOUT = """\
# Allow 30 seconds for this complex request (value in milliseconds)
curl http://localhost:8000/v1/chat/completions \\
  -H "X-KVFleet-Timeout: 30000" \\
  -H "Content-Type: application/json" \\
  -d '{"messages": [{"role": "user", "content": "Write a detailed essay..."}]}'
"""

REQUEST_ID = """\
curl -v http://localhost:8000/v1/chat/completions \\
  -H "X-Request-ID: my-trace-001" \\
  -H "Content-Type: application/json" \\
  -d '{"messages": [{"role": "user", "content": "Hello"}]}'
"""

# E-6, E-7 ------------------------------------------------------------------------------------------------------------

TYPES = """\
models:
  - name: gpt-4o
    capabilities:
      model_type: chat  # default
  - name: text-embedding-3
    capabilities:
      model_type: embedding  # excluded from chat routing
  - name: reranker-v2
    capabilities:
      model_type: rerank  # excluded from chat routing
"""

TYPED_PLACES = """\
models:
  - {name: gpt-4o, endpoint: "https://api.openai.com"}
  - {name: text-embedding-3, endpoint: "https://api.openai.com"}
  - {name: reranker-v2, endpoint: "http://gpu-2:8000"}
"""

REGISTRY = """
# Programmatic filtering
from kvfleet.registry.models import ModelRegistry

reg = ModelRegistry()
chat_models = reg.list_models(model_type="chat")       # Only chat models
embeddings = reg.list_models(model_type="embedding")    # Only embedding models
"""

SHARED = """\
# These two models share an endpoint → one connection pool
models:
  - name: llama-3-8b
    endpoint: http://gpu-cluster:8000
    provider: openai_compat
    model_id: meta-llama/Llama-3-8B
  - name: llama-3-70b
    endpoint: http://gpu-cluster:8000  # Same endpoint!
    provider: openai_compat
    model_id: meta-llama/Llama-3-70B
"""


async def test_e1_headers_reach_the_backend() -> None:
    """Those that are listed, and no others."""
    async with live(fleet(QUICKSTART, PASSTHROUGH)) as gateway:
        assert (await curl(SENDS, gateway.url, '-H "X-Secret-Of-Mine: 1"')).status == 200
        (call,) = gateway.engines["llama-3-8b"][0].calls
        passed = {name.lower(): value for name, value in call.headers}
        assert (passed["x-access-token"], passed["x-correlation-id"]) == ("tok_abc123", "req-789")
        assert "x-secret-of-mine" not in passed


@pytest.mark.parametrize("example", [TOOLS, JSON_MODE], ids=["tools", "json_mode"])
async def test_e2_and_e8_go_to_who_can(example: str) -> None:
    """The other model is dropped for what it lacks, as the trace says; a plain request goes to it."""
    from openai import OpenAI

    async with live(fleet(CAPABLE, PLACES)) as gateway:
        with OpenAI(base_url=f"{gateway.url}/v1", api_key="optional") as client:
            ran = await run_apart(example, client=client)
        assert "gpt-4o speaking." in ran["response"].choices[0].message.content
        assert [(drop.stage, drop.model) for drop in gateway.last.drops] == [("filter.capabilities", "llama-3-8b")]
        assert await gateway.served() == "llama-3-8b"


async def test_e3_a_strategy_for_one_request() -> None:
    """The header decides, the answer and the trace say that it did, and the next request has the fleet's again."""
    costs = "models: [{name: llama-3-8b, cost_per_1k_input_tokens: 0.01}, {name: llama-3-70b, cost_per_1k_input_tokens: 0.001}]\n"
    async with live(fleet(QUICKSTART, costs, STRATEGY_HEADER)) as gateway:
        answer = await curl(STRATEGY, gateway.url)
        assert (answer.headers["x-kvfleet-strategy"], answer.headers["x-kvfleet-model"]) == (
            "cost_first",
            "llama-3-70b",
        )
        await gateway.router.settled()
        assert gateway.last.strategy_overridden
        await gateway.ask()
        assert (gateway.last.strategy, gateway.last.strategy_overridden) == ("hybrid_score", False)


@pytest.mark.parametrize("name", SUPPORTED.split(", "))
async def test_e3_every_supported_value(name: str) -> None:
    """Each of the page's list is served under its own name."""
    async with live(fleet(QUICKSTART)) as gateway:
        assert (await gateway.ask(X_KVFleet_Strategy=name)).headers["x-kvfleet-strategy"] == name


async def test_e4_only_these_models() -> None:
    """Even the better one is no candidate."""
    models = 'models: [{name: gpt-4o, endpoint: "https://api.openai.com"}]\n'
    async with live(fleet(QUICKSTART, models)) as gateway:
        answer = await curl(ALLOWLIST, gateway.url)
        assert answer.headers["x-kvfleet-model"] in {"llama-3-70b", "gpt-4o"}
        await gateway.router.settled()
        assert {candidate.model for candidate in gateway.last.candidates} == {"llama-3-70b", "gpt-4o"}


async def test_e5_the_tenant_from_a_header() -> None:
    """Its preferences and its budget count, as the trace says."""
    tenants = "tenants: {team-ml: {preferred_models: [llama-3-70b], budget: {enabled: true}}}\n"
    async with live(fleet(QUICKSTART, TENANT_HEADER, tenants)) as gateway:
        answer = await curl(TENANT.partition("# →")[0], gateway.url)
        assert (answer.status, answer.headers["x-kvfleet-model"]) == (200, "llama-3-70b")
        await gateway.router.settled()
        trace = gateway.kept.traces[-1]
        assert trace.route.attributes["kvfleet.tenant"] == "team-ml"
        held = [
            span.attributes["kvfleet.budget.accounts"] for span in trace.stages if span.name == "kvfleet.admit.budget"
        ]
        assert held == [("tenant/team-ml",)]


async def test_e6_other_types_are_out_of_chat() -> None:
    """A chat goes to the chat model alone, and each other call to its own."""
    async with live(fleet(TYPES, TYPED_PLACES)) as gateway:
        assert await gateway.served() == "gpt-4o"
        assert [candidate.model for candidate in gateway.last.candidates] == ["gpt-4o"]
        embedded = await gateway.ask({"model": "auto", "input": "Hello"}, path="/v1/embeddings")
        assert embedded.headers["x-kvfleet-model"] == "text-embedding-3"
        ranked = await gateway.ask({"model": "auto", "query": "a", "documents": ["a", "b"]}, path="/v1/rerank")
        assert ranked.headers["x-kvfleet-model"] == "reranker-v2"


async def test_e6_the_registry_lists_by_type() -> None:
    """As printed it is empty; with the page's models each list has its own."""
    ran = await run(REGISTRY)
    assert (ran["chat_models"], ran["embeddings"]) == ([], [])
    for model in fleet(TYPES, TYPED_PLACES).models:
        ran["reg"].register(model)
    assert [model.name for model in ran["reg"].list_models(model_type="chat")] == ["gpt-4o"]
    assert [model.name for model in ran["reg"].list_models(model_type="embedding")] == ["text-embedding-3"]


async def test_e7_one_pool_and_one_probe() -> None:
    """Two models of one endpoint share the connection and the health check; another key has a pool of its own."""
    async with serving(Served()) as (engine,), live(fleet(SHARED.replace("http://gpu-cluster:8000", engine.url)), scripts={"llama-3-8b": None, "llama-3-70b": None}) as gateway:  # fmt: skip
        for name in ("llama-3-8b", "llama-3-70b"):
            assert await gateway.served({**question(), "model": name}) == name
        asked = [json.loads(request.body)["model"] for request in engine.requests]
        assert asked == ["meta-llama/Llama-3-8B", "meta-llama/Llama-3-70B"]
        assert len(engine.wires) == 1
        adapters = gateway.router.adapters.values()
        checked = await asyncio.gather(*(adapter.health_check() for adapter in adapters))
        assert [health.healthy for health in checked] == [True, True]
        probes = [request.path for request in engine.requests if request.method == "GET"]
        assert len(probes) == len(set(probes))
        assert len(engine.wires) == 1


async def test_e7_another_key_has_another_pool() -> None:
    """Whoever pays differently is not mixed up."""
    async with serving(Served()) as (engine,):
        keys = 'models: [{name: llama-3-8b, api_key: "sk-1"}, {name: llama-3-70b, api_key: "sk-2"}]\n'
        config = fleet(SHARED.replace("http://gpu-cluster:8000", engine.url), keys)
        async with live(config, scripts={"llama-3-8b": None, "llama-3-70b": None}) as gateway:
            for name in ("llama-3-8b", "llama-3-70b"):
                await gateway.served({**question(), "model": name})
        assert [request.headers["authorization"] for request in engine.requests] == ["Bearer sk-1", "Bearer sk-2"]
        assert len(engine.wires) == 2


async def test_e9_a_timeout_for_one_request() -> None:
    """Thirty seconds are enough; one millisecond is not, and the answer says 504."""
    slow = {"llama-3-8b": FakeReply(text="An essay."), "llama-3-70b": FakeReply(text="An essay.")}
    async with live(fleet(QUICKSTART), scripts=slow) as gateway:
        assert (await curl(TIMEOUT, gateway.url)).status == 200
    slow_fleet = "models: [{name: slow, provider: mock, options: {prefill_tokens_per_s: 1}}]\n"
    async with live(fleet(slow_fleet), scripts={"slow": None}) as gateway:
        late = await curl(TIMEOUT.replace("30000", "50"), gateway.url)
        assert (late.status, json.loads(late.body)["error"]["code"]) == (504, "deadline_exceeded")
        await gateway.router.settled()
        assert gateway.last.error_code == "deadline_exceeded"


async def test_e10_the_request_id_travels() -> None:
    """On the answer, in its body, to the backend and in the trace; on errors too; one is made if none came."""
    failing = {"gpt-4o-fallback": FakeReply(fail=Fault.BAD_REQUEST)}
    async with live(fleet(QUICKSTART), scripts=failing) as gateway:
        answer = await curl(REQUEST_ID, gateway.url)
        assert answer.headers["x-request-id"] == "my-trace-001"
        assert json.loads(answer.body)["id"] == "my-trace-001"
        await gateway.router.settled()
        assert gateway.last.request_id == "my-trace-001"
        (call,) = gateway.engines["llama-3-8b"][0].calls
        assert dict(call.headers)["x-request-id"] == "my-trace-001"
        refused = await gateway.ask({**question(), "model": "gpt-4o-fallback"}, X_Request_ID="my-trace-002", X_KVFleet_Data_Class="public")  # fmt: skip
        assert (refused.status_code, refused.headers["x-request-id"]) == (400, "my-trace-002")
        made = await gateway.ask()
        assert made.headers["x-request-id"] == made.json()["id"] == gateway.last.request_id
