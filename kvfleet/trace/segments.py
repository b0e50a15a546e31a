"""Traces as they lie in the store: those that were written together, in one JSON document.

What is the same in all of them (the stages' names, the attributes' names, the replicas' identifiers) stands there once.
So a trace takes about a kilobyte and a tenth of the time that packing it alone would take (`benchmarks/trace.py`), and
nothing needs compressing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import orjson

from kvfleet.trace.spans import Shape, Span, SpanKind, Status, Step, Trace

__all__ = ["Packer", "unpack_segment"]

_STEP_LENGTH = 5


class Packer:
    """Takes traces, one after the other, and gives a segment of them.

    Attributes:
        count: Traces taken.
        size: Bytes they take, about.
    """

    __slots__ = ("_abouts", "_keys", "_shapes", "_traces", "count", "size")

    def __init__(self) -> None:
        self.count = self.size = 0
        self._shapes: dict[Shape, int] = {}
        self._abouts: dict[tuple[str, ...], int] = {}
        self._keys: dict[tuple[str, ...], int] = {}
        self._traces: list[bytes] = []

    def add(self, trace: Trace, most: int) -> None:
        """Take one more.

        Args:
            trace: A finished one.
            most: Bytes that it may take.

        Raises:
            ValueError: if it takes more; it is then left out.
            Exception: whatever a record that is none leads to; the same.
        """
        base_ns = trace.route.start_ns
        records = [
            self._step(record, base_ns) if type(record) is Step else self._span(record, base_ns)  # type: ignore[arg-type]
            for record in trace.records
        ]
        data = _dump((trace.trace_id, trace.parent_span_id, base_ns, records))
        if len(data) > most:
            raise ValueError(f"a trace of {len(data)} bytes")
        self._traces.append(data)
        self.count += 1
        self.size += len(data)

    def done(self) -> bytes:
        """The segment."""
        shapes = [(shape.name, shape.fixed, shape.names, shape.about) for shape in self._shapes]
        shared = _dump((shapes, list(self._abouts), list(self._keys)))
        return b"[%b,[%b]]" % (shared, b",".join(self._traces))

    def _step(self, step: Step, base_ns: int) -> tuple[Any, ...]:
        shapes, abouts = self._shapes, self._abouts
        shape = shapes.get(step.shape)
        if shape is None:
            shape = shapes[step.shape] = len(shapes)
        about = abouts.get(step.about)
        if about is None:
            about = abouts[step.about] = len(abouts)
        return (shape, step.start_ns - base_ns, step.end_ns - base_ns, about, step.values)

    def _span(self, span: Span, base_ns: int) -> tuple[Any, ...]:
        attributes = span.attributes
        names = tuple(attributes)
        keys = self._keys.get(names)
        if keys is None:
            keys = self._keys[names] = len(self._keys)
        return (
            keys,
            span.start_ns - base_ns,
            span.end_ns - base_ns,
            tuple(attributes.values()),
            span.name,
            span.status._value_,
            span.message,
            span.kind._value_,
            span.span_id,
        )


def _dump(plain: Any) -> bytes:
    """JSON; by the slower way for what the faster one changes (infinities) or refuses (great integers, surrogates)."""
    try:
        data = orjson.dumps(plain)
    except TypeError:
        return json.dumps(plain).encode()
    # There is no null in a record, so one that appears was an infinity, or stands in a text.
    return json.dumps(plain).encode() if b"null" in data else data


def unpack_segment(body: bytes) -> Iterator[Trace]:
    """The traces of a segment, in the order they were written."""
    try:
        (shapes, abouts, keys), traces = orjson.loads(body)
    except orjson.JSONDecodeError:  # it holds what JSON proper does not know
        (shapes, abouts, keys), traces = json.loads(body)
    known = [Shape(name, fixed, tuple(names), about) for name, fixed, names, about in shapes]
    ids = [tuple(about) for about in abouts]
    for trace_id, parent, base_ns, records in traces:
        found = [
            _step(record, base_ns, known, ids) if len(record) == _STEP_LENGTH else _span(record, base_ns, keys)
            for record in records
        ]
        yield Trace(trace_id, found, parent)


def _step(record: list[Any], base_ns: int, shapes: list[Shape], abouts: list[tuple[str, ...]]) -> Step:
    shape, start_ns, end_ns, about, values = record
    return Step(shapes[shape], _plain(values), abouts[about], base_ns + start_ns, base_ns + end_ns)


def _span(record: list[Any], base_ns: int, keys: list[list[str]]) -> Span:
    names, start_ns, end_ns, values, name, status, message, kind, span_id = record
    attributes = dict(zip(keys[names], _plain(values), strict=True))
    return Span(
        name, base_ns + start_ns, base_ns + end_ns, attributes, Status(status), message, SpanKind(kind), span_id
    )


def _plain(values: list[Any]) -> tuple[Any, ...]:
    """Values as attributes have them: JSON knows lists, where a record has tuples."""
    return tuple([tuple(value) if type(value) is list else value for value in values])
