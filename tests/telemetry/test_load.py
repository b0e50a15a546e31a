"""What is in flight, what engines say, and the waits that follow from both."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.base import EngineLoad
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.reservations import Reservation, Work


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


FLEET = (A1, A2, B)


def stream(load: FleetLoad, clock: FrozenClock, model: ModelConfig, ttfb_s: float, prompt: float = 0.0) -> None:
    """One streamed request to an idle replica, first byte after some seconds, ten tokens in as many more."""
    one = load.started(model.id, Work(prompt))
    clock.advance(ttfb_s)
    load.first_byte(one, ttfb_s)
    clock.advance(ttfb_s)
    load.finished(one, ttfb_s * 2, True, 10)


def begun(load: FleetLoad, count: int) -> list[Reservation]:
    """So many answers that are being written from now on."""
    found = [load.started(A1.id) for _ in range(count)]
    for one in found:
        load.first_byte(one, 0.0)
    return found


def written(load: FleetLoad, clock: FrozenClock, together: int, step_s: float, tokens: int) -> None:
    """An answer whose tokens come so long after each other, written together with so many others."""
    *others, one = begun(load, together + 1)
    clock.advance(step_s * (tokens - 1))
    load.finished(one, 1.0, True, tokens)
    for other in others:
        load.finished(other, 1.0, False)


def whole(load: FleetLoad, clock: FrozenClock, model: ModelConfig, duration_s: float, tokens: int = 10) -> None:
    """One request answered in one piece."""
    one = load.started(model.id, Work(is_stream=False))
    clock.advance(duration_s)
    load.answered(one, duration_s, tokens)
    load.finished(one, duration_s, True, tokens)


def waits(load: FleetLoad, clock: FrozenClock, prompt: float = 0.0, cached: Any = (0.0, 0.0, 0.0)) -> list[float]:
    """Seconds to the first byte at each replica."""
    found = load.waits(FLEET, prompt, cached, clock.now_s())
    return [queue + own for queue, own in zip(found.queue_s, found.prompt_s, strict=True)]


# Reservations


def test_requests_are_counted_from_start_to_end(load: FleetLoad) -> None:
    """What began and has not ended is in flight; it ends once."""
    one, two = load.started(A1.id), load.started(A1.id)
    assert load.in_flight(A1.id) == 2
    load.finished(one, 1.0, True)
    load.finished(one, 1.0, True)
    assert load.in_flight(A1.id) == 1
    load.finished(two, 1.0, False)
    assert load.in_flight(A1.id) == 0
    assert load.in_flight("stranger") == 0


def test_a_reservation_outlives_a_reload_harmlessly(load: FleetLoad) -> None:
    """The replica may be gone when its answer ends."""
    one = load.started(B.id)
    load.register([A1])
    load.finished(one, 1.0, True)
    assert load.in_flight(B.id) == 0


def test_prompt_tokens_wait_until_the_first_byte_and_memory_until_the_end(load: FleetLoad, clock: FrozenClock) -> None:
    """What is cached neither waits nor takes memory of its own."""
    one = load.started(A1.id, Work(1000, cached_tokens=400, answer_tokens=100))
    known = load.of(A1.id)
    assert known is not None
    assert (known.queued_tokens, known.held_tokens, known.decoding) == (600, 700, 0)
    load.first_byte(one, 0.1)
    assert (known.queued_tokens, known.held_tokens, known.decoding) == (0, 700, 1)
    load.finished(one, 0.2, True)
    assert (known.queued_tokens, known.held_tokens, known.decoding) == (0, 0, 0)


def test_a_reservation_nobody_releases_ends_by_its_lease(clock: FrozenClock) -> None:
    """And it is counted, because it should not happen."""
    load = FleetLoad(clock, lease_s=60.0)
    load.register(FLEET)
    load.started(A1.id, Work(1000))
    clock.advance(61)
    load.free(clock.now_s(), FLEET)
    known = load.of(A1.id)
    assert known is not None
    assert (known.in_flight, known.queued_tokens, known.held_tokens, load.expired) == (0, 0, 0, 1)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["start", "first", "end", "fail", "whole"]),
        st.integers(0, 2),
        st.integers(0, 30),
        st.floats(0, 1e5),
    ),
    max_size=60,
)


@given(STEPS)
def test_reservations_sum_to_nothing_in_the_end(steps: list[tuple[str, int, int, float]]) -> None:
    """Whatever happened, in whatever order, and however often it was said."""
    clock = FrozenClock()
    load = FleetLoad(clock)
    load.register(FLEET)
    made = []
    for what, replica_at, which, amount in steps:
        clock.advance(amount / 1e5)
        if what == "start" or not made:
            made.append(load.started(FLEET[replica_at].id, Work(amount, amount / 3, is_stream=which % 2 == 0)))
            continue
        one = made[which % len(made)]
        seconds = clock.now_s() - one.started_s
        if what == "first":
            load.first_byte(one, seconds)
        elif what == "whole":
            load.answered(one, seconds, which)
            load.finished(one, seconds, True, which)
        else:
            load.finished(one, seconds, what == "end", which)
    for one in made:
        load.finished(one, 1.0, False)
    for model in FLEET:
        known = load.of(model.id)
        assert known is not None
        assert (known.open, known.prefilling, known.queued_tokens, known.held_tokens) == ({}, {}, 0, 0)
        assert load.waits(FLEET, 10.0, (0, 0, 0), clock.now_s()).queue_s == [0, 0, 0]


# Waits


def test_declared_times_hold_until_something_is_measured(load: FleetLoad, clock: FrozenClock) -> None:
    """Before the first answer, the configuration's word counts."""
    assert load.expected_ttfb_s(A1.id) is None
    assert waits(load, clock) == pytest.approx([0.5625, 0.5625, 1.125])


