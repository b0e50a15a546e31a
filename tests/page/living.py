"""A running gateway over engines of the tests' own, and the traces of what went through it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import httpx

from kvfleet.clock import Clock, FrozenClock
from kvfleet.config.schema import FleetConfig, ModelConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.server import running
from kvfleet.registry.models import ModelRegistry
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Trace
from tests.page.printed import TABLE

__all__ = ["CHAT", "QUIET", "Kept", "Live", "live", "question"]

CHAT = "/v1/chat/completions"
QUIET = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False))


def question(text: str = "Hello!", **fields: Any) -> dict[str, Any]:
    """The body of a request that asks this."""
    return {"model": "auto", "messages": [{"role": "user", "content": text}], **fields}


class Kept:
    """A sink that keeps traces."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def write(self, trace: Trace) -> None:
        """Keep one."""
        self.traces.append(trace)


@attrs.define
class Live:
    """A gateway that serves.

    Attributes:
        url: Where.
        router: What is behind it.
        kept: The traces of finished routes.
        engines: The fake engines, by model name, in the order of their endpoints.
        http: A client of it.
    """

    url: str
    router: Router
    kept: Kept
    engines: Mapping[str, Sequence[FakeAdapter]]
    http: httpx.AsyncClient

    async def ask(self, body: Mapping[str, Any] | str = "Hello!", path: str = CHAT, **headers: str) -> httpx.Response:
        """One request, and everything that comes after its answer."""
        asked = question(body) if isinstance(body, str) else body
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = await self.http.post(path, json=asked, headers=named)
        await self.router.settled()
        return answer

    async def served(self, body: Mapping[str, Any] | str = "Hello!", **headers: str) -> str:
        """The model that answers a request, which must be answered."""
        answer = await self.ask(body, **headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-kvfleet-model"] == self.last.served_by
        return self.last.served_by

    @property
    def last(self) -> Explanation:
        """The newest trace, explained."""
        return Explanation(self.kept.traces[-1])

    def metric(self, name: str, **labels: str) -> float | None:
        """One sample of the gateway's metrics."""
        return self.router.services.metrics.registry.get_sample_value(name, labels)

    def asked_of(self, model: str) -> int:
        """How many calls a model's engines got."""
        return sum(len(engine.calls) for engine in self.engines[model])


@contextlib.asynccontextmanager
async def live(
    config: FleetConfig,
    *,
    scripts: Mapping[str, Any] | None = None,
    clock: Clock | None = None,
    state_dir: Path | None = None,
    api_key: str = "",
    seed: int = 7,
    polls: bool = False,
) -> AsyncIterator[Live]:
    """A gateway on a free port, with fake engines in the place of the fleet's own.

    Args:
        config: The fleet.
        scripts: What the engines of a model say, by its name or by its endpoint; models named None keep their own
            adapters, as mock engines do that are to behave like engines.
        clock: The time; the system's if None. A frozen one is moved by the latencies of scripted replies.
        state_dir: Where components keep what outlives the process.
        api_key: A key for clients.
        seed: Of the decisions.
        polls: True to watch the engines' health and load, as a gateway in service does.
    """
    config = attrs.evolve(config, telemetry=attrs.evolve(config.telemetry, trace_store=QUIET.trace_store))
    scripts = scripts or {}
    kept = Kept()
    frozen = clock if isinstance(clock, FrozenClock) else None
    replicas = [
        one for one in ModelRegistry.from_configs(config.models).replicas if scripts.get(one.name, "") is not None
    ]
    engines = {
        one.id: FakeAdapter(endpoint=one.endpoint, model_id=one.name, time=frozen, script=_script(one, scripts))
        for one in replicas
    }
    router = Router(
        config, table=TABLE, clock=clock, adapters=engines, sinks=[kept], polls=polls, seed=seed, state_dir=state_dir
    )
    by_model: dict[str, list[FakeAdapter]] = {}
    for one in replicas:
        by_model.setdefault(one.name, []).append(engines[one.id])
    async with (
        running(config, router=router, api_key=api_key) as serving,
        httpx.AsyncClient(base_url=serving.url, trust_env=False, timeout=30) as http,
    ):
        yield Live(serving.url, router, kept, by_model, http)


def _script(model: ModelConfig, scripts: Mapping[str, Any]) -> Any:
    usual = FakeReply(text=f"{model.name} speaking.")
    return scripts.get(model.endpoint, scripts.get(model.name, usual))
