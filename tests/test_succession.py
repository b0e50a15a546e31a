"""What a router keeps when another one takes its place, and what it does not touch before."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from kvfleet.clock import FrozenClock
from kvfleet.config.health import HealthConfig
from kvfleet.config.schema import (
    BudgetConfig,
    FleetConfig,
    GatewayConfig,
    ModelConfig,
    RateLimitsConfig,
    StageConfig,
)
from kvfleet.errors import ConfigError, Fault, RouteError
from kvfleet.pipeline.requests import request_from
from kvfleet.plugin.manager import discover
from kvfleet.router.learned import LearnedStrategy
from kvfleet.runtime import Router
from kvfleet.telemetry.reservations import Work
from kvfleet.testing.fakes import FakeAdapter, FakeReply

TABLE = discover()
ONE = ModelConfig(name="one", endpoint="http://one", cost_per_1k_input_tokens=1, cost_per_1k_output_tokens=1)
TWO = attrs.evolve(ONE, name="two", endpoint="http://two")
NEW = attrs.evolve(ONE, name="new", endpoint="http://new")
LONG = "The quick brown fox jumps over the lazy dog. " * 100


def config(*models: ModelConfig, **more: Any) -> FleetConfig:
    """A fleet of these."""
    return FleetConfig(models=models or (ONE, TWO), **more)


@contextlib.asynccontextmanager
async def router(config: FleetConfig, state_dir: Path | None = None) -> AsyncIterator[Router]:
    """A router over fakes, for which nobody polls."""
    clock = FrozenClock()
    adapters = {
        model.id: FakeAdapter(
            endpoint=model.endpoint, model_id=model.name, time=clock, script=FakeReply(text="Hello.", cached_tokens=0)
        )
        for model in (ONE, TWO, NEW)
    }
    made = Router(
        config, table=TABLE, clock=clock, adapters=adapters, polls=False, seed=1, state_dir=state_dir
    )  # fmt: skip
    async with made:
        yield made


@contextlib.asynccontextmanager
async def changed(before: Router, config: FleetConfig) -> AsyncIterator[Router]:
    """The router that takes its place."""
    made = before.successor(config)
    await made.open()
    await before.stop_watching()
    made.take_over(before)
    async with made:
        yield made


def component(router: Router, key: str) -> Any:
    """The component of a stage."""
    stages = (*router.pipeline.all_stages, *router.pipeline.strategies.values())
    return next(stage.component for stage in stages if stage.key == key)


async def test_load_and_reservations_go_on() -> None:
    """What is in flight at a replica that stays is known, and released by whoever began it."""
    async with router(config()) as before:
        held = before.services.load.started(ONE.id, Work(prompt_tokens=1000))
        before.services.load.finished(before.services.load.started(TWO.id), 3.0, ok=True, completion_tokens=30)
        async with changed(before, config(ONE, TWO, NEW)) as now:
            known = now.services.load.of(ONE.id)
            assert known is not None
            assert (known.in_flight, known.queued_tokens) == (1, 1000)
            two = now.services.load.of(TWO.id)
            assert two is not None
            assert two.tokens_per_second == 10
            before.services.load.finished(held, 1.0, ok=True)
            assert now.services.load.in_flight(ONE.id) == 0
            assert now.services.load.of(NEW.id) is not None


async def test_replicas_that_are_gone_are_forgotten_when_nobody_uses_them() -> None:
    """Until the router before is closed its replicas are known; then no more."""
    async with router(config()) as before, changed(before, config(ONE)) as now:
        assert now.services.load.of(TWO.id) is not None
        now.forget_others()
        assert now.services.load.of(TWO.id) is None


async def test_breakers_stay_open_and_options_change() -> None:
    """A replica that was left alone still is; how many failures it takes is as the new file says."""
    async with router(config()) as before:
        for _ in range(3):
            before.services.health.record_failure(ONE.endpoint, Fault.CONNECT)
        async with changed(before, config(health=HealthConfig(failure_threshold=1))) as now:
            health = now.services.health
            assert [health.is_available(one) for one in (ONE.endpoint, TWO.endpoint)] == [False, True]
            health.record_failure(TWO.endpoint, Fault.CONNECT)
            assert not health.is_available(TWO.endpoint)


async def test_rate_limits_go_on() -> None:
    """A replica that asked to wait is held, by calls of either router; configured limits are the new file's."""
    async with router(config()) as before:
        late = before.services.limits.begin(TWO.id)
        before.services.limits.tracker.record_429(ONE.endpoint, ONE.get_model_id(), retry_after=60)
        async with changed(before, config(rate_limits=RateLimitsConfig(default_rpm=2))) as now:
            now_s = now.clock.now_s()
            assert now.services.limits.hold(ONE.id, now_s) is not None
            assert now.services.limits.hold(TWO.id, now_s) is None
            late.heard({"x-ratelimit-limit-requests": "10", "x-ratelimit-remaining-requests": "0"})
            assert now.services.limits.hold(TWO.id, now_s) is not None
            assert now.services.limits.tracker.default_rpm == 2


