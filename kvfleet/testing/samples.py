"""A small fleet, requests and contexts to try components on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from kvfleet.adapters.call import Operation
from kvfleet.clock import Clock, FrozenClock
from kvfleet.config.schema import ModelCapabilities, ModelConfig
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Fact, Kind, Outcome, RouteRequest, RoutingContext
from kvfleet.plugin.manager import ComponentTable
from kvfleet.registry.models import ModelRegistry
from kvfleet.router.scoring import Column, Unit
from kvfleet.telemetry.health import HealthManager
from kvfleet.trace import names
from kvfleet.trace.spans import Span, Trace

__all__ = [
    "facts_for",
    "sample_context",
    "sample_models",
    "sample_outcome",
    "sample_request",
    "sample_requests",
    "sample_services",
]

_MODELS = (
    ModelConfig(
        name="small-8b",
        endpoint="http://gpu-1.invalid:8000",
        replicas=("http://gpu-2.invalid:8000",),
        provider="vllm",
        capabilities=ModelCapabilities(supports_tools=True, max_context_window=8192),
        quality_score=0.6,
        latency_p50_ms=200,
        region="eu-west-1",
        tags={"domain": "general", "tier": "fast"},
    ),
    ModelConfig(
        name="large-70b",
        endpoint="http://gpu-3.invalid:8000",
        provider="sglang",
        capabilities=ModelCapabilities(supports_tools=True, supports_json_mode=True, supports_vision=True),
        quality_score=0.9,
        latency_p50_ms=800,
        region="us-east-1",
        tags={"domain": "coding"},
    ),
    ModelConfig(
        name="cloud",
        endpoint="https://api.cloud.invalid",
        provider="openai_compat",
        capabilities=ModelCapabilities(supports_tools=True, supports_json_mode=True, supports_vision=True),
        cost_per_1k_input_tokens=0.005,
        cost_per_1k_output_tokens=0.015,
        quality_score=0.95,
        latency_p50_ms=400,
        allowed_data_classes=("public",),
    ),
)


def sample_models() -> tuple[ModelConfig, ...]:
    """Four replicas of three models: two self-hosted, one of them twice, and one in a cloud for public data only.

    >>> [model.id for model in sample_models()][:2]
    ['small-8b@http://gpu-1.invalid:8000', 'small-8b@http://gpu-2.invalid:8000']
    """
    return ModelRegistry.from_configs(_MODELS).replicas


def sample_services(clock: Clock | None = None, *, table: ComponentTable | None = None) -> Services:
    """Services of a fleet of `sample_models`, with a frozen clock, where everybody is healthy and idle."""
    clock = clock or FrozenClock()
    services = Services(clock=clock, models=sample_models(), health=HealthManager(clock=clock))
    if table is not None:
        services.find = table.get
    return services


def sample_request(**changes: Any) -> RouteRequest:
    """A chat request with a system prompt; `changes` are fields of `RouteRequest`, ``messages`` goes into the body."""
    messages = changes.pop("messages", None) or [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Write a function that sorts a list, and explain it in one sentence."},
    ]
    body = changes.pop("body", None) or {"model": "auto", "messages": messages}
    return RouteRequest(**{"body": body, "request_id": "sample-1", "seed": 7, **changes})


def sample_requests() -> tuple[RouteRequest, ...]:
    """Requests of many kinds: plain, with tools and a session, with a picture and personal data, not chat at all."""
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    question = [{"role": "user", "content": [{"type": "text", "text": "Mail ada@example.com about this"}, picture]}]
    chat = sample_request()
    return (
        chat,
        sample_request(
            body={**chat.body, "tools": [tool], "response_format": {"type": "json_object"}, "stream": True},
            stream=True,
            session="talk-1",
            tenant="team-a",
            tags={"domain": "coding"},
        ),
        sample_request(messages=question, data_class="confidential", region="eu-west-1"),
        sample_request(operation=Operation.COMPLETION, body={"model": "auto", "prompt": "Once upon a time"}),
        sample_request(operation=Operation.EMBEDDING, body={"model": "auto", "input": ["one", "two"]}),
    )


def sample_context(
    request: RouteRequest | None = None,
    candidates: Sequence[ModelConfig] | None = None,
    *,
    facts: Mapping[Fact[Any], Any] | None = None,
    dry_run: bool = False,
) -> RoutingContext:
    """What a stage sees in the middle of a pipeline: candidates, facts, and columns in seconds, dollars and utility."""
    request = sample_request() if request is None else request
    chosen = sample_models() if candidates is None else tuple(candidates)
    columns = {
        "latency": Column(Unit.SECONDS, [model.latency_p50_ms / 1000 for model in chosen]),
        "cost": Column(Unit.USD, [model.cost_per_1k_input_tokens for model in chosen]),
        "quality": Column(Unit.UTILITY, [model.quality_score for model in chosen]),
    }
    return RoutingContext(
        request=request,
        candidates=chosen,
        data_class=request.data_class or "internal",
        tenant=request.tenant,
        region=request.region,
        facts=dict(facts or {}),
        affinity={},
        columns=columns,
        now_s=1000.0,
        seed=request.seed or 0,
        dry_run=dry_run,
    )


def sample_outcome(context: RoutingContext, **changes: Any) -> Outcome:
    """How a route under that context may have ended: answered by the first candidate, unless `changes` say else."""
    span = Span(names.ROUTE_SPAN, 1_700_000_000_000_000_000, 1_700_000_000_500_000_000)
    span.attributes = {names.REQUEST_ID: context.request.request_id, names.OUTCOME: "answered"}
    served_by = context.candidates[0] if context.candidates else None
    usual = {"served_by": served_by, "ttfb_s": 0.2, "duration_s": 0.5, "trace": Trace("0" * 32, [span])}
    return Outcome(context=context, **{**usual, **changes})


async def facts_for(
    needs: Sequence[Fact[Any]],
    context: RoutingContext,
    table: ComponentTable,
    *,
    asked: frozenset[Fact[Any]] = frozenset(),
) -> dict[Fact[Any], Any]:
    """Facts, found by the first installed classifier that gives each with its options at their defaults.

    A classifier that needs facts itself gets those first. Facts nobody gives are absent, and so are those of
    classifiers that wait for each other, or that cannot be without options of their own; `asked` are the facts that
    are waited for.
    """
    found = dict(context.facts)
    for fact in needs:
        giver = next((one for one in table.of_kind(Kind.CLASSIFY) if fact in one.gives), None)
        if giver is None or fact in found or fact in asked:
            continue
        context = attrs.evolve(context, facts=found)
        found = await facts_for(giver.needs, context, table, asked=asked | {fact})
        classifier = _with_defaults(giver)
        if classifier is not None and found.keys() >= set(giver.needs):
            found.update(await _classify(classifier, attrs.evolve(context, facts=found), table))
    return found


def _with_defaults(component: Component) -> Any:
    """The component with its options at their defaults; None if it refuses them."""
    try:
        return component.cls()
    except (TypeError, ValueError):
        return None


async def _classify(classifier: Any, context: RoutingContext, table: ComponentTable) -> Mapping[Fact[Any], Any]:
    if callable(provision := getattr(classifier, "provision", None)):
        provision(sample_services(table=table))
    given: Mapping[Fact[Any], Any] = await classifier.classify(context)
    return given
