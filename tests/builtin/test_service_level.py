"""The section slo: price, quality, slow answers, and engines that are full."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from kvfleet.adapters.base import EngineLoad
from kvfleet.builtin.service_level import OverloadFilter, ServiceLevelFilter
from kvfleet.clock import FrozenClock
from kvfleet.config.loader import check_text
from kvfleet.config.schema import FleetConfig, ModelConfig
from kvfleet.errors import ConfigError, RouteError
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import RouteRequest
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
from kvfleet.telemetry.load import FleetLoad
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace import names
from kvfleet.trace.spans import Span, Status
from tests.builtin.making import context, model, outcome, user

OWN = {"provider": "vllm", "cost_per_1k_input_tokens": 0.001, "cost_per_1k_output_tokens": 0.01}
A, B = model("a", latency_p95_ms=800, **OWN), model("b", latency_p95_ms=900, **OWN)
MS = 10**6


def stage(models: Sequence[ModelConfig] = (A, B), **options: Any) -> tuple[ServiceLevelFilter, FrozenClock]:
    """A filter in a fleet."""
    clock = FrozenClock()
    made = ServiceLevelFilter(**options)
    made.provision(Services(clock=clock, models=tuple(models)))
    return made, clock


def dropped(made: Any, models: Sequence[ModelConfig] = (A, B), now_s: float = 1000.0, **ctx: Any) -> dict[str, str]:
    """By model: why."""
    found = made.filter(context(models, [user("Hello")], now_s=now_s, **ctx))
    return {drop.candidate.name: f"{drop.reason} [{drop.rule}]" for drop in found}


def answered(made: ServiceLevelFilter, replica: ModelConfig, times_ms: Sequence[float], **given: Any) -> None:
    """Tell of answers that a replica gave in these times."""
    for took in times_ms:
        attributes: dict[str, Any] = {names.REPLICA: replica.id, names.MODEL: replica.name, **given.get("span", {})}
        status = given.get("status", Status.OK)
        spans = [
            Span("kvfleet.route", 0, 0, given.get("route", {})),
            Span("chat", 0, round(took * MS), attributes, status=status),
        ]
        asyncio.run(made.observe(outcome(context([replica]), replica, spans=spans)))


def test_without_limits_nobody_is_dropped() -> None:
    """Neither for what it costs, nor for how good or how slow it is."""
    made, _ = stage()
    answered(made, A, [60_000] * 30)
    assert dropped(made, [A, model("b", quality_score=0.0)]) == {}
    assert made.limit_usd(context([A])) is None


def test_a_model_that_is_not_good_enough_is_dropped() -> None:
    """Even if nobody else is there."""
    made, _ = stage(min_quality_score=0.6)
    assert dropped(made, [model("a", quality_score=0.6), model("b", quality_score=0.59)]) == {
        "b": "its quality is 0.59, and 0.6 is the least [min_quality_score]"
    }
    assert dropped(made, [model("b", quality_score=0.1)]) != {}


def test_a_request_that_may_cost_too_much_is_kept_from_there() -> None:
    """By its prompt and the longest answer it allows, or a usual one; nobody knows: not within the limit."""
    made, _ = stage(max_cost_per_request=0.02)
    assert made.limit_usd(context([A])) == 0.02
    assert dropped(made, [A], body={"max_tokens": 1000}) == {}
    assert dropped(made, [A], body={"max_tokens": 3000}) == {
        "a": "it may cost $0.03, and the limit is $0.02 [max_cost_per_request]"
    }
    assert dropped(made, [model("c")]) == {
        "c": "the request may cost an unknown amount, and the limit is $0.02 [max_cost_per_request]"
    }
    longer, _ = stage(max_cost_per_request=0.02, answer_tokens=5000)
    assert list(dropped(longer, [A])) == ["a"]


def test_a_price_that_nobody_knows_is_found_before_the_start() -> None:
    """It would be dropped always."""
    with pytest.raises(ConfigError, match=r"nobody knows the price of cloud, so max_cost_per_request would drop it"):
        stage([A, model("cloud", provider="openai_compat")], max_cost_per_request=0.1)
    stage([A, model("cloud", provider="openai_compat")], min_quality_score=0.1)


class TestLatency:
    def test_it_is_what_was_declared_at_first(self) -> None:
        """Whoever declares more than the target is left to others."""
        made, _ = stage(target_p95_latency_ms=850)
        assert dropped(made) == {
            "b": "one of 20 answers is said to take more than 900 ms, and the target is 850 [target_p95_latency_ms]"
        }

    def test_a_target_that_nobody_meets_drops_nobody(self) -> None:
        """Somebody has to answer; those who are dropped for other reasons do not count."""
        made, _ = stage(target_p95_latency_ms=500)
        assert dropped(made) == {}
        made, _ = stage(target_p95_latency_ms=850, min_quality_score=0.5)
        assert list(dropped(made, [model("a", quality_score=0.1, latency_p95_ms=800), B])) == ["a"]

    def test_it_is_measured_once_there_are_enough_answers(self) -> None:
        """The slowest 5 in 100 count, of each replica by itself."""
        made, clock = stage(target_p95_latency_ms=1000)
        answered(made, A, [100] * 17 + [4000] * 2)
        assert dropped(made) == {}
        clock.advance(2)
        answered(made, A, [100])
        assert dropped(made, now_s=clock.now_s()) == {
            "a": "one of 20 answers takes more than 4000 ms, and the target is 1000 [target_p95_latency_ms]"
        }
        assert made.state() == {A.id: {"p95_ms": 4000.0}}
        clock.advance(2)
        answered(made, A, [100] * 100)
        assert dropped(made, now_s=clock.now_s()) == {}

    def test_who_was_slow_is_tried_again(self) -> None:
        """What is old is forgotten, and the declaration holds again."""
        made, clock = stage(target_p95_latency_ms=1000, window_s=60)
        answered(made, A, [4000] * 20)
        assert list(dropped(made, now_s=clock.now_s())) == ["a"]
        clock.advance(61)
        assert dropped(made, now_s=clock.now_s()) == {}

    def test_a_stream_is_as_slow_as_its_first_byte(self) -> None:
        """A client that reads slowly makes no replica slow."""
        made, _ = stage(target_p95_latency_ms=1000)
        answered(made, A, [60_000] * 20, span={names.TTFB_S: 0.2}, route={names.STREAM: True})
        assert dropped(made) == {}
        answered(made, B, [60_000] * 20, span={names.TTFB_S: 0.2})
        made, _ = stage(target_p95_latency_ms=1000)
        answered(made, B, [60_000] * 20, span={names.TTFB_S: 0.2})
        assert list(dropped(made)) == ["b"]

    def test_a_failure_is_no_answer(self) -> None:
        """That is the breaker's business."""
        made, _ = stage(target_p95_latency_ms=1000)
        answered(made, A, [60_000] * 20, status=Status.ERROR)
        assert dropped(made) == {}


