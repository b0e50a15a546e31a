"""Budgets: what is reserved and spent adds up, whatever happens in between."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.clock import FrozenClock
from kvfleet.config.schema import BudgetConfig, TenantConfig
from kvfleet.policy.budget import NANO, Account, Denial, Reservation, Spending, nano, reserve
from kvfleet.policy.tenant import BudgetTracker, TenantManager

DAY_S = 24 * 3600.0


def account(name: str = "tenant/a", clock: FrozenClock | None = None, **limits: object) -> Account:
    """An account with so many dollars."""
    return Account(name, BudgetConfig(enabled=True, **limits), clock or FrozenClock())  # type: ignore[arg-type]


def held(got: Reservation | Denial) -> Reservation:
    """A reservation that must be there."""
    assert isinstance(got, Reservation)
    return got


def denied(got: Reservation | Denial) -> Denial:
    """A denial that must come."""
    assert isinstance(got, Denial)
    return got


def test_money_is_reserved_and_settled_to_what_it_was() -> None:
    """The rest comes back."""
    one = account(monthly_budget_usd=1.0)
    reservation = held(reserve([one], nano(0.6), 100))
    assert one.remaining == nano(0.4)
    reservation.settle(Spending(nano_usd=nano(0.1), requests=1))
    assert (one.reserved, one.remaining, one.spent.requests) == (0, nano(0.9), 1)


def test_a_reservation_is_settled_once() -> None:
    """A second end changes nothing."""
    one = account(monthly_budget_usd=1.0)
    reservation = held(reserve([one], nano(0.6), 0))
    assert reservation.settle(Spending(nano_usd=5))
    assert not reservation.settle(Spending(nano_usd=5))
    assert (one.reserved, one.spent.nano_usd) == (0, 5)


def test_two_requests_cannot_spend_the_same_dollar() -> None:
    """The second waits for the first; that is no lack of money, so trying again soon may help."""
    one = account(monthly_budget_usd=1.0)
    first = held(reserve([one], nano(0.6), 0))
    assert denied(reserve([one], nano(0.6), 0)) == Denial(
        "tenant/a", "rate_limit_exceeded", "the rest of the budget tenant/a is held by requests", 1.0
    )
    first.settle(Spending())
    held(reserve([one], nano(0.6), 0))


def test_what_is_used_up_is_used_up_until_the_month_ends() -> None:
    """Retry-After is the beginning of the next month, in UTC."""
    clock = FrozenClock()  # 2023-11-14 22:13:20
    one = account(clock=clock, monthly_budget_usd=1.0)
    held(reserve([one], nano(0.9), 0)).settle(Spending(nano_usd=nano(0.9)))
    denial = denied(reserve([one], nano(0.2), 0))
    assert (denial.code, denial.retry_after_s) == ("insufficient_quota", 16 * DAY_S + 6400)
    assert denial.reason == "the budget tenant/a of $1.00 of 2023-11 is used up"
    clock.advance(16 * DAY_S + 6400)
    held(reserve([one], nano(0.2), 0))
    assert (one.month, one.refused) == ("2023-12", 0)


def test_what_never_fits_is_told_so() -> None:
    """No Retry-After: next month has no more money."""
    assert denied(reserve([account(monthly_budget_usd=1.0)], nano(1.1), 0)).retry_after_s is None


def test_a_request_over_midnight_is_billed_to_the_month_it_began_in() -> None:
    """It takes nothing from the new month, and frees nothing there either."""
    clock = FrozenClock()
    one = account(clock=clock, monthly_budget_usd=1.0)
    old = held(reserve([one], nano(0.6), 0))
    clock.advance(17 * DAY_S)
    new = held(reserve([one], nano(0.8), 0))
    assert old.settle(Spending(nano_usd=nano(0.5))) == ((one, "2023-11"),)
    assert (one.reserved, one.spent.nano_usd) == (nano(0.8), 0)
    new.settle(Spending(nano_usd=nano(0.7)))
    assert (one.reserved, one.spent.nano_usd) == (0, nano(0.7))


def test_all_accounts_hold_or_none_does() -> None:
    """The fleet's money is not held for a request that the tenant's budget refuses."""
    fleet, tenant = account("fleet", monthly_budget_usd=10.0), account(monthly_budget_usd=0.5)
    assert denied(reserve([fleet, tenant], nano(0.6), 0)).account == "tenant/a"
    assert (fleet.reserved, fleet.refused, tenant.refused) == (0, 0, 1)


def test_free_requests_go_on_when_the_money_is_gone() -> None:
    """They take nothing from anybody."""
    one = account(monthly_budget_usd=0.0)
    held(reserve([one], 0, 10))
    denied(reserve([one], 1, 10))


def test_without_throttling_spending_goes_on_and_the_alert_is_given_once() -> None:
    """At the threshold, and not again this month."""
    clock = FrozenClock()
    one = account(clock=clock, monthly_budget_usd=1.0, throttle_on_exceed=False)
    seen = []
    for _ in range(4):
        held(reserve([one], nano(0.5), 0)).settle(Spending(nano_usd=nano(0.5)))
        seen.append(one.reaches_threshold)
    assert seen == [False, True, False, False]
    assert one.statement()["spent_pct"] == 200.0
    clock.advance(17 * DAY_S)
    one.roll()
    assert not one.is_alerted


def test_requests_per_minute() -> None:
    """The next one may come when the first second has been over for a minute."""
    clock = FrozenClock()
    one = account(clock=clock, requests_per_minute=2)
    held(reserve([one], 0, 0))
    clock.advance(10)
    held(reserve([one], 0, 0))
    denial = denied(reserve([one], 0, 0))
    assert (denial.code, denial.retry_after_s) == ("rate_limit_exceeded", 51.0)
    clock.advance(51.0)
    held(reserve([one], 0, 0))


def test_tokens_per_minute_are_corrected_to_what_they_were() -> None:
    """What was reserved and not used is free again at once."""
    one = account(tokens_per_minute=1000)
    reservation = held(reserve([one], 0, 900))
    assert denied(reserve([one], 0, 200)).retry_after_s == 61.0
    reservation.settle(Spending(prompt_tokens=50, completion_tokens=50))
    held(reserve([one], 0, 900))
    assert denied(reserve([one], 0, 1001)).retry_after_s is None


@given(st.lists(st.tuples(st.floats(0, 40), st.integers(1, 5)), max_size=60))
def test_no_minute_ever_holds_more_than_is_allowed(steps: list[tuple[float, int]]) -> None:
    """Wherever the minute begins; and after the time told, the request fits."""
    clock = FrozenClock()
    one = account(clock=clock, tokens_per_minute=10)
    let_in: list[tuple[float, int]] = []
    for pause_s, tokens in steps:
        clock.advance(pause_s)
        got = reserve([one], 0, tokens)
        if isinstance(got, Denial):
            assert got.retry_after_s is not None
            clock.advance(got.retry_after_s)
            held(reserve([one], 0, tokens))
        let_in.append((clock.now_s(), tokens))
    for start_s, _ in let_in:
        assert sum(tokens for at_s, tokens in let_in if start_s <= at_s < start_s + 60) <= 10


AMOUNT = st.integers(0, 2 * NANO)
STEP = st.one_of(
    st.tuples(st.just("come"), st.sampled_from("ab"), AMOUNT),
    st.tuples(st.just("end"), st.integers(0, 20), st.floats(0, 1)),
    st.tuples(st.just("wait"), st.just(0), st.floats(0, 20 * DAY_S)),
)


class Books:
    """Two tenants of one fleet, and what we know they paid."""

    def __init__(self) -> None:
        self.clock = FrozenClock()
        self.fleet = account("fleet", self.clock, monthly_budget_usd=5.0)
        self.tenants = {name: account(f"tenant/{name}", self.clock, monthly_budget_usd=3.0) for name in "ab"}
        self.accounts = (self.fleet, *self.tenants.values())
        self.going: list[tuple[Reservation, int]] = []
        self.begin_month()

    def begin_month(self) -> None:
        self.month = self.fleet.month
        self.paid = {one.name: 0 for one in self.accounts}
        self.going = []  # those of the month before end in that month

    def wait(self, _: object, seconds: float) -> None:
        self.clock.advance(seconds)
        for one in self.accounts:
            one.roll()
        if self.fleet.month != self.month:
            self.begin_month()

    def come(self, tenant: object, amount: float) -> None:
        mine = [self.fleet, self.tenants[str(tenant)]]
        fits = not amount or all(one.limit - one.spent.nano_usd - one.reserved >= amount for one in mine)
        got = reserve(mine, int(amount), 1)
        assert isinstance(got, Reservation) == fits
        if isinstance(got, Reservation):
            self.going.append((got, int(amount)))

    def end(self, which: object, share: float) -> None:
        if not self.going:
            return
        reservation, most = self.going.pop(int(str(which)) % len(self.going))
        cost = int(most * share)
        for one, booked_to in reservation.settle(Spending(nano_usd=cost, requests=1)):
            assert booked_to == self.month
            self.paid[one.name] += cost

    def check(self) -> None:
        for one in self.accounts:
            assert one.spent.nano_usd + one.reserved <= one.limit
            assert one.spent.nano_usd == self.paid[one.name]


@settings(max_examples=300, deadline=None)
@given(st.lists(STEP, max_size=60))
def test_budgets_are_conserved(steps: list[tuple[str, object, float]]) -> None:
    """Whatever comes, ends and in which order: spent and reserved never exceed a limit, nobody is refused who fits.

    In the end nothing is reserved, and what was spent is what the requests cost, in every account they were held to.
    """
    books = Books()
    for what, key, amount in steps:
        getattr(books, what)(key, amount)
        books.check()
    for reservation, _ in books.going:
        reservation.settle(Spending())
    books.check()
    assert [one.reserved for one in books.accounts] == [0, 0, 0]
    assert books.fleet.spent.nano_usd == sum(one.spent.nano_usd for one in books.tenants.values())


def test_the_pages_example() -> None:
    """It runs as printed."""
    manager = TenantManager(
        tenants={
            "team-ml": TenantConfig(
                name="ML Team",
                preferred_models=["llama-70b"],
                budget=BudgetConfig(enabled=True, monthly_budget_usd=500),
            ),
        }
    )
    assert manager.filter_models_for_tenant("team-ml", ["llama-8b", "llama-70b", "gpt-4o"]) == ["llama-70b"]
    manager.record_request("team-ml", 0.05)
    assert manager.check_budget("team-ml", 0.01)


def test_a_tenants_books() -> None:
    """Spent, left, over, throttled, reset."""
    tracker = BudgetTracker({"a": BudgetConfig(enabled=True, monthly_budget_usd=2), "off": BudgetConfig()})
    tracker.record_spend("a", 1.5)
    assert tracker.get_remaining_budget("a") == 0.5
    assert not tracker.should_throttle("a", 0.5)
    assert tracker.should_throttle("a", 0.6)
    assert tracker.should_throttle("a", 1.1)  # beyond the usual limit of one request
    tracker.record_spend("a", 0.5)
    assert tracker.is_over_budget("a")
    spent = tracker.get_spend("a")
    assert spent is not None
    assert (spent.spent_usd, spent.requests) == (2.0, 2)
    assert tracker.summary()["a"]["remaining_usd"] == 0.0
    tracker.reset("a")
    assert tracker.get_remaining_budget("a") == 2.0
    assert tracker.get_remaining_budget("off") is None
    assert not tracker.should_throttle("off", 1e9)
    with pytest.raises(ValueError, match="negative"):
        tracker.record_spend("a", -1)


def test_unknown_tenants_have_what_the_configuration_says() -> None:
    """By default nothing; the limit of one request holds too."""
    tenants = {"a": TenantConfig(max_cost_per_request=0.1)}
    assert not TenantManager(tenants).check_budget("stranger", 0.0)
    assert TenantManager(tenants, refuses_unknown=False).check_budget("stranger", 0.0)
    assert TenantManager(tenants).check_budget("a", 0.1)
    assert not TenantManager(tenants).check_budget("a", 0.2)