def test_before_anything_is_measured_the_longer_queue_is_that_of_more_tokens(
    load: FleetLoad, clock: FrozenClock
) -> None:
    """One long prompt is more than three short ones; what a cache would save, nobody knows yet."""
    load.started(A1.id, Work(12_000))
    for _ in range(3):
        load.started(A2.id, Work(500))
    found = load.waits(FLEET, 4000, (4000, 0, 0), clock.now_s(), {4000.0: 3.0})
    assert found.queue_s[0] > 2 * found.queue_s[1] > 0
    assert found.prompt_s == pytest.approx([0.5625, 0.5625, 1.125])
    assert found.saved_s == found.returns_s == [0, 0, 0]


def test_the_usual_time_is_an_exponentially_weighted_mean(load: FleetLoad, clock: FrozenClock) -> None:
    """The first measurement counts whole, later ones in part."""
    stream(load, clock, A1, 1.0)
    assert load.expected_ttfb_s(A1.id) == 1.0
    stream(load, clock, A1, 2.0)
    assert load.expected_ttfb_s(A1.id) == pytest.approx(1.2)


def test_an_unmeasured_replica_is_like_its_siblings(load: FleetLoad, clock: FrozenClock) -> None:
    """What one replica shows of its model's pace counts for all of them."""
    for _ in range(10):
        stream(load, clock, A1, 0.05)
    one, other, _ = waits(load, clock)
    assert one == pytest.approx(0.05, rel=0.1)
    assert other == pytest.approx(one, rel=0.1)


def test_an_unmeasured_model_is_scaled_by_the_fleets_pace(load: FleetLoad, clock: FrozenClock) -> None:
    """If engines answer in a tenth of what was declared, the others are taken to do so too, and stay comparable."""
    stream(load, clock, A1, 0.05)
    assert waits(load, clock)[2] == pytest.approx(0.1125)


