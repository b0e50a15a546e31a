"""Traces as OTLP JSON, and back: what collectors write to files, and what `kvfleet trace show --json` prints.

The format is OpenTelemetry's: https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding (identifiers in hex,
64-bit integers as strings). One document can be read, a list of them, or one a line, as the collector's file exporter
writes them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.errors import TraceError
from kvfleet.trace import names
from kvfleet.trace.attributes import is_attempt, is_stage
from kvfleet.trace.spans import AttributeValue, Span, SpanKind, Status, Trace

__all__ = ["from_otlp", "to_otlp"]

SCOPE = "kvfleet"

_KINDS = {SpanKind.INTERNAL: 1, SpanKind.SERVER: 2, SpanKind.CLIENT: 3}
_KINDS_BACK: Mapping[Any, SpanKind] = {
    **{number: kind for kind, number in _KINDS.items()},
    **{f"SPAN_KIND_{kind.name}": kind for kind in _KINDS},
}
_STATUSES = {Status.UNSET: 0, Status.OK: 1, Status.ERROR: 2}
_STATUSES_BACK: Mapping[Any, Status] = {
    **{number: status for status, number in _STATUSES.items()},
    **{f"STATUS_CODE_{status.name}": status for status in _STATUSES},
}
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_REMEDY = (
    "give an OTLP JSON file, as the OpenTelemetry collector's file exporter or `kvfleet trace show --json` writes it"
)


def to_otlp(traces: Iterable[Trace], *, service_name: str = "kvfleet") -> dict[str, Any]:
    """Traces as one ``ExportTraceServiceRequest`` in JSON types.

    A stage's span has no identifier of its own; it gets one made from the trace's, the same each time.
    """
    spans = [span for trace in traces for span in _spans_of(trace)]
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": service_name}}]},
                "scopeSpans": [{"scope": {"name": SCOPE}, "spans": spans}],
            }
        ]
    }


def _spans_of(trace: Trace) -> Iterator[dict[str, Any]]:
    route_id = trace.route.span_id
    for place, span in enumerate(trace.spans):
        one: dict[str, Any] = {"traceId": trace.trace_id, "spanId": span.span_id or _made_id(trace, place)}
        parent = route_id if place else trace.parent_span_id
        if parent:
            one["parentSpanId"] = parent
        one |= {
            "name": span.name,
            "kind": _KINDS[span.kind],
            "startTimeUnixNano": str(span.start_ns),
            "endTimeUnixNano": str(span.end_ns),
            "attributes": [{"key": key, "value": _any_value(value)} for key, value in span.attributes.items()],
            "status": {"code": _STATUSES[span.status], **({"message": span.message} if span.message else {})},
        }
        yield one


def _made_id(trace: Trace, place: int) -> str:
    seed = f"{trace.trace_id}{trace.route.span_id}{place}".encode()
    return hashlib.blake2b(seed, digest_size=8).hexdigest()


def _any_value(value: AttributeValue) -> dict[str, Any]:
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value if math.isfinite(value) else _special(value)}
    return {"arrayValue": {"values": [_any_value(item) for item in value]}}


def _special(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def from_otlp(data: bytes | str) -> tuple[Trace, ...]:
    """The routes in a file, by their start.

    Spans of other services are passed over. Several routes may belong to one distributed trace.

    Raises:
        TraceError: if it is not OTLP JSON, or holds no route.
    """
    try:
        entries = [entry for document in _documents(data) for entry in _entries(document)]
        traces = list(_group(entries))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise TraceError(f"this is not OTLP JSON ({type(error).__name__}: {error}); {_REMEDY}") from error
    if not traces:
        raise TraceError(f"there is no {names.ROUTE_SPAN} span among {len(entries)} spans; {_REMEDY}")
    return tuple(sorted(traces, key=lambda trace: trace.route.start_ns))


def _documents(data: bytes | str) -> Iterator[Any]:
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        yield from _lines(text)
    else:
        yield from whole if isinstance(whole, list) else [whole]


def _lines(text: str) -> Iterator[Any]:
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error}") from error


@attrs.frozen
class _Entry:
    """One span of a file, its attributes still to be read."""

    trace_id: str
    span_id: str
    parent_id: str
    raw: Mapping[str, Any]


def _entries(document: Mapping[str, Any]) -> Iterator[_Entry]:
    if "resourceSpans" not in document:
        raise ValueError("it has no resourceSpans")
    for resource in document["resourceSpans"]:
        for scope in resource.get("scopeSpans") or ():
            for raw in scope.get("spans") or ():
                parent = raw.get("parentSpanId") or ""
                yield _Entry(_hex(raw["traceId"], 16), _hex(raw["spanId"], 8), _hex(parent, 8) if parent else "", raw)


def _hex(identifier: str, size: int) -> str:
    """An identifier in hex; also read from base64, which protobuf's own JSON has."""
    if len(identifier) == size * 2:
        return bytes.fromhex(identifier).hex()
    try:
        found = base64.b64decode(identifier, validate=True)
    except binascii.Error:
        found = b""
    if len(found) != size:
        raise ValueError(f"{identifier!r} is not an identifier of {size} bytes")
    return found.hex()


def _group(entries: Sequence[_Entry]) -> Iterator[Trace]:
    """Each route span with its own children."""
    children: dict[tuple[str, str], list[_Entry]] = {}
    for entry in entries:
        children.setdefault((entry.trace_id, entry.parent_id), []).append(entry)
    for entry in entries:
        if entry.raw.get("name") == names.ROUTE_SPAN:
            below = [_read(child) for child in children.get((entry.trace_id, entry.span_id), ())]
            ours = [span for span in below if is_stage(span) or is_attempt(span)]
            # Attempts are exported before the stages are replayed; their start says where they belong.
            ours.sort(key=lambda span: (span.start_ns, is_attempt(span)))
            for span in ours:
                if not is_attempt(span):
                    span.span_id = ""  # nobody refers to it
            yield Trace(entry.trace_id, [_read(entry), *ours], entry.parent_id)


def _read(entry: _Entry) -> Span:
    raw = entry.raw
    status = raw.get("status") or {}
    return Span(
        name=str(raw["name"]),
        start_ns=_time_ns(raw["startTimeUnixNano"]),
        end_ns=_time_ns(raw.get("endTimeUnixNano") or 0),
        attributes={str(pair["key"]): _value(pair.get("value") or {}) for pair in raw.get("attributes") or ()},
        status=_STATUSES_BACK.get(status.get("code", 0), Status.UNSET),
        message=str(status.get("message") or ""),
        kind=_KINDS_BACK.get(raw.get("kind", 1), SpanKind.INTERNAL),
        span_id=entry.span_id,
    )


def _time_ns(value: str | int) -> int:
    found = int(value)
    if not 0 <= found < 2**64:
        raise ValueError(f"{value} is not a time in nanoseconds")
    return found


def _value(value: Mapping[str, Any]) -> AttributeValue:
    """One attribute; kinds that kvfleet does not write become text."""
    for kind, found in value.items():
        return _VALUES.get(kind, json.dumps)(found)
    return ""


def _double(value: float | str) -> float:
    return _SPECIAL[value] if isinstance(value, str) and value in _SPECIAL else float(value)


def _array(value: Mapping[str, Any]) -> AttributeValue:
    return tuple([_value(item) for item in value.get("values") or ()])  # type: ignore[return-value]


_VALUES: Mapping[str, Callable[[Any], AttributeValue]] = {
    "stringValue": str,
    "boolValue": bool,
    "intValue": int,
    "doubleValue": _double,
    "arrayValue": _array,
}
