"""One taxonomy for every refusal and every broken exchange."""

from __future__ import annotations

import email.utils
import json
import time
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvfleet.adapters import faults
from kvfleet.errors import Fault

VLLM_LONG = (
    "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens (8000 in the messages, 1000 "
    "in the completion). Please reduce the length of the messages or completion."
)
OPENAI_LONG = {
    "message": "too long",
    "type": "invalid_request_error",
    "param": "messages",
    "code": "context_length_exceeded",
}


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, {"error": OPENAI_LONG}, Fault.CONTEXT_LENGTH),
        (400, {"object": "error", "message": VLLM_LONG, "type": "BadRequestError", "code": 400}, Fault.CONTEXT_LENGTH),
        (
            400,
            {"error": {"message": "max_tokens=90000 cannot be greater than max_model_len=8192.", "code": 400}},
            Fault.CONTEXT_LENGTH,
        ),
        (
            400,
            {"error": {"code": 400, "message": "request (20001 tokens) exceeds", "type": "exceed_context_size_error"}},
            Fault.CONTEXT_LENGTH,
        ),
        (
            400,
            {"object": "error", "message": "The input (9000 tokens) is longer than the model's context length (4096 tokens)."},
            Fault.CONTEXT_LENGTH,
        ),
        (422, {"error": "Input validation error: `inputs` must have less than 4095 tokens", "error_type": "validation"}, Fault.CONTEXT_LENGTH),
        (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096"}, Fault.CONTEXT_LENGTH),
        (400, {"error": {"message": "prompt is too long: 210000 tokens > 200000 maximum"}}, Fault.CONTEXT_LENGTH),
        (500, {"error": {"message": "the request exceeds the available context size"}}, Fault.CONTEXT_LENGTH),
        (400, {"error": {"message": "filtered", "code": "content_filter"}}, Fault.CONTENT_POLICY),
        (400, {"error": {"message": "Your request was rejected", "code": "content_policy_violation"}}, Fault.CONTENT_POLICY),
        (400, {"error": {"message": "no", "type": "invalid_request_error"}}, Fault.BAD_REQUEST),
        (400, None, Fault.BAD_REQUEST),
        (409, {}, Fault.BAD_REQUEST),
        (413, {}, Fault.BAD_REQUEST),
        (422, {"detail": [{"loc": ["body", "n"], "msg": "not a number", "input": "SECRET"}]}, Fault.BAD_REQUEST),
        (401, {"error": {"message": "Incorrect API key provided: sk-abcd", "code": "invalid_api_key"}}, Fault.UNAUTHORIZED),
        (402, {"error": {"message": "Insufficient Balance"}}, Fault.UNAUTHORIZED),
        (403, {}, Fault.UNAUTHORIZED),
        (404, {"error": {"message": "The model `nope` does not exist."}}, Fault.NOT_FOUND),
        (405, {"detail": "Method Not Allowed"}, Fault.NOT_FOUND),
        (501, {"error": {"code": 501, "message": "This server does not support embeddings."}}, Fault.NOT_FOUND),
        (408, {}, Fault.TIMEOUT),
        (429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, Fault.RATE_LIMITED),
        (500, {"error": {"message": "boom"}}, Fault.SERVER_ERROR),
        (502, None, Fault.SERVER_ERROR),
        (503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}, Fault.OVERLOADED),
        (504, {}, Fault.SERVER_ERROR),
        (529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, Fault.OVERLOADED),
        (307, None, Fault.PROTOCOL),
        (200, {"error": {"message": "x", "code": 429}}, Fault.RATE_LIMITED),
        (200, {"error": {"message": "x", "code": "429"}}, Fault.RATE_LIMITED),
        (200, {"error": {"message": "x", "code": "weird"}}, Fault.SERVER_ERROR),
        (200, {"error": "x"}, Fault.SERVER_ERROR),
    ],
)  # fmt: skip
def test_refusals(status: int, body: Any, kind: Fault) -> None:
    """Each engine's way of refusing has its place; only what concerns the caller is kept to be shown."""
    error = faults.from_answer(status, {}, b"<html>" if body is None else orjson.dumps(body))
    assert error.kind is kind
    assert error.received is False
    assert (error.body is not None) == (kind.is_callers and body not in (None, {}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "detail", "message", "code", "type", "loc", "msg"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(st.sampled_from([200, 302, 400, 401, 404, 413, 422, 429, 500, 503]), JSON)
@example(422, {"detail": [{"loc": 5, "msg": None}]})
@example(200, {"error": {"message": "m", "code": "4" * 5000}})
def test_any_error_object_can_be_read(status: int, body: Any) -> None:
    """Whatever shape it has: the status says what it is, and the caller is told something."""
    error = faults.from_answer(status, {}, json.dumps(body).encode())
    assert str(error)
    assert error.status == status or 400 <= (error.status or 0) < 600
    if error.body is not None:
        assert error.body["message"]


def test_the_backends_error_object_is_kept() -> None:
    """A caller's mistake comes back in the backend's own words and codes."""
    error = faults.from_answer(400, {}, orjson.dumps({"error": OPENAI_LONG}))
    assert error.body == OPENAI_LONG
    assert str(error) == "the prompt is longer than the model's context window (status 400)"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("see http://gpu-1:8000/v1/chat for more", "see [address] for more"),
        ("cannot fetch https://10.0.0.7/x", "cannot fetch [address]"),
        ("worker 10.0.0.7:8000 refused", "worker [address] refused"),
        ("plain", "plain"),
        ("x" * 5000, "x" * 2000),
        ("x" * 1995 + " 10.0.0.7 " + "y" * 5000, "x" * 1995 + " [add"),
        ("host gpu-7:8000 has no /root/.cache/x", "host [address] has no [path]"),
    ],
)
def test_no_address_leaves(said: str, shown: str) -> None:
    """What an engine says of addresses is taken out, and a text without end is cut."""
    error = faults.from_answer(400, {}, orjson.dumps({"error": {"message": said, "code": 400}}))
    assert error.body == {"message": shown, "type": None, "param": None, "code": 400}