async def test_where_prompts_are_is_known() -> None:
    """The index of prompts goes on: the next turn is sent where the first was, and is expected to be cached there."""
    async with router(config()) as before:
        _, first = await before.route(prompt=LONG)
        await before.settled()
        entries = component(before, "affinity.prefix").state()["entries"]
        async with changed(before, config(ONE, TWO, NEW, strategy="round_robin")) as now:
            assert component(now, "affinity.prefix").state()["entries"] == entries > 0
            explanation = await now.simulate(prompt=LONG + " And then?")
            (stage,) = [one for one in explanation.stages if one.kind == "affinity"]
            known = [model for model, mode in zip(stage.scored, stage.modes, strict=True) if mode != "none"]
            assert known == [f"{first.selected_model}@http://{first.selected_model}"]
            async with changed(now, config(TWO)) as last:
                assert set(component(last, "affinity.prefix")._trust) == {TWO.id}


async def test_answers_in_memory_go_on() -> None:
    """An answer given before a reload is given again after it."""
    cached = (StageConfig(use="answer.exact_cache"), StageConfig(use="select"), StageConfig(use="execute"))
    async with router(config(pipeline=cached)) as before:
        await before.route(prompt="Hi", temperature=0)
        await before.settled()
        async with changed(before, config(ONE, pipeline=cached)) as now:
            _, explanation = await now.route(prompt="Hi", temperature=0)
    assert explanation.outcome == "cached"


async def test_budgets_go_on(tmp_path: Path) -> None:
    """What was spent and is reserved counts against the new limit, and late answers are booked once, on disk too."""
    budget = BudgetConfig(enabled=True, monthly_budget_usd=100)
    async with router(config(budget=budget), tmp_path) as before:
        await before.route(prompt="Hi", max_tokens=10)
        (account,) = component(before, "admit.budget").statements()
        lower = BudgetConfig(enabled=True, monthly_budget_usd=float(account["spent_usd"]))  # type: ignore[arg-type]
        async with changed(before, config(budget=lower)) as now:
            with pytest.raises(RouteError) as caught:
                await now.route(prompt="Hi", max_tokens=10)
            (after,) = component(now, "admit.budget").statements()
    assert caught.value.code == "insufficient_quota"
    assert after["spent_usd"] == account["spent_usd"]
    async with router(config(budget=budget), tmp_path) as again:
        assert component(again, "admit.budget").statements()[0]["spent_usd"] == account["spent_usd"]


async def test_places_in_flight_are_counted_over_a_reload() -> None:
    """Those let in before still take their places, and give them back."""
    limited = GatewayConfig(max_concurrent=1)
    slow = FakeReply(text="Hello.", latency_s=1.0)
    async with router(config(gateway=limited)) as before:
        for adapter in before.adapters.values():
            adapter.script = slow  # type: ignore[attr-defined]
        component(before, "admit.concurrency")._in_flight["", ""] = 1
        async with changed(before, config(gateway=limited)) as now:
            with pytest.raises(RouteError, match="limit of requests in flight"):
                await now.route(prompt="Hi")
            component(before, "admit.concurrency")._in_flight.clear()
            assert component(now, "admit.concurrency").state()["in_flight"] == 0


