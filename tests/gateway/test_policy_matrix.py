"""Policy holds on every way a prompt can take: each policy against each way, through a running gateway.

Each cell asks twice with the same fleet. A request the policy does not speak of must reach the model in question, which
shows that the way leads there at all; a request that it does speak of must not, and must not get an answer of that
model's either.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import attrs
import httpx
import orjson
import pytest

from kvfleet.adapters.call import Call, Operation, Reply
from kvfleet.builtin.shadow import ShadowObserver
from kvfleet.config.expand import expand
from kvfleet.config.schema import (
    AliasConfig,
    FallbackConfig,
    FleetConfig,
    GatewayConfig,
    ModelCapabilities,
    ModelConfig,
    PolicyConfig,
    PolicyRule,
    SemanticCacheConfig,
    ShadowConfig,
    StageConfig,
    TelemetryConfig,
    TenantConfig,
    TraceStoreConfig,
)
from kvfleet.errors import Fault
from kvfleet.gateway.server import running
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply

SAID = "words of the forbidden one"
TABLE = discover()
TLS = httpx.create_ssl_context()  # reading the certificates takes longer than a cell
TELEMETRY = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False))


class Spy(FakeAdapter):
    """Counts what reaches it, in whatever form; it has the other APIs' words too, if told so."""

    speaking: frozenset[str] = frozenset()
    tokenized: int = 0

    def speaks(self, surface: str) -> bool:
        """As told."""
        return surface in self.speaking

    async def prompt_tokens(self, operation: Operation, body: Mapping[str, Any]) -> Sequence[int]:
        """Count the question, and answer it."""
        self.tokenized += 1
        return [1] * 7

    async def send(self, call: Call) -> Reply:
        """Answer in the script's words."""
        return await super().send(call)

    @property
    def reached(self) -> int:
        """How often a prompt came here."""
        return len(self.calls) + self.tokenized


@attrs.frozen(kw_only=True)
class Policy:
    """One policy that keeps some requests from the model `forbidden`.

    Attributes:
        config: Sections of the fleet that make it.
        forbidden, allowed: What is special about the two models.
        stages: Stages behind `filter.policy`.
        free, bound: Headers of a request that it does not speak of, and of one that it does.
        secret: What the prompt of a bound request holds.
    """

    config: Mapping[str, Any] = attrs.field(factory=dict)
    forbidden: Mapping[str, Any] = attrs.field(factory=dict)
    allowed: Mapping[str, Any] = attrs.field(factory=dict)
    stages: Sequence[StageConfig] = ()
    free: Mapping[str, str] = attrs.field(factory=dict)
    bound: Mapping[str, str] = attrs.field(factory=dict)
    secret: str = ""


def rule(condition: str, action: str, *models: str) -> Mapping[str, Any]:
    """A policy of one rule."""
    one = PolicyRule(name="rule", condition=condition, action=action, target_models=models)
    return {"policy": PolicyConfig(enabled=True, rules=(one,))}


def tenants(**red: Any) -> Mapping[str, Any]:
    """Two tenants, of whom one is bound."""
    return {"tenants": {"red": TenantConfig(**red), "blue": TenantConfig()}}


TENANTS: Mapping[str, Any] = {"free": {"x-tenant-id": "blue"}, "bound": {"x-tenant-id": "red"}}
RESIDENCY = StageConfig(
    use="filter.residency",
    options={"rules": [{"name": "eu", "source_regions": ["eu"], "allowed_model_regions": ["eu"]}]},
)

POLICIES: Mapping[str, Policy] = {
    "data class": Policy(
        config={"policy": PolicyConfig(enabled=True)},
        forbidden={"allowed_data_classes": ("public", "internal")},
        bound={"x-kvfleet-data-class": "confidential"},
    ),
    "a rule that blocks a model": Policy(
        config=rule("headers.x-team == red", "block", "forbidden"), bound={"x-team": "red"}
    ),
    "a rule that requires a model": Policy(
        config=rule("headers.x-team == red", "require_model", "allowed"), bound={"x-team": "red"}
    ),
    "personal data": Policy(
        config={"policy": PolicyConfig(enabled=True, pii_detection=True)},
        forbidden={"private": False},
        secret="My number is 078-05-1120, my mail is jane.roe@example.com. ",
    ),
    "residency": Policy(
        stages=(RESIDENCY,),
        config={"policy": PolicyConfig(enabled=True)},
        forbidden={"region": "us"},
        allowed={"region": "eu"},
        bound={"x-kvfleet-region": "eu"},
    ),
    "a tenant's blocked model": Policy(config=tenants(blocked_models=("forbidden",)), **TENANTS),
    "a tenant's preferred model": Policy(config=tenants(preferred_models=("allowed",)), **TENANTS),
    "the request's own list": Policy(bound={"x-kvfleet-models": "allowed"}),
}

