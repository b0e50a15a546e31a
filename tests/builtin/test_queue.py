"""Admission to a fleet that has no room."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import attrs
import pytest

from kvfleet.adapters.base import EngineLoad
from kvfleet.adapters.call import Usage
from kvfleet.builtin.queue import QueueAdmission
from kvfleet.clock import FrozenClock
from kvfleet.config.overload import TenantShare
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import Fault
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Lease, Refusal, RoutingContext
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.reservations import Reservation, Work
from kvfleet.trace import names
from tests.builtin.making import context, model, outcome, user

A, B = model("m", "http://a"), model("m", "http://b")
HEADER = "X-KVFleet-Priority"


@attrs.define
class Fleet:
    """A queue before two replicas, and what happens at these."""

    queue: QueueAdmission
    clock: FrozenClock
    load: FleetLoad
    health: HealthManager
    metrics: Any

    @classmethod
    def of(cls, **options: Any) -> Fleet:
        clock = FrozenClock()
        services = Services(clock=clock, models=(A, B), health=HealthManager(clock=clock), load=FleetLoad(clock))
        queue = QueueAdmission(**options)
        queue.provision(services)
        return cls(queue, clock, services.load, services.health, services.metrics)

    def ctx(self, tenant: str = "", *, priority: str = "", **more: Any) -> RoutingContext:
        """A request."""
        headers = {HEADER.lower(): priority} if priority else {}
        return context(
            more.pop("candidates", (A, B)),
            [user("Hi")],
            tenant=tenant,
            now_s=self.clock.now_s(),
            condition_headers=headers,
            **more,
        )

    def ask(self, tenant: str = "", **more: Any) -> asyncio.Task[Lease | Refusal]:
        """A request that asks for a place."""
        return asyncio.ensure_future(self.queue.admit(self.ctx(tenant, **more)))

    async def asked(self, tenant: str = "", **more: Any) -> asyncio.Task[Lease | Refusal]:
        """The same, once it has its place, its refusal, or waits."""
        task = self.ask(tenant, **more)
        await settle()
        return task

    def end(self, lease: Lease | Refusal, after_s: float = 1.0, **more: Any) -> None:
        """A request ends."""
        assert not isinstance(lease, Refusal)
        self.clock.advance(after_s)
        waited_s = getattr(lease, "waited_s", 0.0)
        lease.release(outcome(self.ctx(), None, duration_s=waited_s + after_s, **more))

    def count(self, reason: str) -> float:
        """How many were refused for a reason."""
        name = "kvfleet_queue_refusals_total"
        return float(self.metrics.registry.get_sample_value(name, {"reason": reason}) or 0)


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


def place(task: asyncio.Task[Lease | Refusal]) -> Any:
    """The place that a task got."""
    got = task.result()
    assert not isinstance(got, Refusal), got
    return got


def refusal(task: asyncio.Task[Lease | Refusal]) -> Refusal:
    """The refusal that a task got."""
    got = task.result()
    assert isinstance(got, Refusal)
    return got


async def test_with_room_nobody_waits_and_the_trace_says_nothing() -> None:
    """A place at once."""
    fleet = Fleet.of(max_in_flight=2)
    first, second = await fleet.asked(), await fleet.asked()
    assert (place(first).waited_s, dict(place(second).attributes)) == (0.0, {})
    assert fleet.queue.state()["in_flight"] == 2


async def test_one_too_many_waits_and_gets_the_place_that_becomes_free() -> None:
    """Its wait is told, in seconds, with how many were before it."""
    fleet = Fleet.of(max_in_flight=1)
    first, second, third = await fleet.asked(), await fleet.asked(), await fleet.asked()
    assert (second.done(), third.done()) == (False, False)
    fleet.end(place(first), 2.0)
    await settle()
    assert place(second).waited_s == 2.0
    assert dict(place(second).attributes) == {names.QUEUE_WAIT_S: 2.0, names.QUEUE_AHEAD: 0.0, names.PRIORITY: 0}
    assert not third.done()
    fleet.end(place(second), 3.0)
    await settle()
    assert dict(place(third).attributes)[names.QUEUE_WAIT_S] == 5.0
    assert fleet.metrics.registry.get_sample_value("kvfleet_queue_wait_seconds_sum", {"priority": "0"}) == 7.0


async def test_a_place_is_given_back_once() -> None:
    """Releasing twice lets in one, not two."""
    fleet = Fleet.of(max_in_flight=1)
    first, second, third = await fleet.asked(), await fleet.asked(), await fleet.asked()
    fleet.end(place(first))
    fleet.end(place(first))
    await settle()
    assert (second.done(), third.done()) == (True, False)
    third.cancel()


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    """By the rate at which places become free: each of the two is used for 10 s, so one is free every 5 s."""
    fleet = Fleet.of(max_in_flight=2, max_queue=1, max_wait_ms=60_000)
    fleet.end(place(await fleet.asked()), 10.0)
    held = [await fleet.asked() for _ in range(3)]
    said = [refusal(await fleet.asked()) for _ in range(2)]
    assert [one.retry_after_s for one in said] == [10.0, 15.0]
    assert {(one.code, one.status) for one in said} == {("overloaded", 503)}
    assert fleet.count("full") == 2
    held[2].cancel()


async def test_who_would_wait_too_long_is_refused_at_once() -> None:
    """Each place is used for 10 s, and nobody is to wait for more than 8."""
    fleet = Fleet.of(max_in_flight=1, max_wait_ms=8_000)
    fleet.end(place(await fleet.asked()), 10.0)
    await fleet.asked()
    assert refusal(await fleet.asked()).reason == "a place is expected to be free in 10.0 s, which is too late"
    assert fleet.count("wait") == 1


async def test_who_waits_too_long_is_refused_then() -> None:
    """Nothing was known of how long places are used, and none became free."""
    fleet = Fleet.of(max_in_flight=1, max_wait_ms=20)
    await fleet.asked()
    waiting = await fleet.asked()
    await asyncio.wait({waiting}, timeout=5)
    assert refusal(waiting).reason == "no place became free within 0.02 s"
    assert (fleet.count("timeout"), fleet.queue.state()["waiting"]) == (1, 0)


async def test_who_leaves_while_waiting_leaves_no_trace() -> None:
    """Neither in the queue nor among those in flight."""
    fleet = Fleet.of(max_in_flight=1)
    first, second, third = await fleet.asked(), await fleet.asked(), await fleet.asked()
    second.cancel()
    await settle()
    fleet.end(place(first))
    await settle()
    fleet.end(place(third))
    assert (fleet.queue.state()["in_flight"], fleet.queue.state()["waiting"]) == (0, 0)


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_who_leaves_as_the_place_is_given_gives_it_back(cancel_first: bool) -> None:
    """In whichever order both happen within one turn of the loop, the next one gets the place."""
    fleet = Fleet.of(max_in_flight=1)
    first, second, third = await fleet.asked(), await fleet.asked(), await fleet.asked()
    if cancel_first:
        second.cancel()
        fleet.end(place(first))
    else:
        fleet.end(place(first))
        second.cancel()
    await settle()
    assert second.cancelled()
    fleet.end(place(third))
    assert fleet.queue.state()["in_flight"] == 0


async def test_the_more_important_go_first() -> None:
    """A header asks for a priority, up to what the tenant may ask for."""
    shares = {"vip": TenantShare(priority=1, max_priority=9), "usual": TenantShare()}
    fleet = Fleet.of(max_in_flight=1, priority_header=HEADER, tenants=shares)
    first = await fleet.asked()
    tasks = {
        "usual": await fleet.asked("usual"),
        "usual that says 9": await fleet.asked("usual", priority="9"),
        "low": await fleet.asked("usual", priority="-3"),
        "vip": await fleet.asked("vip"),
        "vip that says 5": await fleet.asked("vip", priority="5"),
        "nonsense": await fleet.asked("", priority="first!"),
    }
    order: list[str] = []
    got: Any = first
    for _ in tasks:
        fleet.end(place(got))
        await settle()
        got = next(task for name, task in tasks.items() if task.done() and name not in order)
        order.append(next(name for name, task in tasks.items() if task is got))
    assert order[:2] == ["vip that says 5", "vip"]
    assert order[-1] == "low"
    assert fleet.queue.reads_headers == (HEADER,)


async def test_the_more_important_take_the_place_of_others_in_a_full_queue() -> None:
    """Who is sent away is told at once, and when to come back."""
    fleet = Fleet.of(max_in_flight=1, max_queue=1, tenants={"vip": TenantShare(priority=1)})
    await fleet.asked()
    usual = await fleet.asked()
    vip = await fleet.asked("vip")
    assert refusal(usual).reason == "the queue is full, and others come first"
    assert not vip.done()
    assert fleet.count("displaced") == 1
    vip.cancel()


async def test_a_replicas_places_are_counted_where_its_requests_are() -> None:
    """One request at each of two replicas; one that goes to a third party's model does not wait for them."""
    fleet = Fleet.of(max_in_flight_per_replica=1)
    other = ModelConfig(name="other", endpoint="http://other")
    first, second = await fleet.asked(), await fleet.asked()
    calls = [start(fleet, A, first), start(fleet, B, second)]
    third = await fleet.asked(models=frozenset({"m"}))
    assert not third.done()
    beside = await fleet.asked(candidates=(other,), models=frozenset({"other"}))
    assert place(beside).waited_s == 0
    start(fleet, other, beside)
    fleet.load.finished(calls[0], 1.0, ok=True)
    fleet.end(place(first))
    await settle()
    assert place(third).waited_s == 1.0