def test_the_pace_of_prompts_is_learned(load: FleetLoad, clock: FrozenClock) -> None:
    """From prompts of several lengths: 20 ms, and a second for 8,000 tokens; and what is cached takes none."""
    for tokens in (100, 4000, 800, 12000, 2000, 6000) * 8:
        stream(load, clock, A1, 0.02 + tokens / 8000, tokens)
    assert waits(load, clock, 10_000)[0] == pytest.approx(1.27, rel=0.05)
    assert waits(load, clock, 10_000, (8000.0, 0.0, 0.0))[0] == pytest.approx(0.27, rel=0.15)
    assert load.waits(FLEET, 10_000, (8000.0, 0.0, 0.0), clock.now_s()).saved_s[0] == pytest.approx(1.0, rel=0.05)


def test_a_slower_replica_shows(load: FleetLoad, clock: FrozenClock) -> None:
    """Half the speed of its sibling is learned within a few requests, and belongs to that replica alone."""
    for tokens in (1000, 4000, 2000, 8000) * 6:
        stream(load, clock, A1, tokens / 8000, tokens)
        stream(load, clock, A2, tokens / 4000, tokens)
    fast, slow, _ = waits(load, clock, 8000)
    assert slow / fast == pytest.approx(2.0, rel=0.15)


def test_a_queue_lasts_as_long_as_the_prompts_in_it(load: FleetLoad, clock: FrozenClock) -> None:
    """It grows with what is sent, melts with time, and is counted anew from each first byte."""
    for tokens in (1000, 4000, 2000, 8000) * 6:
        stream(load, clock, A1, tokens / 8000, tokens)
    first = load.started(A1.id, Work(8000))
    load.started(A1.id, Work(16000))
    queue = [load.waits(FLEET, 0, (0, 0, 0), clock.now_s()).queue_s[0]]
    clock.advance(0.5)
    queue.append(load.waits(FLEET, 0, (0, 0, 0), clock.now_s()).queue_s[0])
    clock.advance(1.5)
    queue.append(load.waits(FLEET, 0, (0, 0, 0), clock.now_s()).queue_s[0])
    load.first_byte(first, 2.0)
    queue.append(load.waits(FLEET, 0, (0, 0, 0), clock.now_s()).queue_s[0])
    # The first is late: what is behind it still lies ahead, and not less.
    assert queue == pytest.approx([3.0, 2.5, 2.0, 2.1], rel=0.1)


def test_a_queue_in_front_does_not_make_an_engine_look_slow(load: FleetLoad, clock: FrozenClock) -> None:
    """Ten requests at once wait for each other; the pace learned from them is that of one."""
    for _ in range(6):
        open_ = [load.started(A1.id, Work(4000)) for _ in range(10)]
        for one in open_:
            clock.advance(0.5)
            load.first_byte(one, clock.now_s() - one.started_s)
        for one in open_:
            load.finished(one, clock.now_s() - one.started_s, True)
    assert waits(load, clock, 4000)[0] == pytest.approx(0.5, rel=0.2)


def test_whole_answers_are_learned_apart_from_streams(load: FleetLoad, clock: FrozenClock) -> None:
    """A replica that was asked for a long answer in one piece does not look slow to those who stream."""
    for _ in range(5):
        stream(load, clock, A1, 0.2)
        whole(load, clock, A2, 9.0, 900)
    one, other, _ = waits(load, clock)
    assert other == pytest.approx(one, rel=0.1)
    assert load.expected_ttfb_s(A2.id) == pytest.approx(9.0)


def test_without_streams_the_length_of_answers_is_told_from_the_wait_for_them(
    load: FleetLoad, clock: FrozenClock
) -> None:
    """A tenth of a second, and ten milliseconds for each token."""
    for tokens in (10, 400, 100, 900, 50) * 8:
        whole(load, clock, A1, 0.1 + tokens / 100, tokens)
    assert waits(load, clock)[0] == pytest.approx(0.1, abs=0.15)
    rates = load.rates(A1.id)
    assert rates is not None
    assert rates.step_s == pytest.approx(0.01, rel=0.1)


