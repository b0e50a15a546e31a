"""What is known of models, and the file in which it outlives the process."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from kvfleet.clock import FrozenClock
from kvfleet.errors import ComponentError
from kvfleet.router.arms import ArmKeeper, ArmStore

KNOWN = {"": {"epsilon": 0.05}, "small": {"pulls": 3, "mean_reward": 0.5}}


def test_a_file_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    """Reading makes no file."""
    assert ArmStore(tmp_path / "arms.sqlite").load("ucb1") == {}
    assert list(tmp_path.iterdir()) == []


def test_each_strategy_has_its_own_rows(tmp_path: Path) -> None:
    """What one saves replaces what it saved before, and leaves the others' alone."""
    store = ArmStore(tmp_path / "deep" / "arms.sqlite")
    store.save("ucb1", KNOWN)
    store.save("exp3", {"large": {"pulls": 1}})
    store.save("ucb1", {"small": {"pulls": 4}})
    assert store.load("ucb1") == {"small": {"pulls": 4}}
    assert store.load("exp3") == {"large": {"pulls": 1}}


def test_another_program_s_database_is_not_touched(tmp_path: Path) -> None:
    """It is refused with what to do, for reading and for writing."""
    path = tmp_path / "theirs.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    for use in (lambda: ArmStore(path).load("ucb1"), lambda: ArmStore(path).save("ucb1", KNOWN)):
        with pytest.raises(ComponentError, match="cannot be used: it is something else; name another file"):
            use()


def test_a_row_that_is_no_state_is_told(tmp_path: Path) -> None:
    """A broken row is not passed over in silence."""
    store = ArmStore(tmp_path / "arms.sqlite")
    store.save("ucb1", KNOWN)
    with sqlite3.connect(store.path) as connection:
        connection.execute("UPDATE arms SET known = '[1' WHERE model = 'small'")
    connection.close()
    with pytest.raises(ComponentError, match="a row of it is no JSON object"):
        store.load("ucb1")


async def test_a_keeper_saves_what_is_new_and_not_too_often(tmp_path: Path) -> None:
    """It is due when ten seconds have passed and something was learned; saving the same twice writes nothing."""
    clock = FrozenClock()
    keeper = ArmKeeper("ucb1", ArmStore(tmp_path / "arms.sqlite"), clock)
    assert await keeper.load() == {}
    keeper.is_dirty = True
    too_early = keeper.is_due
    clock.advance(10)
    assert (too_early, keeper.is_due) == (False, True)
    await keeper.save(KNOWN)
    assert (keeper.is_due, keeper.is_dirty) == (False, False)
    await keeper.save({})
    assert await keeper.load() == KNOWN


async def test_a_disk_that_fails_costs_no_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and tried again later."""
    (tmp_path / "file").write_text("")
    keeper = ArmKeeper("ucb1", ArmStore(tmp_path / "file" / "arms.sqlite"), is_dirty=True)
    await keeper.save(KNOWN)
    assert keeper.is_dirty
    assert "arms_not_kept strategy=ucb1" in caplog.text
