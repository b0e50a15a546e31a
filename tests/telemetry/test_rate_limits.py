"""Rate limits: what is known, for how long, and who is left alone."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.clock import FrozenClock
from kvfleet.telemetry.rate_limits import RateLimitState, RateLimitTracker

API, MODEL = "http://api:8000", "llama-3-8b"


@pytest.fixture
def clock() -> FrozenClock:
    """A clock that stands still."""
    return FrozenClock()


@pytest.fixture
def tracker(clock: FrozenClock) -> RateLimitTracker:
    """A tracker with the page's defaults."""
    return RateLimitTracker(clock=clock)


def told(
    remaining: float, limit: float | None = 60, reset: str | None = None, kind: str = "requests"
) -> dict[str, str]:
    """Headers of OpenAI's family."""
    headers = {f"x-ratelimit-remaining-{kind}": str(remaining)}
    if limit is not None:
        headers[f"x-ratelimit-limit-{kind}"] = str(limit)
    if reset is not None:
        headers[f"x-ratelimit-reset-{kind}"] = reset
    return headers


def window(remaining: int, limit: int = 60, reset_s: int = 30) -> dict[str, str]:
    """Headers of a window that gives everything back at its end."""
    return {"ratelimit": f"limit={limit}, remaining={remaining}, reset={reset_s}"}


def freed_after_s(tracker: RateLimitTracker, clock: FrozenClock, most_s: float = 4000) -> float:
    """Seconds until the throttling ends, to a tenth."""
    start, tenths = clock.now_s(), 0
    while tracker.should_throttle(API, MODEL) and tenths < most_s * 10:
        tenths += 1
        clock.advance(start + tenths / 10 - clock.now_s())
    return tenths / 10


# The documented example


