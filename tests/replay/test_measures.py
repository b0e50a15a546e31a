"""The figures of a replay."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.replay.measures import FIGURES, Served, by_replica, differences, figures, imbalance, quantile
from kvfleet.replay.slo import SLO, parse_slo


def served(number: int = 0, **options: Any) -> Served:
    """An answer of eleven tokens that began after a second and took two."""
    usual = {"replica": "a", "at_s": 0.0, "first_s": 1.0, "end_s": 2.0, "prompt_tokens": 100, "output_tokens": 11}
    return Served(**{"number": number, "attempts": 1, "cost_usd": 0.5} | usual | options)


def test_the_figures_are_those_of_their_definitions() -> None:
    """One answer within the level, one beyond it, one that failed."""
    found = figures(
        [
            served(0, cached_tokens=50),
            served(1, at_s=1.0, first_s=4.0, end_s=5.0, replica="b", attempts=3),
            served(2, error="backend_timeout", first_s=None, end_s=9.0, replica="", cost_usd=None),
        ],
        ["a", "b"],
        parse_slo("ttft < 2s"),
        preemptions=4,
    )
    expected = {
        "ttft_mean": 2.0,
        "ttft_p50": 2.0,
        "ttft_max": 3.0,
        "tpot_mean": 0.1,
        "e2e_mean": 3.0,
        "cached_share": 0.25,
        "goodput": 1 / 3,
        "goodput_rps": 1 / 9,
        "cost_usd": 1.0,
        "requests": 3,
        "failed": 1,
        "failed_share": 1 / 3,
        "retries": 2,
        "preemptions": 4,
        "output_tokens_per_s": 22 / 9,
        "duration_s": 9.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert set(found) <= set(FIGURES)


def test_an_unknown_price_makes_the_cost_unknown_and_no_answer_makes_the_times_unknown() -> None:
    """Nothing is guessed."""
    assert "cost_usd" not in figures([served(), served(1, cost_usd=None)], ["a"], SLO())
    nothing = figures([served(error="refused", first_s=None)], ["a"], SLO())
    assert "ttft_mean" not in nothing
    assert nothing["failed_share"] == 1.0


@pytest.mark.parametrize(
    ("placed", "expected"),
    [(("a", "b", "c", "d"), 1.0), (("a", "a", "a", "a"), 4.0), (("a", "a", "b", "b"), 2.0)],
)
def test_imbalance_is_one_where_all_have_the_same_and_the_number_of_replicas_where_one_has_all(
    placed: tuple[str, ...], expected: float
) -> None:
    """It looks at each moment: taking turns one at a time is as uneven as it gets."""
    at_once = [served(i, replica=replica) for i, replica in enumerate(placed)]
    assert imbalance(at_once, list("abcd")) == pytest.approx(expected)
    in_turn = [served(i, replica=r, at_s=10.0 * i, end_s=10.0 * i + 2) for i, r in enumerate(placed)]
    assert imbalance(in_turn, list("abcd")) == pytest.approx(4.0)


def test_each_replica_gets_its_own_part() -> None:
    """Those without requests too."""
    answers = [served(0, cached_tokens=25), served(1), served(2, replica="b", end_s=4.0)]
    one, other, third = by_replica(answers, ["a", "b", "c"], {"b": 2})
    assert (one.requests, one.prompt_tokens, one.cached_share, one.in_flight_most) == (2, 200, 0.125, 2)
    assert (one.in_flight_mean, other.in_flight_mean) == pytest.approx((1.0, 1.0))
    assert (other.preemptions, third.requests, third.ttft_mean) == (2, 0, None)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_a_quantile_lies_within_the_values_and_grows_with_its_share(values: list[float], share: float) -> None:
    """Its ends are the least and the greatest value."""
    values.sort()
    assert values[0] <= quantile(values, share) <= values[-1] or math.isclose(quantile(values, share), values[-1])
    assert (quantile(values, 0.0), quantile(values, 1.0)) == (values[0], values[-1])


def test_a_difference_that_is_everywhere_is_certain_and_one_that_is_noise_is_not() -> None:
    """The interval holds 0 only for the latter."""
    draw = random.Random(3)
    first = [served(i, first_s=1.0 + draw.random()) for i in range(500)]
    slower = [served(i, first_s=one.first_s + 0.1 + 0.01 * draw.random()) for i, one in enumerate(first)]
    noise = [served(i, first_s=one.first_s + draw.gauss(0, 0.3)) for i, one in enumerate(first)]
    sure, unsure = differences(first, slower)[0], differences(first, noise)[0]
    assert sure.value == pytest.approx(0.105, abs=0.002)
    assert 0 < sure.low <= sure.value <= sure.high
    assert unsure.low < 0 < unsure.high


def test_differences_speak_of_the_requests_that_both_answered() -> None:
    """And are nothing where there are none."""
    failed = served(0, error="refused", first_s=None)
    kept = differences([served(0), served(1)], [failed, served(1, first_s=3.0)])
    assert {one.figure: one.value for one in kept}["ttft_mean"] == pytest.approx(2.0)
    assert differences([served(0)], [failed]) == ()
