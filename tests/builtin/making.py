"""Contexts and outcomes for tests of the built-in stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvfleet.adapters.call import Operation, Usage
from kvfleet.builtin.classify import ModalityClassifier, PromptClassifier
from kvfleet.config.schema import ModelCapabilities, ModelConfig
from kvfleet.errors import RouteError
from kvfleet.plugin.contract import Outcome, RouteRequest, RoutingContext
from kvfleet.trace.spans import Span, Trace


def model(name: str, endpoint: str = "", **known: Any) -> ModelConfig:
    """A replica."""
    return ModelConfig(name=name, endpoint=endpoint or f"http://{name}", **known)


def able(name: str, **capabilities: Any) -> ModelConfig:
    """A replica with some capabilities."""
    return model(name, capabilities=ModelCapabilities(**capabilities))


def user(text: str) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": text}


def context(
    candidates: Sequence[ModelConfig] = (),
    messages: Sequence[Mapping[str, Any]] = (),
    *,
    body: Mapping[str, Any] | None = None,
    operation: Operation = Operation.CHAT,
    now_s: float = 1000.0,
    facts: bool = True,
    affinity: Mapping[str, float] | None = None,
    dry_run: bool = False,
    tenant: str = "",
    data_class: str = "internal",
    **request: Any,
) -> RoutingContext:
    """What a stage sees, with the facts of the usual classifiers."""
    whole = {"messages": list(messages), **(body or {})} if operation is Operation.CHAT else dict(body or {})
    ctx = RoutingContext(
        request=RouteRequest(operation=operation, body=whole, **request),
        candidates=tuple(candidates),
        now_s=now_s,
        facts={},
        affinity=affinity or {},
        dry_run=dry_run,
        tenant=tenant,
        data_class=data_class,
    )
    if facts:
        known: dict[Any, Any] = ctx.facts  # type: ignore[assignment]
        for classifier in (PromptClassifier(), ModalityClassifier()):
            known.update(_now(classifier.classify(ctx)))
    return ctx


def _now(coroutine: Any) -> Any:
    """The result of a coroutine that waits for nothing; usable with and without a running loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a classifier of ours waited for something")


def outcome(
    ctx: RoutingContext,
    served_by: ModelConfig | None,
    *,
    usage: Usage | None = None,
    error: RouteError | None = None,
    content: bytes = b"",
    spans: Sequence[Span] = (),
    duration_s: float = 2.0,
    ttfb_s: float | None = 0.5,
    cost_usd: float | None = None,
) -> Outcome:
    """How a route ended."""
    return Outcome(
        context=ctx,
        trace=Trace("0" * 32, list(spans) or [Span("kvfleet.route", 0)]),
        served_by=served_by,
        usage=usage,
        error=error,
        content=content,
        duration_s=duration_s,
        ttfb_s=ttfb_s,
        cost_usd=cost_usd,
    )
