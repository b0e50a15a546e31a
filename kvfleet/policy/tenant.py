"""What each tenant may use, and prefers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import attrs

from kvfleet.config.schema import TenantConfig

__all__ = ["TenantManager"]


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


@attrs.define
class TenantManager:
    """The tenants of a fleet. They are sorted once: later changes of `tenants` have no effect.

    Args:
        tenants: By identifier.
        refuses_unknown: True if a request of an unknown tenant, or of none, gets no model at all. Where no tenants are
            configured, nobody is unknown.
    """

    tenants: Mapping[str, TenantConfig] = attrs.field(factory=dict)
    refuses_unknown: bool = True
    _grants: dict[str, _Grant] = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        """Sort what each tenant may use."""
        self._grants = {name: _Grant.of(name, config) for name, config in self.tenants.items()}

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
