"""What is in flight, what engines say, and the times learned from both."""

from __future__ import annotations

import pytest

from kvfleet.adapters.base import EngineLoad
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.telemetry.load import FleetLoad


def replica(name: str, endpoint: str, p50_ms: float = 500) -> ModelConfig:
    """One replica with a declared time."""
    return ModelConfig(name=name, endpoint=endpoint, latency_p50_ms=p50_ms)


A1, A2, B = replica("a", "http://a1"), replica("a", "http://a2"), replica("b", "http://b", 1000)


@pytest.fixture
def clock() -> FrozenClock:
    """A clock that stands still."""
    return FrozenClock()


@pytest.fixture
def load(clock: FrozenClock) -> FleetLoad:
    """The load of three replicas of two models."""
    load = FleetLoad(clock)
    load.register([A1, A2, B])
    return load


def answered(load: FleetLoad, model: ModelConfig, ttfb_s: float) -> None:
    """One request, answered after some seconds."""
    load.started(model.id)
    load.first_byte(model.id, ttfb_s)
    load.finished(model.id, ttfb_s * 2, True, 10)


def times(load: FleetLoad, clock: FrozenClock) -> dict[str, float]:
    """The expected times, to be compared approximately."""
    return {key: pytest.approx(value) for key, value in load.times(clock.now_s()).items()}


def test_requests_are_counted_from_start_to_end(load: FleetLoad) -> None:
    """What began and has not ended is in flight."""
    load.started(A1.id)
    load.started(A1.id)
    assert load.in_flight(A1.id) == 2
    load.finished(A1.id, 1.0, True)
    load.finished(A1.id, 1.0, False)
    assert load.in_flight(A1.id) == 0
    assert load.in_flight("stranger") == 0


def test_an_end_without_a_beginning_does_not_count_below_nothing(load: FleetLoad) -> None:
    """A route that outlived a reload ends harmlessly."""
    load.finished(A1.id, 1.0, True)
    assert load.in_flight(A1.id) == 0


def test_declared_times_hold_until_something_is_measured(load: FleetLoad, clock: FrozenClock) -> None:
    """Before the first answer, the configuration's word counts."""
    assert load.expected_ttfb_s(A1.id) is None
    assert times(load, clock) == {A1.id: 0.5, A2.id: 0.5, B.id: 1.0}


def test_the_first_measurement_counts_whole_and_later_ones_in_part(load: FleetLoad) -> None:
    """The learned time is an exponentially weighted mean."""
    answered(load, A1, 1.0)
    assert load.expected_ttfb_s(A1.id) == 1.0
    answered(load, A1, 2.0)
    assert load.expected_ttfb_s(A1.id) == pytest.approx(1.2)


def test_an_unmeasured_replica_is_like_its_siblings(load: FleetLoad, clock: FrozenClock) -> None:
    """One replica's measurement replaces its model's declared time everywhere."""
    answered(load, A1, 0.05)
    found = times(load, clock)
    assert found[A2.id] == found[A1.id] == 0.05


def test_an_unmeasured_model_is_scaled_by_the_fleets_pace(load: FleetLoad, clock: FrozenClock) -> None:
    """If engines answer in a tenth of what was declared, the others are taken to do so too, and stay comparable."""
    answered(load, A1, 0.05)
    assert times(load, clock)[B.id] == 0.1


def test_whole_answers_are_learned_apart_from_streams(load: FleetLoad, clock: FrozenClock) -> None:
    """A replica that was asked for a long answer in one piece does not look slow to those who stream."""
    load.started(A1.id)
    load.first_byte(A1.id, 0.2)
    load.finished(A1.id, 5.0, True)
    load.started(A1.id)
    load.answered(A1.id, 9.0)
    load.finished(A1.id, 9.0, True)
    load.started(A2.id)
    load.answered(A2.id, 9.0)
    load.finished(A2.id, 9.0, True)
    assert times(load, clock) == {A1.id: 0.2, A2.id: 0.2, B.id: 0.4}
    assert (load.expected_ttfb_s(A1.id), load.expected_ttfb_s(A2.id)) == (0.2, 9.0)


def test_without_streams_whole_answers_are_what_is_known(load: FleetLoad, clock: FrozenClock) -> None:
    """Until the model streams for the first time; then that counts for all its replicas at once."""
    for model, seconds in ((A1, 1.0), (A2, 3.0)):
        load.started(model.id)
        load.answered(model.id, seconds)
        load.finished(model.id, seconds, True)
    assert times(load, clock) == {A1.id: 1.0, A2.id: 3.0, B.id: 2.8}
    answered(load, A1, 0.1)
    assert times(load, clock) == {A1.id: 0.1, A2.id: 0.1, B.id: 0.2}


def test_requests_there_make_the_expected_time_longer(load: FleetLoad, clock: FrozenClock) -> None:
    """Eight requests in flight double the time of an idle replica."""
    for _ in range(8):
        load.started(A1.id)
    assert times(load, clock) == {A1.id: 1.0, A2.id: 0.5, B.id: 1.0}


