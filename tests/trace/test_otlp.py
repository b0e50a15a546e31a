"""OTLP JSON: what collectors write is read, and what is something else is refused in words."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.errors import TraceError
from kvfleet.trace import names
from kvfleet.trace.otlp import from_otlp, to_otlp
from kvfleet.trace.spans import Trace
from tests.trace.building import fallback, nobody, page

FOREIGN = {
    "traceId": "4F1C9A2B" + "0" * 24,
    "spanId": "EE" * 8,
    "parentSpanId": "ab" * 8,  # a child of the route, by an instrumented library
    "name": "GET",
    "kind": "SPAN_KIND_CLIENT",
    "startTimeUnixNano": 5,
    "attributes": [
        {"key": "http.request.header", "value": {"kvlistValue": {"values": []}}},
        {"key": "bytes", "value": {"bytesValue": "AAAA"}},
        {"key": "nothing", "value": {}},
        {"key": "missing"},
    ],
    "events": [{"name": "retry"}],
}


def spans_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The spans of a document as `to_otlp` writes it."""
    return document["resourceSpans"][0]["scopeSpans"][0]["spans"]


def test_a_span_as_the_format_has_it() -> None:
    """A route's span is written as OTLP's JSON encoding demands: hex, 64-bit integers as text, enums as numbers."""
    trace = nobody()
    trace.parent_span_id = "cd" * 8
    trace.route.attributes |= {"d": math.inf, "n": math.nan, "b": True, "floats": (0.5, -math.inf), "none": ()}
    document = to_otlp([trace], service_name="edge")
    assert document["resourceSpans"][0]["resource"] == {
        "attributes": [{"key": "service.name", "value": {"stringValue": "edge"}}]
    }
    route = spans_of(json.loads(json.dumps(document, allow_nan=False)))[0]
    attributes = {pair["key"]: pair["value"] for pair in route.pop("attributes")}
    assert route == {
        "traceId": "9d02be11" + "0" * 24,
        "spanId": "ab" * 8,
        "parentSpanId": "cd" * 8,
        "name": "kvfleet.route",
        "kind": 2,
        "startTimeUnixNano": "1780000000123456789",
        "endTimeUnixNano": "1780000000123516789",
        "status": {"code": 2, "message": "no model may or can serve this request"},
    }
    assert attributes[names.STATUS_CODE] == {"intValue": "503"}
    assert [attributes[key] for key in ("d", "n", "b", "none")] == [
        {"doubleValue": "Infinity"},
        {"doubleValue": "NaN"},
        {"boolValue": True},
        {"arrayValue": {"values": []}},
    ]
    assert attributes["floats"] == {"arrayValue": {"values": [{"doubleValue": 0.5}, {"doubleValue": "-Infinity"}]}}


def test_stages_have_identifiers_of_their_own() -> None:
    """Written stages have distinct identifiers, the same each time, under the route's."""
    once, again = (spans_of(to_otlp([fallback()])) for _ in range(2))
    assert once == again
    assert len({span["spanId"] for span in once}) == len(once)
    assert {span["parentSpanId"] for span in once[1:]} == {"ab" * 8}
    assert "parentSpanId" not in once[0]


def test_what_a_collector_writes() -> None:
    """The file exporter writes one document a line, and may tear one trace apart; foreign spans do not hurt."""
    first, second = to_otlp([fallback()]), to_otlp([nobody()])
    spans = spans_of(first)
    torn = [
        {"resourceSpans": [{"scopeSpans": [{"spans": [FOREIGN, *spans[3:]]}]}, {"scopeSpans": []}, {}]},
        {"resourceSpans": [{"scopeSpans": [{"spans": spans[:3]}]}]},
        second,
    ]
    lines = "\n".join(json.dumps(document) for document in torn)
    assert set(map(repr, from_otlp(f"{lines}\n\n"))) == set(map(repr, (fallback(), nobody())))
    assert set(map(repr, from_otlp(json.dumps(torn)))) == set(map(repr, (fallback(), nobody())))


def test_a_file_with_a_byte_order_mark() -> None:
    """A file saved by an editor that puts a mark at its beginning is read too."""
    assert from_otlp(b"\xef\xbb\xbf" + json.dumps(to_otlp([page()])).encode()) == (page(),)


def test_identifiers_in_base64() -> None:
    """Protobuf's own JSON has identifiers in base64 and enums by name; it is read too."""
    document = to_otlp([page()])
    for span in spans_of(document):
        for key in ("traceId", "spanId", "parentSpanId"):
            if key in span:
                span[key] = base64.b64encode(bytes.fromhex(span[key])).decode()
        span["kind"] = {1: "SPAN_KIND_INTERNAL", 2: "SPAN_KIND_SERVER", 3: "SPAN_KIND_CLIENT"}[span["kind"]]
        span["status"]["code"] = {0: "STATUS_CODE_UNSET", 1: "STATUS_CODE_OK", 2: "STATUS_CODE_ERROR"}[
            span["status"]["code"]
        ]
    assert from_otlp(json.dumps(document)) == (page(),)


def test_routes_of_one_distributed_trace() -> None:
    """Two routes under one caller's trace come apart, each with its own stages."""
    one, other = page(), fallback()
    other.route.span_id = "cc" * 8
    assert one.trace_id == other.trace_id
    found = from_otlp(json.dumps(to_otlp([one, other])))
    assert sorted(map(repr, found)) == sorted(map(repr, [one, other]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no kvfleet.route span among 0 spans"),
        ("hello", "this is not OTLP JSON (ValueError: line 1: "),
        ('{"a": 1}', "this is not OTLP JSON (ValueError: it has no resourceSpans)"),
        ("[1, 2]", "this is not OTLP JSON (TypeError: "),
        ('{"resourceSpans": 5}', "this is not OTLP JSON (TypeError: "),
        ('{"resourceSpans": []}', "there is no kvfleet.route span among 0 spans"),
        ('{"resourceSpans": []}\n{"resourceSpans"', "this is not OTLP JSON (ValueError: line 2: "),
        ('{"resourceSpans": [{"scopeSpans": [{"spans": [{}]}]}]}', "this is not OTLP JSON (KeyError: 'traceId')"),
        (
            json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [FOREIGN | {"traceId": "xyz"}]}]}]}),
            "this is not OTLP JSON (ValueError: 'xyz' is not an identifier of 16 bytes)",
        ),
        (
            json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [FOREIGN]}]}]}),
            "there is no kvfleet.route span among 1 spans",
        ),
        (
            json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [FOREIGN | {"name": names.ROUTE_SPAN, "startTimeUnixNano": -1}]}]}]}),
            "this is not OTLP JSON (ValueError: -1 is not a time in nanoseconds)",
        ),
    ],
)  # fmt: skip
def test_something_else(text: str, message: str) -> None:
    """What is not OTLP JSON, or holds no route, is refused with what it is and what to give instead."""
    with pytest.raises(TraceError) as caught:
        from_otlp(text)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(
        "; give an OTLP JSON file, as the OpenTelemetry collector's file exporter or `kvfleet trace show --json` writes it"
    )


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["resourceSpans", "scopeSpans", "spans", "traceId", "spanId", "name", "attributes", "key", "value", "status"]), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(_json)
def test_any_json(document: object) -> None:
    """Whatever a file holds, it is either read or refused with a `TraceError`."""
    try:
        found = from_otlp(json.dumps(document))
    except TraceError:
        return
    assert all(isinstance(trace, Trace) for trace in found)