@pytest.mark.parametrize("name", ["ucb1", "thompson_sampling", "epsilon_greedy", "exp3"])
async def test_learned_arms_go_on_and_are_kept_once(tmp_path: Path, name: str) -> None:
    """Rewards from before count, answers from before can be rated, and the file has what was learned last."""
    async with router(config(ONE, strategy=name), tmp_path) as before:
        await before.route(prompt="Hi", request_id="mine")
        await before.settled()
        async with changed(before, config(ONE, strategy=name)) as now:
            assert component(now, f"select.{name}").stats()["arms"]["one"]["pulls"] == 1
            assert now.feedback("mine", 1.0) == "one"
            for _ in range(3):
                await now.route(prompt="Hi")
            await now.settled()
            learned: LearnedStrategy = component(now, f"select.{name}")
            kept = learned._kept()
            await now.aclose()
            await before.aclose()
    async with router(config(ONE, strategy=name), tmp_path) as again:
        assert component(again, f"select.{name}")._kept() == kept


async def test_a_canary_stays_on_its_step(tmp_path: Path) -> None:
    """Another canary, or another salt, begins anew; the same one goes on."""
    other = attrs.evolve(ONE, name="other", endpoint="http://new")

    def canary(**options: Any) -> FleetConfig:
        stages = (
            StageConfig(use="select.canary", options={"canary": "other", **options}),
            StageConfig(use="execute"),
        )
        return config(ONE, other, pipeline=stages)

    async with router(canary(), tmp_path) as before:
        component(before, "select.canary").step = 2
        async with changed(before, canary(max_latency_ratio=3.0)) as now:
            assert component(now, "select.canary").step == 2
            async with changed(now, canary(salt="again")) as anew:
                assert component(anew, "select.canary").step == 0


async def test_outcomes_of_the_router_before_teach_the_one_that_goes_on() -> None:
    """A request that ends after the reload is learned from by who is asked now."""
    async with router(config(ONE, strategy="ucb1")) as before:
        dispatched = await before.dispatch(request_from(prompt="Hi", stream=True))
        async with changed(before, config(ONE, strategy="ucb1")) as now:
            assert dispatched.answer.reply.events is not None
            _ = [piece async for piece in dispatched.answer.reply.events]
            await before.settled()
            assert component(now, "select.ucb1").stats()["arms"]["one"]["pulls"] == 1


async def test_adapters_of_unchanged_replicas_stay_and_are_closed_once() -> None:
    """A replica that is as it was keeps its adapter and connections; a changed one gets another."""
    unlike = attrs.evolve(TWO, timeout_seconds=1)
    plain = Router(config(), table=TABLE, polls=False)
    async with plain, changed(plain, config(ONE, unlike)) as now:
        assert now.adapters[ONE.id] is plain.adapters[ONE.id]
        assert now.adapters[TWO.id] is not plain.adapters[TWO.id]
        assert now.connections is plain.connections
        await plain.aclose()
        assert (await now.simulate(prompt="Hi")).selected_model == "one"


async def test_until_it_takes_over_a_successor_changes_nothing() -> None:
    """One that is built, opened and closed again leaves the router as it was: its state, metrics and connections."""
    async with router(config()) as before:
        await before.route(prompt="Hi")
        await before.settled()
        rendered, known = before.services.metrics.render(), before.services.load.snapshot()
        for wrong in ({"strategy": "nothing"}, {"pipeline": (StageConfig(use="filter.nothing"),)}):
            with pytest.raises(ConfigError):
                before.successor(config(ONE, **wrong))
        made = before.successor(config(ONE))
        await made.open()
        await made.aclose()
        assert before.services.metrics.render() == rendered
        assert before.services.load.snapshot() == known
        response, _ = await before.route(prompt="Hi")
        assert response.content == "Hello."


async def test_a_plugin_that_cannot_hand_on_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    """A component that fails while it takes over keeps nobody from serving, and is named."""
    async with router(config(ONE, strategy="ucb1")) as before:
        broken = component(before, "select.ucb1")
        arms = broken._arms
        del broken._arms
        async with changed(before, config(ONE, strategy="ucb1")) as now:
            response, _ = await now.route(prompt="Hi")
        broken._arms = arms
    assert response.content == "Hello."
    assert "stage begins anew stage=select.ucb1 error=AttributeError" in caplog.text


async def test_engines_are_watched_by_one_at_a_time() -> None:
    """The watch goes from one router to the next: it ends here before it begins there."""
    mock = ModelConfig(name="mock", provider="mock", endpoint="mock://1")
    more = attrs.evolve(mock, name="more", endpoint="mock://2")
    async with Router(config(mock), table=TABLE) as before, changed(before, config(mock, more)) as now:
        async with asyncio.timeout(5):
            while now.services.health.get_health("mock://2") is None:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.01)
