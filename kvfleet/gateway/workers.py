"""Several processes behind one port: who starts them, starts them again, and passes signals on.

The listening sockets are made once, by the supervisor, one for each worker, and inherited: the system shares
connections out among them, and a worker that dies takes none of those with it that it has not accepted, because the
others stand in for it. What the workers know in common, and how, is in ``docs/how-to/operate.md``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs

from kvfleet.errors import KVFleetError
from kvfleet.policy.shared_minutes import SharedMinute, SharedMinutes

__all__ = ["Seat", "Supervisor"]

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 10.0
_STEADY_S = 30.0
"""A worker that lived so long is started again at once, whatever happened before."""
_STOPPING = "stopping"
"""A file in the workers' folder, there once all are to stop."""
_NOT_STARTED = 70
"""The exit status of a worker that could not begin to serve, after it has said why."""


@attrs.frozen(eq=False)
class Seat:
    """A worker's place among the others.

    Attributes:
        number: Which, from 0.
        count: How many there are.
        folder: Where the workers' own sockets are, for this user alone.
        news: By number: where each worker is told what the others do.
        tells: By number: what is sent there arrives at that worker.
        minutes: What all workers let in within the last minute.
        leash: Reads as ended when the supervisor is gone.
        starts: How often a worker was started in this place.
    """

    number: int
    count: int
    folder: Path
    news: Sequence[socket.socket]
    tells: Sequence[socket.socket]
    minutes: SharedMinutes
    leash: int
    starts: int = 1

    @property
    def others(self) -> Sequence[int]:
        """The numbers of the other workers."""
        return [number for number in range(self.count) if number != self.number]

    def minute(self, account: str) -> SharedMinute:
        """The last minute of an account, as all workers have it."""
        return self.minutes.of(account, self.number)

    def is_everybody_stopping(self) -> bool:
        """True once the supervisor stops all workers, and not this one alone was told to."""
        return (self.folder / _STOPPING).exists()

    def path(self, number: int) -> Path:
        """Where a worker is asked by the others."""
        return self.folder / f"worker-{number}.sock"


@attrs.define
class _Child:
    """One place, and who has it."""

    number: int
    pid: int = 0
    started_s: float = 0.0
    starts: int = 0
    failures: int = 0
    again_s: float = 0.0


