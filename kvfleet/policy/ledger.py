"""What was spent, kept over a restart: SQLite, a row for each account and month, written by a thread of its own.

Reservations are not written: they are held for requests of this process, and end with it. What is booked is added up in
memory and written a few times a second, so a crash loses at most the last moment's bookings.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path

import attrs

from kvfleet.errors import KVFleetError
from kvfleet.policy.budget import Spending

__all__ = ["Ledger", "LedgerError", "read_month"]

log = logging.getLogger(__name__)

_VERSION = 1
_MONTHS_KEPT = 24
_WRITE_DELAY_S = 0.2
_COLUMNS = tuple(field.name for field in attrs.fields(Spending))
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS spending (account TEXT NOT NULL, month TEXT NOT NULL, "
    + ", ".join(f"{name} INTEGER NOT NULL DEFAULT 0" for name in _COLUMNS)
    + ", PRIMARY KEY (account, month)) WITHOUT ROWID"
)
_ADD = (
    f"INSERT INTO spending (account, month, {', '.join(_COLUMNS)}) VALUES (?, ?{', ?' * len(_COLUMNS)}) "  # noqa: S608 - our names
    f"ON CONFLICT (account, month) DO UPDATE SET {', '.join(f'{name} = {name} + excluded.{name}' for name in _COLUMNS)}"
)
_READ = f"SELECT account, {', '.join(_COLUMNS)} FROM spending WHERE month = ?"  # noqa: S608 - our names


class LedgerError(KVFleetError):
    """A ledger that cannot be used; says which file, and what to do."""


@attrs.define
class Ledger:
    """Keeps bookings in a file; `book` never waits and never raises.

    Several processes may share the file: bookings are added, never overwritten. Each sees what the others spent when it
    starts, not at once.
    """

    path: Path
    failed: int = attrs.field(init=False, default=0)
    _waiting: dict[tuple[str, str], Spending] = attrs.field(init=False, factory=dict, repr=False)
    _lock: threading.Lock = attrs.field(init=False, factory=threading.Lock, repr=False)
    _wake: threading.Event = attrs.field(init=False, factory=threading.Event, repr=False)
    _stop: threading.Event = attrs.field(init=False, factory=threading.Event, repr=False)
    _thread: threading.Thread | None = attrs.field(init=False, default=None, repr=False)

    def open(self, month: str) -> Mapping[str, Spending]:
        """Make or check the file and start the writer; what each account has spent in that month.

        Raises:
            LedgerError: if the file cannot be used.
        """
        try:
            connection = self._connect()
            found = _rows(connection, month)
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(
                f"the ledger of budgets at {self.path} cannot be used: {error}; move it away, or name another `path`"
            ) from error
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, args=(connection,), name="kvfleet-ledger", daemon=True)
        self._thread.start()
        return found

    def book(self, account: str, month: str, spending: Spending) -> None:
        """Add to what an account spent in a month."""
        with self._lock:
            known = self._waiting.get((account, month))
            self._waiting[account, month] = spending if known is None else known.plus(spending)
        self._wake.set()

    def close(self, deadline_s: float = 5.0) -> None:
        """Write what is waiting, and stop. Twice is safe."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stop.set()
        self._wake.set()
        thread.join(deadline_s)
        if thread.is_alive():
            log.warning("ledger_close_timeout path=%s", self.path)

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(self.path, timeout=5.0, isolation_level=None, check_same_thread=False)
        try:
            _check_version(connection)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(_SCHEMA)
            connection.execute(f"PRAGMA user_version = {_VERSION}")
            connection.execute(
                "DELETE FROM spending WHERE month NOT IN "
                "(SELECT DISTINCT month FROM spending ORDER BY month DESC LIMIT ?)",
                (_MONTHS_KEPT,),
            )
        except BaseException:
            connection.close()
            raise
        return connection

    def _run(self, connection: sqlite3.Connection) -> None:
        with contextlib.closing(connection):
            while not self._stop.is_set():
                self._wake.wait()
                self._stop.wait(_WRITE_DELAY_S)
                self._wake.clear()
                self._write(connection)
            self._write(connection)

    def _write(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            batch, self._waiting = self._waiting, {}
        if not batch:
            return
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(_ADD, [(*key, *attrs.astuple(spent)) for key, spent in batch.items()])
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            self._put_back(batch, error)

    def _put_back(self, batch: Mapping[tuple[str, str], Spending], error: sqlite3.Error) -> None:
        """A failing disk loses nothing while the process lives: it is tried again with the next booking."""
        if not self.failed:
            log.warning("ledger_failed path=%s error=%s", self.path, error)
        self.failed += 1
        with self._lock:
            for key, spent in batch.items():
                known = self._waiting.get(key)
                self._waiting[key] = spent if known is None else known.plus(spent)


def _check_version(connection: sqlite3.Connection) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, _VERSION):
        raise sqlite3.DatabaseError(f"it has version {version}, and this kvfleet reads version {_VERSION}")


def _rows(connection: sqlite3.Connection, month: str) -> dict[str, Spending]:
    return {
        account: Spending(**dict(zip(_COLUMNS, figures, strict=True)))
        for account, *figures in connection.execute(_READ, (month,))
    }


def read_month(path: Path, month: str) -> Mapping[str, Spending]:
    """What each account spent in a month, read without changing the file; empty if there is none.

    Raises:
        LedgerError: if the file is no ledger.
    """
    if not path.exists():
        return {}
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)) as connection:
            return _rows(connection, month)
    except sqlite3.Error as error:
        raise LedgerError(f"{path} is not a ledger of budgets: {error}") from error
