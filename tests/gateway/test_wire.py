"""From headers and a body to a route request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import attrs
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvfleet.adapters.call import Operation
from kvfleet.config.schema import GatewayConfig, PolicyRule
from kvfleet.errors import BadRequestError
from kvfleet.gateway.headers import HeaderNames, read_by_conditions
from kvfleet.gateway.wire import RequestReader, parse
from kvfleet.plugin.contract import RouteRequest

MESSAGES = [{"role": "user", "content": "Hello"}]


def read(
    body: Any, operation: Operation = Operation.CHAT, *, config: GatewayConfig | None = None, **headers: str
) -> RouteRequest:
    """A request from a body and headers, underscores for hyphens."""
    names = HeaderNames.of(config or GatewayConfig(tenant_header="X-Tenant-ID"), ["X-Env"])
    pairs = [(key.replace("_", "-").lower().encode(), value.encode("latin-1")) for key, value in headers.items()]
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    return RequestReader(names).read(operation, raw, names.read(pairs), "req-1")


def refusal(body: Any, operation: Operation = Operation.CHAT, **headers: str) -> tuple[str, str | None]:
    """Message and parameter of the refusal of a request."""
    with pytest.raises(BadRequestError) as caught:
        read(body, operation, **headers)
    assert caught.value.status == 400
    return caught.value.message, caught.value.param


def test_everything_a_request_says() -> None:
    """Headers and body together make the route request, each field in its place."""
    body = {
        "model": "llama",
        "messages": MESSAGES,
        "stream": True,
        "metadata": {"domain": "coding", "n": 1},
        "prompt_cache_key": "key",
        "unknown": {"kept": [1]},
    }
    config = GatewayConfig(tenant_header="X-Tenant-ID", passthrough_headers=("X-Correlation-ID",))
    request = read(
        body,
        config=config,
        X_KVFleet_Strategy="cost_first",
        X_KVFleet_Models="llama, gpt-4o,",
        X_KVFleet_Timeout="30000",
        X_KVFleet_Data_Class="public",
        X_KVFleet_Region="eu-west-1",
        X_Tenant_ID="team-ml",
        X_Session_ID="talk-1",
        X_Correlation_ID="req-789",
        X_Env="prod",
        X_Other="not looked at",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        tracestate="a=b",
    )
    assert request == RouteRequest(
        operation=Operation.CHAT,
        body=body,
        raw=orjson.dumps(body),
        model="llama",
        models=frozenset({"llama", "gpt-4o"}),
        strategy="cost_first",
        is_override=True,
        stream=True,
        request_id="req-1",
        tenant="team-ml",
        data_class="public",
        region="eu-west-1",
        tags={"domain": "coding"},
        session="talk-1",
        headers=(("x-correlation-id", "req-789"),),
        condition_headers={"x-env": "prod"},
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        tracestate="a=b",
        timeout_s=30.0,
        timeout_by="x-kvfleet-timeout",
    )


def test_a_bare_request_leaves_everything_open() -> None:
    """Without headers, the model is auto, and nothing else is said."""
    body = {"messages": MESSAGES}
    assert read(body) == RouteRequest(body=body, raw=orjson.dumps(body), request_id="req-1")


def test_the_session_is_the_header_or_the_cache_key() -> None:
    """The header comes first; `prompt_cache_key` stands in; `user` names a person, not a conversation."""
    body = {"messages": MESSAGES, "prompt_cache_key": "key", "user": "ann"}
    assert read(body, X_Session_ID="talk").session == "talk"
    assert read(body).session == "key"
    assert read({"messages": MESSAGES, "user": "ann"}).session == ""
    long = read({"messages": MESSAGES, "prompt_cache_key": "k" * 10_000}).session
    assert len(long) == 32


def test_configured_header_names_count() -> None:
    """A renamed header is read under its new name only, and one that is switched off not at all."""
    config = GatewayConfig(strategy_header="X-How", session_header="")
    request = read(
        {"messages": MESSAGES}, config=config, X_How="random", X_KVFleet_Strategy="cost_first", X_Session_ID="talk"
    )
    assert (request.strategy, request.session, request.tenant) == ("random", "", "")


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b"", "the request has no body; send a JSON object", None),
        (b'{"messages": [}', "the request body is not valid JSON (near line 1 column 15)", None),
        (b"[1]", "the request body must be a JSON object, not a list", None),
        (b"\xff", "the request body is not valid JSON (near line 1 column 1)", None),
        ({}, "messages is missing", "messages"),
        ({"messages": "Hi"}, "messages must be a list, not text", "messages"),
        ({"messages": []}, "messages must not be empty", "messages"),
        ({"messages": [{}] * 10_001}, "messages must be at most 10000", "messages"),
        ({"messages": ["Hi"]}, "messages[0] must be an object, not text", "messages"),
        ({"messages": [*MESSAGES, {"content": "Hi"}]}, "messages[1].role must be text", "messages[1].role"),
        (
            {"messages": [{"role": "user", "content": 1}]},
            "messages[0].content must be text, a list of parts or null",
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "user", "content": ["Hi"]}]},
            "messages[0].content[0] must be an object, not text",
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": 1}]},
            "messages[0].tool_calls must be a list, not a number",
            "messages[0].tool_calls",
        ),
        ({"messages": MESSAGES, "tools": [1]}, "tools[0] must be an object, not a number", "tools"),
        ({"messages": MESSAGES, "tools": {}}, "tools must be a list, not an object", "tools"),
        ({"messages": MESSAGES, "model": 1}, "model must be text, not a number", "model"),
        ({"messages": MESSAGES, "model": ""}, "model must be 1 to 256 characters long", "model"),
        ({"messages": MESSAGES, "model": "m" * 257}, "model must be 1 to 256 characters long", "model"),
        ({"messages": MESSAGES, "stream": "yes"}, "stream must be true or false, not text", "stream"),
        ({"messages": MESSAGES, "stream": 1}, "stream must be true or false, not a number", "stream"),
    ],
)
def test_a_wrong_chat_body_names_its_field(body: Any, message: str, param: str | None) -> None:
    """Each refusal says what is wrong and in which field, and repeats nothing of the content."""
    assert refusal(body) == (message, param)


def test_nesting_is_bounded() -> None:
    """A body of a hundred thousand brackets is refused by the parser, not by the end of the stack."""
    for raw in (b"[" * 100_000, b'{"messages":' * 100_000):
        assert "is not valid JSON" in refusal(raw)[0]


@pytest.mark.parametrize(
    ("operation", "body", "message", "param"),
    [
        (Operation.COMPLETION, {}, "prompt is missing", "prompt"),
        (Operation.COMPLETION, {"prompt": 1}, "prompt must be text or a list, not a number", "prompt"),
        (Operation.EMBEDDING, {"input": []}, "input must not be empty", "input"),
        (Operation.EMBEDDING, {"input": {}}, "input must be text or a list, not an object", "input"),
        (
            Operation.EMBEDDING,
            {"input": "a", "stream": True},
            "an answer to /v1/embeddings cannot be streamed",
            "stream",
        ),
        (Operation.RERANK, {"documents": ["a"]}, "query is missing or not text", "query"),
        (Operation.RERANK, {"query": "a"}, "documents must be a list that is not empty", "documents"),
    ],
)
def test_other_operations_check_their_own_fields(operation: Operation, body: Any, message: str, param: str) -> None:
    """Each operation needs what its engine would need."""
    assert refusal(body, operation) == (message, param)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        (
            {"X_KVFleet_Timeout": "1s"},
            "the header x-kvfleet-timeout must be a whole number of milliseconds from 1 to 99999999",
        ),
        (
            {"X_KVFleet_Timeout": "0"},
            "the header x-kvfleet-timeout must be a whole number of milliseconds from 1 to 99999999",
        ),
        ({"X_KVFleet_Models": " , "}, "the header x-kvfleet-models names no model"),
        (
            {"X_KVFleet_Data_Class": "secret"},
            "the header x-kvfleet-data-class must be one of public, internal, confidential, restricted",
        ),
        ({"X_Tenant_ID": "t" * 257}, "the header x-tenant-id must be at most 256 printable ASCII characters"),
        ({"X_Tenant_ID": "t\x7f"}, "the header x-tenant-id must be at most 256 printable ASCII characters"),
    ],
)
def test_a_wrong_header_is_named(headers: dict[str, str], message: str) -> None:
    """A header that cannot be obeyed is refused, never ignored."""
    assert refusal({"messages": MESSAGES}, **headers)[0] == message


def test_a_control_header_sent_twice_is_refused() -> None:
    """Two tenants, or two keys, are nobody: whoever reads first and whoever reads last would disagree."""
    names = HeaderNames.of(GatewayConfig(tenant_header="X-Tenant-ID"))
    with pytest.raises(BadRequestError, match="the header x-tenant-id is sent twice"):
        names.read([(b"x-tenant-id", b"a"), (b"x-tenant-id", b"b")])


def test_repeated_passed_on_headers_are_joined() -> None:
    """Other headers may repeat, as HTTP has it."""
    names = HeaderNames.of(GatewayConfig(passthrough_headers=("X-Note",)))
    found = names.read([(b"x-note", b"a"), (b"x-note", b"b")])
    assert names.passed_on(found) == (("x-note", "a, b"),)


@pytest.mark.parametrize("name", ["Authorization", "content-length", "Host", "x-api-key", "Transfer-Encoding"])
def test_credentials_and_framing_are_never_passed_through(name: str) -> None:
    """A configuration that would let clients set a backend's credential or framing is a finding."""
    with pytest.raises(ValueError, match=rf"gateway.passthrough_headers\[0\]: {name} cannot be passed through"):
        HeaderNames.of(GatewayConfig(passthrough_headers=(name,)))


