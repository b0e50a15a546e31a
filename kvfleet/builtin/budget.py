"""Budgets in the pipeline: candidates too dear for a request are dropped, and money is reserved before it is spent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import attrs

from kvfleet.adapters.call import Usage
from kvfleet.builtin.facts import answer_tokens, prompt_tokens
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.fields import mapping, number, section, text
from kvfleet.config.findings import Finding
from kvfleet.config.schema import BudgetConfig, ModelConfig
from kvfleet.errors import ConfigError
from kvfleet.money import money
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Drop, Kind, Lease, Outcome, Refusal, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.policy.books import Books, Succession
from kvfleet.policy.budget import NANO, Account, Denial, Reservation, Spending, month_of, nano, reserve
from kvfleet.policy.grants import Grants
from kvfleet.policy.ledger import Ledger
from kvfleet.telemetry.cost import Price, with_known_prices
from kvfleet.telemetry.metrics import MetricsExporter
from kvfleet.trace import names
from kvfleet.trace.spans import AttributeValue
from kvfleet.turns import Steps, at_once, in_turns

__all__ = ["BudgetAdmission", "BudgetFilter", "ledger_path"]

log = logging.getLogger(__name__)

_ANSWER = 1024
_ANSWER_DOC = "Length taken for an answer where the request sets no `max_tokens`."
_BUDGET_DOC = "What the whole fleet may spend, all tenants together."
_TENANTS_DOC = "What each tenant may spend, by the identifier requests carry."
_KEYS_DOC = "What may be spent with each of the gateway's keys, by its name."


class _Nothing:
    """What a dry run reserves, or a request that no budget speaks of."""

    def release(self, outcome: Outcome) -> None:
        """Nothing to give back."""


@attrs.define(eq=False)
class _Held:
    """One request's reservation."""

    owner: BudgetAdmission
    reservation: Reservation
    expected: tuple[int, int]

    @property
    def attributes(self) -> Mapping[str, AttributeValue]:
        """What the trace shows of it."""
        return {
            names.BUDGET_ACCOUNTS: tuple(account.name for account in self.reservation.accounts),
            names.BUDGET_RESERVED_USD: self.reservation.amount / NANO,
            names.BUDGET_REMAINING_USD: min(account.remaining for account in self.reservation.accounts) / NANO,
        }

    def release(self, outcome: Outcome) -> None:
        self.owner.settle(self.reservation, spending_of(outcome, self.expected))


def spending_of(outcome: Outcome, expected: tuple[int, int]) -> Spending:
    """What a route came to, answers included that were made on the way and not given.

    An answer whose engine reports no tokens is booked as it was expected: `expected` prompt and answer tokens. A route
    that broke off before its engine reported any is booked at nothing.
    """
    answers = [(one.model, one.usage) for one in outcome.unused]
    if outcome.served_by is not None and (outcome.usage is not None or outcome.is_success):
        answers.append((outcome.served_by, outcome.usage))
    whole = Spending(requests=1)
    for model, usage in answers:
        whole = whole.plus(_spent(model, Usage(*expected) if usage is None else usage))
    if outcome.cost_usd is None:
        return whole
    return attrs.evolve(whole, nano_usd=nano(outcome.cost_usd), unpriced=0)


def _spent(model: ModelConfig, usage: Usage) -> Spending:
    """What one answer came to; where only one price is known, it is taken for all tokens."""
    price, cached = Price.of(model), usage.cached_tokens or 0
    cost = None if price is None else price.cost_usd(usage.prompt_tokens, usage.completion_tokens, cached)
    return Spending(
        nano_usd=nano(cost or 0.0),
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=cached,
        unpriced=int(cost is None),
    )