def start(fleet: Fleet, at: ModelConfig, task: asyncio.Task[Lease | Refusal]) -> Reservation:
    """A request that was let in goes to a replica."""
    assert place(task)
    fleet.queue.placed(attrs.evolve(fleet.ctx(), request=place(task).request), at)
    return fleet.load.started(at.id, Work())


async def test_what_engines_do_for_others_takes_room_until_it_is_done() -> None:
    """Room that other gateways took counts, and is found when they have given it back, though nothing of ours ends."""
    fleet = Fleet.of(max_in_flight_per_replica=2)
    for one in (A, B):
        fleet.load.report(one.endpoint, EngineLoad(running=2, waiting=0), fleet.clock.now_s())
    waiting = await fleet.asked()
    assert not waiting.done()
    fleet.load.report(A.endpoint, EngineLoad(running=1, waiting=0), fleet.clock.now_s())
    await asyncio.wait({waiting}, timeout=5)
    assert place(waiting)


async def test_those_on_their_way_count_too() -> None:
    """Between a place and the call that uses it the load knows nothing of a request."""
    fleet = Fleet.of(max_in_flight_per_replica=1)
    first, second = await fleet.asked(), await fleet.asked()  # kept, as a route keeps its places
    assert place(first)
    assert place(second)
    waiting = await fleet.asked()
    assert not waiting.done()
    waiting.cancel()


