"""A router that is not one: answers as a test says, and keeps what it was asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import attrs

from kvfleet.adapters.call import Reply
from kvfleet.config.schema import FleetConfig, GatewayConfig, ModelConfig
from kvfleet.gateway.app import Gateway
from kvfleet.gateway.auth import Keys
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Answer, RouteRequest
from kvfleet.trace import names
from kvfleet.trace.explanation import TraceSink
from kvfleet.trace.spans import Span, SpanKind, Trace
from kvfleet.turns import Steps

ENDPOINTS = ("http://gpu-1.internal:8000", "http://gpu-2.internal:8000/v1")
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
MESSAGES = [{"role": "user", "content": "Hello"}]
CHAT = {"model": "auto", "messages": MESSAGES}


def fleet(**gateway: Any) -> FleetConfig:
    """Two replicas of one model."""
    model = ModelConfig(name="llama", endpoint=ENDPOINTS[0], replicas=ENDPOINTS[1:], provider="vllm")
    return FleetConfig(fleet_name="test", models=(model,), gateway=GatewayConfig(**gateway))


def replicas(config: FleetConfig) -> tuple[ModelConfig, ...]:
    """One `ModelConfig` for each endpoint."""
    return tuple(
        attrs.evolve(model, endpoint=endpoint, replicas=())
        for model in config.models
        for endpoint in model.all_endpoints()
    )


@attrs.frozen
class Dispatched:
    answer: Answer
    trace: Trace


@attrs.frozen
class Explained:
    request: RouteRequest
    selected: str

    def to_dict(self) -> dict[str, Any]:
        return {"selected_model": "llama", "replica": self.selected, "operation": self.request.operation.value}


Respond = Callable[[RouteRequest], Awaitable[Reply]]


async def hello(request: RouteRequest) -> Reply:
    """Answer whole, or stream three events."""
    if request.stream:
        return Reply(events=events(b'data: {"a":1}\n\n', b'data: {"b":2}\n\n', b"data: [DONE]\n\n"))
    return Reply(body=b'{"id":"chatcmpl-1","object":"chat.completion"}')


async def events(*pieces: bytes | BaseException) -> AsyncIterator[bytes]:
    """A stream of these pieces; an exception is raised where it stands."""
    for piece in pieces:
        if isinstance(piece, BaseException):
            raise piece
        yield piece


class FakeRouter:
    """Answers with `respond`, as the second replica, after a decision of 2 ms and a first byte after 30 ms."""

    def __init__(
        self, config: FleetConfig, respond: Respond = hello, *, healthy: tuple[bool, ...] = (True, True)
    ) -> None:
        self.config = config
        self.models = replicas(config)
        self.services = Services(models=self.models)
        self.respond = respond
        self.healthy = healthy
        self.sinks: tuple[TraceSink, ...] = ()
        self.requests: list[RouteRequest] = []
        self.opened = self.closed = 0

    async def open(self) -> None:
        self.opened += 1

    async def aclose(self) -> None:
        self.closed += 1

    def add_sink(self, sink: TraceSink) -> None:
        self.sinks = (*self.sinks, sink)

    def remove_sink(self, sink: TraceSink) -> None:
        self.sinks = tuple(one for one in self.sinks if one is not sink)

    async def dispatch(self, request: RouteRequest, *, kind: SpanKind) -> Dispatched:
        assert kind is SpanKind.SERVER
        self.requests.append(request)
        replica = self.models[-1]
        return Dispatched(Answer(await self.respond(request), replica), trace_of(replica))

    async def simulate_request(self, request: RouteRequest) -> Explained:
        self.requests.append(request)
        return Explained(request, self.models[-1].id)

    def replica_states(self) -> dict[str, Any]:
        return self.state()

    def replica_steps(self) -> Steps[dict[str, Any]]:
        yield
        return self.state()

    def state_steps(self, most: int | None = None) -> Steps[dict[str, Any]]:
        assert most is None or most > 0
        yield
        return self.state()

    def state(self) -> dict[str, Any]:
        return {
            "fleet": self.config.fleet_name,
            "pipeline": "abc",
            "strategy": "hybrid_score",
            "stages": {},
            "replicas": [
                {
                    "model": model.name,
                    "endpoint": model.endpoint,
                    "healthy": healthy,
                    "enabled": True,
                    "reason": "" if healthy else f"no answer from {model.endpoint}",
                    "breaker": "closed" if healthy else "open",
                    "in_flight": 0,
                }
                for model, healthy in zip(self.models, self.healthy, strict=True)
            ],
        }


def trace_of(replica: ModelConfig) -> Trace:
    """A decision of 2 ms and one attempt."""
    route = Span("kvfleet.route", 1_000_000_000, attributes={names.STRATEGY: "hybrid_score"})
    attempt = Span("chat llama", 1_002_000_000, kind=SpanKind.CLIENT, attributes={names.TTFB_S: 0.030})
    return Trace(TRACE_ID, [route, attempt])


async def gateway(router: FakeRouter, *, key: str = "") -> Gateway:
    """A gateway that has started."""
    app = Gateway(
        router, keys=Keys.of(router.config.gateway, key, tenants=router.config.tenants), new_id=lambda: "req-new"
    )  # type: ignore[arg-type]
    await app.start()
    return app
