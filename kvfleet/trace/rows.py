"""The local store's schema, a trace's facts to search by, and one trace packed alone."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import orjson

from kvfleet.trace import names
from kvfleet.trace.attributes import Attributes, answering_attempts, count, flag, is_attempt, number, text
from kvfleet.trace.spans import Span, SpanKind, Status, Trace

__all__ = ["APPLICATION_ID", "SCHEMA", "VERSION", "TraceRow", "default_path", "pack", "row_of", "unpack"]

APPLICATION_ID = 0x6B76666C
"""What SQLite keeps in the file's header, so that another program's database is not taken for a store."""

VERSION = 3
_LONGEST = 256

SCHEMA = (
    # Each row holds what was written at once: `count` traces, of which `last` is the number of the last one.
    """CREATE TABLE segments (
    last INTEGER PRIMARY KEY AUTOINCREMENT, count INTEGER NOT NULL, newest_ns INTEGER NOT NULL, body BLOB NOT NULL)""",
    # Spans of traces written before, each packed alone; `last` is the number of the newest trace at that time.
    "CREATE TABLE late (last INTEGER NOT NULL, trace_id TEXT NOT NULL, span_id TEXT NOT NULL, body BLOB NOT NULL)",
    "CREATE INDEX late_by_last ON late (last)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
)


@attrs.frozen(kw_only=True)
class TraceRow:
    """One route as `kvfleet trace list` shows it.

    Attributes:
        id: Its number in the store; later routes have greater ones.
        selected, served_by: Models.
        error: The code of what went wrong; empty if nothing did.
    """

    id: int = 0
    trace_id: str
    span_id: str
    request_id: str
    start_ns: int
    duration_ms: float
    ttfb_s: float | None
    operation: str
    is_stream: bool
    tenant: str
    outcome: str
    error: str
    status: int | None
    strategy: str
    selected: str
    served_by: str
    attempts: int
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    cost_usd: float | None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return attrs.asdict(self)


def row_of(trace: Trace, number_: int = 0) -> TraceRow:
    """The facts of a trace to search by.

    Args:
        trace: The trace; its steps stay steps.
        number_: Its number in the store.
    """
    route = trace.route
    a = route.attributes
    spans = [record for record in trace.records if type(record) is Span]
    answering = [span.attributes for span in answering_attempts(spans)]
    used: Attributes = next((one for one in reversed(answering) if names.GEN_AI_INPUT_TOKENS in one), {})
    return TraceRow(
        id=number_,
        trace_id=trace.trace_id,
        span_id=route.span_id,
        request_id=_text(a, names.REQUEST_ID),
        start_ns=route.start_ns,
        duration_ms=route.duration_ms,
        ttfb_s=number(a, names.TTFB_S),
        operation=_text(a, names.OPERATION),
        is_stream=flag(a, names.STREAM),
        tenant=_text(a, names.TENANT),
        outcome=_text(a, names.OUTCOME),
        error=_text(a, names.ERROR_TYPE),
        status=count(a, names.STATUS_CODE),
        strategy=_text(a, names.STRATEGY),
        selected=_text(a, names.MODEL_SELECTED),
        served_by=_text(a, names.MODEL_SERVED),
        attempts=sum(map(is_attempt, spans)),
        prompt_tokens=count(used, names.GEN_AI_INPUT_TOKENS),
        completion_tokens=count(used, names.GEN_AI_OUTPUT_TOKENS),
        cached_tokens=count(used, names.GEN_AI_CACHED_TOKENS),
        cost_usd=number(a, names.COST_USD),
    )


def _text(attributes: Attributes, name: str) -> str:
    """A text, short and printable: a caller may send anything, half of a surrogate pair included."""
    value = text(attributes, name)[:_LONGEST]
    return value if value.isascii() else value.encode(errors="replace").decode()


def pack(trace: Trace) -> bytes:
    """A trace in few bytes: JSON, deflated.

    Not OTLP's JSON, which takes several times the CPU time and space (`benchmarks/trace.py`).
    """
    plain = [
        trace.trace_id,
        trace.parent_span_id,
        [[s.name, s.start_ns, s.end_ns, s.attributes, s.status, s.message, s.kind, s.span_id] for s in trace.spans],
    ]
    return zlib.compress(_dump(plain, trace), 1)


def _dump(plain: list[Any], trace: Trace) -> bytes:
    """JSON; by the slower way for what the faster one changes (infinities) or refuses (great integers, surrogates)."""
    if all(_is_finite(span) for span in trace.spans):
        try:
            return orjson.dumps(plain)
        except TypeError:
            pass
    return json.dumps(plain).encode()


def _is_finite(span: Span) -> bool:
    for value in span.attributes.values():
        if type(value) is tuple and value and type(value[0]) is float:
            if not math.isfinite(sum(value)):
                return False
        elif type(value) is float and not math.isfinite(value):
            return False
    return True


def unpack(body: bytes) -> Trace:
    """The trace again."""
    trace_id, parent, spans = json.loads(zlib.decompress(body))
    return Trace(trace_id, [_span(fields) for fields in spans], parent)


def _span(fields: list[Any]) -> Span:
    name, start_ns, end_ns, attributes, status, message, kind, span_id = fields
    known = {key: tuple(value) if isinstance(value, list) else value for key, value in attributes.items()}
    return Span(name, start_ns, end_ns, known, Status(status), message, SpanKind(kind), span_id)


def default_path(environ: Mapping[str, str]) -> Path:
    """Where the store lies unless the configuration says otherwise: in the user's state directory.

    See https://specifications.freedesktop.org/basedir-spec/latest/.

    >>> default_path({"XDG_STATE_HOME": "/var/state"})
    PosixPath('/var/state/kvfleet/traces.sqlite')
    """
    state = Path(environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():  # the specification says to ignore a relative one
        home = environ.get("HOME")
        state = (Path(home) if home else Path.home()) / ".local" / "state"
    return state / "kvfleet" / "traces.sqlite"
