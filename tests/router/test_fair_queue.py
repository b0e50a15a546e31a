"""A bounded queue that is fair to tenants."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.router.fair_queue import FairQueue, Waiting


def drained(queue: FairQueue[str]) -> list[str]:
    """All that wait, in the order in which they go."""
    found = []
    while (one := queue.next()) is not None:
        found.append(one.item)
    return found


def test_one_tenants_requests_go_as_they_came() -> None:
    """Nobody is overtaken by a younger one of its own."""
    queue: FairQueue[str] = FairQueue()
    for item in "abcd":
        queue.add(item, "t", 0, 1)
    assert drained(queue) == list("abcd")
    assert len(queue) == 0


def test_the_more_important_go_first() -> None:
    """Whoever came first, and whatever its tenant has had."""
    queue: FairQueue[str] = FairQueue()
    for item, priority in (("low", -1), ("usual", 0), ("high", 5), ("also high", 5)):
        queue.add(item, "t", priority, 1)
    assert drained(queue) == ["high", "also high", "usual", "low"]
    assert queue.depths() == {}


def test_a_flood_of_one_tenant_does_not_keep_another_waiting() -> None:
    """The second request of the others goes before the flood's third."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(50):
        queue.add("flood", "loud", 0, 1)
    for _ in range(3):
        queue.add("quiet", "quiet", 0, 1)
    assert Counter(drained(queue)[:6]) == {"flood": 3, "quiet": 3}


def test_weights_are_shares() -> None:
    """A tenant of weight 3 gets three times as much while both have something to ask for."""
    queue: FairQueue[str] = FairQueue(weights={"big": 3.0})
    for _ in range(40):
        queue.add("big", "big", 0, 10)
        queue.add("small", "small", 0, 10)
    assert Counter(drained(queue)[:40]) == {"big": 30, "small": 10}


def test_work_counts_and_not_requests() -> None:
    """A tenant with requests ten times as long gets a tenth as many."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(40):
        queue.add("long", "long", 0, 100)
        queue.add("short", "short", 0, 10)
    assert Counter(drained(queue)[:33])["long"] == pytest.approx(3, abs=1)


def test_who_asked_for_nothing_saves_up_nothing() -> None:
    """A tenant that comes back after a while gets its share from then on, and not what it missed."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(60):
        queue.add("busy", "busy", 0, 1)
    for _ in range(20):
        queue.next()
    for _ in range(40):
        queue.add("new", "new", 0, 1)
    assert Counter(one.item for one in [queue.next() for _ in range(20)] if one) == {"busy": 10, "new": 10}


