"""The accounts of a fleet, its tenants and its keys; and how those of a changed file go on where these are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import attrs

from kvfleet.clock import Clock
from kvfleet.config.schema import BudgetConfig
from kvfleet.policy.budget import Account
from kvfleet.policy.shared_minutes import SharedMinute
from kvfleet.turns import Steps

__all__ = ["Books", "Succession"]


@attrs.frozen
class Books:
    """Every account there is.

    Attributes:
        shared: The fleet's, if it has one.
        of_tenants: What a tenant's request is held to, by the tenant: the fleet's account, and its own, which is last.
        of_keys: By the name of the key.
    """

    shared: tuple[Account, ...] = ()
    of_tenants: dict[str, tuple[Account, ...]] = attrs.field(factory=dict)
    of_keys: dict[str, Account] = attrs.field(factory=dict)

    @classmethod
    def opened(
        cls,
        budget: BudgetConfig | None,
        tenants: Mapping[str, BudgetConfig],
        keys: Mapping[str, BudgetConfig],
        clock: Clock,
    ) -> Books:
        """An account for each budget that is enabled."""
        shared = (Account("fleet", budget, clock),) if budget is not None and budget.enabled else ()
        of_tenants = {
            name: (*shared, Account(f"tenant/{name}", one, clock)) for name, one in tenants.items() if one.enabled
        }
        of_keys = {name: Account(f"key/{name}", one, clock) for name, one in keys.items() if one.enabled}
        return cls(shared, of_tenants, of_keys)

    def of(self, tenant: str, key: str) -> tuple[Account, ...]:
        """The accounts that a request must fit."""
        accounts = self.of_tenants.get(tenant, self.shared)
        own = self.of_keys.get(key)
        return accounts if own is None else (*accounts, own)

    def each(self) -> Iterator[Account]:
        """The accounts, in no order."""
        yield from self.shared
        yield from (accounts[-1] for accounts in self.of_tenants.values())
        yield from self.of_keys.values()

    def every(self) -> Sequence[Account]:
        """The fleet's, then the tenants' and the keys' by name."""
        tenants = [self.of_tenants[name][-1] for name in sorted(self.of_tenants)]
        return [*self.shared, *tenants, *(self.of_keys[name] for name in sorted(self.of_keys))]

    def going_on_from(self, before: Books) -> Steps[Succession]:
        """These accounts, with those of before in the place of the ones of the same name, which are not changed yet.

        An account is the same object before and after, so that whatever is reserved and settled meanwhile is in it.
        These books come to their end with it: thousands of accounts that are not needed take milliseconds to free.
        """
        known, changed = {account.name: account for account in before.each()}, []
        yield
        for own in self.each():
            there = known.get(own.name)
            if there is not None and (there.config != own.config or there.shared is not own.shared):
                changed.append((there, own.config, own.shared))
            yield

        shared = tuple(known.get(account.name, account) for account in self.shared)
        of_tenants = {}
        for name in list(self.of_tenants):
            own = self.of_tenants.pop(name)[-1]
            of_tenants[name] = (*shared, known.get(own.name, own))
            yield
        of_keys = {name: known.get(account.name, account) for name, account in self.of_keys.items()}
        books = Books(shared, of_tenants, of_keys)
        by_name: dict[str, Account] = {}
        yield
        for account in books.each():
            by_name[account.name] = account
            yield
        return Succession(books, by_name, changed)


@attrs.frozen
class Succession:
    """How the accounts of a changed file go on: made in steps beforehand, so that the change itself is a short one.

    Attributes:
        books: The accounts that are to be.
        by_name: The same.
        changed: Those that are held to something else from then on, and to what.
    """

    books: Books
    by_name: dict[str, Account]
    changed: Sequence[tuple[Account, BudgetConfig, SharedMinute | None]]

    def begin(self) -> None:
        """Hold the accounts to what they are held to from now on."""
        for account, config, shared in self.changed:
            account.config, account.shared = config, shared
