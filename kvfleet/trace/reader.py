"""Reading the local store, while a gateway writes it or after."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import attrs

from kvfleet.errors import TraceError
from kvfleet.trace.rows import COLUMNS, TraceRow, unpack
from kvfleet.trace.spans import Trace
from kvfleet.trace.store import connect

__all__ = ["LAST", "TraceReader"]

LAST = "last"
"""The word for the newest trace, where an identifier is asked for."""

_SELECT = f"SELECT id, {', '.join(COLUMNS)} FROM traces"  # noqa: S608 - our names
_GREATEST = "\U0010ffff"


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
        wanted: dict[str, Any] = {
            "? IN (selected, served_by)": model,
            "outcome = ?": outcome,
            "tenant = ?": tenant,
            "status = ?": status,
            "start_ns >= ?": since_ns,
        }
        used = {clause: value for clause, value in wanted.items() if value}
        where = f" WHERE {' AND '.join(used)}" if used else ""
        return tuple(self._rows(f"{where} ORDER BY id DESC LIMIT ?", *used.values(), limit))

    def since(self, last_id: int, limit: int = 1000) -> tuple[TraceRow, ...]:
        """Traces stored after the one with that number, the oldest first."""
        return tuple(self._rows(" WHERE id > ? ORDER BY id LIMIT ?", last_id, limit))

    def get(self, reference: str) -> Trace:
        """One trace.

        Args:
            reference: The beginning of a trace or request identifier, a route's span identifier, or ``last``.

        Raises:
            TraceError: if there is none, or more than one.
        """
        row = self._find(reference)
        with self._reading():
            found = self._connection.execute("SELECT body FROM bodies WHERE id = ?", (row.id,)).fetchone()
        if found is None:
            raise TraceError(f"{reference} has just been pruned; newer ones: `kvfleet trace list`")
        return unpack(found[0])

    def _find(self, reference: str) -> TraceRow:
        if reference == LAST:
            newest = self.list(1)
            if not newest:
                raise TraceError(f"the trace store at {self.path} is empty; send the gateway a request first")
            return newest[0]
        found = self._matching(reference) if reference else ()
        if not found:
            raise TraceError(f"no trace {reference!r} in {self.path}; `kvfleet trace list` shows what is there")
        if len(found) > 1:
            shown = "; ".join(_describe(row) for row in found[:5])
            more = "" if len(found) <= 5 else "; …"
            raise TraceError(f"{reference!r} is the beginning of several: {shown}{more}; give more of one")
        return found[0]

    def _matching(self, reference: str) -> tuple[TraceRow, ...]:
        """What is called exactly so, or else what begins so."""
        exactly = tuple(self._rows(" WHERE ? IN (request_id, trace_id, span_id) LIMIT 6", reference))
        if exactly:
            return exactly
        ends = (reference, reference + _GREATEST)
        return tuple(
            self._rows(
                " WHERE (trace_id >= ? AND trace_id < ?) OR (request_id >= ? AND request_id < ?) LIMIT 6", *ends, *ends
            )
        )

    def _rows(self, rest: str, *values: Any) -> Iterator[TraceRow]:
        with self._reading():
            found = self._connection.execute(_SELECT + rest, values).fetchall()
        names = ("id", *COLUMNS)
        for row in found:
            fields = dict(zip(names, row, strict=True))
            yield TraceRow(**fields | {"is_stream": bool(fields["is_stream"])})

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise TraceError(f"the trace store at {self.path} cannot be read: {error}") from error


def _describe(row: TraceRow) -> str:
    when = datetime.fromtimestamp(row.start_ns // 10**9, UTC)
    return f"trace {row.trace_id[:12]}, span {row.span_id}, request {row.request_id}, {when:%Y-%m-%d %H:%M:%S} UTC"
