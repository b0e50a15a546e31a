"""Health and circuit breakers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.adapters.base import EndpointHealth
from kvfleet.clock import FrozenClock
from kvfleet.config.health import HealthConfig
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import Fault
from kvfleet.telemetry.health import HealthManager

GPU = "http://gpu-1:8000"


def check(healthy: bool, **known: object) -> EndpointHealth:
    """What a health check found."""
    return EndpointHealth(endpoint=GPU, healthy=healthy, **known)  # type: ignore[arg-type]


@pytest.fixture
def clock() -> FrozenClock:
    """A clock that stands still."""
    return FrozenClock()


@pytest.fixture
def health(clock: FrozenClock) -> HealthManager:
    """A manager with the page's thresholds."""
    return HealthManager(failure_threshold=3, recovery_timeout_seconds=60, clock=clock)


def fail(health: HealthManager, times: int, fault: Fault = Fault.CONNECT) -> None:
    """Some failed calls in a row."""
    for _ in range(times):
        health.record_failure(GPU, fault)


def test_an_endpoint_nobody_has_heard_of_is_available(health: HealthManager) -> None:
    """Not knowing is not a reason to refuse."""
    assert health.is_available(GPU)
    assert health.is_healthy(GPU)
    assert health.breaker_state(GPU) == "closed"
    assert health.unavailable_reason(GPU) == ""


def test_three_failed_checks_open_the_breaker(health: HealthManager) -> None:
    """The page's example: three unhealthy checks remove an endpoint from routing."""
    for expected in (True, True, False):
        health.update_health(check(healthy=False))
        assert health.is_available(GPU) is expected
    assert health.breaker_state(GPU) == "open"
    assert health.unavailable_reason(GPU) == "circuit open after 3 failed health checks"


def test_one_failed_check_is_unhealthy_and_still_available(health: HealthManager) -> None:
    """A single bad check is shown, and routing waits for the threshold."""
    health.update_health(check(healthy=False))
    assert not health.is_healthy(GPU)
    assert health.is_available(GPU)


def test_a_passing_check_closes_a_breaker_that_checks_opened(health: HealthManager) -> None:
    """The same evidence that opened it closes it."""
    for _ in range(3):
        health.update_health(check(healthy=False))
    health.update_health(check(healthy=True))
    assert health.is_available(GPU)
    assert health.is_healthy(GPU)


def test_a_passing_check_does_not_forgive_failed_calls(health: HealthManager) -> None:
    """A wedged engine answers its health check and nothing else."""
    fail(health, 3, Fault.TIMEOUT)
    health.update_health(check(healthy=True))
    assert not health.is_available(GPU)
    assert health.unavailable_reason(GPU) == "circuit open after 3 failed calls, last timeout"


def test_failed_checks_after_failed_calls_do_not_let_a_check_close_it(health: HealthManager) -> None:
    """Once calls are a cause, checks alone cannot close the breaker."""
    fail(health, 3)
    for _ in range(3):
        health.update_health(check(healthy=False))
    health.update_health(check(healthy=True))
    assert health.breaker_state(GPU) != "closed"


def test_an_engine_that_was_seen_down_and_is_up_again_may_be_tried_at_once(health: HealthManager) -> None:
    """A restart ends the wait, not the doubt: one call may try, and only one."""
    fail(health, 3)
    health.update_health(check(healthy=False))
    assert health.breaker_state(GPU) == "open"
    health.update_health(check(healthy=True))
    assert health.breaker_state(GPU) == "half_open"
    assert health.begin(GPU)
    assert not health.begin(GPU)


def test_of_many_calls_that_were_decided_together_one_is_the_probe(health: HealthManager, clock: FrozenClock) -> None:
    """Requests that saw the free slot at the same moment do not all get it."""
    fail(health, 3)
    clock.advance(60)
    assert [health.begin(GPU) for _ in range(5)] == [True, False, False, False, False]
    health.record_failure(GPU, Fault.CIRCUIT_OPEN)
    assert not health.begin(GPU), "a call that was not made says nothing of the probe"
    health.record_success(GPU)
    assert [health.begin(GPU) for _ in range(2)] == [True, True]


