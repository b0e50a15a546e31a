"""Budgets that several processes share: exact whatever they do at once, and whatever becomes of one of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.adapters.call import Usage
from kvfleet.builtin.budget import BudgetAdmission
from kvfleet.clock import SystemClock
from kvfleet.config.schema import BudgetConfig
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Refusal
from kvfleet.policy.budget import Account, Denial, Spending, month_of, reserve
from kvfleet.policy.grants import Grants
from kvfleet.policy.ledger import Ask, Ledger, Standing, read_month
from tests.builtin.making import context, model, outcome, user

CHEAP = model("cheap", cost_per_1k_input_tokens=1.0, cost_per_1k_output_tokens=1.0)
MONTH = month_of(time.time_ns())
DOLLAR = 1_000_000_000


async def opened(path: Path, **limits: Any) -> BudgetAdmission:
    """One process's budgets, as a running gateway has them."""
    made = BudgetAdmission(path=str(path), budget=BudgetConfig(enabled=True, per_request_max_usd=None, **limits))
    made.provision(Services(clock=SystemClock(), models=(CHEAP,)))
    await made.aopen()
    return made


async def ask(stage: BudgetAdmission, dollars: int = 1) -> Any:
    """A request that may cost so many dollars: its lease, or its refusal."""
    return await stage.admit(context((CHEAP,), [user("")], body={"max_tokens": dollars * 1000}))


def end(lease: Any, dollars: float = 1.0) -> None:
    """It ends, and cost so much."""
    lease.release(outcome(context(), CHEAP, usage=Usage(0, round(dollars * 1000)), cost_usd=dollars))


def left(path: Path) -> float:
    """What was spent, in dollars, as the file tells."""
    return read_month(path, MONTH).get("fleet", Spending()).nano_usd / DOLLAR


async def test_many_at_once_in_two_processes_never_hold_more_than_there_is(tmp_path: Path) -> None:
    """400 requests for a dollar each against 100 dollars: 100 are let in, no more and no fewer, whoever asks first."""
    stages = [await opened(tmp_path / "b.sqlite", monthly_budget_usd=100.0) for _ in range(2)]
    found = await asyncio.gather(*(ask(stages[i % 2]) for i in range(400)))
    leases = [one for one in found if not isinstance(one, Refusal)]
    assert 99 <= len(leases) <= 100
    for lease in leases:
        end(lease)
    for stage in stages:
        await stage.aclose()
    assert left(tmp_path / "b.sqlite") == len(leases)


@pytest.mark.parametrize("real", [0.25, 0.5])
async def test_what_is_given_back_is_there_for_everybody(tmp_path: Path, real: float) -> None:
    """Requests cost less than was held for them: as many are served as the money buys, in whichever process."""
    path = tmp_path / "b.sqlite"
    stages = [await opened(path, monthly_budget_usd=10.0) for _ in range(2)]
    served = 0
    for i in range(200):
        got = await ask(stages[i % 2])
        if isinstance(got, Refusal):
            break
        end(got, real)
        served += 1
    for stage in stages:
        await stage.aclose()
    assert 10 - 1 < served * real <= 10
    assert left(path) == served * real


async def test_what_one_process_holds_and_does_not_use_refuses_nobody(tmp_path: Path) -> None:
    """The first one gets a part of what is left to spare; the second may still spend the last dollar."""
    path = tmp_path / "b.sqlite"
    first, second = [await opened(path, monthly_budget_usd=100.0) for _ in range(2)]
    end(await ask(first))
    for _ in range(99):
        got = await ask(second)
        assert not isinstance(got, Refusal), got
        end(got)
    refused = await ask(second)
    assert (refused.code, refused.status) == ("insufficient_quota", None)
    assert (await ask(first)).code == "insufficient_quota"
    await first.aclose()
    await second.aclose()
    assert left(path) == 100


async def test_within_one_process_a_refusal_is_right_at_once(tmp_path: Path) -> None:
    """Nobody waits for others where there are none."""
    stage = await opened(tmp_path / "b.sqlite", monthly_budget_usd=3.0)
    leases = [await ask(stage) for _ in range(3)]
    async with asyncio.timeout(0.4):  # it would wait for 1.15 s
        assert isinstance(await ask(stage), Refusal)
    end(leases[0], 0.5)
    assert isinstance(await ask(stage), Refusal)
    end(leases[1], 0.5)
    end(await ask(stage))
    end(leases[2])
    await stage.aclose()