def test_headers_that_conditions_read_are_found() -> None:
    """Rules of any stage count; credentials are never read, and stages without rules are passed over."""
    rules = (
        PolicyRule(name="a", condition="headers.X-Env == prod or Headers.x-team == ml", action="allow"),
        PolicyRule(name="b", condition="headers.authorization == secret", action="allow"),
    )
    found = read_by_conditions([SimpleNamespace(rules=rules), SimpleNamespace(), SimpleNamespace(rules=(object(),))])
    assert found == ("x-env", "x-team")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_a_refusal(raw: bytes) -> None:
    """No body raises anything but a refusal."""
    try:
        found = parse(raw)
    except BadRequestError:
        return
    assert isinstance(found, dict)


@given(
    st.sampled_from(Operation),
    st.dictionaries(
        st.sampled_from(
            ["model", "messages", "prompt", "input", "query", "documents", "stream", "metadata", "prompt_cache_key"]
        ),
        JSON,
    ),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_object_is_a_request_or_a_refusal(operation: Operation, body: Any) -> None:
    """Whatever the fields hold, the answer is a request that holds them all, or a refusal."""
    raw = orjson.dumps(body)
    try:
        request = read(raw, operation)
    except BadRequestError:
        return
    assert attrs.evolve(request, body=dict(request.body)).body == orjson.loads(raw)
    assert request.raw == raw
