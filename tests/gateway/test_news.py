"""What workers tell each other all the time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.builtin.placements import Placement
from kvfleet.config.loader import load_config
from kvfleet.errors import BackendError, Fault
from kvfleet.gateway.news import News
from kvfleet.gateway.workers import Seat
from kvfleet.policy.shared_minutes import SharedMinutes
from kvfleet.runtime import Router

FLEET = {
    "models": [
        {"name": name, "provider": "mock", "endpoint": f"mock://{name}", "options": {"decode_ms_per_token": 1}}
        for name in ("a", "b")
    ]
}
LONG = "The quick brown fox jumps over the lazy dog. " * 60


@attrs.frozen
class Worker:
    """One worker without a process of its own."""

    router: Router
    news: News


@contextlib.asynccontextmanager
async def workers(folder: Path, count: int = 2, fleet: Any = None) -> AsyncIterator[list[Worker]]:
    """So many, who tell each other."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(count)]
    minutes = SharedMinutes(count, folder / "lock")
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(minutes.close)
        found = []
        for one in (one for pair in pairs for one in pair):
            one.setblocking(False)
            stack.callback(one.close)
        for number in range(count):
            seat = Seat(
                number, count, folder, [pair[0] for pair in pairs], [pair[1] for pair in pairs], minutes, leash=-1
            )
            news = News(seat)
            config = load_config(None, fleet or FLEET, environ={})
            router = await stack.enter_async_context(Router(config, polls=False, news=news.publish))
            task = asyncio.create_task(news.run(lambda router=router: router))
            stack.callback(task.cancel)
            found.append(Worker(router, news))
        yield found


async def until(holds: Any) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(10):
        while not await holds():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.02)


async def test_where_a_prompt_went_is_known_to_all(tmp_path: Path) -> None:
    """A prompt answered through one worker is expected in the same replica's cache by the other."""
    async with workers(tmp_path) as (one, two):
        _, first = await one.router.route(prompt=LONG)

        async def knows() -> bool:
            explanation = await two.router.simulate(prompt=LONG + " And then?")
            (stage,) = [found for found in explanation.stages if found.kind == "affinity"]
            known = [name for name, mode in zip(stage.scored, stage.modes, strict=True) if mode != "none"]
            return known == [f"{first.selected_model}@mock://{first.selected_model}"]

        await until(knows)


async def test_a_conversation_has_one_home_for_all(tmp_path: Path) -> None:
    """A named session that one worker has seen is at home at the same replica for the other."""
    async with workers(tmp_path) as (one, two):
        _, first = await one.router.route(prompt="Hi", session="mine")

        sessions = two.router.pipeline.all_stages
        affinity = next(stage.component for stage in sessions if stage.key == "affinity.prefix")

        async def bound() -> bool:
            return bool(affinity._sessions.get(("", "mine"), ("",))[0].startswith(first.selected_model))

        await until(bound)


async def test_what_is_in_flight_is_known_to_all(tmp_path: Path) -> None:
    """Within a moment the others count it, and no longer than it lasts."""
    async with workers(tmp_path, 3) as (one, two, three):
        held = one.router.services.load.started("a@mock://a")

        async def counted() -> bool:
            return all(worker.router.services.load.pending("a@mock://a") == 1 for worker in (two, three))

        await until(counted)
        one.router.services.load.finished(held, 1.0, ok=True)

        async def gone() -> bool:
            return all(worker.router.services.load.pending("a@mock://a") == 0 for worker in (two, three))

        await until(gone)


async def test_a_backend_that_asked_one_to_wait_is_left_alone_by_all(tmp_path: Path) -> None:
    """A 429 with Retry-After that one worker got costs the others no request."""
    async with workers(tmp_path, 3) as (one, two, three):
        ticket = one.router.services.limits.begin("a@mock://a")
        ticket.ended(BackendError(Fault.RATE_LIMITED, "slow down", status=429, retry_after_s=40.0))

        async def known() -> bool:
            now_s = one.router.clock.now_s()
            return all(worker.router.services.limits.hold("a@mock://a", now_s) for worker in (two, three))

        await until(known)
        for worker in (two, three):
            _, explanation = await worker.router.route(prompt="Hi")
            assert [attempt.model for attempt in explanation.attempts] == ["b"]


async def test_breakers_are_known_to_whoever_comes_later(tmp_path: Path) -> None:
    """What is open is told again and again: a worker that heard nothing at first knows a second later."""
    async with workers(tmp_path) as (one, two):
        for _ in range(3):
            one.router.services.health.record_failure("mock://a", Fault.CONNECT)
        one.news.tell()
        two.router.services.health.retain([])  # as one that has just begun

        async def known() -> bool:
            return not two.router.services.health.is_available("mock://a")

        await until(known)
        assert "told by another worker" in two.router.services.health.unavailable_reason("mock://a")


async def test_news_that_finds_no_room_is_lost_and_counted(tmp_path: Path) -> None:
    """A worker that hears nothing holds up nobody."""
    async with workers(tmp_path) as (one, two):
        asyncio.get_running_loop().remove_reader(two.news._seat.news[1].fileno())
        for _ in range(200):
            for _ in range(20):
                one.news.publish("affinity.prefix", b"x" * 10_000)
            one.news.tell()
        assert one.news.lost > 0
        response, _ = await one.router.route(prompt="Hi")
        assert response.content


async def test_nonsense_is_ignored(tmp_path: Path) -> None:
    """What another version of a stage says, or another stage, harms nobody."""
    async with workers(tmp_path) as (one, two):
        for stage, payload in (("affinity.prefix", b"\xff"), ("nobody.knows", b"x"), ("classify.prompt", b"")):
            one.news.publish(stage, payload)
        one.news._seat.tells[1].send(b"\x01\x00not json")
        one.news._seat.tells[1].send(b"\x02")
        await asyncio.sleep(0.2)
        response, _ = await two.router.route(prompt="Hi")
        assert response.content


@given(
    st.text(min_size=1, max_size=50),
    st.lists(st.integers(0, 2**64 - 1), max_size=50),
    st.floats(0, 1e6),
    st.text(max_size=20),
    st.text(max_size=20),
)
def test_a_placement_survives_the_way(replica: str, blocks: list[int], ttl_s: float, tenant: str, session: str) -> None:
    """What is packed is unpacked."""
    found = Placement.unpacked(Placement(replica, blocks, ttl_s, tenant, session).packed())
    assert (found.replica, list(found.blocks), found.ttl_s) == (replica, blocks, ttl_s)
    assert (found.tenant, found.session) == (tenant, session)


def test_a_long_prompt_is_told_as_far_as_there_is_room() -> None:
    """Its beginning is what matters."""
    data = Placement("m@http://gpu", range(100_000), 60.0).packed()
    assert len(data) < 60_000
    assert list(Placement.unpacked(data).blocks[:3]) == [0, 1, 2]
