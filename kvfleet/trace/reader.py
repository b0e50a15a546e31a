"""Reading the local store, while a gateway writes it or after."""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import attrs

from kvfleet.errors import TraceError
from kvfleet.trace.rows import TraceRow, row_of, unpack
from kvfleet.trace.segments import unpack_segment
from kvfleet.trace.spans import Trace
from kvfleet.trace.store import connect

__all__ = ["LAST", "TraceReader"]

LAST = "last"
"""The word for the newest trace, where an identifier is asked for."""

_MOST_SHOWN = 5

Found = tuple[TraceRow, Trace]


@attrs.define
class TraceReader:
    """Finds traces in a store. Use it as a context manager.

    Raises:
        TraceError: at opening, if there is no store at `path`.
    """

    path: Path
    _connection: sqlite3.Connection = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        """Open the file, for reading alone."""
        self._connection = connect(self.path)
        self._connection.execute("PRAGMA query_only = ON")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Twice is safe."""
        self._connection.close()

    def list(
        self,
        limit: int = 20,
        *,
        model: str = "",
        outcome: str = "",
        tenant: str = "",
        status: int | None = None,
        since_ns: int = 0,
    ) -> tuple[TraceRow, ...]:
        """Traces, the newest first.

        Args:
            limit: At most so many.
            model: Only those that selected it, or that it answered.
            outcome: Only those that ended so.
            tenant: Only this tenant's.
            status: Only those with this HTTP status.
            since_ns: Only those that began since, in Unix nanoseconds.
        """
        found: list[TraceRow] = []
        for row, _ in self._newest_first(since_ns):
            if len(found) == limit:
                break
            if (
                row.start_ns >= since_ns
                and (not model or model in (row.selected, row.served_by))
                and (not outcome or row.outcome == outcome)
                and (not tenant or row.tenant == tenant)
                and (not status or row.status == status)
            ):
                found.append(row)
        return tuple(found)

    def since(self, last_id: int, limit: int = 1000) -> tuple[TraceRow, ...]:
        """Traces stored after the one with that number, the oldest first."""
        segments = self._segments(" WHERE last > ? ORDER BY last", last_id)
        rows = (row for segment in segments for row, _ in segment if row.id > last_id)
        return tuple(itertools.islice(rows, limit))

    def get(self, reference: str) -> Trace:
        """One trace.

        Args:
            reference: The beginning of a trace or request identifier, a route's span identifier, or ``last``.

        Raises:
            TraceError: if there is none, or more than one.
        """
        if reference == LAST:
            newest = next(self._newest_first(), None)
            if newest is None:
                raise TraceError(f"the trace store at {self.path} is empty; send the gateway a request first")
            return self._whole(newest[1])
        found = self._matching(reference) if reference else ()
        if not found:
            raise TraceError(f"no trace {reference!r} in {self.path}; `kvfleet trace list` shows what is there")
        if len(found) > 1:
            shown = "; ".join(_describe(row) for row, _ in found[:_MOST_SHOWN])
            more = "" if len(found) <= _MOST_SHOWN else "; …"
            raise TraceError(f"{reference!r} is the beginning of several: {shown}{more}; give more of one")
        return self._whole(found[0][1])

    def _whole(self, trace: Trace) -> Trace:
        """The trace with the spans that came late; one that came early enough is in it already."""
        query = "SELECT body FROM late WHERE trace_id = ? AND span_id = ? ORDER BY rowid"
        with self._reading():
            found = self._connection.execute(query, (trace.trace_id, trace.route.span_id)).fetchall()
        late = [unpack(body).route for (body,) in found]
        trace.records += [span for span in late if span not in trace.spans]
        return trace

    def _matching(self, reference: str) -> Sequence[Found]:
        """What is called exactly so, or else what begins so; a few of them."""
        exactly: deque[Found] = deque()
        alike: deque[Found] = deque()
        # Identifiers stand in a segment as JSON has them, so that most segments need not be read.
        quoted = (json.dumps(reference), json.dumps(reference, ensure_ascii=False))
        texts = {text[1:-1].encode(errors="replace") for text in quoted}
        where = " OR ".join(["instr(body, ?)"] * len(texts))
        for segment in self._segments(f" WHERE {where} ORDER BY last", *texts):
            for row, trace in segment:
                if reference in (row.request_id, row.trace_id, row.span_id):
                    exactly.append((row, trace))
                elif len(alike) <= _MOST_SHOWN and any(
                    name.startswith(reference) for name in (row.trace_id, row.request_id)
                ):
                    alike.append((row, trace))
            if len(exactly) > _MOST_SHOWN:
                break
        return tuple(exactly or alike)

    def _newest_first(self, since_ns: int = 0) -> Iterator[Found]:
        for segment in self._segments(" WHERE newest_ns >= ? ORDER BY last DESC", since_ns):
            yield from reversed(segment)

    def _segments(self, rest: str, *values: Any) -> Iterator[Sequence[Found]]:
        """The traces of each segment, in the order they were written, each with its facts."""
        query = f"SELECT last, count, body FROM segments{rest}"  # noqa: S608 - our own words
        with self._reading():
            for last, count, body in self._connection.execute(query, values):
                first = last - count + 1
                yield [(row_of(trace, first + place), trace) for place, trace in enumerate(unpack_segment(body))]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise TraceError(f"the trace store at {self.path} cannot be read: {error}") from error


def _describe(row: TraceRow) -> str:
    when = datetime.fromtimestamp(row.start_ns // 10**9, UTC)
    return f"trace {row.trace_id[:12]}, span {row.span_id}, request {row.request_id}, {when:%Y-%m-%d %H:%M:%S} UTC"
