"""Which web pages may call."""

from __future__ import annotations

import pytest

from tests.gateway.asgi import call
from tests.gateway.fleet import CHAT, FakeRouter, fleet, gateway

ORIGIN = {"Origin": "https://app.example"}


async def test_an_allowed_origin_may_read_the_answer() -> None:
    """The origin is named back, the answer's own headers are exposed, and caches are told."""
    app = await gateway(FakeRouter(fleet(cors_origins=("https://app.example/",))))
    answer = await call(app, "POST", "/v1/chat/completions", CHAT, headers=ORIGIN)
    assert answer.status == 200
    assert answer.header("access-control-allow-origin") == "https://app.example"
    assert answer.header("vary") == "Origin"
    assert "x-kvfleet-model" in (answer.header("access-control-expose-headers") or "")


async def test_errors_can_be_read_too() -> None:
    """A page sees why it was refused."""
    app = await gateway(FakeRouter(fleet(cors_origins=("*",))), key="k")
    answer = await call(app, "POST", "/v1/chat/completions", CHAT, headers=ORIGIN)
    assert (answer.status, answer.header("access-control-allow-origin")) == (401, "*")


@pytest.mark.parametrize("origins", [(), ("https://other.example",)])
async def test_another_origin_is_refused(origins: tuple[str, ...]) -> None:
    """A page that is not allowed gets nothing done: a "simple" request would otherwise reach the backend."""
    router = FakeRouter(fleet(cors_origins=origins))
    answer = await call(await gateway(router), "POST", "/v1/chat/completions", CHAT, headers=ORIGIN)
    assert (answer.status, answer.json["error"]["code"]) == (403, "origin_not_allowed")
    assert answer.header("access-control-allow-origin") is None
    assert router.requests == []


async def test_a_preflight_is_answered_without_a_key() -> None:
    """A browser asks first, and without credentials; it learns methods and headers."""
    app = await gateway(FakeRouter(fleet(cors_origins=("https://app.example",))), key="k")
    asked = {**ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answer = await call(app, "OPTIONS", "/v1/chat/completions", headers=asked)
    assert (answer.status, answer.header("access-control-allow-methods")) == (204, "POST")
    assert answer.header("access-control-allow-headers") == "authorization"


async def test_a_preflight_of_another_origin_is_refused() -> None:
    """No origin, no promise."""
    app = await gateway(FakeRouter(fleet()))
    assert (await call(app, "OPTIONS", "/v1/chat/completions", headers=ORIGIN)).status == 403


async def test_options_without_an_origin_is_a_wrong_method() -> None:
    """OPTIONS means nothing but a browser's question."""
    app = await gateway(FakeRouter(fleet()))
    assert (await call(app, "OPTIONS", "/v1/chat/completions")).status == 405
