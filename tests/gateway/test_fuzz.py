"""Whatever a client sends, the gateway answers with an OpenAI answer or an OpenAI error, and never with a failure of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import attrs
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvfleet.config.schema import (
    FleetConfig,
    GatewayConfig,
    ModelCapabilities,
    ModelConfig,
    PolicyConfig,
    PolicyRule,
)
from kvfleet.gateway.server import create_gateway_app
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter
from tests.gateway.asgi import Answer, Client

KINDS = ("chat", "embedding", "rerank")

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=20)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PARTS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["text", "image_url", "input_audio", "file", "video_url"]) | JSON,
            "text": st.text(max_size=20) | JSON,
            "image_url": st.fixed_dictionaries({"url": st.text(max_size=20)}) | JSON,
            "input_audio": JSON,
        },
    )
    | JSON,
    max_size=3,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text(max_size=50) | PARTS},
        optional={"tool_calls": JSON, "tool_call_id": JSON, "name": JSON},
    ),
    min_size=1,
    max_size=4,
)
TEXTS = st.lists(st.text(max_size=5) | st.integers(0, 9), max_size=3)
ANY = {
    "model": st.sampled_from(["auto", "auto", "chat", "embedding", "rerank", "nobody"]) | JSON,
    "stream": st.booleans() | JSON,
    "tools": JSON,
    "response_format": JSON,
    "max_tokens": st.integers(1, 50) | JSON,
    "n": JSON,
    "metadata": JSON,
    "user": JSON,
    "prompt_cache_key": JSON,
    "stream_options": JSON,
    "dimensions": JSON,
    "top_n": JSON,
}
NEEDED: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": st.text(max_size=20) | TEXTS | JSON},
    "/v1/embeddings": {"input": st.text(max_size=20) | TEXTS | JSON},
    "/v1/rerank": {"query": st.text(max_size=20), "documents": TEXTS | st.lists(JSON, max_size=3)},
    "/v1/route/explain": {"messages": MESSAGES},
}
# A sound body with at most two odd fields gets further than one in which everything is odd.
ODD = st.lists(
    st.sampled_from(sorted(ANY)).flatmap(lambda field: st.tuples(st.just(field), ANY[field])), max_size=2
).map(dict)
CALLS = st.sampled_from(sorted(NEEDED)).flatmap(
    lambda path: st.tuples(
        st.just(path), st.builds(lambda needed, odd: {**needed, **odd}, st.fixed_dictionaries(NEEDED[path]), ODD) | JSON
    )
)
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            "x-kvfleet-strategy",
            "x-kvfleet-models",
            "x-kvfleet-timeout",
            "x-kvfleet-data-class",
            "x-kvfleet-region",
            "x-tenant-id",
            "x-session-id",
            "x-request-id",
            "traceparent",
            "tracestate",
            "x-env",
            "authorization",
        ]
    ),
    st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=40)
    | st.sampled_from(["cost_first", "chat", "30000", "public", "team", "00-" + "a" * 32 + "-" + "b" * 16 + "-01"]),
    max_size=4,
)


@attrs.frozen
class Face:
    """A gateway before fake engines, in an event loop that lives as long as the tests."""

    app: Any
    runner: asyncio.Runner

    def call(self, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        """One request."""
        return self.runner.run(Client(self.app).call("POST", path, body, headers=headers))


@pytest.fixture(scope="module")
def face() -> Iterator[Face]:
    """The default pipeline with everything on that reads requests."""
    models = tuple(
        ModelConfig(
            name=kind,
            endpoint=f"http://{kind}.internal:8000",
            capabilities=ModelCapabilities(model_type=kind, supports_tools=True, supports_json_mode=True),
        )
        for kind in KINDS
    )
    rule = PolicyRule(name="env", condition="headers.x-env == prod and tokens > 10", action="require_private")
    config = FleetConfig(
        models=models,
        policy=PolicyConfig(enabled=True, pii_detection=True, rules=(rule,)),
        gateway=GatewayConfig(tenant_header="X-Tenant-ID"),
    )
    adapters = {one.id: FakeAdapter(endpoint=one.endpoint, model_id=one.name) for one in models}
    with asyncio.Runner() as runner:

        async def start() -> Any:
            app = create_gateway_app(Router(config, adapters=adapters, polls=False, seed=1))
            await app.start()
            return app

        app = runner.run(start())
        yield Face(app, runner)
        runner.run(app.stop())


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of requests are not worth thousands of records."""
    caplog.set_level(logging.CRITICAL)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=CALLS, headers=st.just({}) | HEADERS)
def test_any_json_gets_an_answer_or_an_error(face: Face, call: tuple[str, Any], headers: dict[str, str]) -> None:
    """Any JSON with any headers is answered, or refused in OpenAI's shape with a status below 500 or a known 503."""
    path, body = call
    try:
        raw = orjson.dumps(body)
    except TypeError:
        return
    answer = face.call(path, raw, headers)
    assert answer.is_complete
    assert answer.header("x-request-id")
    if answer.status == 200:
        assert answer.body
        return
    error = answer.json["error"]
    assert isinstance(error["message"], str)
    assert answer.status < 500 or error["code"] in ("no_candidates", "deadline_exceeded"), error


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(sorted(NEEDED)), body=st.binary(max_size=200), headers=HEADERS)
def test_any_bytes_are_refused_politely(face: Face, path: str, body: bytes, headers: dict[str, str]) -> None:
    """What is not JSON is a 400 that repeats nothing of it."""
    answer = face.call(path, body, headers)
    assert answer.status == 400
    assert answer.json["error"]["type"] == "invalid_request_error"
