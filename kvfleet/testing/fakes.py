"""Fakes at the seams: a clock one can sleep on, and an adapter that answers from a script.

They are for tests of plugins, of pipelines and of kvfleet itself. For an engine that behaves like one (queue, prefix
cache, timing) there is `kvfleet.adapters.mock.MockAdapter`.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import orjson

from kvfleet.adapters.base import EndpointHealth, EngineLoad, InferenceAdapter
from kvfleet.adapters.call import Call, Reply, Tally, Usage
from kvfleet.adapters.mock import injected_fault
from kvfleet.adapters.mock_wire import Part, Work, Writer, plan
from kvfleet.clock import FrozenClock
from kvfleet.errors import BackendError, Fault

__all__ = ["FakeAdapter", "FakeReply", "VirtualTime"]

_SETTLE = 25  # loop turns in which everything that was woken comes to rest; none of our chains of wake-ups is longer


@attrs.define
class VirtualTime(FrozenClock):
    """A frozen clock one can also sleep on: whoever sleeps wakes when the test lets that much time pass.

    >>> async def demo() -> float:
    ...     time = VirtualTime()
    ...     async with anyio.create_task_group() as group:
    ...         group.start_soon(time.sleep, 30.0)
    ...         await time.pass_s(60.0)
    ...     return time.now_s()
    >>> anyio.run(demo)
    1060.0
    """

    _sleepers: list[tuple[float, int, anyio.Event]] = attrs.field(init=False, factory=list, repr=False)
    _count: int = attrs.field(init=False, default=0, repr=False)

    async def sleep(self, seconds: float) -> None:
        """Sleep until the clock has been moved that far."""
        if seconds <= 0:
            await anyio.lowlevel.checkpoint()
            return
        self._count += 1
        event = anyio.Event()
        heapq.heappush(self._sleepers, (self.seconds + seconds, self._count, event))
        await event.wait()

    async def pass_s(self, seconds: float) -> None:
        """Let time pass, waking each sleeper at its own moment, those that fall asleep again meanwhile included."""
        end = self.seconds + seconds
        await self.settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            at, _, event = heapq.heappop(self._sleepers)
            self.seconds = max(self.seconds, at)
            event.set()
            await self.settle()
        self.seconds = end

    async def settle(self) -> None:
        """Let every task run until it waits for something."""
        for _ in range(_SETTLE):
            await anyio.lowlevel.checkpoint()


@attrs.frozen(kw_only=True)
class FakeReply:
    """What a `FakeAdapter` does with one call.

    Attributes:
        text: What it says.
        fail: The fault it raises instead.
        status: The HTTP status of the fault, if not the usual one.
        retry_after_s: Seconds the refusal asks to wait, if not the usual one's.
        headers: Headers of the answer or the refusal, lower-case.
        fail_after: For a stream: pieces of the answer that get through before the fault.
        latency_s: Time until the answer (for a stream: its first event); beyond the call's limit it is a timeout.
        cached_tokens: Prompt tokens reported as cached; not reported if None.
        usage: Tokens reported, if not those counted.
        answer: A whole OpenAI answer to give instead of one made from `text`.
        token_probability: How sure it is of each token, told where `logprobs` are asked for; None if it never tells.
    """

    text: str = "This is a fake answer."
    fail: Fault | None = None
    status: int | None = None
    retry_after_s: float | None = None
    headers: Mapping[str, str] = attrs.field(factory=dict)
    fail_after: int = 0
    latency_s: float = 0.0
    cached_tokens: int | None = None
    usage: Usage | None = None
    answer: Mapping[str, Any] | None = None
    token_probability: float | None = None


Script = FakeReply | Callable[[Call], FakeReply] | Iterable[FakeReply]


@attrs.define(kw_only=True)
class FakeAdapter(InferenceAdapter):
    """An adapter that answers from a script and keeps what it was asked.

    Args:
        script: One reply for every call, a function from the call to its reply, or replies one after the other, of
            which the last stays.
        time: The clock that a reply's latency moves; without one, latency takes no time.
        health: What `health_check` says; healthy if None.
        load: What `get_load` says.

    >>> from kvfleet.adapters.base import ChatMessage, ChatRequest
    >>> adapter = FakeAdapter(model_id="m", script=FakeReply(text="Hello."))
    >>> anyio.run(adapter.chat, ChatRequest([ChatMessage("user", "Hi")])).content
    'Hello.'
    >>> adapter.calls[0].body["messages"]
    [{'role': 'user', 'content': 'Hi'}]
    """

    script: Script = attrs.field(factory=FakeReply)
    time: FrozenClock | None = None
    health: EndpointHealth | None = None
    load: EngineLoad = EngineLoad()
    calls: list[Call] = attrs.field(init=False, factory=list)
    closed: int = attrs.field(init=False, default=0)
    cancelled: int = attrs.field(init=False, default=0)
    _replies: list[FakeReply] = attrs.field(init=False, factory=list)

    def __attrs_post_init__(self) -> None:
        if not callable(self.script) and not isinstance(self.script, FakeReply):
            self._replies = list(self.script)

    async def send(self, call: Call) -> Reply:
        """Answer as the script says.

        Raises:
            BackendError: the scripted fault, or a timeout if the scripted latency is beyond the call's limit.
        """
        self.calls.append(call)
        reply = self._reply_to(call)
        self._let_pass(reply, call.limits.first_byte_s)
        if reply.fail is not None and not (call.stream and reply.fail_after):
            raise _fault(reply)
        work = plan(call.operation, call.body, reply.text, dimensions=8, probability=reply.token_probability)
        usage = reply.usage or _usage(work, reply.cached_tokens)
        tally = Tally(model=self.model_id, response_id=f"fake-{len(self.calls)}")
        writer = Writer(operation=call.operation, id=tally.response_id, created=0, model=self.model_id, work=work)
        if call.stream and work.choices:
            stream = _Stream(writer, usage, tally, reply)
            return Reply(headers=reply.headers, events=stream, tally=tally, close=self._closer(stream))
        tally.usage, tally.is_complete = usage, True
        tally.finish_reason = work.choices[0].finish_reason if work.choices else "stop"
        body = writer.whole(usage) if reply.answer is None else orjson.dumps(reply.answer)
        return Reply(headers=reply.headers, body=body, tally=tally)

    async def health_check(self) -> EndpointHealth:
        """What the test said."""
        return self.health or EndpointHealth(endpoint=self.endpoint, healthy=True, models=(self.model_id,))

    async def get_load(self) -> EngineLoad:
        """What the test said."""
        return self.load

    async def aclose(self) -> None:
        """Count it."""
        self.closed += 1

    def _reply_to(self, call: Call) -> FakeReply:
        if isinstance(self.script, FakeReply):
            return self.script
        if callable(self.script):
            return self.script(call)
        return self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]

    def _let_pass(self, reply: FakeReply, limit_s: float) -> None:
        if self.time is not None:
            self.time.advance(min(reply.latency_s, limit_s))
        if reply.latency_s > limit_s:
            raise BackendError(Fault.TIMEOUT, "the backend sent no answer in time")

    def _closer(self, stream: _Stream) -> Callable[[], Any]:
        async def close() -> None:
            if stream.leave():
                self.cancelled += 1

        return close


def _fault(reply: FakeReply, *, received: bool = False) -> BackendError:
    error = injected_fault(reply.fail or Fault.SERVER_ERROR, received=received)
    if reply.status is not None:
        error.status = reply.status
    if reply.retry_after_s is not None:
        error.retry_after_s = reply.retry_after_s
    error.headers = reply.headers
    return error


def _usage(work: Work, cached_tokens: int | None) -> Usage:
    prompt, output = work.prompt_tokens, work.output_tokens
    return Usage(prompt, output, prompt + output, cached_tokens)


class _Stream(AsyncIterator[bytes]):
    """A scripted stream: its events at once, or some of them and then the fault."""

    def __init__(self, writer: Writer, usage: Usage, tally: Tally, reply: FakeReply) -> None:
        self._events = writer.chunks(usage)
        self._usage, self._tally, self._reply = usage, tally, reply
        self._finish_reason = writer.work.choices[0].finish_reason
        self._left_to_fail = reply.fail_after if reply.fail is not None else None
        self._is_over = False

    async def __anext__(self) -> bytes:
        part, event = (None, b"") if self._is_over else next(self._events, (None, b""))
        if part is None:
            raise StopAsyncIteration
        if part is Part.TOKEN and self._left_to_fail is not None:
            if not self._left_to_fail:
                self._is_over = True
                raise _fault(self._reply, received=True)
            self._left_to_fail -= 1
        if part is Part.DONE:
            self._is_over = self._tally.is_complete = True
            self._tally.usage = self._usage
            self._tally.finish_reason = self._finish_reason
        self._tally.events += event.count(b"\n\n")
        await anyio.lowlevel.checkpoint()  # as from a network: others have their turn, too
        return event

    def leave(self) -> bool:
        """End it; True if it was still going on."""
        was_going, self._is_over = not self._is_over, True
        return was_going
