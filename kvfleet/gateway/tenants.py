"""Tenants over HTTP: for whom a key asks, and the statements it may see.

A client's key asks for its own tenant, whatever a header says, and sees that tenant's statement and its own. An
admin's key asks for any tenant and sees all statements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import orjson

from kvfleet.errors import RouteError
from kvfleet.gateway.auth import Caller
from kvfleet.plugin.contract import RouteRequest
from kvfleet.turns import Steps

if TYPE_CHECKING:
    from kvfleet.runtime import Router

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


def statements(router: Router, caller: Caller) -> Steps[bytes]:
    """What each budget came to this month, as far as the caller may see it, as JSON."""
    found: list[bytes] = []
    for stage in router.pipeline.all_stages:
        if stage.key.startswith("admit."):
            for account in _accounts_of(stage.component):
                if caller.is_admin or _is_theirs(account, caller):
                    found.append(orjson.dumps(account, option=orjson.OPT_NON_STR_KEYS))
                yield
    fleet = orjson.dumps(router.config.fleet_name)
    return b'{"object":"list","fleet":%b,"data":[%b]}' % (fleet, b",".join(found))


def _accounts_of(component: Any) -> Iterable[Mapping[str, Any]]:
    """The accounts that a stage keeps: one by one if it can, else as its state has them."""
    if callable(each := getattr(component, "each_statement", None)):
        statements: Iterable[Mapping[str, Any]] = each()
        return statements
    read = getattr(component, "state", None)
    return read().get("accounts", ()) if callable(read) else ()


def _is_theirs(account: Mapping[str, Any], caller: Caller) -> bool:
    """True for the account of the key itself and for its tenant's, but not for another key's of the same tenant."""
    if account["key"] is not None:
        return bool(account["key"] == caller.name)
    return bool(caller.tenant) and account["tenant"] == caller.tenant