def test_a_validation_error_does_not_repeat_the_input() -> None:
    """FastAPI puts the offending input beside its message; it stays here."""
    detail = [{"loc": ["body", "messages", 0, "content"], "msg": "Field required", "input": "SECRET"}]
    error = faults.from_answer(422, {}, orjson.dumps({"detail": detail}))
    assert error.body is not None
    assert error.body["message"] == "messages.0.content: Field required"


@pytest.mark.parametrize(
    "data",
    [None, [], {}, {"choices": []}, {"choices": [], "message": "x"}, {"error": None}, {"error": 5}, "error", 3],
)
def test_what_is_no_error(data: Any) -> None:
    """An answer without an error has none."""
    assert faults.error_object(data) is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "1e99"}, None),
        ({"retry-after": "3600"}, 3600.0),
        ({"retry-after": "8640000"}, 3600.0),
        ({"retry-after-ms": "9000000"}, 3600.0),
        ({"retry-after": "Mon, 01 Jan 2125 00:00:00 GMT"}, 3600.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Mon, 01 Jan 2001 00:00:00 GMT"}, 0.0),
        ({}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    """Seconds, milliseconds, and dates that have passed; nonsense is nothing, and an hour is the longest."""
    assert faults.retry_after_s(headers) == seconds
    assert faults.from_answer(429, headers, b"").retry_after_s == seconds


def test_retry_after_a_date() -> None:
    """A date to come is that far away."""
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    found = faults.retry_after_s({"retry-after": date})
    assert found is not None
    assert 55 < found <= 61


@pytest.mark.parametrize(
    ("error", "before", "amid"),
    [
        (httpx.ConnectError("x"), Fault.CONNECT, Fault.CONNECT),
        (httpx.ConnectTimeout("x"), Fault.CONNECT_TIMEOUT, Fault.CONNECT_TIMEOUT),
        (httpx.PoolTimeout("x"), Fault.CONNECT_TIMEOUT, Fault.CONNECT_TIMEOUT),
        (httpx.UnsupportedProtocol("x"), Fault.CONNECT, Fault.CONNECT),
        (httpx.ReadTimeout("x"), Fault.TIMEOUT, Fault.IDLE_TIMEOUT),
        (TimeoutError(), Fault.TIMEOUT, Fault.IDLE_TIMEOUT),
        (httpx.ReadError("x"), Fault.DISCONNECTED, Fault.DISCONNECTED),
        (httpx.WriteError("x"), Fault.DISCONNECTED, Fault.DISCONNECTED),
        (httpx.RemoteProtocolError("Server disconnected without sending a response."), Fault.DISCONNECTED, Fault.DISCONNECTED),
        (httpx.RemoteProtocolError("illegal status line"), Fault.PROTOCOL, Fault.PROTOCOL),
        (httpx.LocalProtocolError("x"), Fault.PROTOCOL, Fault.PROTOCOL),
    ],
)  # fmt: skip
def test_broken_exchanges(error: Exception, before: Fault, amid: Fault) -> None:
    """Each way an exchange can break, before the answer and amid it."""
    assert faults.from_exception(error).kind is before
    assert faults.from_exception(error).received is False
    assert faults.from_exception(error, received=True).kind is amid


@pytest.mark.parametrize("status", [401, 403])
def test_a_credential_that_was_not_sent_was_not_refused(status: int) -> None:
    """Whoever reads it learns what to write where."""
    sent = faults.from_answer(status, {}, b"")
    bare = faults.from_answer(status, {}, b"", has_credential=False)
    assert str(sent) == f"the backend refused kvfleet's credential (status {status})"
    assert str(bare) == (
        f"the backend wants a credential and was sent none: give its model an `api_key` (status {status})"
    )
    assert bare.kind is sent.kind is Fault.UNAUTHORIZED
    assert "credential" not in str(faults.from_answer(404, {}, b"", has_credential=False))