async def test_a_replica_that_is_out_has_no_places() -> None:
    """A breaker that opens takes its room away; if all are out nobody waits, because `filter.health` has the word."""
    fleet = Fleet.of(max_in_flight_per_replica=1)
    for _ in range(3):
        fleet.health.record_failure(A.endpoint, Fault.CONNECT)
    ctx = fleet.ctx()
    lease = await fleet.queue.admit(ctx)
    fleet.queue.placed(ctx, B)
    fleet.load.started(B.id, Work())
    waiting = await fleet.asked()
    assert not waiting.done()
    for _ in range(3):
        fleet.health.record_failure(B.endpoint, Fault.CONNECT)
    fleet.end(lease)
    await settle()
    assert place(waiting)
    assert place(await fleet.asked())


async def test_those_beside_a_probe_wait_for_its_outcome() -> None:
    """While no breaker is closed and a probe is under way nobody goes on; then all do, however it ended."""
    for outcome_of in ("record_success", "record_failure"):
        fleet = Fleet.of()
        for one in (A, B):
            for _ in range(3):
                fleet.health.record_failure(one.endpoint, Fault.CONNECT)
        assert isinstance(await fleet.queue.admit(fleet.ctx()), Lease), "no room is not for the queue to say"
        fleet.clock.advance(61)
        assert fleet.health.begin(A.endpoint)
        assert fleet.health.begin(B.endpoint)
        waiting = [fleet.ask() for _ in range(3)]
        await settle()
        assert not any(one.done() for one in waiting)
        if outcome_of == "record_success":
            fleet.health.record_success(A.endpoint)
        else:
            for one in (A, B):
                fleet.health.record_failure(one.endpoint, Fault.CONNECT)
        assert all(isinstance(place, Lease) for place in await asyncio.gather(*waiting))


