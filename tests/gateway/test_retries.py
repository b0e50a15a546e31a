"""Retries through a running gateway: before the first byte, elsewhere first, paid for, and said in the trace."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import httpx
import pytest

from kvfleet.adapters.call import Call
from kvfleet.config.schema import (
    FallbackConfig,
    FleetConfig,
    ModelCapabilities,
    ModelConfig,
    TelemetryConfig,
    TraceStoreConfig,
)
from kvfleet.errors import Fault
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace import names
from kvfleet.trace.spans import Trace

Script = FakeReply | list[FakeReply] | Callable[[Call], FakeReply]
OK = FakeReply(text="Hello.")
BROKEN = FakeReply(fail=Fault.SERVER_ERROR)


def first(reply: FakeReply) -> Callable[[Call], FakeReply]:
    """Whoever is asked first gives this; everybody else is well."""
    replies = iter([reply])
    return lambda _: next(replies, OK)


class Stage:
    """A gateway before fakes, by endpoint; keeps traces."""

    def __init__(self, url: str, router: Router, adapters: Mapping[str, FakeAdapter]) -> None:
        self.url, self.router, self.adapters = url, router, adapters
        self.traces: list[Trace] = []
        router.add_sink(self)

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)

    @property
    def asked(self) -> dict[str, int]:
        """Calls, by endpoint."""
        return {one.endpoint.removeprefix("http://"): len(one.calls) for one in self.adapters.values()}

    async def ask(self, **more: Any) -> httpx.Response:
        """One chat."""
        body = {"messages": [{"role": "user", "content": "Hi"}], **more}
        async with httpx.AsyncClient() as client:
            return await client.post(f"{self.url}/v1/chat/completions", json=body)


@contextlib.asynccontextmanager
async def staged(
    scripts: Mapping[str, Script], *models: ModelConfig, fallback: FallbackConfig | None = None
) -> AsyncIterator[Stage]:
    """Serve a model with a replica for each script."""
    urls = [f"http://{name}" for name in scripts]
    fleet = models or (ModelConfig(name="m", endpoint=urls[0], replicas=tuple(urls[1:])),)
    config = FleetConfig(
        models=fleet,
        strategy="static",
        default_model=fleet[0].name,
        fallback=fallback or FallbackConfig(),
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )
    adapters = {
        f"{model.name}@{url}": FakeAdapter(endpoint=url, model_id="m", script=scripts[url.removeprefix("http://")])
        for model in fleet
        for url in model.all_endpoints()
    }
    router = Router(config, adapters=adapters, polls=False, seed=3)
    async with running(config, router=router) as serving:
        yield Stage(serving.url, router, adapters)


async def test_another_replica_answers_at_once() -> None:
    """One failure, one retry elsewhere; the trace says what is left of the budget."""
    script = first(BROKEN)
    async with staged({"a": script, "b": script}) as stage:
        answer = await stage.ask()
        assert answer.status_code == 200
        assert stage.asked == {"a": 1, "b": 1}
        assert stage.traces[0].route.attributes[names.RETRIES_LEFT] == pytest.approx(29.2, abs=0.8)


async def test_a_refusal_is_waited_out_where_nobody_else_is() -> None:
    """`Retry-After: 0.2`: no less than that passes, and the answer is there."""
    refusal = FakeReply(fail=Fault.RATE_LIMITED, retry_after_s=0.2)
    async with staged({"a": [refusal, OK]}) as stage:
        began_s = time.monotonic()
        answer = await stage.ask()
        assert answer.status_code == 200
        assert time.monotonic() - began_s >= 0.2
        reasons = [one.attributes.get(names.ATTEMPT_REASON) for one in stage.traces[0].stages]
        assert [reason for reason in reasons if reason] == ["first", "rate_limited"]


async def test_a_long_wait_is_passed_on() -> None:
    """Half a minute is the client's to wait: 429, `Retry-After`, and no word against coming back."""
    async with staged({"a": FakeReply(fail=Fault.RATE_LIMITED, retry_after_s=30)}) as stage:
        answer = await stage.ask()
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "30")
        assert "x-should-retry" not in answer.headers
        assert stage.asked == {"a": 1}
        assert stage.traces[0].route.attributes[names.RETRY_STOPPED] == "retry_after"