async def test_a_reload_keeps_what_is_held(tmp_path: Path) -> None:
    """The successor goes on with the grant, and nothing is counted twice."""
    path = tmp_path / "b.sqlite"
    before = await opened(path, monthly_budget_usd=4.0)
    held = [await ask(before) for _ in range(3)]
    after = await opened(path, monthly_budget_usd=4.0)
    after.inherit(before)
    one = await ask(after)
    assert not isinstance(one, Refusal)
    assert isinstance(await ask(after), Refusal)
    for lease in (*held, one):
        end(lease, 0.5)
    await before.aclose()
    again = await ask(after)
    assert not isinstance(again, Refusal)
    end(again, 1.0)
    await after.aclose()
    assert left(path) == 3.0


def grant(ledger: Ledger, needed: int, *, limit: int = 100) -> Standing:
    """Ask a ledger, and wait for what it says."""
    told: list[Standing | None] = []
    done = threading.Event()

    def say(standing: Standing | None) -> None:
        told.append(standing)
        done.set()

    ledger.ask(Ask(account="fleet", month=MONTH, limit=limit, needed=needed, spares=False), say)
    assert done.wait(5)
    assert told[0] is not None
    return told[0]


def test_the_grant_of_one_that_died_is_free_after_a_minute(tmp_path: Path) -> None:
    """Until then nobody else may have it; what it had booked stays."""
    now = [1000.0]
    path = tmp_path / "b.sqlite"
    dead, other = (Ledger(path, time_s=lambda: now[0]) for _ in range(2))
    dead.open(MONTH)
    other.open(MONTH)
    assert grant(dead, 80).granted == 80
    assert (grant(other, 50).granted, grant(other, 50).others) == (20, 80)
    now[0] += 61
    assert (grant(other, 50).granted, grant(other, 50).others) == (50, 0)
    dead.close()
    other.close()


moves = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["ask", "book", "free"]), st.integers(0, 60)), max_size=40
)


@settings(deadline=None, max_examples=25)
@given(moves)
def test_spent_and_held_never_exceed_the_limit(tmp_path_factory: pytest.TempPathFactory, history: Any) -> None:
    """Three processes that ask, book under what they hold, and give back, in any order."""
    path = tmp_path_factory.mktemp("grants") / "b.sqlite"
    ledgers = [Ledger(path) for _ in range(3)]
    held = [0, 0, 0]
    spent = 0
    for ledger in ledgers:
        ledger.open(MONTH)
    try:
        for who, what, wish in history:
            amount = wish
            if what == "book":
                amount = min(wish, held[who])
                ledgers[who].book("fleet", MONTH, Spending(nano_usd=amount))
                held[who] -= amount
                spent += amount
            else:
                standing = grant(ledgers[who], amount if what == "ask" else 0)
                held[who] = standing.granted
                assert standing.spent.nano_usd + standing.granted + standing.others <= 100
            assert spent + sum(held) <= 100
    finally:
        for ledger in ledgers:
            ledger.close()
    assert read_month(path, MONTH).get("fleet", Spending()).nano_usd == spent


WORKER = """
import asyncio, json, random, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.policy.test_grants import Refusal, ask, end, opened

async def main():
    stage = await opened(Path(sys.argv[1]), monthly_budget_usd=float(sys.argv[4]))
    chance, served = random.Random(int(sys.argv[2])), 0.0
    print("ready", flush=True)

    async def one():
        got = await ask(stage)
        if isinstance(got, Refusal):
            return False
        await asyncio.sleep(chance.random() / 100)
        cost = round(chance.random(), 3)
        end(got, cost)
        print(json.dumps(cost), flush=True)
        return True

    while rounds := await asyncio.to_thread(sys.stdin.readline):
        for _ in range(int(rounds)):
            if not any(await asyncio.gather(*(one() for _ in range(10)))):
                break
    await stage.aclose()

asyncio.run(main())
"""

TO_ITS_END = "1000000\n"


def start(path: Path, seed: int, *, dollars: int = 50) -> subprocess.Popen[str]:
    """A process that spends in rounds of ten requests, as many as it is told to, until there is nothing left."""
    root = str(Path(__file__).parent.parent.parent)
    return subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-c", WORKER, str(path), str(seed), root, str(dollars)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def told(worker: subprocess.Popen[str], text: str) -> None:
    """Give it the next line."""
    assert worker.stdin is not None
    worker.stdin.write(text)
    worker.stdin.flush()


