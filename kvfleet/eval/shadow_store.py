"""Where comparisons with shadow models are kept: SQLite, bounded by number, written off the event loop."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from kvfleet.errors import TraceError
from kvfleet.eval.asking import mean, median
from kvfleet.sqlite import make_once, use_wal

__all__ = ["FILE_NAME", "ShadowRow", "ShadowStore", "ShadowSummary", "summarise"]

FILE_NAME = "shadow.sqlite"
APPLICATION_ID = 0x6B767368
_VERSION = 1
_LONGEST = 20_000


@attrs.frozen(kw_only=True)
class ShadowRow:
    """One answer of a shadow model beside the one that was given.

    Attributes:
        at_s: When, in seconds since 1970.
        primary, shadow: The models.
        error: Why the shadow model gave no answer; empty if it did.
        primary_ms, shadow_ms: Milliseconds until the whole answer.
        primary_tokens, shadow_tokens: Length of the answers, if reported.
        similarity: 0 to 1; None if it was not computed.
        judgement: What the judge said, 0 to 1; None without one.
        prompt, primary_output, shadow_output: Content, only if the operator asked for it.
    """

    at_s: float
    fleet: str = ""
    request_id: str = ""
    trace_id: str = ""
    tenant: str = ""
    primary: str = ""
    shadow: str = ""
    error: str = ""
    primary_ms: float = 0.0
    shadow_ms: float = 0.0
    primary_usd: float | None = None
    shadow_usd: float | None = None
    primary_tokens: int | None = None
    shadow_tokens: int | None = None
    similarity: float | None = None
    judgement: float | None = None
    prompt: str = attrs.field(default="", repr=False)
    primary_output: str = attrs.field(default="", repr=False)
    shadow_output: str = attrs.field(default="", repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types; what is not known is left out."""
        return {key: value for key, value in attrs.asdict(self).items() if value not in (None, "")}


_COLUMNS = tuple(attribute.name for attribute in attrs.fields(ShadowRow))
_NAMES = ", ".join(f'"{name}"' for name in _COLUMNS)  # quoted: PRIMARY is a word of SQL
_INSERT = f"INSERT INTO shadow ({_NAMES}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608 - our names
_SELECT = f"SELECT {_NAMES} FROM shadow ORDER BY id DESC LIMIT ?"  # noqa: S608 - our names
_TRIM = "DELETE FROM shadow WHERE id <= (SELECT max(id) FROM shadow) - ?"


@attrs.define
class ShadowStore:
    """Comparisons in a file. Its methods wait for the disk: call them from a thread.

    Args:
        path: The file; made when something is first kept.
        most: Rows kept; the oldest go first.
    """

    path: Path
    most: int = 10_000
    _connection: sqlite3.Connection | None = attrs.field(init=False, default=None, repr=False)
    _lock: threading.Lock = attrs.field(init=False, factory=threading.Lock, repr=False)

    def add(self, rows: Sequence[ShadowRow]) -> None:
        """Keep some.

        Raises:
            TraceError: if the file cannot be used.
        """
        with self._lock, _told(self.path):
            connection = self._open()
            with connection:
                connection.executemany(_INSERT, [_values(row) for row in rows])
                connection.execute(_TRIM, (self.most,))

    def last(self, limit: int) -> list[ShadowRow]:
        """The newest, newest first.

        Raises:
            TraceError: if there is no such file, or it is something else.
        """
        if not self.path.exists():
            raise TraceError(
                f"there are no comparisons at {self.path}; a gateway keeps them once it mirrors requests (`shadow:`), "
                "or name another file with --store"
            )
        with self._lock, _told(self.path):
            return [
                ShadowRow(**dict(zip(_COLUMNS, row, strict=True))) for row in self._open().execute(_SELECT, (limit,))
            ]

    def close(self) -> None:
        """Close the file; twice is safe."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))  # with its mode, before SQLite makes it
            # Used by one thread at a time, under the lock.
            connection = sqlite3.connect(self.path, timeout=5.0, check_same_thread=False)
            try:
                _prepare(connection, self.path)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    columns = ", ".join(f'"{name}" {_type(name)}' for name in _COLUMNS)
    made = f"CREATE TABLE shadow (id INTEGER PRIMARY KEY AUTOINCREMENT, {columns})"
    make_once(connection, (made, f"PRAGMA application_id = {APPLICATION_ID}", f"PRAGMA user_version = {_VERSION}"))
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if (application, version) != (APPLICATION_ID, _VERSION):
        raise TraceError(f"{path} is not a store of comparisons that this kvfleet reads; name another file")
    use_wal(connection)


def _type(name: str) -> str:
    hint = str(attrs.fields_dict(ShadowRow)[name].type)
    return "TEXT" if hint == "str" else "REAL" if "float" in hint else "INTEGER"


def _values(row: ShadowRow) -> tuple[Any, ...]:
    """A row as SQLite takes it: texts are cut, and half of a surrogate pair is replaced."""
    return tuple(
        value[:_LONGEST].encode(errors="replace").decode() if isinstance(value, str) else value
        for value in attrs.astuple(row)
    )


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise TraceError(f"the comparisons at {path} cannot be used: {error}; name another file") from error


@attrs.frozen(kw_only=True)
class ShadowSummary:
    """How one shadow model did beside one primary: medians of latency, means of the rest, over what was answered."""

    primary: str
    shadow: str
    requests: int
    failed: int
    primary_ms: float | None
    shadow_ms: float | None
    primary_usd: float | None
    shadow_usd: float | None
    primary_tokens: float | None
    shadow_tokens: float | None
    similarity: float | None
    judgement: float | None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return attrs.asdict(self)


def summarise(rows: Sequence[ShadowRow]) -> list[ShadowSummary]:
    """One summary for each pair of models, by name."""
    pairs: dict[tuple[str, str], list[ShadowRow]] = {}
    for row in rows:
        pairs.setdefault((row.primary, row.shadow), []).append(row)
    return [_summary(primary, shadow, found) for (primary, shadow), found in sorted(pairs.items())]


def _summary(primary: str, shadow: str, rows: Sequence[ShadowRow]) -> ShadowSummary:
    answered = [row for row in rows if not row.error]

    def known(name: str) -> list[float]:
        return [value for row in answered if (value := getattr(row, name)) is not None]

    return ShadowSummary(
        primary=primary,
        shadow=shadow,
        requests=len(rows),
        failed=len(rows) - len(answered),
        primary_ms=median(known("primary_ms")),
        shadow_ms=median(known("shadow_ms")),
        **{
            name: mean(known(name))
            for name in (
                "primary_usd",
                "shadow_usd",
                "primary_tokens",
                "shadow_tokens",
                "similarity",
                "judgement",
            )
        },
    )
