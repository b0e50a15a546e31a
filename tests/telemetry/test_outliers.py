"""Replicas that answer worse than their model's others are left alone."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from kvfleet.clock import FrozenClock
from kvfleet.config.health import HealthConfig, OutlierConfig
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import Fault
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.outliers import Outliers
from kvfleet.telemetry.reservations import Work
from kvfleet.testing.fakes import VirtualTime

POOL = tuple(ModelConfig(name="m", endpoint=f"http://gpu-{i}:8000", latency_p50_ms=100) for i in range(4))


def watch(clock: FrozenClock, **config: Any) -> Outliers:
    """Four replicas of one model, and who compares them."""
    health = HealthManager.of(HealthConfig(), POOL, clock)
    load = FleetLoad(clock)
    load.register(POOL)
    return Outliers(health, load, OutlierConfig(**config))


def serve(outliers: Outliers, number: int, *, ok: int = 0, failed: int = 0) -> None:
    """Calls to a replica that end so, none of them in a row that would open its breaker."""
    health, endpoint = outliers.health, POOL[number].endpoint
    for i in range(max(ok, failed)):
        if i < failed:
            health.record_failure(endpoint, Fault.SERVER_ERROR)
        if i < ok:
            health.record_success(endpoint)


def test_who_fails_more_often_than_the_others_is_left_alone() -> None:
    """A third of its calls fail, never three in a row, and none of the others' do."""
    outliers = watch(FrozenClock())
    for number in (1, 2, 3):
        serve(outliers, number, ok=30)
    serve(outliers, 0, ok=30, failed=15)
    assert outliers.look() == {POOL[0].endpoint: "33% of its calls failed, and 0% of the others'"}
    health = outliers.health
    assert health.unavailable_reason(POOL[0].endpoint).startswith("circuit open after 33% of its calls failed")
    assert health.ejections == {(POOL[0].endpoint, "success_rate"): 1}


def test_what_fails_everywhere_ejects_nobody() -> None:
    """A request that is wrong for every engine says nothing of one of them."""
    outliers = watch(FrozenClock())
    for number in range(4):
        serve(outliers, number, ok=30, failed=15 + number)
    assert outliers.look() == {}


def test_few_calls_are_no_measurement_and_are_kept_until_there_are_more() -> None:
    """Nineteen calls are too few; together with the next ones they count."""
    outliers = watch(FrozenClock())
    for number in range(4):
        serve(outliers, number, ok=10, failed=9 if number == 0 else 0)
    assert outliers.look() == {}
    for number in range(4):
        serve(outliers, number, ok=20)
    assert list(outliers.look()) == [POOL[0].endpoint]


def test_each_further_ejection_is_longer_up_to_a_limit() -> None:
    """30 s, 60 s, 90 s as in Envoy; and shorter again after a time in which it did well."""
    clock = FrozenClock()
    outliers = watch(clock, max_ejection_seconds=80)
    waits = []
    for _ in range(3):
        for number in (1, 2, 3):
            serve(outliers, number, ok=30)
        serve(outliers, 0, ok=30, failed=20)
        outliers.look()
        waits.append(outliers.health.wait_s(POOL[0].endpoint, clock.now_s()))
        clock.advance(100)
        outliers.health.begin(POOL[0].endpoint)
        outliers.health.record_success(POOL[0].endpoint)
    assert waits == [30, 60, 80]


def answer(outliers: Outliers, clock: FrozenClock, number: int, ttfb_s: float) -> None:
    """One streamed answer of a replica."""
    load = outliers.load
    one = load.started(POOL[number].id, Work(prompt_tokens=1000))
    clock.advance(ttfb_s)
    load.first_byte(one, ttfb_s)
    load.finished(one, ttfb_s, ok=True, completion_tokens=1)


@pytest.mark.parametrize(("slow_s", "expected"), [(5.0, [POOL[0].endpoint]), (0.4, [])])
def test_who_takes_many_times_as_long_is_left_alone(slow_s: float, expected: list[str]) -> None:
    """Fifty times as long as the others is an illness; four times is a slower machine."""
    clock = FrozenClock()
    outliers = watch(clock)
    for _ in range(40):
        for number in range(4):
            answer(outliers, clock, number, slow_s if number == 0 else 0.1)
    assert list(outliers.look()) == expected
    assert list(watch(clock, latency_factor=None).look()) == []


async def test_it_looks_every_ten_seconds_and_not_if_it_is_off() -> None:
    """The comparison runs by itself."""
    time = VirtualTime()
    outliers = watch(time)
    outliers.sleep = time.sleep

    async with anyio.create_task_group() as group:
        group.start_soon(outliers.run)
        for number in (1, 2, 3):
            serve(outliers, number, ok=30)
        serve(outliers, 0, ok=30, failed=20)
        await time.pass_s(9)
        assert outliers.health.is_available(POOL[0].endpoint)
        await time.pass_s(1)
        assert not outliers.health.is_available(POOL[0].endpoint)
        group.cancel_scope.cancel()
    off = watch(time, enabled=False)
    await off.run()