async def test_who_was_only_spared_helps_out() -> None:
    """A replica that comes near its limit is left alone while another is free, and asked when that one fails."""
    told = {
        "x-ratelimit-limit-requests": "100",
        "x-ratelimit-remaining-requests": "5",
        "x-ratelimit-reset-requests": "9s",
    }
    nearly, fails = first(FakeReply(headers=told)), first(BROKEN)
    async with staged({"a": nearly, "b": nearly}) as stage:
        assert (await stage.ask()).status_code == 200
        for adapter in stage.adapters.values():
            adapter.script = fails
        assert (await stage.ask()).status_code == 200
        assert sorted(stage.asked.values()) == [1, 2]
        attempts = [one.attributes for one in stage.traces[-1].stages if names.ATTEMPT in one.attributes]
        assert [one[names.ATTEMPT_REASON] for one in attempts] == ["first", "server_error"]
        assert len({one[names.REPLICA] for one in attempts}) == 2


async def test_when_the_budget_is_used_up_nothing_is_retried() -> None:
    """The client is told not to try either; trace and metric say why."""
    fallback = FallbackConfig(retry_ratio=0.0, min_retries_per_second=0.1)
    async with staged({"a": BROKEN, "b": BROKEN}, fallback=fallback) as stage:
        await stage.ask()
        answer = await stage.ask()
        assert (answer.status_code, answer.headers["x-should-retry"]) == (502, "false")
        assert answer.json()["error"]["kvfleet"]["stopped"] == "model_budget"
        assert sum(stage.asked.values()) == 3
        assert stage.traces[-1].route.attributes[names.RETRY_STOPPED] == "model_budget"
        async with httpx.AsyncClient() as client:
            metrics = (await client.get(f"{stage.url}/metrics")).text
        assert 'kvfleet_retries_refused_total{budget="model",model="m"} 2.0' in metrics
        assert stage.router.state()["stages"]["execute.fallback"]["retries_left"] < 1.0


async def test_a_prompt_too_long_goes_to_a_larger_window_alone() -> None:
    """Not to the same model's other replica, not to a model of the same size; and never to the same one again."""
    windows = {"small": 4096, "same": 4096, "large": 32_768}
    models = [
        ModelConfig(
            name=name,
            endpoint=f"http://{name}-1",
            replicas=(f"http://{name}-2",) if name == "small" else (),
            capabilities=ModelCapabilities(max_context_window=window),
        )
        for name, window in windows.items()
    ]
    too_long = FakeReply(fail=Fault.CONTEXT_LENGTH, status=400)
    scripts: dict[str, Script] = {"small-1": too_long, "small-2": too_long, "same-1": too_long, "large-1": OK}
    async with staged(scripts, *models) as stage:
        answer = await stage.ask()
        assert (answer.status_code, answer.headers["x-kvfleet-model"]) == (200, "large")
        assert sorted(stage.asked.values()) == [0, 0, 1, 1]
        assert stage.asked["large-1"] == 1


async def test_a_prompt_too_long_for_everybody_is_said_as_it_is() -> None:
    """400, after one attempt."""
    async with staged({"a": FakeReply(fail=Fault.CONTEXT_LENGTH, status=400)}) as stage:
        answer = await stage.ask()
        assert (answer.status_code, answer.json()["error"]["kvfleet"]["stopped"]) == (400, "final")
        assert (stage.asked, answer.headers["x-should-retry"]) == ({"a": 1}, "false")


async def test_nothing_is_retried_after_the_first_byte() -> None:
    """A stream that began and broke stays broken: an error event, and nobody else is asked."""
    cut = FakeReply(text="one two three", fail=Fault.DISCONNECTED, fail_after=1)
    script = first(cut)
    async with staged({"a": script, "b": script}) as stage:
        answer = await stage.ask(stream=True)
        assert answer.status_code == 200
        assert '"code":"stream_interrupted"' in answer.text.strip().splitlines()[-1]
        assert "[DONE]" not in answer.text
        assert sum(stage.asked.values()) == 1
