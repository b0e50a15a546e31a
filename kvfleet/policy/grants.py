"""Obtains, for the budgets of one process, what they may spend of accounts that several processes share.

See `kvfleet.policy.ledger`: a grant is asked for when the one there is has no room, and given back when it is not used.
All of this runs in the event loop; the ledger answers from its own thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import attrs

from kvfleet.policy.budget import Account
from kvfleet.policy.ledger import Ask, Booked, Ledger, Standing

__all__ = ["Grants"]

_PATIENCE_S = (0.05, 0.1, 0.2, 0.4, 0.4, 0.0)
"""Waits for what other processes hold and may not use."""
_LOOK_AGAIN_S = 0.5
"""A grant is fitted to what is used so long after a reservation was settled."""


@attrs.define(eq=False)
class Grants:
    """Asks a ledger for what accounts need.

    Args:
        ledger: Shared with other processes.
        accounts: Those of this process, by name.
        answer_s: Longest wait for the ledger, which itself waits up to five seconds for its file.
    """

    ledger: Ledger
    accounts: dict[str, Account] = attrs.field(repr=False)
    answer_s: float = 15.0
    _loop: asyncio.AbstractEventLoop = attrs.field(init=False, repr=False, factory=asyncio.get_running_loop)
    _asking: dict[str, asyncio.Future[None]] = attrs.field(init=False, factory=dict, repr=False)
    _looking: dict[str, asyncio.TimerHandle] = attrs.field(init=False, factory=dict, repr=False)

    def __attrs_post_init__(self) -> None:
        """Be told what the ledger has written."""
        self.ledger.written = lambda booked: self._tell(lambda: self._written(booked))

    async def obtain(self, accounts: Sequence[Account], amount: int) -> None:
        """Ask for so many nanodollars in each account, until all have room for it or cannot have.

        Waits for a moment if only what other processes hold is in the way, because they give back what they do not use.
        """
        for account in accounts:
            account.wanted += amount
        try:
            for wait_s in _PATIENCE_S:
                for account in accounts:
                    if account.lacks(amount):
                        await self._ask_for(account, amount)
                short = [account for account in accounts if account.lacks(amount)]
                if all(account.remaining < amount and not _is_held_elsewhere(account, amount) for account in short):
                    return  # also if none is short
                if any(_is_held_elsewhere(account, amount) for account in short):
                    await asyncio.sleep(wait_s)
                # else somebody who came later took what was granted for this one, and there is more
        finally:
            for account in accounts:
                account.wanted -= amount

    def settled(self, account: Account) -> None:
        """A reservation was settled: in a moment, what is not used then is given back."""
        if account.granted is not None and account.name not in self._looking:
            self._looking[account.name] = self._loop.call_later(_LOOK_AGAIN_S, self._look, account)

    def _look(self, account: Account) -> None:
        """Fit the grant to what is used; give all of it back if nothing is under way."""
        del self._looking[account.name]
        if account.name in self._asking:
            self.settled(account)
        elif account.granted:
            self._ask(account, spares=bool(account.reserved or account.wanted))

    async def _ask_for(self, account: Account, amount: int) -> None:
        """Ask once, after whoever asks already; those that come meanwhile are in the same demand."""
        try:
            async with asyncio.timeout(self.answer_s):
                while (under_way := self._asking.get(account.name)) is not None:
                    await asyncio.shield(under_way)
                if account.lacks(amount):
                    await asyncio.shield(self._ask(account))
        except TimeoutError:
            account.granted = None  # as where the file cannot be used: this process goes on by what it knows

    def _ask(self, account: Account, *, spares: bool = True) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self._asking[account.name] = future
        month = account.month
        ask = Ask(account=account.name, month=month, limit=account.limit, needed=account.needs(), spares=spares)
        self.ledger.ask(ask, lambda standing: self._tell(lambda: self._told(account, month, standing)))
        return future

    def _tell(self, what: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever would want to know
            self._loop.call_soon_threadsafe(what)  # type: ignore[arg-type]

    def _told(self, account: Account, month: str, standing: Standing | None) -> None:
        future = self._asking.pop(account.name, None)
        if standing is None:
            account.granted = None  # the file cannot be used: this process goes on by what it knows
        elif month == account.month:
            account.stands(standing.spent, standing.granted, standing.others)
        if future is not None and not future.done():
            future.set_result(None)

    def _written(self, booked: Booked) -> None:
        for (name, month), spending in booked.items():
            account = self.accounts.get(name)
            if account is not None:
                account.written(month, spending)


def _is_held_elsewhere(account: Account, amount: int) -> bool:
    """True if there would be room, were it not for what other processes hold."""
    return account.others > 0 and account.spent.nano_usd + account.reserved + amount <= account.limit