PROMPT = "Tell me of the sea. "


def chat(prompt: str, model: str) -> Mapping[str, Any]:
    """A chat, or a message, or what both explain."""
    return {"model": model, "max_tokens": 50, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}


def blocks(prompt: str, model: str) -> Mapping[str, Any]:
    """A message with the prompt where only Anthropic's API has a place for it."""
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": prompt}]}
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    return {**chat("", model), "messages": turns}


def document(prompt: str, model: str) -> Mapping[str, Any]:
    """A message with the prompt in a document."""
    source = {"type": "text", "media_type": "text/plain", "data": prompt}
    return {**chat("", model), "messages": [{"role": "user", "content": [{"type": "document", "source": source}]}]}


def system(prompt: str, model: str) -> Mapping[str, Any]:
    """A message with the prompt as its system prompt."""
    return {**chat("Hi", model), "system": [{"type": "text", "text": prompt}]}


def response(prompt: str, model: str) -> Mapping[str, Any]:
    """A response to a text."""
    return {"model": model, "input": prompt, "temperature": 0}


def items(prompt: str, model: str) -> Mapping[str, Any]:
    """A response to items."""
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    return {"model": model, "input": [call, {"type": "function_call_output", "call_id": "c", "output": prompt}]}


def thoughts(prompt: str, model: str) -> Mapping[str, Any]:
    """A response that goes on from earlier thoughts."""
    thought = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": prompt}]}
    return {"model": model, "input": [thought, {"role": "user", "content": "Hi"}]}


def text(prompt: str, model: str) -> Mapping[str, Any]:
    """A text completion."""
    return {"model": model, "prompt": prompt, "temperature": 0}


def embedding(prompt: str, model: str) -> Mapping[str, Any]:
    """Vectors."""
    return {"model": model, "input": [prompt]}


def ranking(prompt: str, model: str) -> Mapping[str, Any]:
    """A ranking of documents."""
    return {"model": model, "query": "sea", "documents": [prompt, "b"]}


Body = Callable[[str, str], Mapping[str, Any]]


@attrs.frozen(kw_only=True)
class Way:
    """One way to a model.

    Attributes:
        path, body: What the client asks.
        stream: As a stream.
        model: The name it asks for.
        type: Of both models.
        first: Whom the ranking prefers.
        config: Sections of the fleet.
        changed: Changes the expanded pipeline's stages.
        headers: More of the request's.
        allowed: What the allowed model does.
        times: How often the same is asked.
        reaches: False for a way that calls nobody: then the decision is looked at.
        speaking: The APIs that both models speak.
    """

    path: str = "/v1/chat/completions"
    body: Body = chat
    stream: bool = False
    model: str = "auto"
    type: str = "chat"
    first: str = "forbidden"
    config: Mapping[str, Any] = attrs.field(factory=dict)
    changed: Callable[[StageConfig], StageConfig] = lambda stage: stage
    headers: Mapping[str, str] = attrs.field(factory=dict)
    allowed: FakeReply = attrs.field(factory=FakeReply)
    times: int = 1
    reaches: bool = True
    speaking: frozenset[str] = frozenset()


def escalating(**options: Any) -> Callable[[StageConfig], StageConfig]:
    """Puts escalation in the place of fallback."""

    def changed(stage: StageConfig) -> StageConfig:
        if stage.use != "execute.fallback":
            return stage
        return StageConfig(use="execute.escalate", options={"threshold": 0.9, "max_attempts": 3, **options})

    return changed


UNSURE = FakeReply(text="I cannot help with that.", token_probability=0.01)
JUDGE = {"judges": [{"use": "model", "with": {"model": "forbidden"}}]}
SHADOW = ShadowConfig(enabled=True, shadow_models=("forbidden",), sample_rate=1.0)
BOTH = frozenset({"messages", "responses"})

