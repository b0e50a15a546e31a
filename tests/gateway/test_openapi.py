"""The page for programs: every route is on it, and what it says of bodies is what the gateway checks."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from kvfleet.gateway.openapi import SCHEMAS, openapi
from tests.gateway.asgi import Client
from tests.gateway.fleet import FakeRouter, fleet, gateway


async def page(key: str = "") -> tuple[Any, Any]:
    """A gateway, and what it says of itself."""
    app = await gateway(FakeRouter(fleet()), key=key)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = await Client(app).call("GET", "/openapi.json", headers=headers)
    return app, answer.json


async def test_every_route_is_on_it() -> None:
    """No path and no method is missing, and none is there that is not one."""
    app, told = await page()
    listed = {(method.upper(), path) for path, methods in told["paths"].items() for method in methods}
    assert listed == {(route.method, route.path) for route in app.routes}
    assert told["openapi"].startswith("3.1")


async def test_keys_are_told_where_they_are_asked_for() -> None:
    """With keys every path names them but those that are open; without, none does."""
    _, told = await page("k")
    open_paths = {path for path, methods in told["paths"].items() if "security" not in next(iter(methods.values()))}
    assert open_paths == {"/livez", "/readyz", "/dashboard"}
    _, told = await page()
    assert "security" not in str(told["paths"])


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_schema_is_one(name: str) -> None:
    """As JSON Schema 2020-12, which OpenAPI 3.1 uses."""
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])


def test_every_reference_leads_somewhere() -> None:
    """Bodies and errors name schemas that are there."""
    text = str(openapi((), has_keys=True)) + str(SCHEMAS)
    assert "#/components/schemas/" not in text.replace(str(SCHEMAS), "")
    assert {"Error", "MessageError", "Chat"} <= SCHEMAS.keys()
