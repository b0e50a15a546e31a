"""What each tenant may use, prefers, and may spend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import attrs

from kvfleet.clock import Clock, SystemClock
from kvfleet.config.schema import BudgetConfig, TenantConfig
from kvfleet.policy.budget import NANO, Account, Spending, nano

__all__ = ["BudgetTracker", "SpendRecord", "TenantManager"]


BLOCKED_RULE = "blocked_models"
PREFERRED_RULE = "preferred_models"
UNKNOWN_RULE = "unknown_tenant"


@attrs.frozen
class _Grant:
    """What one tenant may use, sorted, with the reasons it gives the others."""

    config: TenantConfig
    blocked: frozenset[str]
    preferred: frozenset[str]
    data_classes: frozenset[str]
    why_blocked: tuple[str, str]
    why_not_preferred: tuple[str, str]

    @classmethod
    def of(cls, tenant_id: str, config: TenantConfig) -> _Grant:
        """Sort a tenant's configuration; a model that is both blocked and preferred is blocked."""
        blocked = frozenset(config.blocked_models)
        preferred = [name for name in config.preferred_models if name not in blocked]
        return cls(
            config,
            blocked,
            frozenset(preferred),
            frozenset(config.allowed_data_classes),
            (f"blocked for tenant {tenant_id}", BLOCKED_RULE),
            (f"tenant {tenant_id} prefers {', '.join(preferred)}", PREFERRED_RULE),
        )


@attrs.frozen
class SpendRecord:
    """What one tenant spent in one month (``YYYY-MM``, UTC)."""

    tenant_id: str
    month: str
    spent_usd: float
    requests: int


@attrs.define
class BudgetTracker:
    """What tenants with a budget have spent this month; begins anew with each month.

    For books kept by hand. In a pipeline `admit.budget` keeps them, reserves before a request and settles after it.

    >>> tracker = BudgetTracker({"team-ml": BudgetConfig(enabled=True, monthly_budget_usd=100)})
    >>> tracker.record_spend("team-ml", 85.0)
    >>> tracker.get_remaining_budget("team-ml"), tracker.is_over_budget("team-ml")
    (15.0, False)
    """

    budgets: Mapping[str, BudgetConfig] = attrs.field(factory=dict)
    clock: Clock = attrs.field(factory=SystemClock, repr=False)
    _accounts: dict[str, Account] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        """Open an account for each enabled budget."""
        self._accounts = {
            name: Account(f"tenant/{name}", budget, self.clock)
            for name, budget in self.budgets.items()
            if budget.enabled
        }

    def record_spend(self, tenant_id: str, amount_usd: float) -> None:
        """Book what a request cost; of a tenant without a budget no books are kept.

        Raises:
            ValueError: for a negative amount.
        """
        if amount_usd < 0:
            raise ValueError("what a request cost must not be negative")
        account = self._of(tenant_id)
        if account is not None:
            account.book(account.month, Spending(nano_usd=nano(amount_usd), requests=1))

    def get_spend(self, tenant_id: str) -> SpendRecord | None:
        """What a tenant spent this month; None without a budget."""
        account = self._of(tenant_id)
        if account is None:
            return None
        return SpendRecord(tenant_id, account.month, account.spent.nano_usd / NANO, account.spent.requests)

    def get_remaining_budget(self, tenant_id: str) -> float | None:
        """US dollars left this month, at least 0; None without a budget, where there is no limit."""
        account = self._of(tenant_id)
        return None if account is None else max(account.remaining, 0) / NANO

    def is_over_budget(self, tenant_id: str) -> bool:
        """True if all of the month's money has been spent."""
        account = self._of(tenant_id)
        return account is not None and account.remaining <= 0

    def should_throttle(self, tenant_id: str, estimated_usd: float = 0.0) -> bool:
        """True if a request of that cost must be refused: beyond the month's money, or dearer than one may be."""
        account = self._of(tenant_id)
        if account is None:
            return False
        config = account.config
        if config.per_request_max_usd is not None and estimated_usd > config.per_request_max_usd:
            return True
        is_beyond = account.remaining <= 0 or nano(estimated_usd) > account.remaining
        return config.throttle_on_exceed and is_beyond

    def reset(self, tenant_id: str | None = None) -> None:
        """Forget what a tenant spent this month, or what everybody did."""
        for name, account in self._accounts.items():
            if tenant_id in (None, name):
                account.spent, account.is_alerted = Spending(), False

    def summary(self) -> dict[str, dict[str, object]]:
        """Every tenant's statement."""
        return {name: account.statement() for name, account in self._accounts.items()}

    def _of(self, tenant_id: str) -> Account | None:
        account = self._accounts.get(tenant_id)
        if account is not None:
            account.roll()
        return account