def test_steps_of_decoding_are_learned_with_the_batch(load: FleetLoad, clock: FrozenClock) -> None:
    """Ten milliseconds alone, and one more for each other request."""
    for together in (0, 4, 1, 8, 2) * 6:
        written(load, clock, together, 0.001 * (10 + together), 100)
    rates = load.rates(A1.id)
    assert rates is not None
    assert (rates.step_s, rates.step_each_s) == pytest.approx((0.010, 0.001), rel=0.15)


def test_answers_beside_never_account_for_all_of_a_prompts_time(load: FleetLoad, clock: FrozenClock) -> None:
    """Steps that a crowd of prompts held up look slow; were more taken off than there is, prompts would seem free."""
    for together in (0, 4, 1, 8):
        written(load, clock, together, 0.2 * (1 + together), 10)
    others = begun(load, 8)
    for _ in range(20):
        prompt = load.started(A1.id, Work(1000))
        clock.advance(0.5)
        load.first_byte(prompt, 0.5)
        load.finished(prompt, 0.5, False)
    for other in others:
        load.finished(other, 1.0, False)
    assert 0.05 < waits(load, clock, 1000)[0] <= 0.5


def test_an_old_measurement_is_forgotten(load: FleetLoad, clock: FrozenClock) -> None:
    """A replica that was slow once, and was avoided since, is tried again."""
    for _ in range(6):
        stream(load, clock, A2, 0.1)
        stream(load, clock, A1, 3.0)
    assert waits(load, clock)[0] > 2.5 * waits(load, clock)[1]
    for _ in range(200):
        clock.advance(2)
        stream(load, clock, A2, 0.1)
    assert waits(load, clock)[0] < 3 * waits(load, clock)[1]
    assert load.expected_ttfb_s(A1.id) is None


# The engines' own account


def test_other_peoples_requests_count_where_the_engine_tells(load: FleetLoad, clock: FrozenClock) -> None:
    """An engine that is busy for another gateway is busy, and its queue lasts."""
    load.report("http://a1", EngineLoad(running=6, waiting=2), clock.now_s())
    assert load.pending(A1.id) == 8
    rates = load.rates(A1.id)
    assert rates is not None
    assert load.waits(FLEET, 1000, (0, 0, 0), clock.now_s()).queue_s == pytest.approx(
        [2 * rates.service_s(1000, 0), 0, 0]
    )
    load.started(A1.id)
    assert load.pending(A1.id) == 9


def test_our_own_requests_are_not_counted_twice(load: FleetLoad, clock: FrozenClock) -> None:
    """The engine's count holds ours; what we did since moves it on."""
    one, *_ = [load.started(A1.id) for _ in range(3)]
    load.report("http://a1", EngineLoad(running=1, waiting=2), clock.now_s())
    assert load.pending(A1.id) == 3
    queue = load.waits(FLEET, 0, (0, 0, 0), clock.now_s()).queue_s[0]
    assert queue == pytest.approx(3 * 0.0625)
    load.finished(one, 1.0, True)
    assert load.pending(A1.id) == 2


def test_a_silent_engine_is_unknown_and_not_full(load: FleetLoad, clock: FrozenClock) -> None:
    """A reading that is too old no longer counts; it can still be read, with its age."""
    load.report("http://a1", EngineLoad(running=100, waiting=100, kv_usage=0.99), clock.now_s())
    assert load.free(clock.now_s(), FLEET)[0] == pytest.approx(0.01)
    clock.advance(16)
    assert load.free(clock.now_s(), FLEET)[0] == 1.0
    assert load.age_s("http://a1") == 16
    assert load.engine("http://a1") == EngineLoad(running=100, waiting=100, kv_usage=0.99)
    assert load.engine("http://nobody") is None
    assert load.age_s("http://nobody") is None


