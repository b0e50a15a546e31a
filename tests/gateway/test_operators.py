"""Who may look inside: roles, and the operators' own listener."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import attrs
import httpx
import pytest

from kvfleet.config.loader import check_text, load_config
from kvfleet.errors import ConfigError
from kvfleet.gateway.auth import digest_text
from kvfleet.gateway.server import running, serve
from kvfleet.gateway.table import Access

KEYS = {
    "app": {"key": digest_text("client-key")},
    "ops": {"sha256": digest_text("admin-key"), "role": "admin"},
}
HEADERS = {
    "nobody": {},
    "a stranger": {"authorization": "Bearer other"},
    "the digest itself": {"authorization": f"Bearer {digest_text('admin-key')}"},
    "a client": {"authorization": "Bearer client-key"},
    "an admin": {"authorization": "Bearer admin-key"},
}
ASK = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def fleet(**gateway: Any) -> Any:
    """A mock model behind these keys."""
    data = {"models": [{"name": "m", "provider": "mock"}], "gateway": {"keys": KEYS, **gateway}}
    return load_config(None, data, environ={})


@attrs.frozen
class Both:
    """A client of each listener."""

    clients: httpx.AsyncClient
    operators: httpx.AsyncClient
    routes: tuple[Any, ...]


@contextlib.asynccontextmanager
async def split(**gateway: Any) -> AsyncIterator[Both]:
    """A gateway whose operators have a listener of their own."""
    async with (
        running(fleet(admin={"port": 0}, **gateway)) as serving,
        httpx.AsyncClient(base_url=serving.url, timeout=10) as clients,
        httpx.AsyncClient(base_url=serving.admin_url, timeout=10) as operators,
    ):
        yield Both(clients, operators, serving.gateway.routes)


async def asked(client: httpx.AsyncClient, route: Any, headers: Mapping[str, str]) -> int:
    """The status of a request to a route; a stream is left after its head."""
    path = route.path.replace("{id}", "m")
    async with client.stream(route.method, path, headers=headers, json=ASK if route.method == "POST" else None) as got:
        return got.status_code


@pytest.mark.parametrize("who", HEADERS)
async def test_every_route_on_every_listener_for_every_role(who: str) -> None:
    """The whole table: what is open, what asks for a key, what for an admin's, and what is not there at all."""
    async with split() as both:
        for route in both.routes:
            is_known = who in ("a client", "an admin")
            may = {Access.OPEN: True, Access.KEY: is_known, Access.ADMIN: who == "an admin"}[route.access]
            at_clients = await asked(both.clients, route, HEADERS[who])
            at_operators = await asked(both.operators, route, HEADERS[who])
            if route.is_operators:
                assert at_clients == (404 if is_known else 401), route.path
            else:
                assert (at_clients in (401, 403)) != may, route.path
            if not route.is_operators and route.method == "POST":
                assert at_operators in (404, 405) if is_known else at_operators == 401, route.path
            else:
                assert (at_operators in (401, 403)) != may, route.path


async def test_an_operator_at_the_clients_door_is_told_where_to_go() -> None:
    """The metrics are not gone, they are elsewhere."""
    async with split() as both:
        answer = await both.clients.get("/metrics", headers=HEADERS["an admin"])
    assert answer.json()["error"]["message"] == (
        "there is no /metrics here; operators have a listener of their own: gateway.admin"
    )


async def test_a_client_is_told_what_its_key_is_not() -> None:
    """The message says what the key is, and what it does open."""
    async with split() as both:
        answer = await both.operators.post("/-/reload", headers=HEADERS["a client"])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (403, "operators_only")
    assert "this is a client's key" in error["message"]


async def test_without_a_listener_of_their_own_operators_use_the_clients() -> None:
    """As it was: one listener, and roles on it."""
    async with running(fleet()) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        found = [(await client.get("/metrics", headers=HEADERS[who])).status_code for who in ("a client", "an admin")]
    assert (found, serving.admin_url) == ([403, 200], "")


def test_operators_listen_on_loopback_or_behind_a_key() -> None:
    """As for clients: an open listener beyond this machine is refused, at its own place in the file."""
    config = load_config(
        None, {"models": [{"name": "m", "provider": "mock"}], "gateway": {"admin": {"host": "0.0.0.0", "port": 0}}}
    )
    with pytest.raises(ConfigError, match=r"gateway.admin.host: 0.0.0.0 is not loopback and no key is set"):
        serve(config)


def test_half_a_digest_is_a_finding() -> None:
    """What begins as a digest and is none is never taken for a key."""
    text = "models: [{name: m, provider: mock}]\ngateway: {api_key: 'sha256:abc', api_keys: {x: 'sha256:'}}\n"
    _, findings = check_text(text, environ={})
    assert [(one.path, one.message.partition(":")[0]) for one in findings] == [
        (("gateway", "api_key"), "is no SHA-256"),
        (("gateway", "api_keys", "x"), "is no SHA-256"),
    ]