def test_a_success_between_failures_starts_the_count_again(health: HealthManager) -> None:
    """Only failures in a row count."""
    fail(health, 2)
    health.record_success(GPU)
    fail(health, 2)
    assert health.is_available(GPU)


@pytest.mark.parametrize("fault", [f for f in Fault if not f.counts_against_replica])
def test_faults_that_are_not_the_replicas_own_never_open_it(health: HealthManager, fault: Fault) -> None:
    """A caller's bad request, a rate limit, a client that left: none of them speaks against the replica."""
    fail(health, 10, fault)
    assert health.is_available(GPU)
    assert health.summary()["tracked_endpoints"] == 0


@pytest.mark.parametrize("fault", [f for f in Fault if f.counts_against_replica])
def test_each_fault_of_the_replicas_own_opens_it(health: HealthManager, fault: Fault) -> None:
    """Every fault of the replica's own counts."""
    fail(health, 3, fault)
    assert not health.is_available(GPU)


def test_after_the_wait_one_call_may_try(health: HealthManager, clock: FrozenClock) -> None:
    """Half-open lets one request through, and not a second one beside it."""
    fail(health, 3)
    clock.advance(59.9)
    assert not health.is_available(GPU)
    clock.advance(0.1)
    assert health.breaker_state(GPU) == "half_open"
    assert health.is_available(GPU)
    health.begin(GPU)
    assert not health.is_available(GPU)
    assert health.unavailable_reason(GPU) == "circuit half-open, its probe is under way"


def test_an_open_breaker_says_how_long_it_stays_so(health: HealthManager, clock: FrozenClock) -> None:
    """Until the probe; then, while that is under way, a moment; nothing where one may call."""
    assert health.wait_s(GPU, clock.now_s()) is None
    fail(health, 3)
    clock.advance(18)
    assert health.wait_s(GPU, clock.now_s()) == 42
    clock.advance(42)
    assert health.wait_s(GPU, clock.now_s()) is None
    health.begin(GPU)
    assert health.wait_s(GPU, clock.now_s()) == 1


def test_a_probe_that_works_closes_the_breaker(health: HealthManager, clock: FrozenClock) -> None:
    """One answer is enough."""
    fail(health, 3)
    clock.advance(60)
    health.begin(GPU)
    health.record_success(GPU)
    assert health.breaker_state(GPU) == "closed"
    fail(health, 2)
    assert health.is_available(GPU)


def test_a_probe_that_fails_opens_it_for_another_wait(health: HealthManager, clock: FrozenClock) -> None:
    """The wait starts anew."""
    fail(health, 3)
    clock.advance(60)
    health.begin(GPU)
    fail(health, 1)
    clock.advance(59)
    assert not health.is_available(GPU)
    clock.advance(1)
    assert health.is_available(GPU)


def test_a_probe_the_client_left_frees_the_slot_and_decides_nothing(health: HealthManager, clock: FrozenClock) -> None:
    """A cancelled probe says nothing; the next request may try."""
    fail(health, 3)
    clock.advance(60)
    health.begin(GPU)
    health.record_failure(GPU, Fault.CANCELLED)
    assert health.breaker_state(GPU) == "half_open"
    assert health.is_available(GPU)


def test_a_probe_answered_with_a_client_error_shows_life(health: HealthManager, clock: FrozenClock) -> None:
    """An engine that refuses a bad request is up."""
    fail(health, 3)
    clock.advance(60)
    health.begin(GPU)
    health.record_failure(GPU, Fault.BAD_REQUEST)
    assert health.breaker_state(GPU) == "closed"


def test_a_late_client_error_does_not_close_an_open_breaker(health: HealthManager) -> None:
    """A call from before the failures must not end the wait."""
    fail(health, 3)
    health.record_failure(GPU, Fault.BAD_REQUEST)
    assert health.breaker_state(GPU) == "open"