def test_what_it_really_took_counts() -> None:
    """A tenant whose answers were much longer than said waits for the others to have had as much."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(20):
        queue.add("a", "a", 0, 1)
        queue.add("b", "b", 0, 1)
    first = queue.next()
    assert first is not None
    queue.correct(first, 8)
    assert [one.item for one in [queue.next() for _ in range(8)] if one] == ["b"] * 8


def test_a_pool_without_room_does_not_hold_up_the_others() -> None:
    """The first one for somebody else goes, also of the same tenant."""
    queue: FairQueue[str] = FairQueue()
    queue.add("for x", "t", 0, 1, "x")
    queue.add("for y", "t", 0, 1, "y")
    assert queue.holds("x")
    found = queue.next(lambda one: one.pool == "y")
    assert found is not None
    assert found.item == "for y"
    assert queue.next(lambda one: one.pool == "y") is None
    assert (queue.holds("x"), queue.holds("y")) == (True, False)


def test_a_full_queue_sends_the_least_important_away() -> None:
    """The youngest of the lowest priority; one that is not more important gets no place."""
    queue: FairQueue[str] = FairQueue(most=2)
    queue.add("old", "t", 0, 1)
    queue.add("young", "t", 0, 1)
    found = queue.room_for("t", 1)
    assert isinstance(found, Waiting)
    assert found.item == "young"
    assert queue.room_for("t", 0) is False
    assert queue.room_for("t", -1) is False
    assert FairQueue(most=0).room_for("t", 5) is False


def test_a_tenant_that_fills_the_queue_takes_places_only_from_itself() -> None:
    """Another tenant gets in for the youngest of the one that has most waiting, until both have as many."""
    queue: FairQueue[str] = FairQueue(most=4)
    for item in "abcd":
        queue.add(item, "loud", 0, 1)
    assert queue.room_for("loud", 0) is False
    for expected in ("d", "c"):
        found = queue.room_for("quiet", 0)
        assert isinstance(found, Waiting)
        assert found.item == expected
        queue.remove(found)
        queue.add("q", "quiet", 0, 1)
    assert queue.room_for("quiet", 0) is False


def test_how_many_go_before() -> None:
    """All that are more important, its own, and of every other tenant as many as it takes turns."""
    queue: FairQueue[str] = FairQueue(weights={"big": 2.0})
    for tenant, priority, count in (("big", 0, 9), ("t", 0, 1), ("loud", 0, 9), ("x", 3, 4), ("y", -3, 4)):
        for _ in range(count):
            queue.add("", tenant, priority, 1)
    assert queue.ahead("t", 0) == 4 + 1 + 2 * 2 + 2


def test_removing_twice_is_harmless() -> None:
    """Who has left has left."""
    queue: FairQueue[str] = FairQueue()
    one = queue.add("a", "t", 0, 1)
    assert queue.remove(one)
    assert not queue.remove(one)
    assert list(queue) == []
    queue.correct(one, 5)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("abc"), st.integers(-1, 1), st.integers(1, 9), st.sampled_from("xy")),
        st.tuples(st.just("next"), st.sampled_from(["", "x", "y"])),
        st.tuples(st.just("leave"), st.integers(0, 30)),
    ),
    max_size=120,
)


@settings(deadline=None)
@given(operations)
def test_nobody_is_lost_and_nobody_goes_twice(history: list[tuple[object, ...]]) -> None:
    """Whatever happens: who was added has gone, left, been sent away, or waits; and never are there too many."""
    queue: FairQueue[int] = FairQueue(most=8)
    waiting: dict[int, Waiting[int]] = {}
    for number, (what, *args) in enumerate(history):
        if what == "add":
            tenant, priority, work, pool = args
            room = queue.room_for(str(tenant), int(str(priority)))
            if isinstance(room, Waiting):
                assert queue.remove(waiting.pop(room.item))
            if room:
                waiting[number] = queue.add(number, str(tenant), int(str(priority)), float(str(work)), pool)
        elif what == "next":
            (pool,) = args
            one = queue.next(lambda one, pool=pool: not pool or one.pool == pool)
            may = [w for w in waiting.values() if not pool or w.pool == pool]
            assert (one is None) == (not may)
            if one is not None:
                assert one.priority == max(w.priority for w in may)
                assert one.number == min(
                    w.number for w in may if (w.tenant, w.priority, w.pool) == (one.tenant, one.priority, one.pool)
                )
                del waiting[one.item]
        elif waiting:
            key = list(waiting)[int(str(args[0])) % len(waiting)]
            assert queue.remove(waiting.pop(key))
        assert {one.item for one in queue} == set(waiting)
        assert len(queue) == len(waiting) == sum(queue.depths().values()) <= 8
        assert all(queue.holds(one.pool) for one in waiting.values())


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 20)), min_size=30, max_size=90))
def test_tenants_with_something_to_ask_for_never_differ_by_more_than_one_request(work: list[tuple[str, int]]) -> None:
    """While two tenants both wait, what they have had differs by no more than the longest request of either."""
    queue: FairQueue[str] = FairQueue()
    for tenant, tokens in work:
        queue.add(tenant, tenant, 0, tokens)
    left, had = Counter(tenant for tenant, _ in work), Counter[str]()
    while (one := queue.next()) is not None:
        left[one.item] -= 1
        had[one.item] += int(one.work)
        busy = [tenant for tenant in "abc" if left[tenant]]
        if len(busy) > 1:
            assert max(had[t] for t in busy) - min(had[t] for t in busy) <= 20


def test_what_is_given_back_puts_nobody_before_those_who_came_meanwhile() -> None:
    """A tenant whose requests were taken for ten times as long does not get ten times as many for that."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(4):
        queue.add("old", "old", 0, 100)
    taken = [one for one in (queue.next(), queue.next(), queue.next()) if one]
    for _ in range(20):
        queue.add("new", "new", 0, 10)
        queue.add("old", "old", 0, 10)
    for one in taken:
        queue.correct(one, -90)
    assert Counter(one.item for one in [queue.next() for _ in range(12)] if one)["new"] >= 6
