"""How a trace lies in the local store: the schema, one row of facts to search by, and the whole record, packed."""

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

__all__ = ["APPLICATION_ID", "COLUMNS", "SCHEMA", "VERSION", "TraceRow", "default_path", "pack", "row_of", "unpack"]

APPLICATION_ID = 0x6B76666C
"""What SQLite keeps in the file's header, so that another program's database is not taken for a store."""

VERSION = 1
_GREATEST = 2**63 - 1
_LONGEST = 256

SCHEMA = (
    """CREATE TABLE traces (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    trace_id TEXT NOT NULL, span_id TEXT NOT NULL, request_id TEXT NOT NULL,
    start_ns INTEGER NOT NULL, duration_ms REAL NOT NULL, ttfb_s REAL,
    operation TEXT NOT NULL, is_stream INTEGER NOT NULL, tenant TEXT NOT NULL,
    outcome TEXT NOT NULL, error TEXT NOT NULL, status INTEGER,
    strategy TEXT NOT NULL, selected TEXT NOT NULL, served_by TEXT NOT NULL, attempts INTEGER NOT NULL,
    prompt_tokens INTEGER, completion_tokens INTEGER, cached_tokens INTEGER, cost_usd REAL)""",
    "CREATE INDEX traces_trace_id ON traces (trace_id)",
    "CREATE INDEX traces_request_id ON traces (request_id)",
    # Apart, so that a search reads the small table alone.
    "CREATE TABLE bodies (id INTEGER PRIMARY KEY, body BLOB NOT NULL)",
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


COLUMNS = tuple(attribute.name for attribute in attrs.fields(TraceRow) if attribute.name != "id")


def row_of(trace: Trace) -> tuple[Any, ...]:
    """The facts of a trace to search by, in the order of `COLUMNS`."""
    route = trace.route
    a = route.attributes
    attempts = [span.attributes for span in trace.stages if is_attempt(span)]
    answering = [span.attributes for span in answering_attempts(trace.spans)]
    used: Attributes = next((one for one in reversed(answering) if names.GEN_AI_INPUT_TOKENS in one), {})
    return (
        trace.trace_id,
        route.span_id,
        _text(a, names.REQUEST_ID),
        route.start_ns,
        route.duration_ms,
        number(a, names.TTFB_S),
        _text(a, names.OPERATION),
        flag(a, names.STREAM),
        _text(a, names.TENANT),
        _text(a, names.OUTCOME),
        _text(a, names.ERROR_TYPE),
        _count(a, names.STATUS_CODE),
        _text(a, names.STRATEGY),
        _text(a, names.MODEL_SELECTED),
        _text(a, names.MODEL_SERVED),
        len(attempts),
        _count(used, names.GEN_AI_INPUT_TOKENS),
        _count(used, names.GEN_AI_OUTPUT_TOKENS),
        _count(used, names.GEN_AI_CACHED_TOKENS),
        number(a, names.COST_USD),
    )


def _text(attributes: Attributes, name: str) -> str:
    """A text that SQLite can take, and short: a caller may send anything, half of a surrogate pair included."""
    value = text(attributes, name)[:_LONGEST]
    return value if value.isascii() else value.encode(errors="replace").decode()


def _count(attributes: Attributes, name: str) -> int | None:
    """A whole number that SQLite can take: an engine may report any."""
    value = count(attributes, name)
    return value if value is not None and -_GREATEST <= value <= _GREATEST else None


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