def test_a_probe_that_is_never_heard_of_gives_its_slot_back(health: HealthManager, clock: FrozenClock) -> None:
    """No slot is lost for good."""
    fail(health, 3)
    clock.advance(60)
    health.begin(GPU)
    clock.advance(60)
    assert health.is_available(GPU)


def test_a_stale_finding_is_no_finding(health: HealthManager, clock: FrozenClock) -> None:
    """Old news of illness is not believed; it is still there to be read."""
    health.update_health(check(healthy=False, queue_depth=32))
    assert not health.is_healthy(GPU)
    assert health.get_load_scores() == {GPU: 1.0}
    clock.advance(121)
    assert health.is_healthy(GPU)
    assert health.get_load_scores() == {GPU: 0.5}
    assert health.get_health(GPU) == check(healthy=False, queue_depth=32)


def test_warm_means_working(health: HealthManager, clock: FrozenClock) -> None:
    """Requests or throughput at the last check make an endpoint warm, while the check is recent."""
    assert not health.is_warm(GPU)
    health.update_health(check(healthy=True, active_requests=2))
    assert health.is_warm(GPU)
    health.update_health(check(healthy=True, tokens_per_second=12.5))
    assert health.is_warm(GPU)
    health.update_health(check(healthy=True, active_requests=0))
    assert not health.is_warm(GPU)
    health.update_health(check(healthy=True, active_requests=2))
    clock.advance(121)
    assert not health.is_warm(GPU)


def test_the_summary_counts(health: HealthManager) -> None:
    """Tracked, healthy, unhealthy and open are counted."""
    health.update_health(EndpointHealth(endpoint="http://a", healthy=True))
    health.update_health(EndpointHealth(endpoint="http://b", healthy=False))
    fail(health, 3)
    expected = {"tracked_endpoints": 3, "healthy": 1, "unhealthy": 2, "circuit_breakers_open": 1}
    assert health.summary() == expected
    assert health.get_healthy_endpoints() == ["http://a"]


def test_what_is_no_longer_configured_is_forgotten(health: HealthManager) -> None:
    """After a reload, endpoints that are gone leave no trace."""
    fail(health, 3)
    health.retain(["http://a"])
    assert health.summary()["tracked_endpoints"] == 0
    assert health.is_available(GPU)


def test_endpoints_are_bounded(health: HealthManager) -> None:
    """However many endpoints report, memory has an end, and the oldest go first."""
    for i in range(16_400):
        health.record_failure(f"http://{i}", Fault.CONNECT)
    assert health.summary()["tracked_endpoints"] == 16_384


def test_asking_again_costs_nothing_until_something_changes(health: HealthManager, clock: FrozenClock) -> None:
    """The mapping is the same object while nothing changed, and a new one after a change or an expiry."""
    fail(health, 3)
    first = health.unavailable(clock.now_s())
    assert health.unavailable(clock.now_s() + 59) is first
    assert health.unavailable(clock.now_s() + 60) == {}


