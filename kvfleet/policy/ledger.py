"""What was spent, kept over a restart: SQLite, a row for each account and month, written by a thread of its own.

What is booked is added up in memory and written at once or, where bookings come closer than five milliseconds, together
with those that come until then, in one transaction. Reservations are not written one by one. Each process holds a part
of what is left of an account, its *grant*, and lets requests in only under it; a grant is given in a transaction that
sees what everybody spent and holds. So all processes together never reserve more than there is, and a request costs the
file nothing while the grant has room. What is booked leaves the grant in the transaction that adds it to what is spent.

A grant is a lease. A process that dies leaves it behind for a minute at most; what it had booked stays.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from kvfleet.errors import KVFleetError
from kvfleet.policy.budget import Spending
from kvfleet.sqlite import use_wal

__all__ = ["Ask", "Booked", "Ledger", "LedgerError", "Standing", "read_month"]

log = logging.getLogger(__name__)

_VERSION = 1
_MONTHS_KEPT = 24
_WRITE_DELAY_S = 0.005
_LEASE_S = 60.0
_RENEW_S = 15.0
_SPARE = 16
"""A process gets, beyond what it needs, this part of what is left: less and less as the account runs out."""
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
_HELD = (
    "CREATE TABLE IF NOT EXISTS held (account TEXT NOT NULL, month TEXT NOT NULL, holder TEXT NOT NULL, "
    "nano_usd INTEGER NOT NULL, until_s REAL NOT NULL, PRIMARY KEY (account, month, holder)) WITHOUT ROWID"
)
_HOLD = (
    "INSERT INTO held (account, month, holder, nano_usd, until_s) VALUES (?, ?, ?, ?, ?) "
    "ON CONFLICT (account, month, holder) DO UPDATE SET nano_usd = excluded.nano_usd, until_s = excluded.until_s"
)
_USE = "UPDATE held SET nano_usd = max(nano_usd - ?, 0) WHERE account = ? AND month = ? AND holder = ?"
_OWN = "SELECT nano_usd FROM held WHERE account = ? AND month = ? AND holder = ? AND until_s > ?"
_OTHERS = "SELECT coalesce(sum(nano_usd), 0) FROM held WHERE account = ? AND month = ? AND holder != ? AND until_s > ?"
_READ = f"SELECT account, {', '.join(_COLUMNS)} FROM spending WHERE month = ?"  # noqa: S608 - our names

_READ_ONE = f"SELECT {', '.join(_COLUMNS)} FROM spending WHERE account = ? AND month = ?"  # noqa: S608 - our names


class LedgerError(KVFleetError):
    """A ledger that cannot be used; says which file, and what to do."""


@attrs.frozen(kw_only=True)
class Ask:
    """What a process asks to hold of an account in a month, in nanodollars.

    Attributes:
        limit: All there is.
        needed: What it needs to hold, what it holds already included.
        spares: True for a part of what is left beyond that, for the next requests.
    """

    account: str
    month: str
    limit: int
    needed: int
    spares: bool = True


@attrs.frozen(kw_only=True)
class Standing:
    """How an account stands: what everybody has spent, what this process may hold, and what the others hold."""

    spent: Spending
    granted: int
    others: int


Booked = Mapping[tuple[str, str], Spending]
"""What was booked, by account and month."""


def _nobody(booked: Booked) -> None:
    """Told of what was written; who knows of nobody else lets go of whoever was told before."""


@attrs.define
class Ledger:
    """Keeps bookings and grants in a file; `book` and `ask` never wait and never raise.

    Several processes may share the file: bookings are added, never overwritten, and grants never exceed what is there.

    Attributes:
        failed: Transactions that failed.
        written: Told from the writer's thread what was written.
        users: How many have it open; the last one to close it ends it.
    """

    path: Path
    failed: int = attrs.field(init=False, default=0)
    written: Callable[[Booked], None] = attrs.field(init=False, default=_nobody, repr=False)
    users: int = attrs.field(init=False, default=0)
    time_s: Callable[[], float] = attrs.field(default=time.time, kw_only=True, repr=False)
    running_s: Callable[[], float] = attrs.field(default=time.monotonic, kw_only=True, repr=False)
    holder: str = attrs.field(init=False, factory=lambda: uuid.uuid4().hex, repr=False)
    _asked: list[tuple[Ask, Callable[[Standing | None], None]]] = attrs.field(init=False, factory=list, repr=False)
    _renewed_s: float = attrs.field(init=False, default=0.0, repr=False)
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
        self.users += 1
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

    def ask(self, ask: Ask, done: Callable[[Standing | None], None]) -> None:
        """Ask for a grant; `done` is told from the writer's thread, with None if the file could not be used."""
        with self._lock:
            self._asked.append((ask, done))
        self._wake.set()

    def close(self, deadline_s: float = 5.0) -> None:
        """Write what is waiting, give back what is held, and stop, if nobody else uses it. Twice is safe."""
        self.users = max(self.users - 1, 0)
        if self.users:
            return
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stop.set()
        self._wake.set()
        thread.join(deadline_s)
        self.written = _nobody
        if thread.is_alive():
            log.warning("ledger_close_timeout path=%s", self.path)

    def abandon(self) -> None:
        """Stop without waiting for the writer, which has nothing to write: nobody has used this one."""
        self.users, self._thread, self.written = 0, None, _nobody
        self._stop.set()
        self._wake.set()

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(self.path, timeout=5.0, isolation_level=None, check_same_thread=False)
        try:
            _check_version(connection)
            use_wal(connection)
            connection.execute(_SCHEMA)
            connection.execute(_HELD)
            connection.execute("DELETE FROM held WHERE until_s <= ?", (self.time_s(),))
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
            wrote_s = self.running_s()
            while not self._stop.is_set():
                self._wake.wait(_RENEW_S)
                if not self._asked:  # who asks is waiting
                    self._stop.wait(max(wrote_s + _WRITE_DELAY_S - self.running_s(), 0.0))
                self._wake.clear()
                self._write(connection)
                wrote_s = self.running_s()
            self._write(connection)
            with contextlib.suppress(sqlite3.Error):
                connection.execute("DELETE FROM held WHERE holder = ?", (self.holder,))

    def _write(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            batch, self._waiting = self._waiting, {}
            asked, self._asked = self._asked, []
        now_s = self.time_s()
        is_time = now_s - self._renewed_s >= _RENEW_S
        if not batch and not asked and not is_time:
            return
        standings: list[Standing | None] = [None] * len(asked)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(_ADD, [(*key, *attrs.astuple(spent)) for key, spent in batch.items()])
            connection.executemany(_USE, [(spent.nano_usd, *key, self.holder) for key, spent in batch.items()])
            if is_time:
                connection.execute("UPDATE held SET until_s = ? WHERE holder = ?", (now_s + _LEASE_S, self.holder))
            found = [self._grant(connection, ask, now_s) for ask, _ in asked]
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - whatever SQLite's module raises must not end the thread
            with contextlib.suppress(sqlite3.Error):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                self._put_back(batch, error)
            else:  # no file could ever take it, and whoever waits for a grant must not wait for ever
                name = type(error).__name__
                log.error("ledger_lost path=%s bookings=%d error=%s", self.path, len(batch), name)  # noqa: TRY400
                self.failed += 1
        else:
            standings, self._renewed_s = list(found), now_s if is_time else self._renewed_s
            if batch:
                self.written(batch)
        for (_, done), standing in zip(asked, standings, strict=True):
            done(standing)

    def _grant(self, connection: sqlite3.Connection, ask: Ask, now_s: float) -> Standing:
        """Give what is needed, and a part of what is left beyond it, as far as there is room; take nothing in use."""
        key = (ask.account, ask.month)
        others = int(connection.execute(_OTHERS, (*key, self.holder, now_s)).fetchone()[0])
        own = connection.execute(_OWN, (*key, self.holder, now_s)).fetchone()
        row = connection.execute(_READ_ONE, key).fetchone()
        spent = Spending() if row is None else Spending(**dict(zip(_COLUMNS, row, strict=True)))
        room = max(ask.limit - spent.nano_usd - others, 0)
        wanted = ask.needed + (max(room - ask.needed, 0) // _SPARE if ask.spares else 0)
        granted = min(wanted, max(room, own[0] if own else 0))
        connection.execute(_HOLD, (*key, self.holder, granted, now_s + _LEASE_S))
        return Standing(spent=spent, granted=granted, others=others)

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
