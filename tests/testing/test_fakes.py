"""The fakes: a clock one can sleep on, and an adapter that follows a script."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from kvfleet.adapters.base import ChatMessage, ChatRequest, EndpointHealth, EngineLoad
from kvfleet.adapters.call import Call, Limits, Operation, Usage
from kvfleet.clock import FrozenClock
from kvfleet.errors import BackendError, Fault
from kvfleet.testing.fakes import FakeAdapter, FakeReply, VirtualTime

BODY = {"messages": [{"role": "user", "content": "Hello"}]}


def _call(*, stream: bool = False, **rest: Any) -> Call:
    return Call(operation=Operation.CHAT, body=BODY, stream=stream, **rest)


class TestVirtualTime:
    async def test_sleepers_wake_in_the_order_of_their_time(self) -> None:
        """Whoever sleeps less wakes first, each at its own moment, also when it falls asleep again."""
        time = VirtualTime()
        log = []

        async def sleeper(name: str, *naps: float) -> None:
            for nap in naps:
                await time.sleep(nap)
                log.append((name, time.now_s() - 1000))

        async with anyio.create_task_group() as group:
            group.start_soon(sleeper, "long", 3.0)
            group.start_soon(sleeper, "twice", 1.0, 1.5)
            await time.pass_s(5)
        assert log == [("twice", 1.0), ("twice", 2.5), ("long", 3.0)]
        assert time.now_s() == 1005.0

    async def test_nobody_wakes_before_the_time(self) -> None:
        """A second short of the end, the sleeper still sleeps."""
        time = VirtualTime()
        woken = []

        async def sleeper() -> None:
            await time.sleep(10)
            woken.append(True)

        async with anyio.create_task_group() as group:
            group.start_soon(sleeper)
            await time.pass_s(9)
            assert woken == []
            await time.pass_s(1)
            assert woken == [True]


class TestFakeAdapter:
    async def test_it_answers_by_the_script_and_keeps_the_calls(self) -> None:
        """Replies come one after the other, the last one stays; every call is kept."""
        adapter = FakeAdapter(model_id="m", script=[FakeReply(text="One."), FakeReply(text="Two.")])
        request = ChatRequest([ChatMessage("user", "Hi")])
        assert [(await adapter.chat(request)).content for _ in range(3)] == ["One.", "Two.", "Two."]
        assert [call.body["messages"][0]["content"] for call in adapter.calls] == ["Hi"] * 3

    async def test_a_function_may_decide(self) -> None:
        """The reply may depend on the call."""

        def script(call: Call) -> FakeReply:
            return FakeReply(text=f"{call.operation} it is.")

        reply = await FakeAdapter(script=script).send(_call())
        assert json.loads(reply.body)["choices"][0]["message"]["content"] == "chat it is."

    async def test_a_whole_answer_may_be_given(self) -> None:
        """What the script gives as an answer is the body."""
        reply = await FakeAdapter(script=FakeReply(answer={"choices": []})).send(_call())
        assert json.loads(reply.body) == {"choices": []}

    @pytest.mark.parametrize("status", [None, 529])
    async def test_a_fault_is_raised(self, status: int | None) -> None:
        """The scripted fault comes with its usual status, or with the script's."""
        adapter = FakeAdapter(script=FakeReply(fail=Fault.OVERLOADED, status=status))
        with pytest.raises(BackendError) as caught:
            await adapter.send(_call())
        assert (caught.value.kind, caught.value.status) == (Fault.OVERLOADED, status or 503)

    async def test_latency_moves_the_clock(self) -> None:
        """Two seconds of latency are two seconds on the clock, and beyond the limit a timeout at the limit."""
        clock = FrozenClock()
        adapter = FakeAdapter(script=FakeReply(latency_s=2.0), time=clock)
        await adapter.send(_call())
        assert clock.now_s() == 1002.0
        with pytest.raises(BackendError) as caught:
            await adapter.send(_call(limits=Limits(first_byte_s=0.5)))
        assert (caught.value.kind, clock.now_s()) == (Fault.TIMEOUT, 1002.5)

    async def test_usage_is_counted_or_given(self) -> None:
        """Cached tokens are reported if scripted, and a scripted usage stands as it is."""
        reply = await FakeAdapter(script=FakeReply(text="Two words.", cached_tokens=4)).send(_call())
        assert reply.tally.usage == Usage(9, 2, 11, 4)
        assert json.loads(reply.body)["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
        reply = await FakeAdapter(script=FakeReply(usage=Usage(1, 2, 3))).send(_call())
        assert reply.tally.usage == Usage(1, 2, 3)

    async def test_a_stream_is_whole_or_breaks_where_it_should(self) -> None:
        """Streams end in [DONE] with a full tally; a scripted break lets so many pieces through."""
        reply = await FakeAdapter(script=FakeReply(text="One two.")).send(_call(stream=True))
        assert reply.events is not None
        pieces = [piece async for piece in reply.events]
        assert pieces[-1] == b"data: [DONE]\n\n"
        assert (reply.tally.is_complete, reply.tally.finish_reason, reply.tally.events) == (True, "stop", 5)

        broken = FakeAdapter(script=FakeReply(text="One two.", fail=Fault.DISCONNECTED, fail_after=1))
        reply = await broken.send(_call(stream=True))
        assert reply.events is not None
        for _ in range(2):
            await anext(reply.events)
        with pytest.raises(BackendError) as caught:
            await anext(reply.events)
        assert (caught.value.kind, caught.value.received) == (Fault.DISCONNECTED, True)
        assert reply.tally.is_complete is False

    async def test_leaving_a_stream_is_counted_once(self) -> None:
        """A closed stream counts as cancelled; one that had ended does not."""
        adapter = FakeAdapter()
        left, read = [await adapter.send(_call(stream=True)) for _ in range(2)]
        assert read.events is not None
        _ = [piece async for piece in read.events]
        for reply in (left, left, read):
            await reply.close()
        assert adapter.cancelled == 1

    async def test_health_and_load_are_what_the_test_says(self) -> None:
        """The control calls answer from the fake's fields, and closing is counted."""
        down = EndpointHealth(endpoint="http://a", healthy=False)
        adapter = FakeAdapter(endpoint="http://a", health=down, load=EngineLoad(running=3))
        assert await adapter.health_check() == down
        assert (await adapter.get_load()).running == 3
        assert (await FakeAdapter(endpoint="http://b").health_check()).healthy
        await adapter.aclose()
        assert adapter.closed == 1
