"""What all our SQLite files need, whoever keeps them."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable

__all__ = ["make_once", "use_wal"]

_AGAIN_S = 0.005


def make_once(connection: sqlite3.Connection, statements: Iterable[str]) -> None:
    """Run what makes the tables of a new file, in one transaction: nobody else finds half of them, or makes them too.

    Raises:
        sqlite3.Error: if the file cannot be used.
    """
    if _is_made(connection):
        return
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        if not _is_made(connection):
            for statement in statements:
                connection.execute(statement)


def use_wal(connection: sqlite3.Connection, timeout_s: float = 5.0) -> None:
    """Turn on the write-ahead log, waiting for whoever opens the same file at this moment.

    SQLite needs the file for itself to change the journal, and for that it does not wait: of two processes that start
    together one is told at once that the database is locked, whatever the connection's own timeout says.

    Raises:
        sqlite3.Error: if the file is still locked after `timeout_s`, or cannot be used.
    """
    until_s = time.monotonic() + timeout_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or time.monotonic() > until_s:
                raise
            time.sleep(_AGAIN_S)
        else:
            break
    connection.execute("PRAGMA synchronous = NORMAL")


def _is_made(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("PRAGMA schema_version").fetchone()[0])