WAYS: Mapping[str, Way] = {
    "chat": Way(),
    "chat, streamed": Way(stream=True),
    "chat, by name": Way(model="forbidden"),
    "chat, by alias": Way(model="alias"),
    "chat, by a strategy of the request's": Way(headers={"x-kvfleet-strategy": "quality_first"}),
    "completions": Way(path="/v1/completions", body=text),
    "completions, streamed": Way(path="/v1/completions", body=text, stream=True),
    "embeddings": Way(path="/v1/embeddings", body=embedding, type="embedding"),
    "rerank": Way(path="/v1/rerank", body=ranking, type="rerank"),
    "rerank, second version": Way(path="/v2/rerank", body=ranking, type="rerank"),
    "messages": Way(path="/v1/messages"),
    "messages, streamed": Way(path="/v1/messages", stream=True),
    "messages, by name": Way(path="/v1/messages", model="forbidden"),
    "messages, a tool's result": Way(path="/v1/messages", body=blocks),
    "messages, a document": Way(path="/v1/messages", body=document),
    "messages, passed through": Way(path="/v1/messages", body=system, speaking=BOTH),
    "messages, passed through as a stream": Way(path="/v1/messages", body=document, speaking=BOTH, stream=True),
    "messages, counted": Way(path="/v1/messages/count_tokens"),
    "responses": Way(path="/v1/responses", body=response),
    "responses, streamed": Way(path="/v1/responses", body=response, stream=True),
    "responses, by name": Way(path="/v1/responses", body=response, model="forbidden"),
    "responses, a tool's result": Way(path="/v1/responses", body=items),
    "responses, passed through": Way(path="/v1/responses", body=thoughts, speaking=BOTH),
    "explained": Way(path="/v1/route/explain", reaches=False),
    "explained, a message": Way(path="/v1/route/explain/messages", reaches=False),
    "explained, a response": Way(path="/v1/route/explain/responses", body=response, reaches=False),
    "fallback": Way(first="allowed", allowed=FakeReply(fail=Fault.SERVER_ERROR)),
    "fallback, streamed": Way(first="allowed", allowed=FakeReply(fail=Fault.OVERLOADED), stream=True),
    "fallback of a message": Way(
        path="/v1/messages", first="allowed", allowed=FakeReply(fail=Fault.CONNECT), speaking=BOTH
    ),
    "fallback to a larger window": Way(first="allowed", allowed=FakeReply(fail=Fault.CONTEXT_LENGTH)),
    "fallback in an order": Way(
        first="allowed",
        allowed=FakeReply(fail=Fault.RATE_LIMITED),
        config={"fallback": FallbackConfig(fallback_order=("forbidden", "allowed"))},
    ),
    "escalation": Way(first="allowed", allowed=UNSURE, changed=escalating()),
    "escalation, streamed": Way(first="allowed", allowed=UNSURE, changed=escalating(), stream=True),
    "escalation of a message": Way(path="/v1/messages", first="allowed", allowed=UNSURE, changed=escalating()),
    "escalation, judged": Way(first="allowed", changed=escalating(**JUDGE)),
    "shadow": Way(first="allowed", config={"shadow": SHADOW}),
    "shadow of a stream": Way(first="allowed", config={"shadow": SHADOW}, stream=True),
    "shadow of a message": Way(path="/v1/messages", first="allowed", config={"shadow": SHADOW}, speaking=BOTH),
    "shadow of a response": Way(path="/v1/responses", body=response, first="allowed", config={"shadow": SHADOW}),
    "cached": Way(config={"semantic_cache": SemanticCacheConfig(enabled=True)}, times=2),
    "cached, streamed": Way(config={"semantic_cache": SemanticCacheConfig(enabled=True)}, times=2, stream=True),
    "cached message": Way(
        path="/v1/messages", config={"semantic_cache": SemanticCacheConfig(enabled=True)}, times=2, speaking=BOTH
    ),
}


