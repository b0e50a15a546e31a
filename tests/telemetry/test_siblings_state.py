"""What workers tell each other of breakers and of backends that ask to wait."""

from __future__ import annotations

from typing import Any

import attrs
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.base import EndpointHealth
from kvfleet.clock import FrozenClock
from kvfleet.config.health import HealthConfig
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.telemetry.fleet_limits import FleetLimits
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.rate_limits import RateLimitTracker
from kvfleet.telemetry.siblings_state import SiblingsState

MODELS = tuple(ModelConfig(name="m", endpoint=f"http://gpu-{i}", provider="vllm") for i in range(4))
ENDPOINTS = [model.endpoint for model in MODELS]
ONE, TWO = ENDPOINTS[:2]


@attrs.define
class Worker:
    """What one worker knows."""

    clock: FrozenClock
    health: HealthManager = attrs.field(init=False)
    limits: FleetLimits = attrs.field(init=False)
    state: SiblingsState = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        config = HealthConfig(failure_threshold=2, recovery_timeout_seconds=30)
        self.health = HealthManager.of(config, MODELS, self.clock)
        self.limits = FleetLimits(RateLimitTracker(clock=self.clock))
        self.limits.register(MODELS)
        self.state = SiblingsState(self.health, self.limits)

    def tell(self, *others: Worker) -> int:
        """Tell the others, in so many pieces."""
        told = list(self.state.told(self.clock.now_s()))
        for other in others:
            for piece in told:
                other.state.hear(piece, ENDPOINTS)
        return len(told)

    def fail(self, endpoint: str = ONE, fault: Fault = Fault.SERVER_ERROR) -> None:
        """Two calls fail in a row."""
        for _ in range(2):
            self.health.record_failure(endpoint, fault)


def pair() -> tuple[Worker, Worker]:
    """Two workers of one machine."""
    clock = FrozenClock()
    return Worker(clock), Worker(clock)


def test_a_breaker_that_opens_is_open_for_all() -> None:
    """With its cause and its wait, and it costs the other worker no call."""
    one, two = pair()
    one.fail()
    one.clock.advance(10)
    one.tell(two)
    assert two.health.breaker_state(ONE) == "open"
    assert two.health.wait_s(ONE, two.clock.now_s()) == 20
    assert two.health.unavailable_reason(ONE) == (
        "circuit open after 2 failed calls, last server_error (told by another worker)"
    )
    assert not two.health.ejections  # counted once, by whoever saw it


def test_one_probe_is_enough_for_all() -> None:
    """While one worker's call tries, the other sends none; if it is answered, both use the endpoint again."""
    one, two = pair()
    one.fail()
    one.tell(two)
    one.clock.advance(31)
    assert one.health.begin(ONE)
    one.tell(two)
    assert not two.health.is_available(ONE)
    assert not two.health.begin(ONE)
    one.health.record_success(ONE)
    one.tell(two)
    assert two.health.breaker_state(ONE) == "closed"
    assert two.health.begin(ONE)


def test_what_is_older_changes_nothing() -> None:
    """A closing that was told before another opening does not end that one, and neither way does nonsense in order."""
    one, two = pair()
    one.fail()
    old = list(one.state.told(one.clock.now_s()))
    one.clock.advance(1)
    one.health.record_success(ONE)
    one.tell(two)
    for piece in old:
        two.state.hear(piece, ENDPOINTS)
    assert two.health.breaker_state(ONE) == "closed"
    closed = one.health.news(0)
    one.clock.advance(1)
    two.fail()
    two.health.hear(closed[0])
    assert two.health.breaker_state(ONE) == "open"


def test_not_more_are_left_out_than_may_be() -> None:
    """Each worker opened another half of the replicas: together they leave no more out than one may."""
    one, two = pair()
    for endpoint in ENDPOINTS[:2]:
        one.fail(endpoint)
    for endpoint in ENDPOINTS[2:]:
        two.fail(endpoint)
    one.tell(two)
    two.tell(one)
    assert [len([e for e in ENDPOINTS if not w.health.is_available(e)]) for w in (one, two)] == [2, 2]


def test_who_cannot_be_reached_is_left_out_by_all() -> None:
    """What nobody answers is no matter of shares, and neither are failed checks."""
    one, two = pair()
    one.fail(ONE, Fault.CONNECT)
    for _ in range(2):
        one.health.update_health(EndpointHealth(endpoint=TWO, healthy=False))
    one.tell(two)
    assert {e for e in ENDPOINTS if two.health.breaker_state(e) == "open"} == {ONE, TWO}


def refused(worker: Worker, wait_s: float) -> None:
    """A call is refused for its rate limit."""
    ticket = worker.limits.begin(MODELS[0].id)
    ticket.ended(BackendError(Fault.RATE_LIMITED, "slow down", status=429, retry_after_s=wait_s))


def test_a_backend_that_asks_to_wait_is_left_alone_by_all() -> None:
    """For as long as it asked; and when it answers again, by none."""
    one, two = pair()
    refused(one, 20.0)
    one.clock.advance(5)
    one.tell(two)
    hold = two.limits.hold(MODELS[0].id, two.clock.now_s())
    assert hold is not None
    assert hold.is_closed(two.clock.now_s())
    assert hold.wait_s(two.clock.now_s()) == 15
    assert two.limits.hold(MODELS[1].id, two.clock.now_s()) is None
    one.clock.advance(12)
    ticket = one.limits.begin(MODELS[0].id)
    ticket.heard({})
    one.tell(two)
    assert two.limits.hold(MODELS[0].id, two.clock.now_s()) is None


def test_nothing_is_told_twice_within_a_second_and_old_things_no_more() -> None:
    """What is as it was is told again once a second, and what is over, for ten."""
    one, two = pair()
    assert one.tell(two) == 0
    one.fail()
    assert [one.tell(two), one.tell(two)] == [1, 0]
    one.clock.advance(1.1)
    assert one.tell(two) == 1
    one.health.record_success(ONE)
    assert one.tell(two) == 1
    one.clock.advance(11)
    assert one.tell(two) == 0


STEPS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["fail", "answer", "begin", "refuse", "tell"]), st.integers(0, 3)),
    max_size=30,
)


@given(STEPS)
def test_whatever_happened_all_agree_once_everybody_has_told(steps: list[tuple[int, str, int]]) -> None:
    """In whichever order they tell, of each backend that asked to wait and each breaker that the shares do not bind."""
    clock = FrozenClock()
    workers = [Worker(clock) for _ in range(3)]
    for number, what, endpoint in steps:
        clock.advance(0.7)
        worker = workers[number]
        if what == "fail":
            worker.fail(ENDPOINTS[endpoint], Fault.CONNECT)
        elif what == "answer":
            worker.health.record_success(ENDPOINTS[endpoint])
        elif what == "begin":
            worker.health.begin(ENDPOINTS[endpoint])
        elif what == "refuse":
            refused(worker, 3.0)
        else:
            worker.tell(*[other for other in workers if other is not worker])
    clock.advance(1.1)
    for _ in range(2):
        for worker in workers:
            worker.tell(*[other for other in workers if other is not worker])

    def known(worker: Worker) -> Any:
        waits = {one: attrs.astuple(wait) for one, wait in worker.limits.waits(clock.now_s() - 10).items()}
        return waits, [worker.health.breaker_state(endpoint) for endpoint in ENDPOINTS]

    late = [max((one.changed_s for one in worker.health.news(0)), default=0) for worker in workers]
    if min(late) > clock.now_s() - 10 or not any(late):
        assert known(workers[0]) == known(workers[1]) == known(workers[2])