steps = st.lists(
    st.one_of(
        st.sampled_from(["success", "begin", "check ok", "check bad"]),
        st.sampled_from(list(Fault)),
        st.floats(0, 200),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(steps)
def test_an_endpoint_always_comes_back(history: list[object]) -> None:
    """Whatever happened, an endpoint left alone is tried again after two waits at the most."""
    clock = FrozenClock()
    health = HealthManager(failure_threshold=2, recovery_timeout_seconds=60, clock=clock)
    for step in history:
        match step:
            case "success":
                health.record_success(GPU)
            case "begin":
                health.begin(GPU)
            case "check ok" | "check bad":
                health.update_health(check(healthy=step == "check ok"))
            case Fault():
                health.record_failure(GPU, step)
            case float():
                clock.advance(step)
        is_open = health.breaker_state(GPU) == "open"
        assert not (is_open and health.is_available(GPU))
        assert health.is_available(GPU) == (not health.unavailable_reason(GPU))
    clock.advance(120)
    assert health.is_available(GPU)


# Peers

POOL = tuple(ModelConfig(name="m", endpoint=f"http://gpu-{i}:8000") for i in range(4))


def of_pool(clock: FrozenClock, size: int = 4, **config: Any) -> HealthManager:
    """The health of one model with some replicas."""
    return HealthManager.of(HealthConfig(**config), POOL[:size], clock)


def put_out(health: HealthManager, *numbers: int, fault: Fault = Fault.SERVER_ERROR) -> None:
    """Let replicas fail often enough."""
    for number in numbers:
        for _ in range(3):
            health.record_failure(POOL[number].endpoint, fault)


def out(health: HealthManager) -> list[int]:
    """Which replicas must not be called."""
    return [i for i, model in enumerate(POOL) if not health.is_available(model.endpoint)]


def test_no_more_than_half_are_left_alone_for_how_they_answer(clock: FrozenClock) -> None:
    """A request that breaks every engine it is sent to does not close the fleet; what was spared is counted."""
    health = of_pool(clock)
    put_out(health, 0, 1, 2, 3)
    assert out(health) == [0, 1]
    assert health.ejections[POOL[2].endpoint, "overflow"] == 1


def test_who_cannot_be_reached_is_left_alone_in_any_case(clock: FrozenClock) -> None:
    """There is no use in calling an engine that is not there."""
    health = of_pool(clock)
    put_out(health, 0, 1, 2, fault=Fault.CONNECT)
    assert out(health) == [0, 1, 2]


@pytest.mark.parametrize(("size", "expected"), [(1, [0]), (2, [0]), (3, [0])])
def test_one_may_always_be_left_alone(clock: FrozenClock, size: int, expected: list[int]) -> None:
    """However small the pool."""
    health = of_pool(clock, size, max_ejection_percent=10)
    put_out(health, *range(size))
    assert out(health) == expected


def test_panic_lets_everybody_be_called(clock: FrozenClock) -> None:
    """Below the threshold all are used and the model is named; above it, or when they are back, nobody is."""
    health = of_pool(clock, panic_threshold_percent=50)
    put_out(health, 0, 1, fault=Fault.CONNECT)
    assert (out(health), dict(health.panicking)) == ([0, 1], {})
    put_out(health, 2, fault=Fault.CONNECT)
    assert (out(health), dict(health.panicking)) == ([], {"m": 0.25})
    assert health.breaker_state(POOL[0].endpoint) == "open"
    health.record_success(POOL[2].endpoint)
    assert (out(health), dict(health.panicking)) == ([0, 1], {})


def test_a_pool_of_one_does_not_panic(clock: FrozenClock) -> None:
    """It has no peers that could drown, and its breaker is to hold."""
    health = of_pool(clock, 1, panic_threshold_percent=100)
    put_out(health, 0, fault=Fault.CONNECT)
    assert (out(health), dict(health.panicking)) == ([0], {})


def test_the_share_grows_after_a_return(clock: FrozenClock) -> None:
    """From a tenth to all of it within the window; a new failure ends that."""
    health = of_pool(clock, slow_start_seconds=10)
    put_out(health, 0)
    clock.advance(60)
    health.begin(POOL[0].endpoint)
    health.record_success(POOL[0].endpoint)
    shares = []
    for _ in range(6):
        shares.append(health.share(POOL[0].endpoint, clock.now_s()))
        clock.advance(2)
    assert shares == pytest.approx([0.1, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert not health.is_any_returning
    assert health.share(POOL[1].endpoint, clock.now_s()) == 1.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([Fault.SERVER_ERROR, Fault.TIMEOUT, None])), max_size=80))
def test_half_of_a_pool_always_stays_whatever_it_answers(history: list[tuple[int, Fault | None]]) -> None:
    """As long as every engine can be reached, at least half of them may be called."""
    health = of_pool(FrozenClock())
    for number, fault in history:
        if fault is None:
            health.record_success(POOL[number].endpoint)
        else:
            health.record_failure(POOL[number].endpoint, fault)
        assert len(out(health)) <= 2
