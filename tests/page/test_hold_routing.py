"""What must hold of routing, asked of a running gateway."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.adapters.call import Usage
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import FallbackConfig, FleetConfig, ModelCapabilities, ModelConfig, TelemetryConfig
from kvfleet.errors import Fault
from kvfleet.testing.fakes import FakeReply
from tests.adapters.scripted import until
from tests.page.living import Live, live, question
from tests.page.loopback import METRICS, Served, serving

ENDPOINTS = ("http://gpu-1:8000", "http://gpu-2:8000", "http://gpu-3:8000")
REPLICATED = ModelConfig(name="m", endpoint=ENDPOINTS[0], replicas=ENDPOINTS[1:], provider="vllm")
SYSTEM = {"role": "system", "content": "You are a helpful assistant, and you answer in verse. " * 20}
BROKEN = FakeReply(fail=Fault.SERVER_ERROR)


def model(name: str, **known: Any) -> ModelConfig:
    """A model on one replica."""
    return ModelConfig(name=name, endpoint=f"http://{name}:8000", **{"provider": "vllm", **known})


def user(text: str) -> dict[str, str]:
    """A user's message."""
    return {"role": "user", "content": text}


async def endpoint(gateway: Live, *messages: dict[str, str], **headers: str) -> str:
    """Where a conversation goes."""
    await gateway.served({"model": "auto", "messages": list(messages)}, **headers)
    return gateway.last.served_endpoint


async def test_replicas_are_used() -> None:
    """Requests that have nothing in common reach every one of them."""
    async with live(FleetConfig(models=(REPLICATED,)), clock=FrozenClock()) as gateway:
        assert {await endpoint(gateway, user(f"{i} is a number")) for i in range(12)} == set(ENDPOINTS)


async def test_a_conversation_and_a_system_prompt_stay_where_they_are_known() -> None:
    """The second turn, and another question under the same instructions; but not where one would have to queue."""
    scripts = {"m": FakeReply(text="m speaking.", latency_s=0.1)}
    async with live(FleetConfig(models=(REPLICATED,)), scripts=scripts, clock=FrozenClock()) as gateway:
        talk = [SYSTEM, user("What is a cat?")]
        first = await endpoint(gateway, *talk)
        assert (
            await endpoint(gateway, *talk, {"role": "assistant", "content": "m speaking."}, user("And a dog?")) == first
        )
        assert gateway.last.cache_hit
        assert {await endpoint(gateway, SYSTEM, user(f"What is {word}?")) for word in "abcd"} == {first}
        for _ in range(40):
            gateway.router.services.load.started(f"m@{first}")
        assert await endpoint(gateway, SYSTEM, user("What is a queue?")) != first


async def test_load_and_kv_use_are_polled_and_feed_the_default_score() -> None:
    """The busy engine is left for the idle one, and the trace shows the load that both were found with."""
    busy = METRICS.replace(b"} 3.0", b"} 200.0").replace(b"} 0.25", b"} 0.99")
    idle = METRICS.replace(b"} 3.0", b"} 0.0").replace(b"} 2.0", b"} 0.0").replace(b"} 0.25", b"} 0.0")
    async with serving(Served(metrics=busy), Served(metrics=idle)) as (first, second):
        one = ModelConfig(name="m", endpoint=first.url, replicas=(second.url,), provider="vllm")
        config = FleetConfig(models=(one,), telemetry=TelemetryConfig(load_poll_interval_seconds=0.05))
        async with live(config, scripts={"m": None}, polls=True) as gateway:
            load = gateway.router.services.load
            await until(lambda: load.engine(first.url) and load.engine(second.url))
            assert {await endpoint(gateway, user(f"Question {i}")) for i in range(5)} == {second.url}
            columns = {candidate.endpoint: candidate.columns for candidate in gateway.last.candidates}
            (busy_load, _), (idle_load, _) = (columns[url]["hardware_load"] for url in (first.url, second.url))
            assert busy_load < idle_load


async def test_health_is_polled_and_feeds_the_choice() -> None:
    """An engine that does not answer its check gets no request, before any has failed there."""
    async with serving(Served()) as (well,):
        one = ModelConfig(name="m", endpoint="http://127.0.0.1:9", replicas=(well.url,), provider="vllm")
        config = FleetConfig(models=(one,), telemetry=TelemetryConfig(health_check_interval_seconds=0.05))
        async with live(config, scripts={"m": None}, polls=True) as gateway:
            await until(lambda: not gateway.router.services.health.is_available("http://127.0.0.1:9"))
            assert {await endpoint(gateway, user(f"Question {i}")) for i in range(3)} == {well.url}
            assert [(drop.stage, drop.candidate) for drop in gateway.last.drops] == [
                ("filter.health", "m@http://127.0.0.1:9")
            ]


