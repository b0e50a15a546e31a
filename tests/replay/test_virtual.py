"""The event loop whose clock jumps."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from kvfleet.replay.virtual import START_S, VirtualClock, VirtualLoop


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    """A loop that is closed afterwards."""
    one = VirtualLoop(VirtualClock())
    yield one
    one.close()


class TestVirtualLoop:
    def test_timers_go_in_the_order_of_their_times(self, loop: VirtualLoop) -> None:
        """The earlier first, and of two at the same time the one that was asked for first; each at its very time."""
        found: list[tuple[str, float]] = []
        for name, delay_s in (("c", 2.0), ("a", 1.0), ("b", 1.0), ("d", 3600.0)):
            loop.call_later(delay_s, lambda one=name: found.append((one, loop.time() - START_S)))
        loop.run_until_complete(asyncio.sleep(3600))
        assert found == [("a", 1.0), ("b", 1.0), ("c", 2.0), ("d", 3600.0)]

    def test_a_cancelled_timer_never_goes_and_moves_no_clock(self, loop: VirtualLoop) -> None:
        """However many are cancelled, the others still go."""
        found: list[int] = []
        handles = [loop.call_later(10 + i, found.append, i) for i in range(1000)]
        for i, handle in enumerate(handles):
            if i != 500:
                handle.cancel()
        assert len(loop._timers) < 500
        loop.run_until_complete(asyncio.sleep(20))
        assert (found, loop.time() - START_S) == ([], 20.0)
        loop.run_until_complete(asyncio.sleep(1000))
        assert found == [500]

    def test_a_timeout_is_over_after_its_time(self, loop: VirtualLoop) -> None:
        """`asyncio.timeout` ends a wait that would be too long, at the moment it said."""

        async def wait() -> float:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(5):
                    await asyncio.sleep(6)
            return loop.time() - START_S

        assert loop.run_until_complete(wait()) == 5.0

    def test_what_a_thread_brings_is_waited_for(self, loop: VirtualLoop) -> None:
        """With nothing due, the loop really waits, and no virtual time passes."""

        async def wait() -> float:
            done = loop.create_future()
            thread = threading.Timer(0.05, loop.call_soon_threadsafe, (done.set_result, None))
            thread.start()
            await done
            thread.join()
            return loop.time() - START_S

        assert loop.run_until_complete(wait()) == 0.0
