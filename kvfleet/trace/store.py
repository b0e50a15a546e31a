"""The local store of traces: SQLite, bounded by size and age, written by a thread of its own.

The route's only part in it is `TraceStore.write`, which appends to a bounded queue: 0.2 µs (`benchmarks/trace.py`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import anyio
import attrs

from kvfleet.clock import Clock, SystemClock
from kvfleet.config.findings import Finding
from kvfleet.config.schema import TraceStoreConfig
from kvfleet.errors import ConfigError, TraceError
from kvfleet.sqlite import make_once, use_wal
from kvfleet.trace.rows import APPLICATION_ID, SCHEMA, VERSION, default_path, pack
from kvfleet.trace.segments import Packer
from kvfleet.trace.spans import Span, Trace

__all__ = ["TraceStore", "connect"]

log = logging.getLogger(__name__)

_LEAST_BYTES = 1_000_000
_PAGE_BYTES = 4096
_QUEUE_LENGTH = 2048
_BATCH_DELAY_S = 0.1
_BATCH_LENGTH = 256
_PRUNE_AT_ONCE = 8
_GREATEST = 2**63 - 1
_AGE_CHECK_S = 60.0
_INSERT = "INSERT INTO segments (last, count, newest_ns, body) VALUES (?, ?, ?, ?)"
_INSERT_LATE = "INSERT INTO late (last, trace_id, span_id, body) VALUES (?, ?, ?, ?)"


@attrs.frozen
class _Late:
    """A span of a trace that was handed over before."""

    trace: Trace
    span: Span


@attrs.define
class _Batch:
    """What is written at once: traces, of which the newest began then, and spans of earlier ones, packed."""

    packer: Packer = attrs.field(factory=Packer)
    newest_ns: int = 0
    late: list[tuple[str, str, bytes]] = attrs.field(factory=list)

    def add(self, one: Trace | _Late, most: int) -> None:
        """Take one more; see `Packer.add`."""
        if isinstance(one, _Late):
            body = pack(Trace(one.trace.trace_id, [one.span]))
            self.late.append((one.trace.trace_id, one.trace.route.span_id, body))
        else:
            self.packer.add(one, most)
            self.newest_ns = max(self.newest_ns, one.route.start_ns)

    def __len__(self) -> int:
        return self.packer.count + len(self.late)


@attrs.define
class TraceStore:
    """Keeps finished traces for `kvfleet trace`; a `TraceSink`.

    Attributes:
        path: The SQLite file; made with its directory, readable by its owner alone.
        max_bytes: Largest size of the file and its write-ahead log, at least a megabyte; the oldest traces go first.
        max_age_s: Oldest trace kept; older ones go when others come.
    """

    path: Path
    max_bytes: int = attrs.field(default=256 * 1024 * 1024, validator=attrs.validators.ge(_LEAST_BYTES))
    max_age_s: float = 7 * 24 * 3600.0
    clock: Clock = attrs.field(factory=SystemClock)
    _refused: int = attrs.field(init=False, default=0)
    _failed: int = attrs.field(init=False, default=0)
    _queue: deque[Trace | _Late | threading.Event] = attrs.field(init=False, factory=deque)
    _wake: threading.Event = attrs.field(init=False, factory=threading.Event)
    _stop: threading.Event = attrs.field(init=False, factory=threading.Event)
    _thread: threading.Thread | None = attrs.field(init=False, default=None)
    _next_age_check_s: float = attrs.field(init=False, default=0.0)
    _has_warned: bool = attrs.field(init=False, default=False)

    @classmethod
    def from_config(cls, config: TraceStoreConfig, environ: Mapping[str, str]) -> Self:
        """The store that a ``telemetry.trace_store:`` section asks for.

        Raises:
            ConfigError: if it asks for less than a megabyte.
        """
        max_bytes = round(config.max_megabytes * 1e6)
        if max_bytes < _LEAST_BYTES:
            path = ("telemetry", "trace_store", "max_megabytes")
            raise ConfigError([Finding("must be at least 1", f"not {config.max_megabytes:g}", path, code="range")])
        where = Path(config.path).expanduser() if config.path else default_path(environ)
        return cls(where, max_bytes=max_bytes, max_age_s=config.max_age_days * 24 * 3600.0)

    @property
    def dropped(self) -> int:
        """Traces that could not be kept: the queue was full, the disk failed, or one alone was too large."""
        return self._refused + self._failed  # two counters, because two threads count

    def open(self) -> None:
        """Make or check the file, and start the writer.

        Raises:
            TraceError: if the file cannot be used.
        """
        if self._thread is not None:
            return
        with _as_trace_error(self.path):
            connection = self._prepare()
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, args=(connection,), name="kvfleet-trace-store", daemon=True)
        self._thread.start()

    def write(self, trace: Trace) -> None:
        """Keep a finished trace, which must not be changed any more, but for `amend`. Never blocks, never raises."""
        queue = self._queue
        if len(queue) >= _QUEUE_LENGTH or self._thread is None:
            self._refused += 1
            return
        queue.append(trace)
        if not self._wake.is_set():
            self._wake.set()

    def amend(self, trace: Trace, span: Span) -> None:
        """Keep one more span of a trace that was handed over before. Never blocks, never raises."""
        if len(self._queue) < _QUEUE_LENGTH and self._thread is not None:
            self._queue.append(_Late(trace, span))
            self._wake.set()

    def flush(self, deadline_s: float = 5.0) -> bool:
        """Wait until everything handed over so far is in the file; False if that took too long."""
        if self._thread is None:
            return not self._queue
        reached = threading.Event()
        self._queue.append(reached)
        self._wake.set()
        return reached.wait(deadline_s)

    def close(self, deadline_s: float = 5.0) -> None:
        """Write what is waiting and stop, within so many seconds. Twice is safe."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stop.set()
        self._wake.set()
        thread.join(deadline_s)
        if thread.is_alive():
            log.warning("trace_store_close_timeout path=%s waiting=%d", self.path, len(self._queue))

    async def aclose(self, deadline_s: float = 5.0) -> None:
        """`close`, without holding up the event loop."""
        await anyio.to_thread.run_sync(self.close, deadline_s)

    # The writer's thread ---------------------------------------------------------------------------------------------

    def _run(self, connection: sqlite3.Connection) -> None:
        with contextlib.closing(connection):
            while not (self._stop.is_set() and not self._queue):
                self._wake.wait()
                self._stop.wait(_BATCH_DELAY_S)  # let a batch gather; a stop ends the wait
                self._wake.clear()
                self._drain(connection)

    def _drain(self, connection: sqlite3.Connection) -> None:
        """Write everything in the queue. A failing disk costs traces, never the thread."""
        while self._queue:
            batch = self._take()
            if not batch:
                continue
            try:
                self._keep(connection, batch)
            except Exception as error:  # noqa: BLE001 - whatever SQLite's module raises must not end the thread
                self._lost(batch.packer.count, error)
        try:
            self._prune_by_age(connection)
        except sqlite3.Error as error:
            self._lost(0, error)

    def _take(self) -> _Batch:
        """The next traces and late spans; none beyond a waiting `flush`."""
        batch, most = _Batch(), self._transaction_bytes
        while self._queue and len(batch) < _BATCH_LENGTH and batch.packer.size < most:
            if isinstance(self._queue[0], threading.Event) and batch:
                break
            one = self._queue.popleft()
            if isinstance(one, threading.Event):
                one.set()
                continue
            try:
                batch.add(one, most)
            except Exception as error:  # noqa: BLE001 - a record that cannot be packed must not end the thread
                self._lost(0 if isinstance(one, _Late) else 1, error)
        return batch

    def _lost(self, number: int, error: Exception) -> None:
        self._failed += number
        # Once: a disk that is full fails ten times a second. The count goes on as a metric.
        if not self._has_warned:
            self._has_warned = True
            log.warning("trace_store_failed path=%s lost=%d error=%s", self.path, number, error)

    def _keep(self, connection: sqlite3.Connection, batch: _Batch) -> None:
        body = batch.packer.done() if batch.packer.count else b""
        size = len(body) + sum(len(one) for _, _, one in batch.late)
        self._prune_by_size(connection, coming=size)
        try:
            _insert(connection, batch, body)
        except sqlite3.OperationalError:
            # The file has reached its hard limit: fragments that the estimate did not see.
            _prune_oldest(connection, 2 * size)
            _insert(connection, batch, body)

    def _prune_by_size(self, connection: sqlite3.Connection, coming: int) -> None:
        # Pages are not filled to the brim.
        room = self._file_bytes * 0.9 - coming * 1.5
        while (missing := _used_bytes(connection) - room) > 0 and _prune_oldest(connection, missing):
            pass

    def _prune_by_age(self, connection: sqlite3.Connection) -> None:
        if self.clock.now_s() < self._next_age_check_s:
            return
        self._next_age_check_s = self.clock.now_s() + _AGE_CHECK_S
        oldest_ns = self.clock.time_ns() - round(self.max_age_s * 1e9)
        kept = "SELECT last FROM segments WHERE newest_ns >= ? ORDER BY last LIMIT 1"
        row = connection.execute(kept, (oldest_ns,)).fetchone()
        end = row[0] - 1 if row else _GREATEST
        while _prune_oldest(connection, math.inf, end):
            pass

    @property
    def _log_bytes(self) -> int:
        """Size at which the write-ahead log goes into the file and starts anew."""
        return min(4 * 1024 * 1024, self.max_bytes // 8)

    @property
    def _transaction_bytes(self) -> int:
        return self._log_bytes // 2

    @property
    def _file_bytes(self) -> int:
        """What the file itself may take: the log may outgrow its mark by one transaction, and has an index."""
        return self.max_bytes - 2 * self._log_bytes - 64 * 1024

    def _prepare(self) -> sqlite3.Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Made with its mode before SQLite opens it; the log and its index take the file's mode.
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        self.path.chmod(0o600)
        connection = connect(self.path, must_exist=False)
        connection.execute(f"PRAGMA wal_autocheckpoint = {self._log_bytes // _PAGE_BYTES}")
        connection.execute(f"PRAGMA journal_size_limit = {self._log_bytes}")
        self._prune_by_age(connection)
        self._prune_by_size(connection, coming=0)
        self._shrink(connection)
        connection.execute(f"PRAGMA max_page_count = {self._file_bytes // _PAGE_BYTES}")
        return connection

    def _shrink(self, connection: sqlite3.Connection) -> None:
        """Give pages back if the file is larger than it may be now; a few at a time, for the log's sake."""
        while _pragma(connection, "page_count") * _PAGE_BYTES > self._file_bytes:
            if not _pragma(connection, "freelist_count"):
                return
            connection.execute("PRAGMA incremental_vacuum(256)").fetchall()


def connect(path: Path, *, must_exist: bool = True) -> sqlite3.Connection:
    """Open a store, and make sure that it is one.

    Raises:
        TraceError: if there is none, or the file is something else.
    """
    if must_exist and not path.exists():
        raise TraceError(
            f"there is no trace store at {path}; `kvfleet run` keeps traces by default: "
            "send it a request first, or name another store with --store, or an OTLP JSON file"
        )
    with _as_trace_error(path):
        # The writer's connection is made by one thread and used by another, never by two at once.
        connection = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
        try:
            _check(connection, path, make=not must_exist)
        except BaseException:
            connection.close()
            raise
        return connection


def _check(connection: sqlite3.Connection, path: Path, *, make: bool) -> None:
    if make:
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        make_once(connection, SCHEMA)
    version, application = _pragma(connection, "user_version"), _pragma(connection, "application_id")
    if application != APPLICATION_ID:
        raise TraceError(f"{path} is not a trace store; name another file")
    if version != VERSION:
        raise TraceError(
            f"the trace store at {path} has version {version}, and this kvfleet reads version {VERSION}; "
            "use the kvfleet that wrote it, or move the file away"
        )
    if make:
        use_wal(connection)


@contextlib.contextmanager
def _as_trace_error(path: Path) -> Iterator[None]:
    remedy = "name another file, or turn telemetry.trace_store off"
    try:
        yield
    except sqlite3.Error as error:
        raise TraceError(f"the trace store at {path} cannot be used: {error}; move it away, {remedy}") from error
    except OSError as error:
        raise TraceError(f"the trace store at {path} cannot be used: {error.strerror or error}; {remedy}") from error


def _insert(connection: sqlite3.Connection, batch: _Batch, body: bytes) -> None:
    """Add a segment; its traces get the next numbers, and no number is given twice. Late spans get the last one."""
    count = batch.packer.count
    with _transaction(connection):
        row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'segments'").fetchone()
        last = (row[0] if row else 0) + count
        if count:
            connection.execute(_INSERT, (last, count, batch.newest_ns, body))
        connection.executemany(_INSERT_LATE, [(last, *one) for one in batch.late])


def _prune_oldest(connection: sqlite3.Connection, missing: float, end: int = _GREATEST) -> int:
    """Delete the oldest segments, at most a few of them and none beyond `end`, to free so many bytes; how many."""
    oldest = "SELECT last, length(body) FROM segments WHERE last <= ? ORDER BY last LIMIT ?"
    last = freed = 0
    for one, size in connection.execute(oldest, (end, _PRUNE_AT_ONCE)).fetchall():
        last, freed = one, freed + size
        if freed >= missing:
            break
    with _transaction(connection):
        connection.execute("DELETE FROM late WHERE last <= ?", (last,))
        return connection.execute("DELETE FROM segments WHERE last <= ?", (last,)).rowcount


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _used_bytes(connection: sqlite3.Connection) -> int:
    return (_pragma(connection, "page_count") - _pragma(connection, "freelist_count")) * _PAGE_BYTES


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