async def test_one_tries_and_the_others_wait() -> None:
    """Where a probe may begin, not all who wait begin it; who is not the probe would be refused."""
    fleet = Fleet.of()
    for one in (A, B):
        for _ in range(3):
            fleet.health.record_failure(one.endpoint, Fault.CONNECT)
    fleet.clock.advance(61)
    asking = [fleet.ask() for _ in range(3)]
    await settle()
    assert [one.done() for one in asking] == [True, False, False]
    assert fleet.health.begin(A.endpoint)
    assert fleet.health.begin(B.endpoint)
    start(fleet, A, asking[0])
    await settle()
    assert [one.done() for one in asking] == [True, False, False]
    fleet.health.record_success(A.endpoint)
    await asyncio.gather(*asking)


def learn(fleet: Fleet, ttfb_s: float, step_s: float = 0.0) -> None:
    """Both replicas answer a few requests, and take so long to the first byte and for each further token."""
    for _ in range(20):
        for one in (A, B):
            call = fleet.load.started(one.id, Work(prompt_tokens=10))
            fleet.clock.advance(ttfb_s)
            fleet.load.first_byte(call, ttfb_s)
            fleet.clock.advance(20 * step_s)
            fleet.load.finished(call, ttfb_s + 20 * step_s, ok=True, completion_tokens=21 if step_s else 1)


@pytest.mark.parametrize(("timeout_s", "is_let_in"), [(1.0, False), (10.0, True), (None, True)])
async def test_a_request_that_cannot_be_answered_in_time_is_refused_at_once(
    timeout_s: float | None, is_let_in: bool
) -> None:
    """An answer begins after 4 s here, so a deadline of 1 s is not worth an engine's work."""
    fleet = Fleet.of(max_in_flight=9)
    learn(fleet, 4.0)
    task = await fleet.asked(timeout_s=timeout_s, stream=True)
    assert isinstance(task.result(), Refusal) is not is_let_in
    if not is_let_in:
        assert "and its deadline is in 1.0 s" in refusal(task).reason
        assert fleet.count("deadline") == 1


async def test_the_wait_counts_for_the_deadline_too() -> None:
    """Five seconds of queue and four to the first byte are more than eight."""
    fleet = Fleet.of(max_in_flight=1)
    learn(fleet, 4.0)
    fleet.end(place(await fleet.asked()), 5.0)
    await fleet.asked()
    assert "is expected in" in refusal(await fleet.asked(timeout_s=8.0, stream=True)).reason
    waits = await fleet.asked(timeout_s=20.0, stream=True)
    assert not waits.done()
    waits.cancel()


async def test_a_clients_own_patience_is_a_deadline_too() -> None:
    """How long it waits for the first byte, where that is less."""
    fleet = Fleet.of(max_in_flight=9)
    learn(fleet, 4.0)
    assert "its deadline is in 2.0 s" in refusal(await fleet.asked(first_byte_s=2.0, stream=True)).reason
    assert place(await fleet.asked(first_byte_s=600.0, timeout_s=900.0, stream=True))


@pytest.mark.parametrize(
    ("body", "is_let_in"), [({}, False), ({"max_tokens": 10}, True), ({"max_tokens": 4000}, False)], ids=str
)
async def test_a_whole_answer_takes_as_long_as_answers_usually_are(body: Mapping[str, Any], is_let_in: bool) -> None:
    """A tenth of a second for a token, and 60 tokens of an answer, or as few as are asked for."""
    fleet = Fleet.of(max_in_flight=9)
    learn(fleet, 1.0, step_s=0.1)
    fleet.end(place(await fleet.asked("t")), usage=Usage(10, 60, 70))
    task = await fleet.asked("t", timeout_s=5.0, body=body)
    assert isinstance(task.result(), Refusal) is not is_let_in
    assert place(await fleet.asked("t", timeout_s=10.0, body={"max_tokens": 4000}))


async def test_it_can_be_told_not_to_reckon_with_deadlines() -> None:
    """`refuse_late: false`."""
    fleet = Fleet.of(max_in_flight=9, refuse_late=False)
    learn(fleet, 4.0)
    assert place(await fleet.asked(timeout_s=0.1, stream=True))