@attrs.define
class TenantManager:
    """The tenants of a fleet. They are sorted once: later changes of `tenants` have no effect.

    Args:
        tenants: By identifier.
        refuses_unknown: True if a request of an unknown tenant, or of none, gets no model at all. Where no tenants are
            configured, nobody is unknown.
        clock: For the months of budgets.
    """

    tenants: Mapping[str, TenantConfig] = attrs.field(factory=dict)
    refuses_unknown: bool = True
    clock: Clock = attrs.field(factory=SystemClock, repr=False, eq=False)
    budgets: BudgetTracker = attrs.field(init=False, repr=False, eq=False)
    _grants: dict[str, _Grant] = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        """Sort what each tenant may use."""
        self._grants = {name: _Grant.of(name, config) for name, config in self.tenants.items()}
        self.budgets = BudgetTracker({name: config.budget for name, config in self.tenants.items()}, self.clock)

    def get_tenant(self, tenant_id: str) -> TenantConfig | None:
        """The tenant's configuration, or None."""
        return self.tenants.get(tenant_id)

    def excluded(self, tenant_id: str, models: Sequence[str]) -> Mapping[str, tuple[str, str]]:
        """Models the tenant does not get: why, and by which of its rules (``blocked_models``, ``preferred_models``).

        Preferred models exclude the others as long as one of them is left.
        """
        grant = self._grants.get(tenant_id)
        if grant is None:
            return self._unknown(tenant_id, models)
        out = dict.fromkeys(grant.blocked.intersection(models), grant.why_blocked) if grant.blocked else {}
        if not grant.preferred.isdisjoint(models):
            for name in models:
                if name not in grant.preferred:
                    out.setdefault(name, grant.why_not_preferred)
        return out

    def _unknown(self, tenant_id: str, models: Sequence[str]) -> Mapping[str, tuple[str, str]]:
        if not self.refuses_unknown or not self._grants:
            return {}
        reason = "this tenant is unknown" if tenant_id else "the request names no tenant"
        return dict.fromkeys(models, (reason, UNKNOWN_RULE))

    def filter_models_for_tenant(self, tenant_id: str, models: Iterable[str]) -> list[str]:
        """The models the tenant gets, in their order.

        >>> manager = TenantManager({"team-ml": TenantConfig(name="ML Team", preferred_models=("llama-70b",))})
        >>> manager.filter_models_for_tenant("team-ml", ["llama-8b", "llama-70b", "gpt-4o"])
        ['llama-70b']
        """
        names = list(models)
        out = self.excluded(tenant_id, names)
        return [name for name in names if name not in out]

    def may_send(self, tenant_id: str, data_class: str) -> bool:
        """True if the tenant may send data of that class; an unknown tenant may if unknown ones are let in."""
        grant = self._grants.get(tenant_id)
        if grant is None:
            return not self.refuses_unknown or not self._grants
        return data_class in grant.data_classes

    def check_budget(self, tenant_id: str, estimated_usd: float) -> bool:
        """True if a request of that cost is within the tenant's budget and its limit for one request.

        An unknown tenant has what the configuration gives it: nothing, unless unknown ones are let in.
        """
        grant = self._grants.get(tenant_id)
        if grant is None:
            return not self.refuses_unknown or not self._grants
        most = grant.config.max_cost_per_request
        if most is not None and estimated_usd > most:
            return False
        return not self.budgets.should_throttle(tenant_id, estimated_usd)

    def record_request(self, tenant_id: str, cost_usd: float) -> None:
        """Book what a request of the tenant cost."""
        self.budgets.record_spend(tenant_id, cost_usd)