def model(name: str, way: Way, **more: Any) -> ModelConfig:
    """One of the two models."""
    is_larger = name == "forbidden"
    capable = ModelCapabilities(
        model_type=way.type,
        supports_tools=True,
        supports_json_mode=True,
        max_context_window=32_768 if is_larger else 8192,
    )
    return ModelConfig(
        name=name,
        endpoint=f"http://{name}.internal:8000",
        provider="vllm",
        capabilities=capable,
        quality_score=0.9 if is_larger else 0.5,
        max_retries=0,
        **more,
    )


def fleet(way: Way, policy: Policy) -> FleetConfig:
    """The fleet of a cell."""
    models = {name: model(name, way, **getattr(policy, name)) for name in ("forbidden", "allowed")}
    other = "allowed" if way.first == "forbidden" else "forbidden"
    config = FleetConfig(
        models=(models[way.first], models[other]),
        strategy="static",
        aliases={"alias": AliasConfig(models=("forbidden", "allowed"))},
        gateway=GatewayConfig(tenant_header="X-Tenant-ID"),
        telemetry=TELEMETRY,
        **{**policy.config, **way.config},
    )
    stages: list[StageConfig] = []
    for stage in expand(config):
        stages.append(way.changed(stage))
        if stage.use == "filter.policy":
            stages += policy.stages
    return attrs.evolve(config, pipeline=tuple(stages))


@attrs.define
class Cell:
    """A running gateway of a cell."""

    way: Way
    policy: Policy
    client: httpx.AsyncClient
    router: Router
    forbidden: Spy
    allowed: Spy

    async def ask(self, headers: Mapping[str, str], secret: str) -> str:
        """Ask as the way does; what was answered, after everything beside the route has been done."""
        way = self.way
        body = {**way.body(secret + PROMPT, way.model), "stream": way.stream}
        if not way.stream:
            del body["stream"]
        said = ""
        for _ in range(way.times):
            answer = await self.client.post(way.path, json=body, headers={**way.headers, **headers})
            assert answer.status_code < 500 or answer.status_code in (502, 503), answer.text
            said += answer.text
            await self.router.settled()
            for stage in self.router.pipeline.observe:
                if isinstance(stage.component, ShadowObserver):
                    await stage.component.settled()
        return said


@contextlib.asynccontextmanager
async def cell(way: Way, policy: Policy) -> AsyncIterator[Cell]:
    """Serve the fleet of a cell."""
    config = fleet(way, policy)
    forbidden = Spy(model_id="forbidden", script=FakeReply(text=SAID, token_probability=0.99))
    allowed = Spy(model_id="allowed", script=way.allowed)
    forbidden.speaking = allowed.speaking = way.speaking
    by_name = {"forbidden": forbidden, "allowed": allowed}
    adapters = {one.id: by_name[one.name] for one in config.models}
    router = Router(config, table=TABLE, adapters=adapters, polls=False, seed=1)
    async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url, verify=TLS) as client:
        yield Cell(way, policy, client, router, forbidden, allowed)


def has_a_meaning(way: str, policy: str) -> bool:
    """False where a policy says nothing of a way.

    A tenant's preference holds while one of its preferred models is among those that may answer: a name leaves none, and
    a mirror goes to a model that is named. To count tokens only private models are asked.
    """
    if policy == "a tenant's preferred model":
        return "by name" not in way and "shadow" not in way
    return not (policy == "personal data" and way == "messages, counted")


CELLS = [(way, policy) for way in WAYS for policy in POLICIES if has_a_meaning(way, policy)]


@pytest.mark.parametrize(("way", "policy"), CELLS)
async def test_no_request_lands_where_it_must_not(way: str, policy: str) -> None:
    """Free, it gets there; bound, it does not, and gets nothing that comes from there."""
    one, rules = WAYS[way], POLICIES[policy]
    async with cell(one, rules) as gateway:
        told = await gateway.ask(rules.free, "")
        if one.reaches:
            assert gateway.forbidden.reached, "the way does not lead there"
        else:
            assert orjson.loads(told)["selected_model"] == "forbidden"
        before = gateway.forbidden.reached
        told = await gateway.ask({**rules.free, **rules.bound}, rules.secret)
        assert gateway.forbidden.reached == before
        words = re.sub(r"[^a-z ]", "", told)
        assert SAID not in words
        if not one.reaches:
            assert orjson.loads(told)["selected_model"] != "forbidden"
