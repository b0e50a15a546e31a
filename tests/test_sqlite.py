"""A file that several processes open at the same moment."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvfleet.sqlite import make_once, use_wal


@contextlib.contextmanager
def connected(path: Path, **options: float) -> Iterator[sqlite3.Connection]:
    """A connection of its own."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False, **options)) as one:
        yield one


def test_it_waits_for_whoever_writes(tmp_path: Path) -> None:
    """SQLite itself would say at once that the file is locked."""
    path = tmp_path / "a.sqlite"
    with connected(path) as writer, connected(path, timeout=5.0) as other:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("CREATE TABLE a (b)")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("PRAGMA journal_mode = WAL")
        began = time.monotonic()
        threading.Timer(0.05, lambda: writer.execute("COMMIT")).start()
        use_wal(other)
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert time.monotonic() - began >= 0.05


def test_it_does_not_wait_for_ever(tmp_path: Path) -> None:
    """A file that stays locked is an error."""
    path = tmp_path / "a.sqlite"
    with connected(path) as writer, connected(path) as other:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("CREATE TABLE a (b)")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            use_wal(other, timeout_s=0.02)


def test_a_file_that_is_none_is_an_error_at_once(tmp_path: Path) -> None:
    """Only a lock is worth waiting for."""
    path = tmp_path / "a.sqlite"
    path.write_text("this is no database, however often one looks" * 99)
    with connected(path) as one, pytest.raises(sqlite3.DatabaseError, match="not a database"):
        use_wal(one)


def test_tables_are_made_once(tmp_path: Path) -> None:
    """Of many that open a new file together one makes it, and all find it whole."""
    path, barrier = tmp_path / "a.sqlite", threading.Barrier(8)

    def open_it() -> list[int]:
        with connected(path, timeout=20.0) as one:
            barrier.wait()
            make_once(one, ("CREATE TABLE a (b)", "INSERT INTO a VALUES (7)", "PRAGMA user_version = 3"))
            use_wal(one, timeout_s=20.0)
            return [one.execute("SELECT sum(b) FROM a").fetchone()[0], one.execute("PRAGMA user_version").fetchone()[0]]

    with ThreadPoolExecutor(8) as pool:
        found = [task.result() for task in [pool.submit(open_it) for _ in range(8)]]
    assert found == [[7, 3]] * 8


def test_what_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    """Half of the tables would be taken for the whole by the next."""
    with connected(tmp_path / "a.sqlite") as one:
        with pytest.raises(sqlite3.OperationalError):
            make_once(one, ("CREATE TABLE a (b)", "CREATE NONSENSE"))
        assert one.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
