"""What was spent survives a restart."""

from __future__ import annotations

import contextlib
import queue
import sqlite3
from pathlib import Path

import attrs
import pytest

from kvfleet.policy.budget import Spending
from kvfleet.policy.ledger import Ask, Ledger, LedgerError, Standing, read_month

ONE = Spending(nano_usd=5, requests=1, prompt_tokens=10, completion_tokens=2, cached_tokens=4)
MONTH = "2026-11"


def test_bookings_add_up_over_restarts(tmp_path: Path) -> None:
    """By account and month."""
    path = tmp_path / "deep" / "budgets.sqlite"
    for round_ in range(3):
        ledger = Ledger(path)
        found = ledger.open(MONTH)
        assert found.get("tenant/a", Spending()).nano_usd == 10 * round_
        ledger.book("tenant/a", MONTH, ONE)
        ledger.book("tenant/a", MONTH, ONE)
        ledger.book("tenant/a", "2026-10", ONE)
        ledger.close()
        ledger.close()
    assert read_month(path, MONTH) == {"tenant/a": _times(6)}
    assert read_month(path, "2026-10") == {"tenant/a": _times(3)}
    assert path.stat().st_mode & 0o777 == 0o600


def _times(number: int) -> Spending:
    total = Spending()
    for _ in range(number):
        total = total.plus(ONE)
    return total


def test_two_processes_lose_nothing_of_each_other(tmp_path: Path) -> None:
    """Bookings are added, never overwritten."""
    path = tmp_path / "budgets.sqlite"
    first, second = Ledger(path), Ledger(path)
    first.open(MONTH)
    second.open(MONTH)
    for _ in range(10):
        first.book("fleet", MONTH, ONE)
        second.book("fleet", MONTH, ONE)
    first.close()
    second.close()
    assert read_month(path, MONTH) == {"fleet": _times(20)}


def test_old_months_go(tmp_path: Path) -> None:
    """Two years are kept."""
    path = tmp_path / "budgets.sqlite"
    ledger = Ledger(path)
    ledger.open(MONTH)
    for month in [f"{year}-{number:02}" for year in (2023, 2024, 2025) for number in range(1, 13)]:
        ledger.book("fleet", month, ONE)
    ledger.close()
    again = Ledger(path)
    again.open(MONTH)
    again.close()
    assert read_month(path, "2023-12") == {}
    assert read_month(path, "2024-01") == {"fleet": ONE}


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    """By name, with what to do."""
    path = tmp_path / "budgets.sqlite"
    path.write_text("this is no database, and long enough for SQLite to notice" * 20)
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger(path).open(MONTH)
    with pytest.raises(LedgerError, match="is not a ledger"):
        read_month(path, MONTH)
    newer = tmp_path / "newer.sqlite"
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(LedgerError, match="version 9"):
        Ledger(newer).open(MONTH)


def test_no_file_is_an_empty_month(tmp_path: Path) -> None:
    """And reading makes none."""
    assert read_month(tmp_path / "none.sqlite", MONTH) == {}
    assert not (tmp_path / "none.sqlite").exists()


def test_figures_no_file_can_hold_stop_nobody(tmp_path: Path) -> None:
    """They are lost, and it is counted; who asks for a grant afterwards gets one, and what comes later is written."""
    path = tmp_path / "budgets.sqlite"
    ledger = Ledger(path)
    ledger.open(MONTH)
    told: queue.Queue[Standing | None] = queue.Queue()
    ledger.book("fleet", MONTH, attrs.evolve(ONE, nano_usd=2**70))
    ledger.ask(Ask(account="fleet", month=MONTH, limit=1000, needed=10), told.put)
    told.get(timeout=10)
    ledger.book("fleet", MONTH, ONE)
    ledger.ask(Ask(account="fleet", month=MONTH, limit=10**12, needed=10), told.put)
    standing = told.get(timeout=10)
    ledger.close()
    assert standing is not None
    assert (standing.spent, ledger.failed) == (ONE, 1)
    assert read_month(path, MONTH) == {"fleet": ONE}


def test_a_failing_disk_loses_nothing_while_the_process_lives(tmp_path: Path) -> None:
    """What could not be written is written when it can be."""
    path = tmp_path / "budgets.sqlite"
    ledger = Ledger(path)
    ledger.open(MONTH)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("ALTER TABLE spending RENAME TO away")
        ledger.book("fleet", MONTH, ONE)
        ledger.close()
        assert ledger.failed
        other.execute("ALTER TABLE away RENAME TO spending")
    ledger.open(MONTH)
    ledger.book("fleet", MONTH, ONE)
    ledger.close()
    assert read_month(path, MONTH) == {"fleet": _times(2)}
