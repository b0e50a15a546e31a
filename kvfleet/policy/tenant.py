"""What each tenant may use, and prefers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import attrs

from kvfleet.config.schema import TenantConfig

__all__ = ["TenantManager"]


@attrs.define
class TenantManager:
    """The tenants of a fleet.

    Args:
        tenants: By identifier.
        refuses_unknown: True if a request of an unknown tenant, or of none, gets no model at all.
    """

    tenants: Mapping[str, TenantConfig] = attrs.field(factory=dict)
    refuses_unknown: bool = False

    def get_tenant(self, tenant_id: str) -> TenantConfig | None:
        """The tenant's configuration, or None."""
        return self.tenants.get(tenant_id)

    def excluded(self, tenant_id: str, models: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Models the tenant does not get: why, and by which of its rules (``blocked_models``, ``preferred_models``).

        Preferred models exclude the others as long as one of them is left.
        """
        tenant = self.tenants.get(tenant_id)
        if tenant is None:
            if not self.refuses_unknown:
                return {}
            reason = f"tenant {tenant_id!r} is unknown" if tenant_id else "the request names no tenant"
            return dict.fromkeys(models, (reason, "unknown_tenant"))
        blocked = set(tenant.blocked_models)
        out = {m: (f"blocked for tenant {tenant_id}", "blocked_models") for m in models if m in blocked}
        preferred = {m for m in tenant.preferred_models if m in models and m not in blocked}
        if preferred:
            why = (f"tenant {tenant_id} prefers {', '.join(sorted(preferred))}", "preferred_models")
            out |= {m: why for m in models if m not in preferred and m not in out}
        return out

    def filter_models_for_tenant(self, tenant_id: str, models: Iterable[str]) -> list[str]:
        """The models the tenant gets, in their order."""
        names = list(models)
        out = self.excluded(tenant_id, names)
        return [name for name in names if name not in out]

    def may_send(self, tenant_id: str, data_class: str) -> bool:
        """True if the tenant may send data of that class; an unknown tenant may if unknown ones are let in."""
        tenant = self.tenants.get(tenant_id)
        if tenant is None:
            return not self.refuses_unknown
        return data_class in tenant.allowed_data_classes