def test_a_time_learned_under_load_is_not_counted_twice(load: FleetLoad, clock: FrozenClock) -> None:
    """The time measured with eight requests there is the time expected with eight requests there."""
    for _ in range(9):
        load.started(A1.id)
    load.first_byte(A1.id, 2.0)
    load.finished(A1.id, 3.0, True)
    assert load.in_flight(A1.id) == 8
    assert times(load, clock)[A1.id] == 2.0


def test_an_old_measurement_is_forgotten(load: FleetLoad, clock: FrozenClock) -> None:
    """A replica that was slow once, and was avoided since, is tried again."""
    answered(load, A1, 30.0)
    clock.advance(200)
    answered(load, A2, 0.1)
    for _ in range(40):
        answered(load, A2, 0.1)
    clock.advance(101)
    assert load.times(clock.now_s())[A1.id] < 0.2
    assert load.expected_ttfb_s(A1.id) is None


def test_other_peoples_requests_count_where_the_engine_tells(load: FleetLoad, clock: FrozenClock) -> None:
    """An engine that is busy for another gateway is busy."""
    load.report("http://a1", EngineLoad(running=6, waiting=2), clock.now_s())
    assert load.pending(A1.id) == 8
    assert times(load, clock)[A1.id] == 1.0
    load.started(A1.id)
    assert load.pending(A1.id) == 9


def test_our_own_requests_are_not_counted_twice(load: FleetLoad, clock: FrozenClock) -> None:
    """The engine's count holds ours; what we did since moves it on."""
    for _ in range(3):
        load.started(A1.id)
    load.report("http://a1", EngineLoad(running=3), clock.now_s())
    assert load.pending(A1.id) == 3
    load.finished(A1.id, 1.0, True)
    assert load.pending(A1.id) == 2


def test_a_silent_engine_is_unknown_and_not_full(load: FleetLoad, clock: FrozenClock) -> None:
    """A reading that is too old no longer counts; it can still be read, with its age."""
    load.report("http://a1", EngineLoad(running=100, waiting=100, kv_usage=0.99), clock.now_s())
    assert load.free(clock.now_s())[A1.id] < 0.05
    clock.advance(16)
    assert load.free(clock.now_s())[A1.id] == 1.0
    assert load.age_s("http://a1") == 16
    assert load.engine("http://a1") == EngineLoad(running=100, waiting=100, kv_usage=0.99)
    assert load.engine("http://nobody") is None
    assert load.age_s("http://nobody") is None


def test_a_full_cache_leaves_no_capacity(load: FleetLoad, clock: FrozenClock) -> None:
    """The fuller of batch and KV cache decides how free a replica is."""
    load.report("http://a1", EngineLoad(running=0, kv_usage=0.9), clock.now_s())
    assert load.free(clock.now_s()) == {A1.id: pytest.approx(0.1), A2.id: 1.0, B.id: 1.0}


@pytest.mark.parametrize(("kv_usage", "seconds"), [(0.0, 0.5), (0.8, 0.5), (0.9, 1.0), (0.98, 5.0), (1.0, 5.0)])
def test_a_filling_cache_is_a_barrier(load: FleetLoad, clock: FrozenClock, kv_usage: float, seconds: float) -> None:
    """Up to four fifths it costs nothing; then the expected time grows, up to ten times."""
    load.report("http://a1", EngineLoad(running=0, kv_usage=kv_usage), clock.now_s())
    assert times(load, clock)[A1.id] == seconds


def test_replicas_on_one_endpoint_share_its_report(clock: FrozenClock) -> None:
    """An engine that serves two models tells of both at once."""
    load = FleetLoad(clock)
    one, two = replica("one", "http://shared"), replica("two", "http://shared")
    load.register([one, two])
    load.report("http://shared", EngineLoad(running=4), clock.now_s())
    assert (load.pending(one.id), load.pending(two.id)) == (4, 4)


def test_a_reload_keeps_what_stays_and_forgets_the_rest(load: FleetLoad, clock: FrozenClock) -> None:
    """What was learned of a replica survives a reload; replicas that are gone leave nothing behind."""
    answered(load, A1, 0.2)
    load.report("http://b", EngineLoad(running=1), clock.now_s())
    load.register([A1])
    assert load.expected_ttfb_s(A1.id) == 0.2
    assert set(load.snapshot()) == {A1.id}
    assert load.engine("http://b") is None


def test_strangers_are_bounded() -> None:
    """Replicas nobody registered take bounded memory."""
    load = FleetLoad(FrozenClock())
    for i in range(16_400):
        load.started(f"m@{i}")
        load.report(f"http://{i}", EngineLoad(running=1), 1000.0)
    assert len(load.snapshot()) == 16_384
    assert load.engine("http://0") is None


def test_the_snapshot_shows_what_is_known_and_no_more(load: FleetLoad, clock: FrozenClock) -> None:
    """Figures that nobody knows are absent."""
    answered(load, A1, 0.5)
    assert load.snapshot()[A1.id] == {
        "in_flight": 0,
        "pending": 0,
        "started": 1,
        "failed": 0,
        "ttfb_s": 0.5,
        "duration_s": 1.0,
        "tokens_per_second": 10.0,
    }
    assert load.snapshot()[B.id] == {"in_flight": 0, "pending": 0, "started": 0, "failed": 0}