def test_a_full_cache_leaves_no_capacity(load: FleetLoad, clock: FrozenClock) -> None:
    """The fuller of batch and KV cache decides how free a replica is."""
    load.report("http://a1", EngineLoad(running=0, kv_usage=0.9), clock.now_s())
    assert load.free(clock.now_s(), (*FLEET, replica("x", "http://x"))) == [pytest.approx(0.1), 1.0, 1.0, None]


def test_memory_that_our_requests_will_need_counts_before_the_engine_says_so(
    load: FleetLoad, clock: FrozenClock
) -> None:
    """The size of the cache is the engine's word; what is sent since is ours."""
    load.report("http://a1", EngineLoad(kv_usage=0.1, cache_blocks=100, block_tokens=16), clock.now_s())
    load.started(A1.id, Work(800, answer_tokens=160))
    assert load.waits(FLEET, 0, (0, 0, 0), clock.now_s()).usage == [pytest.approx(0.6), 0.0, 0.0]


def test_replicas_on_one_endpoint_share_its_report(clock: FrozenClock) -> None:
    """An engine that serves two models tells of both at once."""
    load = FleetLoad(clock)
    one, two = replica("one", "http://shared"), replica("two", "http://shared")
    load.register([one, two])
    load.report("http://shared", EngineLoad(running=4), clock.now_s())
    assert (load.pending(one.id), load.pending(two.id)) == (4, 4)


def test_a_reload_keeps_what_stays_and_forgets_the_rest(load: FleetLoad, clock: FrozenClock) -> None:
    """What was learned of a replica survives a reload; replicas that are gone leave nothing behind."""
    stream(load, clock, A1, 0.2)
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
    stream(load, clock, A1, 0.5)
    found = load.snapshot()[A1.id]
    assert {key: found[key] for key in ("in_flight", "started", "ttfb_s", "duration_s", "tokens_per_second")} == {
        "in_flight": 0,
        "started": 1,
        "ttfb_s": 0.5,
        "duration_s": 1.0,
        "tokens_per_second": 10.0,
    }
    assert set(load.snapshot()[B.id]) == {
        "in_flight",
        "pending",
        "started",
        "failed",
        "queued_tokens",
        "held_tokens",
    }


# Busy periods


def test_prompts_computed_together_teach_what_each_takes(load: FleetLoad, clock: FrozenClock) -> None:
    """Two whose answers begin in the same moment took their time together: neither looks slow, nor free."""
    for tokens in (1000, 8000, 2000, 4000) * 8:
        pair = [load.started(A1.id, Work(tokens)), load.started(A1.id, Work(9000 - tokens))]
        clock.advance(9000 / 8000)
        for one in pair:
            load.first_byte(one, 9000 / 8000)
            load.finished(one, 9000 / 8000, True)
    rates = load.rates(A1.id)
    assert rates is not None
    assert rates.latency_s + rates.service_s(9000, 0) == pytest.approx(9000 / 8000, rel=0.15)
    assert rates.service_s(3000, 0) < 0.7


def test_a_crowd_that_is_answered_in_one_moment_teaches_what_a_token_takes(load: FleetLoad, clock: FrozenClock) -> None:
    """A burst under one long prompt that nobody had: from the first answers on, who has it is known to be soon."""
    for _ in range(2):
        burst = [load.started(A1.id, Work(20_000, cached)) for cached in (0, *[19_700] * 14)]
        clock.advance(1.0)
        for one in burst:
            load.first_byte(one, 1.0)
        for one in burst:
            load.finished(one, 1.0, True)
    rates = load.rates(A1.id)
    assert rates is not None
    assert rates.latency_s + rates.service_s(20_000, 0) == pytest.approx(0.8, rel=0.3)
    assert rates.latency_s + rates.service_s(20_000, 19_700) < 0.2