PRICED = (
    model("cheap", provider="openai_compat", cost_per_1k_input_tokens=0.001, cost_per_1k_output_tokens=0.001, latency_p50_ms=900, quality_score=0.2),
    model("fast", provider="openai_compat", cost_per_1k_input_tokens=0.002, cost_per_1k_output_tokens=0.002, latency_p50_ms=100, quality_score=0.3),
    model("good", provider="openai_compat", cost_per_1k_input_tokens=0.003, cost_per_1k_output_tokens=0.003, latency_p50_ms=800, quality_score=0.9),
)  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "best"), [("cost_first", "cheap"), ("latency_first", "fast"), ("quality_first", "good")]
)
async def test_one_dimension_decides(strategy: str, best: str) -> None:
    """However bad the others are."""
    async with live(FleetConfig(models=PRICED)) as gateway:
        assert await gateway.served(X_KVFleet_Strategy=strategy) == best


@pytest.mark.parametrize(("strategy", "equal"), [("cost_first", {"cost_per_1k_input_tokens": 0.001, "cost_per_1k_output_tokens": 0.001}), ("quality_first", {"quality_score": 0.5})])  # fmt: skip
async def test_other_terms_break_ties(strategy: str, equal: dict[str, float]) -> None:
    """Of two that are equal in what counts, the one that is faster."""
    models = tuple(
        model(name, provider="openai_compat", latency_p50_ms=latency, **equal)
        for name, latency in (("slow", 900), ("quick", 100))
    )
    async with live(FleetConfig(models=models)) as gateway:
        assert await gateway.served(X_KVFleet_Strategy=strategy) == "quick"


async def test_real_prices_differ_in_the_default_score() -> None:
    """A tenth of a cent and a cent, with all else alike: the score tells them apart by more than a hair."""
    models = tuple(
        model(name, provider="openai_compat", cost_per_1k_input_tokens=price, cost_per_1k_output_tokens=price)
        for name, price in (("cent", 0.01), ("tenth", 0.001))
    )
    async with live(FleetConfig(models=models)) as gateway:
        assert await gateway.served() == "tenth"
        totals = {candidate.model: candidate.total_score or 0.0 for candidate in gateway.last.candidates}
        assert totals["tenth"] - totals["cent"] > 0.1


async def test_the_cascade_escalates_without_a_fallback_order() -> None:
    """From the cheapest to the next, as far as attempts go."""
    config = FleetConfig(models=PRICED, strategy="cheap_cascade", fallback=FallbackConfig(max_attempts=3))
    async with live(config, scripts={"cheap": BROKEN, "fast": BROKEN}) as gateway:
        assert await gateway.served() == "good"
        assert [attempt.model for attempt in gateway.last.attempts] == ["cheap", "fast", "good"]


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (question(), {}),
        (question(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]), {}),
        (question(), {"X_KVFleet_Strategy": "quality_first"}),
        (question(), {"X_KVFleet_Data_Class": "confidential"}),
        ({**question(), "model": "m"}, {}),
    ],
    ids=["plain", "tools", "strategy", "confidential", "model"],
)
async def test_explain_and_live_agree(body: dict[str, Any], headers: dict[str, str]) -> None:
    """The same candidates with the same drops and the same choice, and nobody is asked for an explanation."""
    public = model("public", provider="openai_compat", allowed_data_classes=("public", "internal"), quality_score=1.0)
    able = model("able", capabilities=ModelCapabilities(supports_tools=True), latency_p50_ms=3000)
    async with live(FleetConfig(models=(REPLICATED, public, able))) as gateway:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        explained = (await gateway.http.post("/v1/route/explain", json=body, headers=named)).json()
        assert [len(engine.calls) for engines in gateway.engines.values() for engine in engines] == [0] * 5
        served = await gateway.served(body, **headers)
        told = gateway.last.to_dict()
        assert explained["selected_model"] == told["selected_model"] == served
        assert [(drop["stage"], drop["reason"]) for drop in explained["drops"]] == [
            (drop["stage"], drop["reason"]) for drop in told["drops"]
        ]
        assert explained["strategy"] == told["strategy"]


async def test_after_a_fallback_everything_names_who_answered() -> None:
    """Response, explanation and metrics; and the path is told as it went."""
    usage = Usage(prompt_tokens=10, completion_tokens=5, total_tokens=15)
    scripts = {"cheap": BROKEN, "fast": FakeReply(text="Here.", usage=usage)}
    async with live(FleetConfig(models=PRICED, strategy="cost_first"), scripts=scripts) as gateway:
        answer = await gateway.ask()
        assert answer.headers["x-kvfleet-model"] == answer.json()["model"] == "fast"
        explanation = gateway.last
        assert (explanation.selected_model, explanation.served_by) == ("cheap", "fast")
        assert explanation.fallback_triggered
        assert explanation.fallback_chain == ("cheap@http://cheap:8000", "fast@http://fast:8000")
        assert explanation.to_dict()["fallback_chain"] == ["cheap", "fast"]
        assert gateway.metric("kvfleet_fallback_triggered_total", from_model="cheap", to_model="fast") == 1
        assert gateway.metric("kvfleet_attempts_total", model="cheap", outcome="server_error") == 1
        assert gateway.metric("kvfleet_tokens_total", model="fast", type="completion") == 5
        assert gateway.metric("kvfleet_tokens_total", model="cheap", type="completion") is None