@attrs.define(kw_only=True)
class BudgetAdmission:
    """Let a request in if its budgets hold: reserve the most it may cost, and settle for what it did cost.

    The most is an estimate: the prompt and an answer of `max_tokens`, at the price of the dearest candidate left, or
    of as many as the execute stage may have answer. So stand this after the filters. A refusal is a 429:
    `insufficient_quota` if the month's money is used up, `rate_limit_exceeded` if waiting a moment helps.
    """

    budget: BudgetConfig | None = section(None, doc=_BUDGET_DOC)
    tenants: Mapping[str, BudgetConfig] = mapping(doc=_TENANTS_DOC)
    keys: Mapping[str, BudgetConfig] = mapping(doc=_KEYS_DOC)
    answer_tokens: int = number(_ANSWER, ge=0, unit="tokens", doc=_ANSWER_DOC)
    path: str = text("", doc="The SQLite file of what was spent; in the user's state directory if empty.")
    fleet: str = text("default", doc="The fleet's name, which tells its ledger from another fleet's.")
    _clock: Clock = attrs.field(init=False, factory=SystemClock, repr=False, eq=False)
    _metrics: MetricsExporter = attrs.field(
        init=False, factory=lambda: MetricsExporter(enabled=False), repr=False, eq=False
    )
    _several: Callable[[Mapping[str, float]], float] | None = attrs.field(
        init=False, default=None, repr=False, eq=False
    )
    _prices: tuple[Price | None, ...] = attrs.field(init=False, default=(), repr=False, eq=False)
    _by_id: dict[str, int] = attrs.field(init=False, factory=dict, repr=False, eq=False)
    _books: Books = attrs.field(init=False, factory=Books, repr=False, eq=False)
    _next: tuple[BudgetAdmission, Succession] | None = attrs.field(init=False, default=None, repr=False, eq=False)
    _ledger: Ledger | None = attrs.field(init=False, default=None, repr=False, eq=False)
    _grants: Grants | None = attrs.field(init=False, default=None, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        """Open the accounts."""
        self._open_accounts()

    def provision(self, services: Services) -> None:
        """Note the prices, and where the ledger is.

        Raises:
            ConfigError: for models whose price nobody knows, if a budget refuses them.
        """
        self._clock, self._metrics, self._several = services.clock, services.metrics, services.most_usd
        self._open_accounts()
        prices = {model.id: Price.of(with_known_prices(model)) for model in services.models}
        self._prices = tuple(dict.fromkeys(prices.values()))  # there are far fewer than replicas
        place = {price: i for i, price in enumerate(self._prices)}
        self._by_id = {replica: place[price] for replica, price in prices.items()}
        unpriced = sorted({model.name for model in services.models if model.enabled and prices[model.id] is None})
        refusing = [name for name, budget in self._budgets() if budget.enabled and budget.unknown_price == "refuse"]
        if unpriced and refusing:
            what = f"nobody knows the price of {', '.join(unpriced)}, so no budget ({', '.join(refusing)}) can hold it"
            remedy = "give it cost_per_1k_input_tokens and cost_per_1k_output_tokens, or set unknown_price: allow"
            raise ConfigError([Finding(what, remedy, code="unknown-price")])
        if services.minutes is not None:
            for account in self._books.every():
                if account.config.requests_per_minute or account.config.tokens_per_minute:
                    account.shared = services.minutes(f"{self.fleet}/{account.name}")
        if self._books.every() and (self.path or services.state_dir is not None):
            state_dir = services.state_dir or Path()
            self._ledger = Ledger(Path(self.path).expanduser() if self.path else ledger_path(state_dir, self.fleet))

    def _open_accounts(self) -> None:
        self._books = Books.opened(self.budget, self.tenants, self.keys, self._clock)

    def _budgets(self) -> Iterator[tuple[str, BudgetConfig]]:
        if self.budget is not None:
            yield "fleet", self.budget
        yield from ((f"tenant/{name}", budget) for name, budget in self.tenants.items())
        yield from ((f"key/{name}", budget) for name, budget in self.keys.items())

    async def aopen(self) -> None:
        """Read what this month came to so far, and share the accounts with whoever else has the file open."""
        if self._ledger is None:
            return
        found = await anyio.to_thread.run_sync(self._ledger.open, month_of(self._clock.time_ns()))
        self._grants = Grants(self._ledger, await in_turns(self._opened(found)))

    def _opened(self, found: Mapping[str, Spending]) -> Steps[dict[str, Account]]:
        """The accounts, which begin with what was spent and no grant, by name."""
        by_name = {}
        for account in self._books.each():
            _begin_with(account, found)
            if account.config.throttle_on_exceed:
                account.granted = 0
            by_name[account.name] = account
            yield
        return by_name

    def inherit_ahead(self, before: BudgetAdmission) -> Steps[None]:
        """Find out how to go on with the accounts of before a reload: there may be thousands."""
        self._next = before, (yield from self._books.going_on_from(before._books))
        unused = self._grants.accounts if self._grants is not None else {}
        while unused:
            unused.popitem()
            yield

    def inherit(self, before: BudgetAdmission) -> None:
        """Go on with the accounts that stood before a reload: what they spent, and what they hold for requests."""
        if self._next is None or self._next[0] is not before:
            at_once(self.inherit_ahead(before))
        assert self._next is not None  # noqa: S101 - it was found just now
        (_, succession), self._next = self._next, None
        succession.begin()
        self._books = succession.books
        if self._grants is not None and before._ledger is not None:
            self._share(before._ledger, succession.by_name)

    def _share(self, ledger: Ledger, accounts: dict[str, Account]) -> None:
        """Use the ledger that the accounts' grants are held by, and let go of the one that was opened beside it."""
        if self._ledger is not None and self._ledger.path == ledger.path:
            ledger.users += 1
            self._ledger.abandon()
            self._ledger, self._grants = ledger, Grants(ledger, accounts)

    async def aclose(self) -> None:
        """Write what was spent."""
        if self._ledger is not None:
            await anyio.to_thread.run_sync(self._ledger.close)

    async def admit(self, ctx: RoutingContext) -> Lease | Refusal:
        """A reservation, or a refusal."""
        accounts = self._books.of(ctx.tenant, ctx.request.key)
        if not accounts:
            return _Nothing()
        prompt, answer = prompt_tokens(ctx), answer_tokens(ctx, self.answer_tokens)
        amount = nano(self._most_usd(ctx, prompt, answer))
        if ctx.dry_run:
            denials = (account.check(amount, prompt + answer) for account in accounts)
            denial = next((one for one in denials if one is not None), None)
            return _Nothing() if denial is None else _refusal(denial)
        held = await self._reserve(accounts, amount, prompt + answer)
        if isinstance(held, Denial):
            self._metrics.count("kvfleet_budget_refusals_total", held.account, held.code)
            return _refusal(held)
        return _Held(self, held, (prompt, answer))

    async def _reserve(self, accounts: tuple[Account, ...], amount: int, tokens: int) -> Reservation | Denial:
        if self._grants is not None and any(account.lacks(amount) for account in accounts):
            await self._grants.obtain(accounts, amount)
        return reserve(accounts, amount, tokens)

    def _most_usd(self, ctx: RoutingContext, prompt: int, answer: int) -> float:
        """The most that the route may cost, in US dollars; unknown prices count as nothing."""
        if self._several is None:
            return self._dearest(ctx, prompt, answer)
        prices = {model.name: self._price_of(model) for model in ctx.candidates}
        return self._several({name: 0.0 if p is None else p.cost_usd(prompt, answer) for name, p in prices.items()})

    def _price_of(self, model: ModelConfig) -> Price | None:
        place = self._by_id.get(model.id)
        return Price.of(model) if place is None else self._prices[place]

    def _dearest(self, ctx: RoutingContext, prompt: int, answer: int) -> float:
        """The most that any candidate left would cost, in US dollars; unknown prices count as nothing."""
        known = self._by_id
        try:
            places = {known[model.id] for model in ctx.candidates}
            prices = [self._prices[place] for place in places]
        except KeyError:  # a model that is not of the fleet, as in a test
            prices = [Price.of(model) for model in ctx.candidates]
        return max((price.cost_usd(prompt, answer) for price in prices if price is not None), default=0.0)

    def settle(self, reservation: Reservation, spending: Spending) -> None:
        """Give a reservation back, and book what it came to."""
        for account, month in reservation.settle(spending):
            if self._ledger is not None:
                self._ledger.book(account.name, month, spending)
            if self._grants is not None:
                self._grants.settled(account)
            if spending.nano_usd:
                self._metrics.count("kvfleet_budget_spend_usd_total", account.name, by=spending.nano_usd / NANO)
            if account.reaches_threshold:
                self._metrics.count("kvfleet_budget_alerts_total", account.name)
                share = account.statement()["spent_pct"]
                log.warning("budget_alert account=%s month=%s spent_pct=%s", account.name, account.month, share)

    def statements(self) -> list[dict[str, object]]:
        """What each account came to this month: the fleet's, then the tenants' and the keys' by name."""
        return list(self.each_statement())

    def each_statement(self) -> Iterator[dict[str, object]]:
        """The same, one by one."""
        return (account.statement() for account in self._books.every())

    def statements_of(self, spent: Mapping[str, Spending]) -> list[dict[str, object]]:
        """The same for a month's spending that a ledger tells, without any reservation."""
        for account in self._books.each():
            _begin_with(account, spent)
        return self.statements()

    def state(self) -> Mapping[str, Any]:
        """The statements, and whether they can be written."""
        failed = 0 if self._ledger is None else self._ledger.failed
        return {"accounts": self.statements(), "ledger_failures": failed}

    def brief_state(self, most: int) -> Mapping[str, Any]:
        """The same with so many of the statements, and how many more there are."""
        every = self._books.every()
        failed = 0 if self._ledger is None else self._ledger.failed
        shown = [account.statement() for account in every[:most]]
        return {"accounts": shown, "accounts_more": max(len(every) - most, 0), "ledger_failures": failed}


def _begin_with(account: Account, found: Mapping[str, Spending]) -> None:
    account.spent = found.get(account.name, account.spent)
    account.is_alerted = account.reaches_threshold  # reached before this process began: the alert has been given


def _refusal(denial: Denial) -> Refusal:
    return Refusal(reason=denial.reason, retry_after_s=denial.retry_after_s, code=denial.code)


def ledger_path(state_dir: Path, fleet: str) -> Path:
    """Where a fleet's ledger lies in a state directory."""
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in fleet)
    return state_dir / f"budgets-{plain}.sqlite"


