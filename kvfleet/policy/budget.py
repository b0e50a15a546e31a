"""Budgets: money by the month, requests and tokens by the minute; reserved before, settled after.

Money is counted in whole nanodollars, so that what was reserved and what was settled sum up exactly. All methods run to
their end without waiting: within one event loop no two requests can spend the same dollar.
"""

from __future__ import annotations

import calendar
import datetime as dt
import functools
from collections.abc import Sequence

import attrs

from kvfleet.clock import Clock
from kvfleet.config.schema import BudgetConfig
from kvfleet.money import money
from kvfleet.policy.shared_minutes import SharedMinute, SharedMinutes
from kvfleet.telemetry.minute import Minute

__all__ = [
    "Account",
    "Denial",
    "Reservation",
    "Spending",
    "month_of",
    "nano",
    "reserve",
    "until_next_month_s",
]

NANO = 1_000_000_000
INSUFFICIENT_QUOTA = "insufficient_quota"
RATE_LIMITED = "rate_limit_exceeded"
_SOON_S = 1.0
_DAY_NS = 86_400 * NANO


def nano(usd: float) -> int:
    """US dollars as whole nanodollars, rounded to the nearest.

    >>> nano(0.0000000014)
    1
    """
    return round(usd * NANO)


def month_of(time_ns: int) -> str:
    """The month of a moment, in UTC, as ``YYYY-MM``.

    >>> month_of(1_700_000_000_000_000_000)
    '2023-11'
    """
    return _month(time_ns // _DAY_NS)[0]


def until_next_month_s(time_ns: int) -> float:
    """Seconds until the next month begins, in UTC."""
    return (_month(time_ns // _DAY_NS)[1] - time_ns) / 1e9


@functools.lru_cache(maxsize=64)
def _month(day: int) -> tuple[str, int]:
    """The month of a day, counted from 1970, and when it ends in Unix time: days of UTC have no leap seconds there."""
    date = dt.date(1970, 1, 1) + dt.timedelta(days=day)
    days = calendar.monthrange(date.year, date.month)[1]
    return f"{date:%Y-%m}", (day + days - date.day + 1) * _DAY_NS


@attrs.frozen
class Denial:
    """Why a budget does not let a request through, and after how many seconds it may; None if it never will."""

    account: str
    code: str
    reason: str
    retry_after_s: float | None = None


@attrs.frozen(kw_only=True)
class Spending:
    """What a request, or a month of them, came to."""

    nano_usd: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    unpriced: int = 0

    def plus(self, more: Spending) -> Spending:
        """Both together."""
        return Spending(
            nano_usd=self.nano_usd + more.nano_usd,
            requests=self.requests + more.requests,
            prompt_tokens=self.prompt_tokens + more.prompt_tokens,
            completion_tokens=self.completion_tokens + more.completion_tokens,
            cached_tokens=self.cached_tokens + more.cached_tokens,
            unpriced=self.unpriced + more.unpriced,
        )

    def minus(self, less: Spending) -> Spending:
        """This without a part of it."""
        return Spending(
            nano_usd=self.nano_usd - less.nano_usd,
            requests=self.requests - less.requests,
            prompt_tokens=self.prompt_tokens - less.prompt_tokens,
            completion_tokens=self.completion_tokens - less.completion_tokens,
            cached_tokens=self.cached_tokens - less.cached_tokens,
            unpriced=self.unpriced - less.unpriced,
        )


@attrs.define
class Account:
    """One budget, and what has been spent and reserved of it this month.

    Attributes:
        name: ``fleet``, ``tenant/NAME`` or ``key/NAME``.
        config: The limits.
        clock: The time; months are in UTC.
        spent: What the month came to so far.
        reserved: Nanodollars held for requests in flight.
        refused: Requests refused this month.
        is_alerted: True once the month's spending has reached the threshold.
        granted: Nanodollars that may be reserved or spent here before they are written; None if nobody else spends of
            the account, so that all of it may.
        unwritten: Of what was spent, what no ledger has written yet.
        others: Nanodollars that other processes hold.
        wanted: Nanodollars that are being asked for.
        shared: The last minute, as all workers of the gateway have it; None if there is one worker.
    """

    name: str
    config: BudgetConfig
    clock: Clock
    spent: Spending = attrs.field(factory=Spending)
    month: str = attrs.field(init=False)
    reserved: int = attrs.field(init=False, default=0)
    refused: int = attrs.field(init=False, default=0)
    is_alerted: bool = attrs.field(init=False, default=False)
    minute: Minute = attrs.field(init=False, factory=Minute)
    granted: int | None = attrs.field(init=False, default=None)
    unwritten: Spending = attrs.field(init=False, factory=Spending)
    others: int = attrs.field(init=False, default=0)
    wanted: int = attrs.field(init=False, default=0)
    shared: SharedMinute | None = attrs.field(init=False, default=None, repr=False)
    _ends_ns: int = attrs.field(init=False, default=0)

    @month.default
    def _now(self) -> str:
        return month_of(self.clock.time_ns())

    @property
    def limit(self) -> int:
        """The month's nanodollars."""
        return nano(self.config.monthly_budget_usd)

    @property
    def remaining(self) -> int:
        """Nanodollars neither spent nor held by anybody; below 0 if more was spent than was there."""
        return self.limit - self.spent.nano_usd - self.reserved - self.others

    def lacks(self, amount: int) -> bool:
        """True if the grant has no room for so many more nanodollars."""
        self.roll()
        return self.granted is not None and self.reserved + self.unwritten.nano_usd + amount > self.granted

    def needs(self) -> int:
        """What is to be held of the account, for a grant, beside what is spent and only has to be written.

        From now on no more is used than that, because the answer may grant no more.
        """
        needed = self.reserved + self.wanted
        if self.granted is not None:
            self.granted = min(self.granted, needed + self.unwritten.nano_usd)
        return needed

    def stands(self, spent: Spending, granted: int, others: int) -> None:
        """What a ledger says: all that was written as spent, what may be held here, and what others hold."""
        self.granted, self.others = granted, others
        self.spent = spent.plus(self.unwritten)

    def written(self, month: str, spending: Spending) -> None:
        """So much of what was spent here has been written, and has left the grant."""
        if month == self.month and self.granted is not None:
            self.unwritten = self.unwritten.minus(spending)
            self.granted = max(self.granted - spending.nano_usd, 0)

    def roll(self) -> None:
        """Begin a new month if it is one: what is in flight is still billed to the month it was let in."""
        now_ns = self.clock.time_ns()
        if now_ns < self._ends_ns:
            return
        self._ends_ns = now_ns + round(until_next_month_s(now_ns) * 1e9)
        month = month_of(now_ns)
        if month != self.month:
            self.month, self.spent = month, Spending()
            self.reserved = self.refused = self.others = 0
            self.unwritten = Spending()
            self.granted = None if self.granted is None else 0
            self.is_alerted = False

    def check(self, amount: int, tokens: int) -> Denial | None:
        """Why a request of so many nanodollars and tokens may not be made now; None if it may."""
        self.roll()
        return self._check_money(amount) or self._check_minute(tokens)

    def _check_money(self, amount: int) -> Denial | None:
        # A request that costs nothing takes nothing from anybody, however little is left.
        if not self.config.throttle_on_exceed or not amount:
            return None
        if amount <= self.remaining and not self.lacks(amount):
            return None
        limit = f"{money(self.config.monthly_budget_usd)} of {self.month}"
        if self.spent.nano_usd + amount > self.limit:
            wait_s = until_next_month_s(self.clock.time_ns()) if amount <= self.limit else None
            return Denial(self.name, INSUFFICIENT_QUOTA, f"the budget {self.name} of {limit} is used up", wait_s)
        return Denial(self.name, RATE_LIMITED, f"the rest of the budget {self.name} is held by requests", _SOON_S)

    def _check_minute(self, tokens: int) -> Denial | None:
        most_requests, most_tokens = self.config.requests_per_minute, self.config.tokens_per_minute
        if most_requests is None and most_tokens is None:
            return None
        now_s, minute = self.clock.now_s(), self.minute
        minute.trim(now_s)
        if self.shared is not None:
            minute = self.shared.everybodys(now_s)
        if most_requests is not None and minute.requests + 1 > most_requests:
            wait_s = minute.wait_s(now_s, requests=minute.requests + 1 - most_requests)
            return Denial(self.name, RATE_LIMITED, f"{self.name} is at its {most_requests} requests a minute", wait_s)
        if most_tokens is not None and minute.tokens + tokens > most_tokens:
            fits = tokens <= most_tokens
            wait_s = minute.wait_s(now_s, tokens=minute.tokens + tokens - most_tokens) if fits else 0.0
            reason = f"{self.name} is at its {most_tokens} tokens a minute"
            return Denial(self.name, RATE_LIMITED, reason, wait_s if fits else None)
        return None

    def book(self, month: str, spending: Spending) -> None:
        """Add to what the month came to."""
        self.roll()
        if month == self.month:
            self.spent = self.spent.plus(spending)
            if self.granted is not None:
                self.unwritten = self.unwritten.plus(spending)

    @property
    def reaches_threshold(self) -> bool:
        """True the first time in a month that its spending has reached the threshold; it is then noted."""
        threshold = self.limit * self.config.alert_threshold_pct / 100
        if self.is_alerted or self.spent.nano_usd < threshold or not self.spent.nano_usd:
            return False
        self.is_alerted = True
        return True

    def _named(self, kind: str) -> str | None:
        """The name of whose account it is, if it is of that kind."""
        found, _, name = self.name.partition("/")
        return name if name and found == kind else None

    def statement(self) -> dict[str, object]:
        """What a person reads of it."""
        self.roll()
        spent = self.spent
        return {
            "account": self.name,
            "tenant": self._named("tenant"),
            "key": self._named("key"),
            "month": self.month,
            "limit_usd": self.config.monthly_budget_usd,
            "spent_usd": spent.nano_usd / NANO,
            "reserved_usd": self.reserved / NANO,
            "remaining_usd": max(self.remaining, 0) / NANO,
            "spent_pct": round(100 * spent.nano_usd / self.limit, 2) if self.limit else None,
            "alert": self.is_alerted,
            "requests": spent.requests,
            "refused": self.refused,
            "prompt_tokens": spent.prompt_tokens,
            "completion_tokens": spent.completion_tokens,
            "cached_tokens": spent.cached_tokens,
            "unpriced": spent.unpriced,
            "resets_in_s": round(until_next_month_s(self.clock.time_ns())),
        }


@attrs.define
class Reservation:
    """What one request holds in each of its accounts; given back or settled once."""

    accounts: Sequence[Account]
    amount: int
    tokens: int
    _months: tuple[str, ...] = attrs.field(init=False)
    _seconds: tuple[int, ...] = attrs.field(init=False)
    _is_over: bool = attrs.field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        """Hold it."""
        now_s = [account.clock.now_s() for account in self.accounts]
        self._months = tuple(account.month for account in self.accounts)
        self._seconds = tuple(a.minute.add(s, 1, self.tokens) for a, s in zip(self.accounts, now_s, strict=True))
        for account in self.accounts:
            account.reserved += self.amount

    def settle(self, spending: Spending) -> Sequence[tuple[Account, str]]:
        """Give the reservation back and book what it really was; each account with the month it was booked to.

        Only the first call counts; later ones give nothing.
        """
        if self._is_over:
            return ()
        self._is_over = True
        shared = _shared_by(self.accounts)
        if shared is None:
            return self._settle(spending)
        with shared.held():
            found = self._settle(spending)
            self.tell()
            return found

    def tell(self) -> None:
        """Show the gateway's other workers what this one lets in."""
        for account, second in zip(self.accounts, self._seconds, strict=True):
            if account.shared is not None:
                account.shared.publish(account.minute, second)

    def _settle(self, spending: Spending) -> Sequence[tuple[Account, str]]:
        used = spending.prompt_tokens + spending.completion_tokens
        for account, month, second in zip(self.accounts, self._months, self._seconds, strict=True):
            account.roll()
            if month == account.month:
                account.reserved -= self.amount
            account.minute.correct(second, used - self.tokens)
            account.book(month, spending)
        return tuple(zip(self.accounts, self._months, strict=True))


def reserve(accounts: Sequence[Account], amount: int, tokens: int) -> Reservation | Denial:
    """Hold so many nanodollars and tokens in every account, or in none."""
    shared = _shared_by(accounts)
    if shared is None:
        return _reserve(accounts, amount, tokens)
    with shared.held():
        found = _reserve(accounts, amount, tokens)
        if isinstance(found, Reservation):
            found.tell()
        return found


def _reserve(accounts: Sequence[Account], amount: int, tokens: int) -> Reservation | Denial:
    for account in accounts:
        denial = account.check(amount, tokens)
        if denial is not None:
            account.refused += 1
            return denial
    return Reservation(accounts, amount, tokens)


def _shared_by(accounts: Sequence[Account]) -> SharedMinutes | None:
    """Where workers meet, if any of the accounts has a minute that they share."""
    for account in accounts:
        if account.shared is not None:
            return account.shared.shared
    return None
