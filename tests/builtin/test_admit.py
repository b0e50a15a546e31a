"""Admission by concurrency."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.builtin.admit import ConcurrencyAdmission
from kvfleet.plugin.contract import Lease, Refusal
from tests.builtin.making import context, outcome


async def let_in(admission: ConcurrencyAdmission, tenant: str = "") -> Lease:
    """A place that must be there."""
    got = await admission.admit(context(tenant=tenant))
    assert not isinstance(got, Refusal)
    return got


async def refused(admission: ConcurrencyAdmission, tenant: str = "", **more: Any) -> Refusal:
    """A refusal that must come."""
    got = await admission.admit(context(tenant=tenant, **more))
    assert isinstance(got, Refusal)
    return got


def ended(duration_s: float) -> Any:
    """A route that took so long."""
    return outcome(context(), None, duration_s=duration_s)


async def test_one_too_many_is_refused() -> None:
    """And let in once a place is free."""
    admission = ConcurrencyAdmission(max_concurrent=2)
    first, _ = await let_in(admission), await let_in(admission)
    refusal = await refused(admission)
    assert refusal.reason == "the gateway is at its limit of requests in flight (2)"
    first.release(ended(1.0))
    await let_in(admission)


async def test_a_tenant_has_a_limit_of_its_own() -> None:
    """One tenant at its limit does not shut out another."""
    admission = ConcurrencyAdmission(max_per_tenant=1)
    await let_in(admission, "a")
    assert (await refused(admission, "a")).reason == "the tenant is at its limit of requests in flight (1)"
    await let_in(admission, "b")
    await let_in(admission)
    await refused(admission)


async def test_without_a_limit_everybody_is_let_in() -> None:
    """0 means none."""
    admission = ConcurrencyAdmission()
    for _ in range(100):
        await let_in(admission)
    assert admission.state()["in_flight"] == 100


async def test_a_place_is_given_back_once() -> None:
    """Releasing twice frees no second place."""
    admission = ConcurrencyAdmission(max_concurrent=2)
    first, _ = await let_in(admission), await let_in(admission)
    first.release(ended(1.0))
    first.release(ended(1.0))
    await let_in(admission)
    await refused(admission)


async def test_retry_after_grows_with_those_who_were_turned_away() -> None:
    """A place is free after duration over places; the next one refused waits one place longer."""
    admission = ConcurrencyAdmission(max_concurrent=2)
    (await let_in(admission)).release(ended(10.0))
    first, _ = await let_in(admission), await let_in(admission)
    assert [(await refused(admission)).retry_after_s for _ in range(3)] == [5.0, 10.0, 15.0]
    first.release(ended(10.0))
    await let_in(admission)
    assert (await refused(admission)).retry_after_s == 15.0


async def test_retry_after_is_unknown_before_anything_was_measured() -> None:
    """No number is made up."""
    admission = ConcurrencyAdmission(max_concurrent=1)
    await let_in(admission)
    assert (await refused(admission)).retry_after_s is None


async def test_the_queue_is_forgotten_with_the_load() -> None:
    """Yesterday's crowd does not make today's refusal wait, and leaves no memory behind."""
    admission = ConcurrencyAdmission(max_concurrent=1, max_per_tenant=1)
    lease = await let_in(admission, "a")
    for _ in range(50):
        await refused(admission, "a")
    lease.release(ended(4.0))
    lease = await let_in(admission, "a")
    assert (await refused(admission, "a")).retry_after_s == 4.0
    lease.release(ended(4.0))
    assert admission._turned_away == {}
    assert admission._in_flight == {}


async def test_a_dry_run_takes_no_place() -> None:
    """Simulating shows what would happen, and changes nothing."""
    admission = ConcurrencyAdmission(max_concurrent=1)
    for _ in range(3):
        lease = await admission.admit(context(dry_run=True))
        assert not isinstance(lease, Refusal)
        lease.release(ended(1.0))
    assert admission.state() == {"in_flight": 0, "max_concurrent": 1, "refused": 0, "duration_s": 0.0}
    await let_in(admission)
    await refused(admission, dry_run=True)
    assert admission.state()["refused"] == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), max_size=60))
async def test_places_are_conserved(steps: list[tuple[bool, str]]) -> None:
    """However requests come and go, nobody exceeds a limit, and in the end every place is back."""
    admission = ConcurrencyAdmission(max_concurrent=4, max_per_tenant=2)
    held: dict[str, list[Lease]] = {"a": [], "b": [], "c": []}
    for comes, tenant in steps:
        if comes:
            got = await admission.admit(context(tenant=tenant))
            is_full = sum(map(len, held.values())) >= 4 or len(held[tenant]) >= 2
            assert isinstance(got, Refusal) == is_full
            if not isinstance(got, Refusal):
                held[tenant].append(got)
        elif held[tenant]:
            held[tenant].pop().release(ended(1.0))
    for lease in [lease for leases in held.values() for lease in leases]:
        lease.release(ended(1.0))
    assert admission.state()["in_flight"] == 0
    assert admission._in_flight == {}


async def test_a_key_has_a_limit_of_its_own() -> None:
    """Those named are held to theirs, together with everybody's; others are not."""
    admission = ConcurrencyAdmission(max_concurrent=3, keys={"ci": 1})
    (first,) = [await admission.admit(context(key="ci"))]
    assert not isinstance(first, Refusal)
    assert (await refused(admission, key="ci")).reason == "the key is at its limit of requests in flight (1)"
    await let_in(admission)
    await admission.admit(context(key="people"))
    assert (await refused(admission, key="people")).reason == "the gateway is at its limit of requests in flight (3)"
    first.release(ended(1.0))
    assert not isinstance(await admission.admit(context(key="ci")), Refusal)