@attrs.define(kw_only=True)
class BudgetFilter:
    """Drop candidates with which this one request could cost more than one request may."""

    budget: BudgetConfig | None = section(None, doc=_BUDGET_DOC)
    tenants: Mapping[str, BudgetConfig] = mapping(doc=_TENANTS_DOC)
    keys: Mapping[str, BudgetConfig] = mapping(doc=_KEYS_DOC)
    answer_tokens: int = number(_ANSWER, ge=0, unit="tokens", doc=_ANSWER_DOC)
    _prices: dict[str, Price | None] = attrs.field(init=False, factory=dict, repr=False, eq=False)

    def provision(self, services: Services) -> None:
        """Note the prices."""
        self._prices = {model.id: Price.of(with_known_prices(model)) for model in services.models}

    def limit_usd(self, ctx: RoutingContext) -> float | None:
        """The most this request may cost; None for no limit."""
        limits = [
            budget.per_request_max_usd
            for budget in (self.budget, self.tenants.get(ctx.tenant), self.keys.get(ctx.request.key))
            if budget is not None and budget.enabled and budget.per_request_max_usd is not None
        ]
        return min(limits) if limits else None

    def filter(self, ctx: RoutingContext) -> Iterable[Drop]:
        """One drop for each candidate that is too dear."""
        limit_usd = self.limit_usd(ctx)
        if limit_usd is None:
            return ()
        prompt, answer = prompt_tokens(ctx), answer_tokens(ctx, self.answer_tokens)
        return list(self._too_dear(ctx.candidates, prompt, answer, limit_usd))

    def _too_dear(self, models: Iterable[ModelConfig], prompt: int, answer: int, most: float) -> Iterator[Drop]:
        for model in models:
            price = self._prices[model.id] if model.id in self._prices else Price.of(model)
            cost = 0.0 if price is None else price.cost_usd(prompt, answer)
            if cost > most:
                reason = f"the request may cost {money(cost)} there, and {money(most)} is the most for one"
                yield Drop(model, reason, "per_request_max_usd")


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The budget's filter and admission."""
    yield Component(Kind.FILTER, "budget", BudgetFilter, must_hold=True)
    yield Component(Kind.ADMIT, "budget", BudgetAdmission, must_hold=True)
