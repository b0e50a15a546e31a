"""Retries are a share of the requests, for each model and for the fleet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.clock import FrozenClock
from kvfleet.router.retry_budget import WINDOW_S, RetryBudget


def spend(budget: RetryBudget, model: str = "m") -> int:
    """Take retries until one is refused."""
    count = 0
    while not budget.take(model):
        count += 1
    return count


def test_a_fleet_with_little_to_do_can_still_recover() -> None:
    """The floor is there without any request."""
    assert spend(RetryBudget(0.2, 3.0, FrozenClock())) == 30


def test_a_busy_model_may_retry_a_share_of_its_requests() -> None:
    """200 of 1,000 requests of late, and the floor."""
    budget = RetryBudget(0.2, 3.0, FrozenClock())
    for _ in range(1000):
        budget.asked("m")
    assert spend(budget) == 230


def test_one_models_trouble_does_not_use_up_anothers() -> None:
    """Each has an account of its own; whose was empty is said."""
    budget = RetryBudget(0.1, 0.0, FrozenClock())
    for model in ("a", "b") * 50:
        budget.asked(model)
    assert spend(budget, "a") == 5
    assert budget.take("a") == "model"
    assert spend(budget, "b") == 5


def test_all_models_together_are_held_to_the_fleets() -> None:
    """Floors of many models do not add up."""
    budget = RetryBudget(0.0, 0.1, FrozenClock())
    assert [budget.take(model) for model in ("a", "b")] == ["", "fleet"]


def test_what_was_spent_is_forgiven_with_time() -> None:
    """After a few windows all is as at the start; the past counts less and less."""
    clock = FrozenClock()
    budget = RetryBudget(0.0, 1.0, clock)
    assert spend(budget) == 10
    clock.advance(WINDOW_S)
    assert budget.left("m") == pytest.approx(10 - 10 / 2.718281828, rel=1e-3)
    clock.advance(10 * WINDOW_S)
    assert spend(budget) == 9


@given(
    st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=300),
    st.floats(0, 2),
    st.floats(0, 5),
)
def test_attempts_never_exceed_the_budget(steps: list[tuple[float, bool]], ratio: float, floor: float) -> None:
    """Whatever happens when, retries are at most the share of the requests, the floor's pace and one window of it."""
    clock = FrozenClock()
    budget = RetryBudget(ratio, floor, clock)
    requests = retries = 0
    for wait_s, is_request in steps:
        clock.advance(wait_s)
        if is_request:
            budget.asked("m")
            requests += 1
        elif not budget.take("m"):
            retries += 1
    passed_s = clock.now_s() - 1000.0
    assert retries <= ratio * requests + floor * (WINDOW_S + passed_s) * 1.06 + 1
    assert budget.left() >= 0


def test_a_reload_forgives_nothing() -> None:
    """What was spent stays spent; what may be spent is what the new file says."""
    before, after = RetryBudget(0.0, 1.0, clock := FrozenClock()), RetryBudget(0.0, 2.0, clock)
    assert spend(before) == 10
    after.inherit(before)
    assert spend(after) == 10


def test_accounts_are_bounded() -> None:
    """Ten thousand names of models do not stay for ever."""
    budget = RetryBudget(0.2, 3.0, FrozenClock())
    for number in range(10_000):
        budget.asked(f"m{number}")
    assert len(budget._models) <= 4096
