"""What several workers of one gateway let in within the last minute, in memory that they share.

So a limit by the minute is one for all, to the last request. Each worker writes its own counts of an account, second by
second, under a lock, and adds up everybody's when it decides; the lock is the system's, and goes with the process that
holds it. Money is shared between processes by the ledger (`kvfleet.policy.ledger`).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import attrs
import xxhash

from kvfleet.errors import ComponentError
from kvfleet.telemetry.minute import Minute

__all__ = ["SharedMinute", "SharedMinutes"]

_MOST_ACCOUNTS = 4096
_SECONDS = 64
_SLOT = 3 * _SECONDS
_BYTES = 8


class SharedMinutes:
    """The last minute of every account, as all workers have it.

    Make it before the workers are: each inherits the memory. 64-bit whole numbers: for each account whose it is, and
    for each worker a ring of seconds, with the requests and tokens of each.

    Args:
        workers: How many there are.
        lock: A file in which the lock is taken.
    """

    def __init__(self, workers: int, lock: Path) -> None:
        self.workers = workers
        self._row = 1 + workers * _SLOT
        # Pages that nobody touches take no memory.
        self._numbers = memoryview(mmap.mmap(-1, _MOST_ACCOUNTS * self._row * _BYTES)).cast("q")
        self._lock: BinaryIO = lock.open("wb")

    def close(self) -> None:
        """Let go of the lock's file; the memory goes with its last reader."""
        self._lock.close()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else reads or writes within the block, which must not wait for anything."""
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)

    def of(self, account: str, worker: int) -> SharedMinute:
        """An account's minute, as one worker has it.

        Raises:
            ComponentError: if there are too many accounts.
        """
        key = xxhash.xxh3_64_intdigest(account.encode()) >> 1 or 1
        with self.held():
            for step in range(_MOST_ACCOUNTS):
                at = (key + step) % _MOST_ACCOUNTS * self._row
                if self._numbers[at] in (0, key):
                    self._numbers[at] = key
                    return SharedMinute(self, self._numbers[at : at + self._row], worker)
        raise ComponentError(
            f"workers can share {_MOST_ACCOUNTS} budgets, and there are more; use fewer, or one worker"
        )


@attrs.frozen(eq=False)
class SharedMinute:
    """One account's last minute, as one worker has it; all methods are for a block of `SharedMinutes.held`.

    Attributes:
        shared: Whose it is.
    """

    shared: SharedMinutes
    _numbers: memoryview = attrs.field(repr=False)
    _worker: int

    def publish(self, own: Minute, second: int) -> None:
        """Show the others what this worker did in a second."""
        at = self._at(self._worker) + 3 * (second % _SECONDS)
        self._numbers[at : at + 3] = array("q", (second, *own.at(second)))

    def everybodys(self, now_s: float) -> Minute:
        """The last minute of all workers, and of those that were in their places before."""
        found: dict[int, list[int]] = {}
        for worker in range(self.shared.workers):
            ring = self._numbers[self._at(worker) : self._at(worker) + _SLOT].tolist()
            for second, requests, tokens in zip(ring[::3], ring[1::3], ring[2::3], strict=True):
                if requests or tokens:
                    entry = found.setdefault(second, [0, 0])
                    entry[0] += requests
                    entry[1] += tokens
        merged = Minute()
        for second in sorted(found):
            merged.add(second, *found[second])
        merged.trim(now_s)
        return merged

    def _at(self, worker: int) -> int:
        return 1 + worker * _SLOT