class TestOverload:
    def busy(self, threshold: float = 0.9, **loads: EngineLoad) -> OverloadFilter:
        """A filter over engines that said this of themselves."""
        load = FleetLoad(clock=FrozenClock())
        made = OverloadFilter(load_shed_threshold=threshold)
        made.provision(Services(models=(A, B), load=load))
        for name, said in loads.items():
            load.report(f"http://{name}", said, 1000.0)
        return made

    def test_an_engine_that_says_nothing_is_left_alone(self) -> None:
        """However many requests are there: nobody knows how many it can serve."""
        made = self.busy()
        for _ in range(500):
            made._load.started(A.id)
        assert dropped(made) == {}

    def test_a_full_cache(self) -> None:
        """From the threshold on."""
        made = self.busy(a=EngineLoad(running=50, waiting=0, kv_usage=0.91), b=EngineLoad(running=50, kv_usage=0.89))
        assert dropped(made) == {
            "a": "its engine has 91% of what it can do: 91% of its KV cache is in use [load_shed_threshold]"
        }
        assert list(dropped(self.busy(0.5, b=EngineLoad(running=5, kv_usage=0.5)))) == ["b"]

    def test_a_queue_as_long_as_the_batch(self) -> None:
        """Our own requests since the engine spoke are in it; a few that wait are no queue."""
        made = self.busy(a=EngineLoad(running=20, waiting=17), b=EngineLoad(running=1, waiting=7))
        assert dropped(made) == {}
        made._load.started(A.id)
        assert dropped(made) == {
            "a": "its engine has 90% of what it can do: 18 requests wait beside 20 that it works on [load_shed_threshold]"
        }

    def test_a_client_is_told_when_to_come_back(self) -> None:
        """After the time of a usual answer; a second at least."""
        made = self.busy(a=EngineLoad(running=9, waiting=9))
        (drop,) = made.filter(context([A]))
        assert drop.retry_after_s == 1.0
        made._load.finished(made._load.started(A.id), 7.0, ok=True)
        (drop,) = made.filter(context([A]))
        assert drop.retry_after_s == pytest.approx(7.0)