async def test_what_an_answer_took_counts_for_its_tenant() -> None:
    """A tenant whose answers are long is served less often than one whose answers are short."""
    fleet = Fleet.of(max_in_flight=1)
    got: Any = await fleet.asked("x")
    waiting = [await fleet.asked(tenant) for _ in range(8) for tenant in ("long", "short")]
    order: list[str] = []
    for _ in range(8):
        tenant = order[-1] if order else ""
        tokens = 5000 if tenant == "long" else 10
        fleet.end(place(got), usage=Usage(10, tokens, tokens + 10))
        await settle()
        got = next(task for i, task in enumerate(waiting) if task.done() and i not in fresh(order, waiting))
        order.append("long" if waiting.index(got) % 2 == 0 else "short")
    assert order.count("short") >= 6
    for task in waiting:
        task.cancel()


def fresh(order: list[str], waiting: list[asyncio.Task[Lease | Refusal]]) -> set[int]:
    """The places of those that had theirs before: the first ones of each tenant, as they came."""
    longs, shorts = order.count("long"), order.count("short")
    return {2 * i for i in range(longs)} | {2 * i + 1 for i in range(shorts)}


async def test_those_who_were_told_to_come_back_count_until_they_do() -> None:
    """A place that becomes free is given to who waits, not to one that was told to come later: that one is still ahead."""
    fleet = Fleet.of(max_in_flight=1, max_queue=3, max_wait_ms=60_000)
    fleet.end(place(await fleet.asked()), 1.0)
    served = [await fleet.asked() for _ in range(4)]
    assert [refusal(await fleet.asked()).retry_after_s for _ in range(3)] == [4.0, 5.0, 6.0]
    for first in range(3):
        fleet.end(place(served[first]), 1.0)
        await settle()
    waiting = [await fleet.asked() for _ in range(3)]
    assert refusal(await fleet.asked()).retry_after_s == 7.0
    fleet.clock.advance(2.0)  # two of the three that were told at first are back, or will not come
    assert refusal(await fleet.asked()).retry_after_s == 6.0
    for task in waiting:
        task.cancel()


async def test_a_dry_run_takes_no_place_and_says_what_would_be() -> None:
    """Also where there is none."""
    fleet = Fleet.of(max_in_flight=1, max_queue=0)
    for _ in range(3):
        assert place(await fleet.asked(dry_run=True))
    await fleet.asked()
    refusal(await fleet.asked(dry_run=True))
    state = fleet.queue.state()
    assert (state["in_flight"], state["turned_away"], fleet.count("full")) == (1, 0, 0)


async def test_the_depth_is_shown_by_priority() -> None:
    """As a gauge, read at each scrape."""
    fleet = Fleet.of(max_in_flight=1, tenants={"vip": TenantShare(priority=2)})
    tasks = [await fleet.asked(tenant) for tenant in ("", "", "", "vip")]
    read = fleet.metrics.registry.get_sample_value
    assert [read("kvfleet_queue_depth", {"priority": p}) for p in ("0", "2")] == [2, 1]
    for task in tasks[1:]:
        task.cancel()


async def test_with_room_it_costs_next_to_nothing() -> None:
    """A place and its return take less than 5 µs here, whatever else the machine does; 1.5 µs by themselves."""
    fleet = Fleet.of(max_in_flight=1000, max_in_flight_per_replica=1000)
    ctx, over = fleet.ctx(), outcome(fleet.ctx(), None)
    best_s = float("inf")
    for _ in range(20):
        began = time.thread_time()
        for _ in range(500):
            lease: Any = await fleet.queue.admit(ctx)
            fleet.queue.placed(ctx, A)
            lease.release(over)
        best_s = min(best_s, (time.thread_time() - began) / 500)
    assert best_s < 5e-6


async def test_a_reload_loses_neither_those_in_flight_nor_those_that_wait() -> None:
    """They go on under the new limits: with one place more, the one that waited longest gets it at the next end."""
    fleet = Fleet.of(max_in_flight=1)
    first, second, third = await fleet.asked(), await fleet.asked(), await fleet.asked()
    after = QueueAdmission(max_in_flight=2, max_queue=1)
    after.provision(Services(clock=fleet.clock, models=(A, B), health=fleet.health, load=fleet.load))
    after.inherit(fleet.queue)
    assert after.state()["in_flight"] == 1
    assert isinstance(await after.admit(fleet.ctx()), Refusal), "the queue takes one now, and two wait"
    fleet.end(place(first))
    await settle()
    fleet.end(place(second))
    fleet.end(place(third))
    assert (after.state()["in_flight"], after.state()["waiting"]) == (0, 0)
