"""One limit a minute for several processes: exact while they all ask at once, and when one of them is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvfleet.clock import FrozenClock, SystemClock
from kvfleet.config.schema import BudgetConfig
from kvfleet.policy.budget import Account, Denial, Reservation, Spending, reserve
from kvfleet.policy.shared_minutes import SharedMinutes
from kvfleet.telemetry.minute import Minute

WORKERS = 4
Common = Callable[[int], SharedMinutes]


@pytest.fixture
def common(tmp_path: Path) -> Iterator[Common]:
    """Makes what so many workers share."""
    made: list[SharedMinutes] = []

    def make(workers: int) -> SharedMinutes:
        made.append(SharedMinutes(workers, tmp_path / "lock"))
        return made[-1]

    yield make
    for one in made:
        one.close()


def account(shared: SharedMinutes, worker: int, clock: FrozenClock | None = None, **limits: int) -> Account:
    """The fleet's account as one worker has it."""
    made = Account("fleet", BudgetConfig(enabled=True, **limits), clock or SystemClock())
    made.shared = shared.of("fleet", worker)
    return made


def in_processes(count: int, work: Callable[[int], int]) -> list[int]:
    """What so many processes came to, which ran at the same time."""
    reads, pids = [], []
    for number in range(count):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.write(write, work(number).to_bytes(8))
            finally:
                os._exit(0)
        os.close(write)
        reads.append(read)
        pids.append(pid)
    found = []
    for read, pid in zip(reads, pids, strict=True):
        found.append(int.from_bytes(os.read(read, 8)))
        os.close(read)
        os.waitpid(pid, 0)
    return found


def test_requests_a_minute_are_one_limit_for_all(common: Common) -> None:
    """Of 400 requests a minute four processes get 400 together, however they share them out, and none is refused early."""
    shared = common(WORKERS)

    def work(number: int) -> int:
        own, let_in = account(shared, number, requests_per_minute=400), 0
        for _ in range(400):
            found = reserve([own], 0, 0)
            if isinstance(found, Reservation):
                let_in += 1
                found.settle(Spending(requests=1))
        return let_in

    assert sum(in_processes(WORKERS, work)) == 400


def test_tokens_a_minute_too_and_what_is_not_used_is_given_back(common: Common) -> None:
    """Each asks for ten tokens and uses one: a thousand of them fit into a thousand."""
    shared = common(WORKERS)

    def work(number: int) -> int:
        own, let_in = account(shared, number, tokens_per_minute=1000), 0
        while isinstance(found := reserve([own], 0, 10), Reservation):
            let_in += 1
            found.settle(Spending(requests=1, prompt_tokens=1))
        return let_in

    # At the end each may hold back nine tokens' worth of the others' requests, and no more.
    assert 1000 - 10 * WORKERS < sum(in_processes(WORKERS, work)) <= 1000


def test_who_is_killed_has_asked_and_holds_up_nobody(common: Common) -> None:
    """What a killed process let in counts for its minute; the lock goes with the process that holds it."""
    shared = common(2)
    pid = os.fork()
    if not pid:
        own = account(shared, 1, requests_per_minute=3)
        reserve([own], 0, 0)
        reserve([own], 0, 0)
        with shared.held():
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    other = account(shared, 0, requests_per_minute=3)
    assert isinstance(reserve([other], 0, 0), Reservation)
    assert isinstance(reserve([other], 0, 0), Denial)


def test_a_minute_passes_for_all(common: Common) -> None:
    """After it everybody may ask again, and who is refused is told when."""
    shared, clock = common(2), FrozenClock()
    one, two = (account(shared, number, clock, requests_per_minute=1) for number in range(2))
    assert isinstance(reserve([one], 0, 0), Reservation)
    refused = reserve([two], 0, 0)
    assert isinstance(refused, Denial)
    assert refused.retry_after_s == pytest.approx(61, abs=1)
    clock.advance(refused.retry_after_s or 0)
    assert isinstance(reserve([two], 0, 0), Reservation)


@pytest.mark.parametrize("count", [1, 500])
def test_accounts_are_told_apart(common: Common, count: int) -> None:
    """Each name has a row of its own, the same for every worker."""
    shared = common(2)
    for number in range(count):
        minute = Minute()
        second = minute.add(1000.0, number + 1, 0)
        shared.of(f"tenant/{number}", 0).publish(minute, second)
    found = [shared.of(f"tenant/{number}", 1).everybodys(1000.0).requests for number in range(count)]
    assert found == list(range(1, count + 1))