def test_short_prompts_teach_what_does_not_depend_on_their_length(load: FleetLoad, clock: FrozenClock) -> None:
    """A far endpoint that takes a second for a few words is not taken to need hours for a book."""
    for _ in range(30):
        one = load.started(A1.id, Work(10))
        clock.advance(1.0)
        load.first_byte(one, 1.0)
        load.finished(one, 1.0, True)
    rates = load.rates(A1.id)
    assert rates is not None
    assert rates.latency_s + rates.service_s(1, 0) == pytest.approx(1.0, rel=0.05)
    assert rates.latency_s + rates.service_s(10_000, 0) < 10


def test_a_long_busy_period_teaches_before_it_ends(load: FleetLoad, clock: FrozenClock) -> None:
    """Steps that follow each other are told apart, so an engine that is never idle is known all the same."""
    waiting = load.started(A1.id, Work(1000))
    for _ in range(40):
        one, waiting = waiting, load.started(A1.id, Work(1000))
        clock.advance(0.125)
        load.first_byte(one, 0.125)
    rates = load.rates(A1.id)
    assert rates is not None
    assert rates.service_s(1000, 0) == pytest.approx(0.125, rel=0.2)


def test_a_prompt_that_came_to_nothing_teaches_nothing(load: FleetLoad, clock: FrozenClock) -> None:
    """Nobody knows how long a call that failed kept the engine from the others."""
    before = load.rates(A1.id)
    for _ in range(20):
        failed, one = load.started(A1.id, Work(8000)), load.started(A1.id, Work(1000))
        load.finished(failed, 0.0, False)
        clock.advance(30)
        load.first_byte(one, 30.0)
        load.finished(one, 30.0, True)
    after = load.rates(A1.id)
    assert before is not None
    assert after is not None
    assert after.token_s == before.token_s


def test_a_prompt_delays_who_waits_by_what_fits_into_a_step(clock: FrozenClock) -> None:
    """One that is longer than the room that is left is computed in several steps, and they are answered after the first."""
    fleet = [ModelConfig(name="m", endpoint=f"http://{tokens}", step_tokens=tokens) for tokens in (2048, 8192)]
    load = FleetLoad(clock)
    load.register(fleet)
    for tokens in (1000, 8000, 2000, 4000) * 8:
        for model in fleet:
            one = load.started(model.id, Work(tokens))
            clock.advance(tokens / 8000)
            load.first_byte(one, tokens / 8000)
            load.finished(one, tokens / 8000, True)
    for model in fleet:
        load.started(model.id, Work(448))
    found = load.waits(fleet, 4000, [0, 0], clock.now_s())
    assert found.delayed_s == pytest.approx([1600 / 8000, 4000 / 8000], rel=0.05)


def test_the_step_under_way_is_waited_for(load: FleetLoad, clock: FrozenClock) -> None:
    """An engine that writes answers begins a prompt half a step later than one that does nothing."""
    for _ in range(4):
        load.first_byte(load.started(A1.id, Work(100)), 0.1)
    busy, idle = load.waits((A1, A2), 1000.0, (0.0, 0.0), clock.now_s()).queue_s
    rates = load.rates(A1.id)
    assert rates is not None
    assert (busy, idle) == (rates.under_way_s(4), 0.0)
    assert busy > rates.step_s / 2


def test_replicas_of_a_model_are_taken_to_answer_alike(load: FleetLoad, clock: FrozenClock) -> None:
    """How long the last few answers of one replica were says nothing of the next one there."""
    for model, tokens in ((A1, 100), (A2, 300)):
        one = load.started(model.id, Work(100))
        load.first_byte(one, 0.1)
        load.finished(one, 1.0, True, tokens)
        load.started(model.id, Work(100))
    assert load.waits((A1, A2), 1000.0, (0.0, 0.0), clock.now_s()).answer_tokens == [200.0, 200.0]