def test_the_printed_example(clock: FrozenClock) -> None:
    """As it stands on the page."""
    tracker = RateLimitTracker(default_rpm=60, throttle_threshold=0.85, clock=clock)
    tracker.record_request(API, model_id=MODEL, tokens_used=500)
    tracker.record_rate_limit_headers(
        API, MODEL, headers={"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "12"}
    )
    assert not tracker.should_throttle(API, MODEL)
    assert tracker.get_capacity_score(API, MODEL) == pytest.approx(0.2)
    tracker.record_429(API, MODEL, retry_after=30)
    assert tracker.should_throttle(API, MODEL)
    assert tracker.get_capacity_score(API, MODEL) == 0.0
    assert freed_after_s(tracker, clock) == 30.0


def test_the_documented_defaults() -> None:
    """Names, order and values."""
    tracker = RateLimitTracker()
    assert (tracker.default_rpm, tracker.default_tpm) == (0, 0)
    assert (tracker.throttle_threshold, tracker.cooldown_seconds) == (0.85, 10)
    assert RateLimitTracker(60, 1000, 0.5, 3).cooldown_seconds == 3


# Nothing known


def test_who_is_not_known_is_not_throttled(tracker: RateLimitTracker) -> None:
    """However much is sent there: without a limit a count says nothing."""
    for _ in range(1000):
        tracker.record_request(API, MODEL, tokens_used=100_000)
    assert not tracker.should_throttle(API, MODEL)
    assert tracker.get_capacity_score(API, MODEL) == 1.0
    assert tracker.get_capacity_score("http://never-heard-of") == 1.0
    assert tracker.get_state("http://never-heard-of") == RateLimitState(endpoint="http://never-heard-of")


# Headers


@pytest.mark.parametrize(("remaining", "throttled"), [(10, False), (9, True), (3, True), (0, True)])
def test_the_threshold_is_a_share_of_what_is_used(tracker: RateLimitTracker, remaining: int, throttled: bool) -> None:
    """51 of 60 are 85 %, and that is enough."""
    tracker.record_rate_limit_headers(API, MODEL, told(remaining, 60, "60s"))
    assert tracker.should_throttle(API, MODEL) is throttled


def test_tokens_count_as_requests_do(tracker: RateLimitTracker) -> None:
    """The tightest limit decides."""
    tracker.record_rate_limit_headers(API, MODEL, told(60) | told(10, 1000, kind="tokens"))
    assert tracker.should_throttle(API, MODEL)
    assert tracker.get_capacity_score(API, MODEL) == pytest.approx(0.01)
    state = tracker.get_state(API, MODEL)
    assert (state.requests_left, state.tokens_left, state.tokens_limit) == (60, 10, 1000)
    assert state.reason.startswith("held back at 99% of its limit of tokens, for another ")


def test_a_bucket_fills_until_its_reset(tracker: RateLimitTracker, clock: FrozenClock) -> None:
    """OpenAI's reset is when it is whole again; 15 % of it are enough to go on, a sixth of that time."""
    tracker.record_rate_limit_headers(API, MODEL, told(0, 60, "60s"))
    assert tracker.get_state(API, MODEL).is_closed
    clock.advance(1.0)
    assert not tracker.get_state(API, MODEL).is_closed, "one request is possible again"
    assert tracker.should_throttle(API, MODEL)
    assert freed_after_s(tracker, clock) == pytest.approx(8.1, abs=0.11)
    clock.advance(21.0)
    assert tracker.get_capacity_score(API, MODEL) == pytest.approx(0.5, abs=0.01)
    clock.advance(60.0)
    assert tracker.get_capacity_score(API, MODEL) == 1.0


def test_a_window_counts_until_its_end(tracker: RateLimitTracker, clock: FrozenClock) -> None:
    """Nothing of it comes back before."""
    tracker.record_rate_limit_headers(API, MODEL, window(0, reset_s=30))
    assert tracker.get_state(API, MODEL).is_closed
    clock.advance(29.9)
    assert tracker.get_state(API, MODEL).wait_s == pytest.approx(0.1)
    assert tracker.get_capacity_score(API, MODEL) == 0.0
    clock.advance(0.2)
    assert not tracker.should_throttle(API, MODEL)
    assert tracker.get_capacity_score(API, MODEL) == 1.0
    assert tracker.get_state(API, MODEL) == RateLimitState(endpoint=API, model_id=MODEL), "it is forgotten"


def test_what_was_left_without_a_reset_counts_for_a_minute(tracker: RateLimitTracker, clock: FrozenClock) -> None:
    """And as long as nobody says when it ends, a call may still be tried."""
    tracker.record_rate_limit_headers(API, MODEL, told(0, None))
    state = tracker.get_state(API, MODEL)
    assert (state.is_throttled, state.is_closed) == (True, False)
    assert freed_after_s(tracker, clock) == pytest.approx(60.0, abs=0.11)


def test_some_left_of_an_unknown_limit_throttles_nobody(tracker: RateLimitTracker) -> None:
    """79 of how many? Unless the limit is configured."""
    tracker.record_rate_limit_headers(API, MODEL, told(9, None))
    assert not tracker.should_throttle(API, MODEL)
    tracker.configure((API, "other", ""), rpm=60)
    tracker.record_rate_limit_headers(API, "other", told(9, None))
    assert tracker.should_throttle(API, "other")


def test_a_limit_of_a_day_is_believed_for_an_hour(tracker: RateLimitTracker, clock: FrozenClock) -> None:
    """Then one call finds out whether it still holds."""
    tracker.record_rate_limit_headers(API, MODEL, window(0, reset_s=80_000))
    assert freed_after_s(tracker, clock) == pytest.approx(3600.0, abs=0.11)


def test_the_last_word_counts(tracker: RateLimitTracker) -> None:
    """An answer that tells more again ends the throttling."""
    tracker.record_rate_limit_headers(API, MODEL, window(0))
    tracker.record_rate_limit_headers(API, MODEL, window(60))
    assert not tracker.should_throttle(API, MODEL)


def test_our_own_requests_are_taken_off_what_was_left(tracker: RateLimitTracker) -> None:
    """Between two answers nobody else counts them."""
    tracker.record_rate_limit_headers(API, MODEL, window(20))
    for _ in range(11):
        tracker.record_request(API, MODEL)
    assert tracker.should_throttle(API, MODEL)
    assert tracker.get_state(API, MODEL).requests_left == 9


def test_names_of_headers_may_be_written_in_any_case(tracker: RateLimitTracker) -> None:
    """As a client's own headers may be."""
    tracker.record_rate_limit_headers(API, MODEL, {"RateLimit": "limit=60, remaining=0, reset=9"})
    assert tracker.should_throttle(API, MODEL)


@pytest.mark.parametrize("headers", [{"retry-after": "7"}, {"retry-after-ms": "7000"}])
def test_retry_after_among_headers_counts(
    tracker: RateLimitTracker, clock: FrozenClock, headers: Mapping[str, str]
) -> None:
    """In seconds or milliseconds."""
    tracker.record_rate_limit_headers(API, MODEL, headers)
    assert freed_after_s(tracker, clock) == pytest.approx(7.0, abs=0.11)


# Our own count


def test_a_configured_limit_is_held_by_our_own_count(clock: FrozenClock) -> None:
    """From the threshold on others are asked, at the limit it is closed, and a minute later all is well."""
    tracker = RateLimitTracker(default_rpm=10, throttle_threshold=0.8, clock=clock)
    for _ in range(7):
        tracker.record_request(API, MODEL)
    assert not tracker.should_throttle(API, MODEL)
    tracker.record_request(API, MODEL)
    near = tracker.get_state(API, MODEL)
    assert (near.is_throttled, near.is_closed) == (True, False)
    tracker.record_request(API, MODEL)
    tracker.record_request(API, MODEL)
    state = tracker.get_state(API, MODEL)
    assert (state.is_closed, state.requests_limit, state.requests_left) == (True, 10, 0)
    assert state.reason == "its limit of requests is used up, for another 61 s"
    assert freed_after_s(tracker, clock) == 61.0


def test_tokens_are_held_to_their_limit(clock: FrozenClock) -> None:
    """Of the last minute, as of requests."""
    tracker = RateLimitTracker(default_tpm=1000, clock=clock)
    tracker.record_request(API, MODEL, tokens_used=849)
    assert not tracker.should_throttle(API, MODEL)
    tracker.record_request(API, MODEL, tokens_used=1)
    assert tracker.should_throttle(API, MODEL)
    clock.advance(61)
    assert not tracker.should_throttle(API, MODEL)


def test_limits_of_one_model_go_before_the_defaults(clock: FrozenClock) -> None:
    """Also when it is known already."""
    tracker = RateLimitTracker(default_rpm=1, clock=clock)
    tracker.record_request(API, MODEL)
    assert tracker.should_throttle(API, MODEL)
    tracker.configure((API, MODEL, ""), rpm=100)
    assert not tracker.should_throttle(API, MODEL)
    tracker.throttle_at(0.01)
    assert tracker.should_throttle(API, MODEL)


# Refusals


def test_a_refusal_without_a_time_cools_down(tracker: RateLimitTracker, clock: FrozenClock) -> None:
    """It is a guess, so the backend is not closed: it may serve if nobody else can."""
    tracker.record_429(API, MODEL)
    state = tracker.get_state(API, MODEL)
    assert (state.is_throttled, state.is_closed, state.capacity, state.refused) == (True, False, 0.0, 1)
    assert state.reason == "held back after it refused for its rate limit, for another 10 s"
    assert freed_after_s(tracker, clock) == 10.0


def test_repetition_doubles_the_cooldown(tracker: RateLimitTracker, clock: FrozenClock) -> None:
    """10, 20, 40 … seconds, five minutes at most."""
    waits = []
    for _ in range(8):
        tracker.record_429(API, MODEL)
        waits.append(freed_after_s(tracker, clock))
    assert waits == pytest.approx([10, 20, 40, 80, 160, 300, 300, 300], abs=0.11)


def test_refusals_of_one_burst_count_once(tracker: RateLimitTracker, clock: FrozenClock) -> None:
    """A hundred requests in flight come back with the same news."""
    for _ in range(100):
        tracker.record_429(API, MODEL)
    assert freed_after_s(tracker, clock) == 10.0


def test_what_the_backend_asks_is_kept_and_doubled_if_it_did_not_help(
    tracker: RateLimitTracker, clock: FrozenClock
) -> None:
    """Closed for as long as it said, and left to others for the rest."""
    tracker.record_429(API, MODEL, retry_after=2)
    assert tracker.get_state(API, MODEL).reason == "it asked to wait, for another 2.0 s"
    assert freed_after_s(tracker, clock) == 2.0
    tracker.record_429(API, MODEL, retry_after=2)
    assert tracker.get_state(API, MODEL).wait_s == 2.0
    clock.advance(2.0)
    assert (tracker.should_throttle(API, MODEL), tracker.get_state(API, MODEL).is_closed) == (True, False)
    assert freed_after_s(tracker, clock) == pytest.approx(2.0, abs=0.11)


def test_an_answer_ends_the_cooldown_and_its_growth(tracker: RateLimitTracker, clock: FrozenClock) -> None:
    """The next refusal begins anew."""
    tracker.record_429(API, MODEL)
    clock.advance(11)
    tracker.record_429(API, MODEL)
    tracker.record_request(API, MODEL, tokens_used=5)
    assert not tracker.should_throttle(API, MODEL)
    tracker.record_429(API, MODEL)
    assert freed_after_s(tracker, clock) == 10.0


def test_a_refusal_long_after_the_last_begins_anew(tracker: RateLimitTracker, clock: FrozenClock) -> None:
    """A minute of quiet is enough."""
    tracker.record_429(API, MODEL)
    clock.advance(10 + 61)
    tracker.record_429(API, MODEL)
    assert freed_after_s(tracker, clock) == 10.0


def test_no_backend_is_shut_out_for_a_day(tracker: RateLimitTracker, clock: FrozenClock) -> None:
    """An hour is the most that is believed."""
    tracker.record_429(API, MODEL, retry_after=86_400)
    assert freed_after_s(tracker, clock) == pytest.approx(3600, abs=0.11)


# Accounts


def test_what_is_said_of_the_account_holds_for_its_models(tracker: RateLimitTracker, clock: FrozenClock) -> None:
    """And for no other endpoint's."""
    tracker.record_429(API, retry_after=5)
    assert tracker.should_throttle(API)
    assert tracker.should_throttle(API, MODEL)
    assert tracker.get_capacity_score(API, MODEL) == 0.0
    assert not tracker.should_throttle("http://other", MODEL)
    tracker.record_429(API, MODEL, retry_after=9)
    assert tracker.get_state(API, MODEL).wait_s == 9.0
    clock.advance(6)
    assert not tracker.should_throttle(API)


def test_models_share_their_accounts_count(clock: FrozenClock) -> None:
    """Once a limit of the account is known, the requests of all its models count for it."""
    tracker = RateLimitTracker(clock=clock)
    tracker.configure((API, "", ""), rpm=4)
    tracker.record_request(API)
    for model in ("a", "b", "c"):
        tracker.record_request(API, model)
    assert tracker.get_state(API).requests_last_minute == 4
    assert tracker.should_throttle(API, "a")
    assert tracker.should_throttle(API, "never-asked")


# Showing


def test_everything_known_is_shown(tracker: RateLimitTracker) -> None:
    """By model and endpoint, as plain data for a dashboard."""
    tracker.record_rate_limit_headers(API, MODEL, window(15))
    tracker.record_request("http://b", "m", tokens_used=7)
    assert set(tracker.get_all_states()) == {f"{MODEL}@{API}", "m@http://b"}
    assert tracker.summary() == {
        f"{MODEL}@{API}": {
            "capacity": 0.25,
            "throttled": False,
            "closed": False,
            "requests_last_minute": 0,
            "tokens_last_minute": 0,
            "requests_limit": 60.0,
            "requests_left": 15.0,
            "wait_s": 0.0,
            "refused": 0,
        },
        "m@http://b": {
            "capacity": 1.0,
            "throttled": False,
            "closed": False,
            "requests_last_minute": 1,
            "tokens_last_minute": 7,
            "wait_s": 0.0,
            "refused": 0,
        },
    }


def test_it_is_bounded(clock: FrozenClock) -> None:
    """Endpoints that come and go do not fill the memory; the least recently used is forgotten first."""
    tracker = RateLimitTracker(clock=clock)
    for i in range(16_500):
        tracker.record_429(f"http://{i}", "m")
        tracker.record_429("http://used-all-the-time", "m")
    assert len(tracker.get_all_states()) == 16_384
    assert len(tracker.holds(clock.now_s())) == 16_384
    assert tracker.should_throttle("http://used-all-the-time", "m")
    assert not tracker.should_throttle("http://0", "m")


EVENT = st.one_of(
    st.tuples(st.just("send"), st.integers(0, 300)),
    st.tuples(st.just("headers"), st.integers(0, 60)),
    st.tuples(st.just("window"), st.integers(0, 60)),
    st.tuples(st.just("refuse"), st.integers(0, 30)),
    st.tuples(st.just("wait"), st.integers(0, 50)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENT, max_size=40))
def test_what_is_kept_agrees_with_what_is_known(events: list[tuple[str, int]]) -> None:
    """At any moment, whatever happened before.

    The kept holds are those that a fresh look finds, shares are shares, whoever is closed is throttled, and all of it
    ends.
    """
    clock = FrozenClock()
    tracker = RateLimitTracker(default_rpm=20, default_tpm=2000, clock=clock)
    for event, amount in events:
        if event == "send":
            tracker.record_request(API, MODEL, tokens_used=amount)
        elif event == "headers":
            tracker.record_rate_limit_headers(API, MODEL, told(amount, 60, f"{amount}s"))
        elif event == "window":
            tracker.record_rate_limit_headers(API, MODEL, window(amount, reset_s=amount))
        elif event == "refuse":
            tracker.record_429(API, MODEL, retry_after=amount)
        else:
            clock.advance(amount / 3)
        state = tracker.get_state(API, MODEL)
        assert 0 <= state.capacity <= 1
        assert state.is_throttled or not state.is_closed
        assert state.is_throttled == (tracker.of((API, MODEL, "")).hold(clock.now_s(), 0.85) is not None)
        assert not state.is_throttled or state.wait_s >= 0
    clock.advance(3700)
    assert not tracker.should_throttle(API, MODEL)
    assert tracker.get_capacity_score(API, MODEL) == 1.0
