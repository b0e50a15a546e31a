"""What learned strategies know of each model, and the SQLite file in which it outlives the process."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import anyio.to_thread
import attrs

from kvfleet.clock import Clock, SystemClock
from kvfleet.errors import ComponentError
from kvfleet.sqlite import make_once
from kvfleet.telemetry.metrics import MetricsExporter

__all__ = ["ArmKeeper", "ArmStats", "ArmStore", "HasServices"]

log = logging.getLogger(__name__)

_APPLICATION_ID = 0x6B766172
"""What SQLite keeps in the file's header, so that another program's database is not taken for ours."""
_DECLARED_WEIGHT = 5.0
"""A model's declared quality counts as much as so many ratings."""
_SAVE_EVERY_S = 10.0
_TABLE = (
    "CREATE TABLE arms "
    "(strategy TEXT NOT NULL, model TEXT NOT NULL, known TEXT NOT NULL, PRIMARY KEY (strategy, model)) WITHOUT ROWID"
)


@attrs.define
class ArmStats:
    """The rewards of one model, as a running mean and variance (Welford 1962), which stay exact for any number of them.

    Attributes:
        pulls: Rewards learned.
        mean_reward: Their mean, 0..1.
        m2: Sum of their squared distances from the mean.
        ratings: Ratings received.
        mean_rating: Their mean, 0..1.

    >>> arm = ArmStats()
    >>> arm.add(0.5)
    >>> arm.add(1.0)
    >>> arm.mean_reward, arm.variance
    (0.75, 0.0625)
    """

    pulls: int = 0
    mean_reward: float = 0.0
    m2: float = 0.0
    ratings: int = 0
    mean_rating: float = 0.0

    def add(self, reward: float) -> None:
        """Learn one more reward."""
        self.pulls += 1
        distance = reward - self.mean_reward
        self.mean_reward += distance / self.pulls
        self.m2 += distance * (reward - self.mean_reward)

    def correct(self, before: float, after: float) -> None:
        """Replace one reward that was learned before."""
        old_mean = self.mean_reward
        self.mean_reward += (after - before) / self.pulls
        self.m2 = max(0.0, self.m2 + (after - before) * (after - self.mean_reward + before - old_mean))

    def rate(self, score: float, instead_of: float | None = None) -> None:
        """Learn one more rating, or one instead of an earlier one."""
        if instead_of is None:
            self.ratings += 1
            instead_of = self.mean_rating
        self.mean_rating += (score - instead_of) / self.ratings

    def quality(self, declared: float) -> float:
        """How good its answers are, 0..1: as declared, more and more as rated."""
        known = declared * _DECLARED_WEIGHT + self.mean_rating * self.ratings
        return known / (_DECLARED_WEIGHT + self.ratings)

    @property
    def variance(self) -> float:
        """The rewards' variance."""
        return self.m2 / self.pulls if self.pulls else 0.0


@attrs.frozen
class ArmStore:
    """A SQLite file with a row for each strategy and model. Every call opens it anew, and belongs in a thread."""

    path: Path

    @classmethod
    def of(cls, state_path: str, services: HasServices) -> Self | None:
        """The store at the given path, or the fleet's own in the state directory if that is empty; None without any."""
        if state_path:
            return cls(Path(state_path).expanduser())
        if services.state_dir is None:
            return None
        plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in services.fleet)
        return cls(services.state_dir / f"learned-{plain}.sqlite")

    def load(self, strategy: str) -> dict[str, dict[str, Any]]:
        """What was kept for a strategy, by model; nothing if there is no file.

        Raises:
            ComponentError: if the file is not ours or cannot be read; says what to do.
        """
        if not self.path.exists():
            return {}
        with self._open() as connection:
            rows = connection.execute("SELECT model, known FROM arms WHERE strategy = ?", (strategy,)).fetchall()
        try:
            return {str(model): dict(json.loads(known)) for model, known in rows}
        except (ValueError, TypeError) as error:
            raise self.unusable("a row of it is no JSON object") from error

    def save(self, strategy: str, known: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep this for a strategy, instead of what was kept.

        Raises:
            ComponentError: if the file cannot be written.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Made with its mode before SQLite opens it; its journal takes the file's mode.
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise self.unusable(error.strerror or str(error)) from error
        rows = [(strategy, model, json.dumps(value)) for model, value in known.items()]
        with self._open() as connection:
            connection.execute("DELETE FROM arms WHERE strategy = ?", (strategy,))
            connection.executemany("INSERT INTO arms (strategy, model, known) VALUES (?, ?, ?)", rows)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection with one transaction around what is done with it."""
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=5.0)) as connection:
                self._check(connection)
                with connection:
                    yield connection
        except sqlite3.Error as error:
            raise self.unusable(str(error)) from error

    def _check(self, connection: sqlite3.Connection) -> None:
        make_once(connection, (f"PRAGMA application_id = {_APPLICATION_ID}", _TABLE))
        if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
            raise self.unusable("it is something else")

    def unusable(self, why: str) -> ComponentError:
        """The error for a file that cannot be used; says what to do."""
        return ComponentError(
            f"the state of learned strategies at {self.path} cannot be used: {why}; "
            "name another file under state_path, or move this one away"
        )


class HasServices(Protocol):
    """The part of the services that is used here."""

    @property
    def clock(self) -> Clock:
        """The time."""

    @property
    def metrics(self) -> MetricsExporter:
        """Counters and histograms."""

    @property
    def fleet(self) -> str:
        """The fleet's name."""

    @property
    def state_dir(self) -> Path | None:
        """Where state outlives the process; None for nowhere."""


@attrs.define
class ArmKeeper:
    """Keeps one strategy's state in a store, off the event loop, if there is one.

    Attributes:
        strategy: Its name in the store.
        store: Where; None keeps nothing.
        clock: Tells when it is time to save.
        is_dirty: True if something was learned since the last save.
    """

    strategy: str = ""
    store: ArmStore | None = None
    clock: Clock = attrs.field(factory=SystemClock)
    is_dirty: bool = False
    _saved_s: float = attrs.field(init=False, default=0.0)

    @classmethod
    def of(cls, strategy: str, state_path: str, services: HasServices) -> Self:
        """A keeper at the given path, or in the state directory if that is empty."""
        return cls(strategy, ArmStore.of(state_path, services), services.clock)

    @property
    def is_due(self) -> bool:
        """True if it is time to save."""
        return self.store is not None and self.is_dirty and self.clock.now_s() - self._saved_s >= _SAVE_EVERY_S

    async def load(self) -> dict[str, dict[str, Any]]:
        """What was kept.

        Raises:
            ComponentError: if it cannot be read.
        """
        self._saved_s = self.clock.now_s()
        return {} if self.store is None else await anyio.to_thread.run_sync(self.store.load, self.strategy)

    async def save(self, kept: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep this, if anything was learned; a disk that fails costs the state, never a request."""
        if self.store is None or not self.is_dirty:
            return
        self.is_dirty, self._saved_s = False, self.clock.now_s()
        try:
            await anyio.to_thread.run_sync(self.store.save, self.strategy, kept)
        except ComponentError as error:
            self.is_dirty = True
            log.warning("arms_not_kept strategy=%s error=%s", self.strategy, error)

    def unusable(self, why: str) -> ComponentError:
        """The error for a state that cannot be used."""
        return ComponentError(why) if self.store is None else self.store.unusable(why)