def fleet(**more: Any) -> FleetConfig:
    """A fleet with a service level."""
    models = "models:\n  - {name: a, provider: mock, endpoint: 'mock://a'}\n  - {name: b, provider: mock, endpoint: 'mock://b', quality_score: 0.3}\n"
    lines = "".join(f"{key}: {value}\n" for key, value in more.items())
    config, findings = check_text(models + lines)
    assert config is not None, findings
    return config


async def ask(config: FleetConfig, replies: Mapping[str, FakeReply] | None = None) -> Any:
    """Send one request, with everything as the file has it."""
    adapters = {
        one.id: FakeAdapter(endpoint=one.endpoint, model_id=one.name, script=(replies or {}).get(one.name, FakeReply()))
        for one in config.models
    }
    router = Router(config, table=discover(), adapters=adapters, polls=False, seed=1)
    body = {"model": "auto", "messages": [user("Hello")]}
    try:
        for one in config.models:
            router.services.load.report(one.endpoint, EngineLoad(running=10, waiting=20 if one.name == "a" else 0), router.services.clock.now_s())  # fmt: skip
        return await router.dispatch(RouteRequest(body=body))
    finally:
        await router.aclose()


async def test_the_section_does_what_it_says() -> None:
    """With its usual values: the one is full, the other is not good enough, so the client is to come back."""
    with pytest.raises(RouteError) as caught:
        await ask(fleet(slo="{enabled: true}"))
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert caught.value.retry_after_s is not None
    assert "a: its engine has 200% of what it can do" in str(caught.value)
    assert "b: its quality is 0.3, and 0.5 is the least [filter.service_level]" in str(caught.value)
    assert (await ask(fleet(slo="{enabled: true, min_quality_score: null}"))).answer.served_by.name == "b"
    assert (await ask(fleet(slo="{enabled: true, load_shed_threshold: null}"))).answer.served_by.name == "a"
    assert (await ask(fleet(slo="{target_p95_latency_ms: 1}"))).answer.served_by is not None


def test_a_pipeline_without_its_stages_is_a_finding() -> None:
    """A limit that nobody applies would look as if it held."""
    start = "models: [{name: a, provider: mock}]\nslo: {enabled: true}\npipeline:\n"
    _, found = check_text(start + "  - classify.prompt\n")
    assert [(one.code, one.remedy) for one in found] == [
        ("unused-section", "add `- filter.service_level`, or remove the section"),
        ("unused-section", "add `- filter.overload`, or remove the section"),
    ]
    _, found = check_text(start + "  - classify.prompt\n  - filter.service_level\n  - filter.overload\n")
    assert found == ()
