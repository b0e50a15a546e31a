"""Tenants over HTTP: whose key it is, and the statements of budgets.

A key that is named as a tenant is that tenant's: its requests are the tenant's, whatever a header says, and it sees the
tenant's own statement. Every other key is the operator's, who sees all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import attrs

from kvfleet.errors import RouteError
from kvfleet.plugin.contract import RouteRequest

__all__ = ["bind", "statements"]


def bind(request: RouteRequest, caller: str, tenants: Collection[str]) -> RouteRequest:
    """The request as its caller may make it: for the tenant whose key it came with, if it is a tenant's.

    Raises:
        RouteError: 403 if a tenant's key asks in another tenant's name.
    """
    if not caller or caller not in tenants:
        return request
    if request.tenant not in ("", caller):
        raise RouteError(
            "this key belongs to another tenant than the one the request names", status=403, code="wrong_tenant"
        )
    return attrs.evolve(request, tenant=caller)


def statements(state: Mapping[str, Any], caller: str, tenants: Collection[str]) -> dict[str, Any]:
    """What each budget came to this month, as far as the caller may see it."""
    accounts = [
        account
        for key, stage in state["stages"].items()
        if key.startswith("admit.")
        for account in stage.get("accounts", ())
    ]
    if caller and caller in tenants:
        accounts = [account for account in accounts if account["tenant"] == caller]
    return {"object": "list", "fleet": state["fleet"], "data": accounts}
