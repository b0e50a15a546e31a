"""Rate limits behind a running gateway: two providers over real HTTP, and a client that only wants an answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import attrs
import httpx
import orjson
import pytest

from kvfleet.clock import FrozenClock
from kvfleet.config.schema import FleetConfig, ModelConfig, ScoringWeights, TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Trace
from tests.gateway.upstream import Upstream, chunk, upstream

ASK = {"model": "auto", "messages": [{"role": "user", "content": "Hello"}]}
NEAR = {
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-remaining-requests": "3",
    "x-ratelimit-reset-requests": "57s",
}
ROOM = {**NEAR, "x-ratelimit-remaining-requests": "59", "x-ratelimit-reset-requests": "1s"}


def answer(who: str, headers: Mapping[str, str] = {}, status: str = "200 OK") -> bytes:
    """A whole answer, or a refusal."""
    message = {"role": "assistant", "content": f"I am {who}."}
    body = orjson.dumps(
        {"id": "1", "object": "chat.completion", "model": who, "choices": [{"index": 0, "message": message}]}
        | {"usage": {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30}}
        if status.startswith("2")
        else {"error": {"message": "slow down", "type": "requests", "code": "rate_limit_exceeded"}}
    )
    return _head(status, "application/json", {**headers, "content-length": str(len(body))}) + body


def stream(who: str, headers: Mapping[str, str] = {}) -> bytes:
    """A streamed answer."""
    delta = {"id": "1", "model": who, "choices": [{"index": 0, "delta": {"content": who}, "finish_reason": "stop"}]}
    events = [b"data: " + orjson.dumps(delta) + b"\n\n", b"data: [DONE]\n\n", b""]
    head = _head("200 OK", "text/event-stream", {**headers, "transfer-encoding": "chunked"})
    return head + b"".join(map(chunk, events))


def _head(status: str, kind: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-type: {kind}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


@attrs.define
class World:
    """A gateway, its two providers, and what became of each request."""

    client: httpx.AsyncClient
    router: Router
    clock: FrozenClock
    best: Upstream
    other: Upstream
    traces: list[Trace] = attrs.field(factory=list)

    def write(self, trace: Trace) -> None:
        """Keep a trace: it is a sink."""
        self.traces.append(trace)

    async def ask(self, **more: Any) -> httpx.Response:
        """Send a request, and wait until its books are closed."""
        got = await self.client.post("/v1/chat/completions", json={**ASK, **more})
        await self.router.settled()
        return got

    async def served(self, **more: Any) -> str:
        """Who answered a request."""
        got = await self.ask(**more)
        assert got.status_code == 200, got.text
        return got.headers["x-kvfleet-model"]

    @property
    def last(self) -> Explanation:
        """Why the last request went where it went."""
        return Explanation(self.traces[-1])

    @property
    def dropped(self) -> dict[str, tuple[str, str, str]]:
        """By model, who dropped it from the last request: stage, rule and reason."""
        return {drop.candidate.partition("@")[0]: (drop.stage, drop.rule, drop.reason) for drop in self.last.drops}

    @property
    def attempts(self) -> list[str]:
        """The models called for the last request, in order."""
        return [attempt.replica.partition("@")[0] for attempt in self.last.attempts]


@asynccontextmanager
async def living(*, tpm: int | None = None, **sections: Any) -> AsyncIterator[World]:
    """A gateway in front of two providers, the best of which is asked first, and allows so many tokens a minute."""
    clock = FrozenClock()
    async with upstream() as best, upstream() as other:
        best.says, other.says = [answer("best")], [answer("other")]
        models = (
            ModelConfig(name="best", endpoint=best.url, quality_score=0.9, max_retries=0, tpm=tpm),
            ModelConfig(name="other", endpoint=other.url, quality_score=0.5, max_retries=0),
        )
        telemetry = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False))
        config = FleetConfig(**{"models": models, "strategy": "quality_first", "telemetry": telemetry, **sections})
        router = Router(config, clock=clock, polls=False)
        async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            world = World(client, router, clock, best, other)
            router.add_sink(world)
            yield world


async def test_near_its_limit_traffic_goes_elsewhere_and_comes_back() -> None:
    """3 of 60 requests left: the next one goes to the other, until a sixth of the limit has come back."""
    async with living() as world:
        world.best.says = [answer("best", NEAR)]
        assert await world.served() == "best"
        assert world.last.trace.stages[-1].attributes[names.RATE_LIMIT_LEFT] == pytest.approx(0.05)
        assert await world.served() == "other"
        stage, rule, reason = world.dropped["best"]
        assert (stage, rule) == ("filter.rate_limits", "requests")
        assert reason == "held back at 95% of its limit of requests, for another 6.0 s"
        world.clock.advance(6.1)
        world.best.says = [answer("best", ROOM)]
        assert [await world.served(), await world.served()] == ["best", "best"]


async def test_a_refusal_is_answered_by_the_other_and_remembered() -> None:
    """429 with `Retry-After`: the client notices nothing, and the provider is left alone for exactly that long."""
    async with living() as world:
        world.best.says = [answer("best", {"retry-after": "20"}, "429 Too Many Requests")]
        assert await world.served() == "other"
        assert world.attempts == ["best", "other"]
        asked = len(world.best.requests)
        for _ in range(3):
            assert await world.served() == "other"
            assert world.attempts == ["other"]
        assert world.dropped["best"] == ("filter.rate_limits", "cooldown", "it asked to wait, for another 20 s")
        assert len(world.best.requests) == asked, "a provider that asked to wait is not asked"
        world.best.says = [answer("best")]
        world.clock.advance(20)
        assert await world.served() == "best"


async def test_if_everybody_asked_to_wait_the_client_is_told_for_how_long() -> None:
    """First by their own refusals, then without asking anybody: 429, the shortest wait, who and why."""
    async with living() as world:
        world.best.says = [answer("best", {"retry-after": "20"}, "429 Too Many Requests")]
        world.other.says = [answer("other", {"retry-after-ms": "7500"}, "429 Too Many Requests")]
        first = await world.ask()
        assert (first.status_code, first.headers["retry-after-ms"]) == (429, "7500")
        asked = len(world.best.requests) + len(world.other.requests)
        world.clock.advance(1.0)
        second = await world.ask()
        assert len(world.best.requests) + len(world.other.requests) == asked
        assert second.status_code == 429
        assert (second.headers["retry-after"], second.headers["retry-after-ms"]) == ("7", "6500")
        assert "x-should-retry" not in second.headers
        error = second.json()["error"]
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
        assert error["kvfleet"]["excluded"]["other"] == {
            "by": "filter.rate_limits",
            "rule": "cooldown",
            "reason": "it asked to wait, for another 6.5 s",
        }
        assert not any(url in second.text for url in (world.best.url, world.other.url))
        world.other.says = [answer("other")]
        world.clock.advance(6.6)
        assert await world.served() == "other"


async def test_streams_tell_their_limits_too() -> None:
    """With their first bytes, long before they end."""
    async with living() as world:
        world.best.says = [stream("best", NEAR)]
        got = await world.ask(stream=True)
        assert (got.status_code, got.headers["x-kvfleet-model"]) == (200, "best")
        assert got.text.endswith("data: [DONE]\n\n")
        assert await world.served(stream=False) == "other"
        assert "best" in world.dropped


async def test_a_full_server_that_asks_to_wait_is_left_alone() -> None:
    """503 with `Retry-After`, as a provider that sheds load sends it."""
    async with living() as world:
        world.best.says = [answer("best", {"retry-after": "3"}, "503 Service Unavailable")]
        assert await world.served() == "other"
        assert await world.served() == "other"
        assert world.attempts == ["other"]
        world.best.says = [answer("best")]
        world.clock.advance(3)
        assert await world.served() == "best"


async def test_a_configured_limit_counts_what_we_send() -> None:
    """For providers that tell nothing: requests and the tokens that answers cost."""
    async with living(tpm=100) as world:
        assert [await world.served() for _ in range(4)] == ["best", "best", "best", "other"]
        assert world.dropped["best"][:2] == ("filter.rate_limits", "tokens")
        world.clock.advance(62)
        assert await world.served() == "best"


async def test_capacity_may_weigh_in_the_score() -> None:
    """Before any threshold is reached, the one with more left wins if the operator wants it so."""
    weights = ScoringWeights(cost=0, latency=0, quality=0.4, cache_affinity=0, capacity=0.6)
    async with living(strategy="hybrid_score", scoring_weights=weights) as world:
        half = {**NEAR, "x-ratelimit-remaining-requests": "30", "x-ratelimit-reset-requests": "30s"}
        world.best.says = [answer("best", half)]
        assert await world.served() == "best"
        assert await world.served() == "other"
        best = next(one for one in world.last.candidates if one.model == "best")
        assert best.capacity_score == pytest.approx(0.5)
        assert best.columns["capacity"] == (pytest.approx(0.5), "utility")


async def test_everybody_can_see_it() -> None:
    """Metrics, the dashboard and `/health`, which names no address."""
    async with living() as world:
        world.best.says = [answer("best", NEAR)]
        await world.ask()
        world.other.says = [answer("other", {"retry-after": "30"}, "429 Too Many Requests")]
        await world.ask(model="other")
        metrics = (await world.client.get("/metrics")).text
        health = (await world.client.get("/health")).json()
        state = (await world.client.get("/dashboard/api/state")).json()
        where = f'{{endpoint="{world.best.url}",model="best"}}'
        assert f"kvfleet_rate_limit_capacity{where} 0.05" in metrics
        assert f'kvfleet_rate_limited_total{{endpoint="{world.other.url}",model="other"}} 1.0' in metrics
        assert health["endpoints"]["best#1"]["rate_limit_left"] == pytest.approx(0.05)
        assert health["endpoints"]["other#1"]["rate_limited_for_s"] == pytest.approx(30)
        assert state["rate_limits"]["best#1"] == {
            "capacity": 0.05,
            "throttled": True,
            "closed": False,
            "requests_last_minute": 1,
            "tokens_last_minute": 30,
            "requests_limit": 60.0,
            "requests_left": 3.0,
            "wait_s": 6.0,
            "reason": "held back at 95% of its limit of requests, for another 6.0 s",
            "refused": 0,
        }
        assert state["rate_limits"]["other#1"]["closed"] is True
        assert world.best.url not in str(state) + str(health)
