"""Accounts that go on over a reload: whatever is reserved and settled while they are looked through is in them."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from kvfleet.clock import FrozenClock
from kvfleet.config.schema import BudgetConfig
from kvfleet.policy.books import Books, Succession
from kvfleet.policy.budget import Reservation, Spending, reserve
from kvfleet.turns import at_once

CLOCK = FrozenClock()


def budgets(limits: Mapping[str, int]) -> dict[str, BudgetConfig]:
    """An enabled budget for each name; a limit of 0 is one that is off."""
    return {name: BudgetConfig(enabled=limit > 0, monthly_budget_usd=limit) for name, limit in limits.items()}


def books(limits: Mapping[str, int], keys: Mapping[str, int] | None = None, *, fleet: int = 0) -> Books:
    """The accounts of a fleet file."""
    shared = BudgetConfig(enabled=True, monthly_budget_usd=fleet) if fleet else None
    return Books.opened(shared, budgets(limits), budgets(keys or {}), CLOCK)


names = st.sampled_from(["a", "b", "c", "d"])
limits = st.dictionaries(names, st.integers(0, 50))
requests = st.lists(st.tuples(names, names, st.integers(0, 3_000_000_000), st.booleans()), max_size=12)


@given(limits, limits, limits, st.integers(0, 50), st.integers(0, 50), requests)
def test_no_booking_is_lost_while_accounts_are_looked_through(
    tenants: dict[str, int],
    others: dict[str, int],
    keys: dict[str, int],
    fleet: int,
    fleet_then: int,
    asked: list[tuple[str, str, int, bool]],
) -> None:
    """Between any two steps requests come and end; each is settled once, in the account that goes on.

    Until the change nothing is held to the new file; then every account is, and has what it had.
    """
    before, now = books(tenants, keys, fleet=fleet), books(others, keys, fleet=fleet_then)
    held: list[tuple[Reservation, int]] = []
    spent: dict[str, int] = {account.name: 0 for account in before.each()}

    def settle(one: Reservation, amount: int) -> None:
        for account, _ in one.settle(Spending(nano_usd=amount // 2)):
            spent[account.name] += amount // 2

    waiting = list(asked)
    steps = now.going_on_from(before)
    succession: Succession | None = None
    while succession is None:
        if waiting:
            tenant, key, amount, ends = waiting.pop()
            got = reserve(before.of(tenant, key), amount, 10)
            if isinstance(got, Reservation):
                settle(got, amount) if ends else held.append((got, amount))
        assert {account.name: account.config.monthly_budget_usd for account in before.each()} == (
            {account.name: account.config.monthly_budget_usd for account in books(tenants, keys, fleet=fleet).each()}
        )
        try:
            next(steps)
        except StopIteration as end:
            succession = end.value
    succession.begin()
    wanted = {account.name: account.config for account in books(others, keys, fleet=fleet_then).each()}
    there = {account.name: account for account in succession.books.each()}
    assert {name: account.config for name, account in there.items()} == wanted
    assert dict(succession.by_name) == there
    for name, account in there.items():
        assert account.spent.nano_usd == spent.get(name, 0)
        assert account.reserved == sum(a for one, a in held if any(account is two for two in one.accounts))
    for tenant in others:
        assert [account.name for account in succession.books.of(tenant, "")] == [
            account.name for account in now.of(tenant, "")
        ]
        assert all(account is there[account.name] for account in succession.books.of(tenant, ""))
    for one, amount in held:
        settle(one, amount)
    assert {name: (account.reserved, account.spent.nano_usd) for name, account in there.items()} == {
        name: (0, spent.get(name, 0)) for name in there
    }


def test_thousands_of_accounts_are_looked_through_in_as_many_steps() -> None:
    """So that others have their turn in between, however many there are; only what changes is left to the change."""
    many = {f"tenant-{number}": 5 for number in range(1000)}
    before, now = books(many), books({**many, "tenant-7": 6})
    steps = sum(1 for _ in now.going_on_from(before))
    assert steps >= 3000
    succession = at_once(now.going_on_from(before))
    assert [(account.name, config.monthly_budget_usd) for account, config, _ in succession.changed] == [
        ("tenant/tenant-7", 6)
    ]


def test_statements_are_in_order() -> None:
    """The fleet's first, then the tenants' and the keys' by name."""
    every = books({"b": 1, "a": 1, "off": 0}, {"z": 1, "k": 1}, fleet=1).every()
    assert [account.name for account in every] == ["fleet", "tenant/a", "tenant/b", "key/k", "key/z"]