def said(worker: subprocess.Popen[str], lines: int) -> list[str]:
    """Its next lines; fewer where it ends."""
    assert worker.stdout is not None
    return [line for _ in range(lines) if (line := worker.stdout.readline())]


def test_four_processes_spend_a_budget_to_its_end_and_not_beyond(tmp_path: Path) -> None:
    """Each serves ten requests at a time until it is refused; what they say they spent is what the file says."""
    path = tmp_path / "b.sqlite"
    workers = [start(path, seed) for seed in range(4)]
    for worker in workers:
        told(worker, TO_ITS_END)
    spent = 0.0
    for worker in workers:
        out, _ = worker.communicate(timeout=60)
        spent += sum(json.loads(line) for line in out.splitlines()[1:])
        assert worker.returncode == 0
    assert left(path) == pytest.approx(spent, abs=1e-6)
    assert 45 < spent <= 50


def test_a_killed_process_takes_nothing_with_it(tmp_path: Path) -> None:
    """What it had spent is soon in the file, unasked; the others go on, and all stay within the budget."""
    path = tmp_path / "b.sqlite"
    victim, other = start(path, 1, dollars=400), start(path, 2, dollars=400)
    assert said(victim, 1) == ["ready\n"]
    told(victim, "10\n")
    kept = sum(json.loads(line) for line in said(victim, 100))
    until_s = time.monotonic() + 60.0
    while left(path) < kept - 1e-6 and time.monotonic() < until_s:
        time.sleep(0.05)
    assert 0 < kept <= left(path) + 1e-6
    told(victim, TO_ITS_END)
    told(other, TO_ITS_END)
    said(victim, 20)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate(timeout=10)
    out, _ = other.communicate(timeout=120)
    spent = sum(json.loads(line) for line in out.splitlines()[1:])
    assert spent + kept - 1e-6 <= left(path) <= 400


@attrs.define
class SlowLedger:
    """A ledger that answers when it is told to."""

    asked: list[tuple[Ask, Any]] = attrs.field(factory=list)
    written: Any = None

    def ask(self, ask: Ask, done: Any) -> None:
        self.asked.append((ask, done))

    def say(self, granted: int) -> None:
        """Answer the last that was asked."""
        self.asked[-1][1](Standing(spent=Spending(), granted=granted, others=0))


async def test_what_was_granted_for_one_and_taken_by_another_is_asked_for_again() -> None:
    """One that comes between a grant and its use may have it, and the first one is not refused for that."""
    account = Account("fleet", BudgetConfig(enabled=True, monthly_budget_usd=100.0), SystemClock())
    account.granted = 0
    ledger = SlowLedger()
    grants = Grants(ledger, {account.name: account})  # type: ignore[arg-type]
    first = asyncio.create_task(grants.obtain([account], 5))
    await asyncio.sleep(0)
    ledger.say(5)
    while account.granted == 0:  # noqa: ASYNC110 - nobody announces it
        await asyncio.sleep(0)
    assert not isinstance(reserve([account], 3, 0), Denial)
    for _ in range(5):
        await asyncio.sleep(0)
    assert [ask.needed for ask, _ in ledger.asked] == [5, 8]
    ledger.say(8)
    await asyncio.wait_for(first, 5)
    assert not isinstance(reserve([account], 5, 0), Denial)


class Dumb(Ledger):
    """A ledger that never answers."""

    def ask(self, ask: Ask, done: Any) -> None:
        """Hear, and say nothing."""


async def test_a_ledger_that_never_answers_stops_nobody(tmp_path: Path) -> None:
    """After a while requests are let in by what this process knows, also those that waited behind the first."""
    account = Account(name="fleet", config=BudgetConfig(enabled=True, monthly_budget_usd=5), clock=SystemClock())
    account.granted = 0
    grants = Grants(Dumb(tmp_path / "budgets.sqlite"), {"fleet": account}, answer_s=0.01)
    async with asyncio.timeout(10):
        await asyncio.gather(*(grants.obtain([account], DOLLAR) for _ in range(3)))
    assert not account.lacks(DOLLAR)
    assert isinstance(reserve((account,), 9 * DOLLAR, 0), Denial)