@attrs.define(eq=False)
class Supervisor:
    """Runs workers until it is told to stop; returns when the last one has ended.

    A worker that ends by itself is started again, after a wait that doubles as long as they end soon. SIGTERM and
    SIGINT go to all; the doors are closed here first, so that they are closed when the last worker closes its own.
    SIGHUP goes to one, which tells the others if the file is good.

    Args:
        count: How many workers.
        sockets: What they listen on.
        work: What a worker does; it gets its place, and its return or failure ends the process.
        clock_s: The time, in seconds.
    """

    count: int
    sockets: Sequence[socket.socket]
    work: Callable[[Seat], None]
    clock_s: Callable[[], float] = time.monotonic
    _children: list[_Child] = attrs.field(init=False, factory=list)
    _is_stopping: bool = attrs.field(init=False, default=False)
    _has_failed: bool = attrs.field(init=False, default=False)
    _held: int = attrs.field(init=False, default=-1)
    _folder: Path | None = attrs.field(init=False, default=None)

    def run(self) -> None:
        """Do so. Call it while the process has one thread and no event loop.

        Raises:
            SystemExit: with status 1, if a worker cannot start at all.
        """
        self._children = [_Child(number) for number in range(self.count)]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            with self._seats() as seat_of:
                self._loop(seat_of)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self._has_failed:
            sys.exit(1)

    @contextlib.contextmanager
    def _seats(self) -> Iterator[Callable[[_Child], Seat]]:
        folder = Path(tempfile.mkdtemp(prefix="kvfleet-"))  # for this user alone
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(self.count)]
        minutes = SharedMinutes(self.count, folder / "minutes.lock")
        leash, held = os.pipe()
        for pair in pairs:
            for one in pair:
                one.setblocking(False)

        def seat_of(child: _Child) -> Seat:
            news, tells = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            return Seat(child.number, self.count, folder, news, tells, minutes, leash, child.starts)

        self._held, self._folder = held, folder
        try:
            yield seat_of
        finally:
            for pair in pairs:
                for one in pair:
                    one.close()
            minutes.close()
            os.close(leash)
            os.close(held)
            shutil.rmtree(folder, ignore_errors=True)

    def _loop(self, seat_of: Callable[[_Child], Seat]) -> None:
        for child in self._children:
            self._start(child, seat_of)
        while any(child.pid or (child.again_s and not self._is_stopping) for child in self._children):
            waits = [child.again_s - self.clock_s() for child in self._children if child.again_s and not child.pid]
            told = signal.sigtimedwait(_SIGNALS, max(min(waits, default=3600.0), 0.0))
            if told is not None and told.si_signo in (signal.SIGTERM, signal.SIGINT):
                self._stop(signal.Signals(told.si_signo))
            elif told is not None and told.si_signo == signal.SIGHUP:
                self._reload()
            self._bury()
            if not self._is_stopping:
                for child in self._children:
                    if not child.pid and child.again_s <= self.clock_s():
                        self._start(child, seat_of)

    def _start(self, child: _Child, seat_of: Callable[[_Child], Seat]) -> None:
        child.starts += 1
        child.again_s, child.started_s = 0.0, self.clock_s()
        seat = seat_of(child)
        pid = os.fork()
        if pid:
            child.pid = pid
            return
        os.close(self._held)
        os.setpgrp()  # a terminal's Ctrl-C is for the supervisor, which passes it on once
        os._exit(_life_of(self.work, seat))

    def _stop(self, what: signal.Signals) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            if self._folder is not None:
                (self._folder / _STOPPING).touch()
            for one in self.sockets:
                one.close()
        for child in self._children:
            if child.pid:
                os.kill(child.pid, what)

    def _reload(self) -> None:
        first = next((child for child in self._children if child.pid), None)
        if first is not None:
            os.kill(first.pid, signal.SIGHUP)

    def _bury(self) -> None:
        """See who has ended, and when they are to be started again."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            child = next((one for one in self._children if one.pid == pid), None)
            if child is not None:
                self._ended(child, os.waitstatus_to_exitcode(status))

    def _ended(self, child: _Child, code: int) -> None:
        pid, child.pid = child.pid, 0
        if self._is_stopping:
            return
        if code == _NOT_STARTED and child.starts == 1:
            # It would not start a second time either, and has said why.
            self._has_failed = True
            self._stop(signal.SIGTERM)
            return
        lived_s = self.clock_s() - child.started_s
        child.failures = 0 if lived_s > _STEADY_S else child.failures + 1
        wait_s = min(_FIRST_WAIT_S * 2 ** max(child.failures - 1, 0), _LONGEST_WAIT_S) if child.failures else 0.0
        child.again_s = self.clock_s() + wait_s
        _log.error("worker ended number=%d pid=%d status=%d %s", child.number, pid, code, _again(wait_s))


def _again(wait_s: float) -> str:
    """When a worker is started again, for the log.

    >>> _again(0.2), _again(0.0)
    ('again_in_s=0.2', 'again=at_once')
    """
    return f"again_in_s={wait_s:.1f}" if wait_s else "again=at_once"


def _life_of(work: Callable[[Seat], None], seat: Seat) -> int:
    """What a worker's process does, and its exit status."""
    for one in _SIGNALS:
        signal.signal(one, signal.SIG_IGN if one is signal.SIGHUP else signal.SIG_DFL)  # until somebody obeys
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        work(seat)
    except (KVFleetError, OSError) as error:
        print(error, file=sys.stderr)  # noqa: T201 - the process ends here, and says why
        return 1 if seat.path(seat.number).exists() else _NOT_STARTED
    except BaseException:  # noqa: BLE001 - the process ends here, and says why
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
