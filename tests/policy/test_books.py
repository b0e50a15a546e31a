"""Accounts that go on over a reload: whatever is reserved and settled while they are looked through is in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import attrs
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
files = st.builds(books, limits, limits, fleet=st.integers(0, 50))
requests = st.lists(st.tuples(names, names, st.integers(0, 3_000_000_000), st.booleans()), max_size=12)


@attrs.define
class Traffic:
    """Requests that come one by one, each of which ends at once or later."""

    waiting: list[tuple[str, str, int, bool]]
    held: list[tuple[Reservation, int]] = attrs.field(factory=list)
    spent: Counter[str] = attrs.field(factory=Counter)

    def come(self, before: Books) -> None:
        """The next one, if there is one."""
        if self.waiting:
            tenant, key, amount, ends = self.waiting.pop()
            got = reserve(before.of(tenant, key), amount, 10)
            if isinstance(got, Reservation):
                self.held.append((got, amount))
                if ends:
                    self.end()

    def end(self) -> None:
        """The last one that is held."""
        one, amount = self.held.pop()
        for account, _ in one.settle(Spending(nano_usd=amount // 2)):
            self.spent[account.name] += amount // 2


def held_to(them: Books) -> dict[str, BudgetConfig]:
    """What accounts are held to, by name."""
    return {account.name: account.config for account in them.each()}


@given(files, files, requests)
def test_no_booking_is_lost_while_accounts_are_looked_through(
    before: Books, now: Books, asked: list[tuple[str, str, int, bool]]
) -> None:
    """Between any two steps requests come and end; each is settled once, in the account that goes on.

    Until the change nothing is held to the new file; then every account is, and has what it had.
    """
    traffic, wanted, then = Traffic(list(asked)), held_to(now), held_to(before)
    asks = {tenant: [account.name for account in now.of(tenant, tenant)] for tenant in "abcd"}
    steps = now.going_on_from(before)
    succession: Succession | None = None
    while succession is None:
        traffic.come(before)
        assert held_to(before) == then
        try:
            next(steps)
        except StopIteration as end:
            succession = end.value
    succession.begin()
    there = {account.name: account for account in succession.books.each()}
    assert held_to(succession.books) == wanted
    assert dict(succession.by_name) == there
    for account in there.values():
        holding = [amount for one, amount in traffic.held if any(account is other for other in one.accounts)]
        assert (account.spent.nano_usd, account.reserved) == (traffic.spent[account.name], sum(holding))
    for tenant in "abcd":
        assert [id(there[name]) for name in asks[tenant]] == [id(one) for one in succession.books.of(tenant, tenant)]
    while traffic.held:
        traffic.end()
    for account in there.values():
        assert (account.spent.nano_usd, account.reserved) == (traffic.spent[account.name], 0)


def test_thousands_of_accounts_are_looked_through_in_as_many_steps() -> None:
    """So that others have their turn in between, however many there are; only what changes is left to the change."""
    many = {f"tenant-{number}": 5 for number in range(1000)}
    before, now = books(many), books({**many, "tenant-7": 6})
    steps = sum(1 for _ in now.going_on_from(before))
    assert steps >= 3000
    succession = at_once(books({**many, "tenant-7": 6}).going_on_from(before))
    assert [(account.name, config.monthly_budget_usd) for account, config, _ in succession.changed] == [
        ("tenant/tenant-7", 6)
    ]


def test_statements_are_in_order() -> None:
    """The fleet's first, then the tenants' and the keys' by name."""
    every = books({"b": 1, "a": 1, "off": 0}, {"z": 1, "k": 1}, fleet=1).every()
    assert [account.name for account in every] == ["fleet", "tenant/a", "tenant/b", "key/k", "key/z"]
