"""Tenants over HTTP: for whom a key asks, and the statements it may see.

A client's key asks for its own tenant, whatever a header says, and sees that tenant's statement and its own. An
admin's key asks for any tenant and sees all statements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.errors import RouteError
from kvfleet.gateway.auth import Caller
from kvfleet.plugin.contract import RouteRequest

__all__ = ["bind", "statements"]


def bind(request: RouteRequest, caller: Caller) -> RouteRequest:
    """The request as its caller may make it: for the tenant whose key it came with.

    Raises:
        RouteError: 403 if a client's key asks in the name of a tenant that is not its own.
    """
    own, named = caller.tenant, request.tenant
    if named == own:
        return request
    if not named:
        return attrs.evolve(request, tenant=own)
    if caller.is_admin:
        return request
    whose = "belongs to another tenant than the one the request names" if own else "may not ask in a tenant's name"
    raise RouteError(f"this key {whose}", status=403, code="wrong_tenant")


def statements(state: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
    """What each budget came to this month, as far as the caller may see it."""
    accounts = [
        account
        for key, stage in state["stages"].items()
        if key.startswith("admit.")
        for account in stage.get("accounts", ())
    ]
    if not caller.is_admin:
        accounts = [account for account in accounts if _is_theirs(account, caller)]
    return {"object": "list", "fleet": state["fleet"], "data": accounts}


def _is_theirs(account: Mapping[str, Any], caller: Caller) -> bool:
    """True for the account of the key itself and for its tenant's, but not for another key's of the same tenant."""
    if account["key"] is not None:
        return bool(account["key"] == caller.name)
    return bool(caller.tenant) and account["tenant"] == caller.tenant
