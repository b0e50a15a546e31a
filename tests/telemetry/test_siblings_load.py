"""What other workers have in flight, as part of what an engine has."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.base import EngineLoad
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.reservations import Work
from kvfleet.telemetry.siblings_load import SiblingsLoad, own_counts

A = ModelConfig(name="a", endpoint="http://gpu-1")
B = ModelConfig(name="b", endpoint="http://gpu-2")


class Worker:
    """A worker's load, and what it knows of the others'."""

    def __init__(self, clock: FrozenClock) -> None:
        self.clock = clock
        self.load = FleetLoad(clock)
        self.load.register([A, B])
        self.siblings = SiblingsLoad(self.load)

    def hears(self, others: Sequence[Worker]) -> None:
        """Take in what the others say, and apply it."""
        now_s = self.clock.now_s()
        for number, other in enumerate(others):
            self.siblings.hear(number, own_counts(other.load, [A, B]), now_s)
        self.siblings.apply([A, B], now_s)


def pair() -> tuple[Worker, Worker, FrozenClock]:
    """Two workers on one clock."""
    clock = FrozenClock()
    return Worker(clock), Worker(clock), clock


def test_requests_of_others_count_where_the_engine_says_nothing() -> None:
    """They are pending for the other worker too, waiting ones wait in front of its own, and they go when they end."""
    one, two, _ = pair()
    first, second = two.load.started(A.id, Work(prompt_tokens=1000)), two.load.started(A.id)
    two.load.first_byte(second, 0.1)
    one.hears([two])
    known = one.load.of(A.id)
    assert known is not None
    assert (known.pending, known.waiting_of_others, one.load.pending(B.id)) == (2, 1, 0)
    assert one.load.waits([A, B], 100, [0, 0], 1000.0).queue_s[0] > 0
    for held in (first, second):
        two.load.finished(held, 1.0, ok=True)
    one.hears([two])
    assert one.load.pending(A.id) == 0


def test_an_engines_own_count_is_moved_on_by_what_the_others_did_since() -> None:
    """It has counted everybody's when it spoke; what began elsewhere since is added, what ended is taken off."""
    one, two, clock = pair()
    before = two.load.started(A.id)
    one.hears([two])
    one.load.report(A.endpoint, EngineLoad(running=5, waiting=0, kv_usage=0.5), clock.now_s())
    one.hears([two])
    assert one.load.pending(A.id) == 5
    for _ in range(3):
        two.load.started(A.id)
    one.hears([two])
    assert one.load.pending(A.id) == 8
    two.load.finished(before, 1.0, ok=True)
    one.load.started(A.id)
    one.hears([two])
    assert one.load.pending(A.id) == 8
    said = one.load.engine(A.endpoint)
    assert said is not None
    assert said.kv_usage == 0.5


def test_a_worker_that_is_gone_has_nothing_in_flight() -> None:
    """Who has said nothing for a while is not waited for."""
    one, two, clock = pair()
    two.load.started(A.id)
    one.hears([two])
    assert one.load.pending(A.id) == 1
    clock.advance(5)
    one.siblings.apply([A, B], clock.now_s())
    assert one.load.pending(A.id) == 0


def test_without_others_nothing_is_said_for_an_engine() -> None:
    """A fleet whose other workers are idle is as one without them."""
    one, two, _ = pair()
    one.load.started(A.id)
    one.hears([two])
    assert one.load.engine(A.endpoint) is None


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=40))
def test_everybody_counts_everything(steps: list[tuple[int, bool]]) -> None:
    """Whoever begins and ends what, in any order: after the news each worker counts what all have in flight."""
    clock = FrozenClock()
    workers = [Worker(clock) for _ in range(3)]
    held: list[list[object]] = [[], [], []]
    for number, begins in steps:
        load = workers[number].load
        if begins:
            held[number].append(load.started(A.id))
        elif held[number]:
            load.finished(held[number].pop(), 1.0, ok=True)  # type: ignore[arg-type]
        for at, worker in enumerate(workers):
            worker.hears([other for place, other in enumerate(workers) if place != at])
    total = sum(map(len, held))
    assert [worker.load.pending(A.id) for worker in workers] == [total] * 3
