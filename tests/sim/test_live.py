"""The engine on a clock: who waits is woken in time, whoever else leaves."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from kvfleet.clock import FrozenClock
from kvfleet.errors import BackendError
from kvfleet.sim.engine import Engine
from kvfleet.sim.events import Event, Finished, Job, Started
from kvfleet.sim.live import LiveEngine, Order
from kvfleet.sim.spec import EngineSpec
from kvfleet.testing.fakes import VirtualTime


def live(**options: Any) -> tuple[LiveEngine, VirtualTime]:
    """An engine on virtual time, of which a step takes a second."""
    time = VirtualTime()
    spec = EngineSpec(step_s=1.0, prefill_s_per_token=0.0, **options)
    return LiveEngine(engine=Engine(spec), clock=time, sleep=time.sleep), time


def job(output: int) -> Job:
    """A request with a prompt of a few tokens."""
    return Job((), 5, output)


async def follow(one: LiveEngine, time: VirtualTime, order: Order, tokens: int, moments: list[float]) -> None:
    """Note when each token came."""
    for count in range(1, tokens + 1):
        await one.tokens(order, count)
        moments.append(time.now_s() - 1000)


class TestLiveEngine:
    async def test_everybody_gets_each_token_at_its_time(self) -> None:
        """Many wait, one sleeps for all, and nobody is late."""
        one, time = live()
        moments: list[list[float]] = [[] for _ in range(5)]
        async with anyio.create_task_group() as group:
            for index in range(5):
                group.start_soon(follow, one, time, one.submit([job(index + 1)]), index + 1, moments[index])
            await time.pass_s(10)
        assert moments == [[float(count + 1) for count in range(index + 1)] for index in range(5)]

    async def test_whoever_stops_reading_does_not_hold_up_the_others(self) -> None:
        """The one that slept for all takes its token and never comes back; the others' time goes on."""
        one, time = live()
        moments: list[float] = []
        first, second, third = (one.submit([job(5)]) for _ in range(3))
        async with anyio.create_task_group() as group:
            group.start_soon(follow, one, time, first, 1, [])
            group.start_soon(follow, one, time, second, 1, [])
            group.start_soon(follow, one, time, third, 5, moments)
            await time.pass_s(10)
        assert moments == [1.0, 2.0, 3.0, 4.0, 5.0]

    @pytest.mark.parametrize("leaver", [0, 1, 2])
    async def test_a_cancelled_waiter_hands_over(self, leaver: int) -> None:
        """Whoever is cancelled while it waits, asleep for all or not, the others are served in time."""
        one, time = live()
        moments: list[list[float]] = [[], [], []]
        scopes = [anyio.CancelScope() for _ in range(3)]
        orders = [one.submit([job(4)]) for _ in range(3)]

        async def wait(index: int) -> None:
            with scopes[index]:
                await follow(one, time, orders[index], 4, moments[index])

        async with anyio.create_task_group() as group:
            for index in range(3):
                group.start_soon(wait, index)
            await time.pass_s(1.5)
            scopes[leaver].cancel()
            await time.pass_s(10)
        assert [times for index, times in enumerate(moments) if index != leaver] == [[1.0, 2.0, 3.0, 4.0]] * 2

    async def test_one_who_waits_for_the_end_only_sleeps_once(self) -> None:
        """Nobody is woken for tokens that nobody waits for."""
        one, time = live()
        naps: list[float] = []

        async def sleep(seconds: float) -> None:
            naps.append(seconds)
            await time.sleep(seconds)

        one.sleep = sleep
        async with anyio.create_task_group() as group:
            group.start_soon(one.finished, one.submit([job(50)]))
            await time.pass_s(60)
        assert naps == [1.0, 49.0]

    async def test_a_long_sleeper_is_woken_for_others(self) -> None:
        """While one waits for its end, another comes and gets each token, and a third is over before both."""
        one, time = live()
        moments: list[float] = []
        ends: dict[str, float] = {}

        async def end(name: str, output: int) -> None:
            await one.finished(one.submit([job(output)]))
            ends[name] = time.now_s() - 1000

        async with anyio.create_task_group() as group:
            group.start_soon(end, "long", 50)
            await time.pass_s(9.5)
            group.start_soon(end, "short", 2)
            await time.pass_s(5.0)
            group.start_soon(follow, one, time, one.submit([job(3)]), 3, moments)
            await time.pass_s(60)
        assert (ends, moments) == ({"long": 50.0, "short": 12.0}, [16.0, 17.0, 18.0])

    async def test_what_nobody_waited_for_is_caught_up_with(self) -> None:
        """While nobody waits the clock goes on, and so has the engine when it is asked again."""
        one, time = live()
        order = one.submit([job(5)])
        await time.pass_s(3.5)
        assert one.load().running == 1
        assert (order.has(3), order.has(4)) == (True, False)
        await time.pass_s(5)
        assert one.load().running == 0
        await one.finished(order)

    async def test_a_clock_that_stands_still_is_overtaken(self) -> None:
        """With a sleep that takes no time on a frozen clock, every step is over as soon as it is waited for."""

        async def no_time(_: float) -> None:
            await anyio.lowlevel.checkpoint()

        one = LiveEngine(engine=Engine(EngineSpec()), clock=FrozenClock(), sleep=no_time)
        order = one.submit([job(100)])
        await one.finished(order)
        assert order.has(100)

    async def test_an_order_is_taken_whole_or_not_at_all(self) -> None:
        """If the queue has no room for all choices of an answer, none of them is taken."""
        one, _ = live(max_running=1, max_waiting=1)
        with pytest.raises(BackendError):
            one.submit([job(5), job(5), job(5)])
        load = one.load()
        assert (load.running, load.waiting) == (0, 0)

    async def test_a_cancelled_order_wakes_its_waiter(self) -> None:
        """Who waits for an order that somebody cancels is told, and does not wait for ever."""
        one, time = live()
        order = one.submit([job(50)])
        async with anyio.create_task_group() as group:
            group.start_soon(one.finished, one.submit([job(50)]))
            await time.settle()
            group.start_soon(one.finished, order)
            await time.settle()
            one.cancel(order)
            await time.settle()
            assert order.is_cancelled
            await time.pass_s(100)

    async def test_a_listener_is_told_everything(self) -> None:
        """Events reach the listener as they happen, in order."""
        one, time = live()
        heard: list[Event] = []
        one.listener = heard.extend
        order = one.submit([job(2)])
        async with anyio.create_task_group() as group:
            group.start_soon(one.finished, order)
            await time.pass_s(5)
        assert heard[0] == Started(1000.0, order.jobs[0], 0)
        assert heard[-1] == Finished(1002.0, order.jobs[0])
