"""One backend call: its live span, its limits, its error mapping, its bookkeeping.

The commit point is the first byte: until an attempt returns, nothing has reached the client, and another may be made.
After that a stream ends in exactly one of three ways: complete, failed, or left by the client.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping

import anyio.to_thread
import attrs

from kvfleet.adapters.base import InferenceAdapter
from kvfleet.adapters.call import Call, Reply, Tally, Usage
from kvfleet.adapters.native import fitted
from kvfleet.clock import Clock
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.pipeline.deadline import Deadline, Named
from kvfleet.pipeline.relayed import Kept, Relay, adapter_broke, deadline_passed
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Answer, Rewrite, RouteRequest, Unused
from kvfleet.telemetry.cost import cost_usd
from kvfleet.telemetry.fleet_limits import LimitTicket
from kvfleet.telemetry.reservations import Reservation, Work
from kvfleet.trace import names
from kvfleet.trace.attempts import attempt_attributes, describe_error, describe_tally
from kvfleet.trace.otel import AttemptHandle, Bridge, RouteHandle
from kvfleet.trace.spans import Span, SpanKind, Status, Trace

__all__ = ["Attempts"]


@attrs.define(kw_only=True)
class Attempts:
    """Makes the attempts of one route; what an executor is given to call.

    Attributes:
        begins: Told when a call to a replica begins; what the call means for it.
        on_end: Told when the answer that was given ends, with its error if it broke off, and its bytes if kept.
        prompt_tokens: About how many tokens the prompt has, for answers that are not read to their end.
        keeps_content: True to keep the answer's bytes, for the trace or for a component that asked for them.
        deadline: When the request's own time is up.
        passes_native: True if an answer may be in the words of another API than OpenAI's chat, since nobody on the way
            reads it.
        passes_bytes: True if the request's bytes may go on as they came, also to models that are not private.
    """

    request: RouteRequest
    adapters: Mapping[str, InferenceAdapter]
    services: Services
    bridge: Bridge
    handle: RouteHandle
    trace: Trace
    clock: Clock
    begins: Callable[[ModelConfig], Work]
    on_end: Callable[[ModelConfig, Tally, BackendError | None, bytes], None]
    prompt_tokens: Callable[[], int] = lambda: 0
    keeps_content: bool = False
    deadline: Deadline = Deadline()
    passes_native: bool = False
    passes_bytes: bool = True
    _made: int = attrs.field(init=False, default=0)
    _answered: list[_One] = attrs.field(init=False, factory=list)
    _goes_on: bool = attrs.field(init=False, default=False)

    async def __call__(
        self,
        candidate: ModelConfig,
        *,
        timeout_s: float | None = None,
        reason: str = "first",
        rewrite: Rewrite | None = None,
    ) -> Answer:
        """See `kvfleet.plugin.contract.Attempt`."""
        now_s = self.clock.now_s()
        deadline = self.deadline.amid(now_s) if self._goes_on else self.deadline
        named = deadline.limits(candidate, timeout_s, now_s)
        self._made += 1
        one = _One(self, candidate, self._made, self._begin(candidate, reason), named, rewrite)
        one.is_part = self._goes_on
        if deadline.is_set:
            one.begun[0].attributes[names.DEADLINE_LEFT_S] = deadline.first_s - now_s
        if rewrite is not None and rewrite.types:
            one.begun[0].attributes[names.REDACTED] = tuple(rewrite.types)
        try:
            reply = await one.call()
        except BackendError as error:
            told = named.name(error)
            one.end(None, told)
            if told is error:
                raise
            raise told from error
        except asyncio.CancelledError:
            one.end(None, self._why_cancelled())
            raise
        except Exception as error:
            # The plugin border: an adapter that breaks is a failed attempt, and the books must be closed.
            broken = adapter_broke(error, received=False)
            one.end(None, broken)
            raise broken from error
        one.tally = reply.tally
        self._answered.append(one)
        return Answer(reply, candidate, attempt=one.number)

    def give(self, answer: Answer) -> bool:
        """Note which answer the caller gets: its end is the route's. False if no attempt made it."""
        if not self._answered:
            return False
        tally = answer.reply.tally
        found = next((one for one in reversed(self._answered) if one.tally is tally), self._answered[-1])
        if len(self._answered) > 1:
            self.trace.route.attributes[names.ATTEMPT_SERVED] = found.number
        if answer.goes_on:
            self._follow(answer, found)
        else:
            found.give()
        return True

    def _follow(self, answer: Answer, first: _One) -> None:
        """Have the route end with the whole stream, whichever attempts it takes."""
        reply, kept = answer.reply, Kept() if self.keeps_content else None
        events = reply.events
        assert events is not None  # noqa: S101 - only a stream goes on
        self._goes_on = first.is_part = True
        before = len(self._answered)

        def ended(error: BackendError | None) -> None:
            last = self._answered[-1]
            last.is_given = True
            if len(self._answered) > before:
                attributes = self.trace.route.attributes
                attributes[names.CONTINUED] = len(self._answered) - before
                attributes[names.ATTEMPT_SERVED] = last.number
            self.on_end(last.candidate, last.tally or reply.tally, error, bytes(kept.pieces) if kept else b"")

        relay = Relay(None, events, ended, kept)

        async def close() -> None:
            try:
                await reply.close()
            finally:
                relay.leave()

        answer.reply = reply.followed(relay, close)

    def close(self) -> tuple[Unused, ...]:
        """Let go of the answers: what those came to that the caller does not get.

        They know us, as we know them: who lets go lets their memory be used by the next request, and not only once the
        garbage collector has come by.
        """
        answered, self._answered = self._answered, []
        return tuple([one.unused for one in answered if not one.is_given])

    def _why_cancelled(self) -> BackendError:
        """A cancelled attempt: the request's own deadline has passed, or nobody waits for it any more."""
        if self.deadline.is_set and self.deadline.passed(self.clock.now_s()):
            return deadline_passed(self.deadline.first_by)
        return BackendError(Fault.CANCELLED, "the call was given up")

    def _begin(self, candidate: ModelConfig, reason: str) -> tuple[Span, AttemptHandle]:
        operation = self.request.operation
        span = Span(f"{operation} {candidate.name}", self.clock.time_ns(), kind=SpanKind.CLIENT)
        handle = self.bridge.start_attempt(self.handle, span.name, span.start_ns)
        span.span_id = handle.span_id
        span.attributes = attempt_attributes(candidate, operation, number=self._made, reason=reason)
        self.trace.add(span)
        return span, handle

    def call_for(
        self, candidate: ModelConfig, handle: AttemptHandle, named: Named, rewrite: Rewrite | None = None
    ) -> Call:
        """The call, with the context it travels under."""
        request = self.request
        headers = [*request.headers, ("x-request-id", request.request_id), ("traceparent", handle.traceparent)]
        if handle.tracestate:
            headers.append(("tracestate", handle.tracestate))
        call = Call(
            operation=request.operation,
            body=request.body if rewrite is None else rewrite.body,
            raw=request.raw if rewrite is None and (self.passes_bytes or candidate.is_private) else b"",
            stream=request.stream,
            headers=tuple(headers),
            limits=named.limits,
            ask_usage=candidate.stream_usage,
        )
        if request.native is None:
            return call
        may_pass = self.passes_native and rewrite is None and not self.keeps_content
        return fitted(call, request.native, self.adapters[candidate.id], may_pass=may_pass)


@attrs.define
class _One:
    """One attempt under way.

    Attributes:
        named: Its time limits.
        tally: What was learned of its answer; None before there is one.
        is_given: True once it is the answer that the caller gets.
        is_part: True if it is, or may become, a part of that answer.
    """

    attempts: Attempts
    candidate: ModelConfig
    number: int
    begun: tuple[Span, AttemptHandle]
    named: Named
    rewrite: Rewrite | None = None
    tally: Tally | None = attrs.field(init=False, default=None)
    is_given: bool = attrs.field(init=False, default=False)
    is_part: bool = attrs.field(init=False, default=False)
    started_s: float = attrs.field(init=False, default=0.0)
    _ended: tuple[Tally, BackendError | None, bytes] | None = attrs.field(init=False, default=None)
    _is_discarded: bool = attrs.field(init=False, default=False)
    _reserved: Reservation | None = attrs.field(init=False, default=None)
    _limits: LimitTicket = attrs.field(init=False)
    _is_over: bool = attrs.field(init=False, default=False)

    @_limits.default
    def _ask_limits(self) -> LimitTicket:
        return self.attempts.services.limits.begin(self.candidate.id)

    async def call(self) -> Reply:
        """Call, and wait for the first byte."""
        made, candidate = self.attempts, self.candidate
        self.started_s = made.clock.now_s()
        if not made.services.health.begin(candidate.endpoint):
            raise BackendError(Fault.CIRCUIT_OPEN, "its circuit breaker is half-open, and another call is its probe")
        is_large = made.request.is_large
        if is_large:
            await asyncio.sleep(0)
        self._reserved = reserved = made.services.load.started(candidate.id, made.begins(candidate))
        if is_large and made.request.native is not None:  # each of its messages may have to be written anew
            call = await anyio.to_thread.run_sync(made.call_for, candidate, self.begun[1], self.named, self.rewrite)
        else:
            if is_large:
                await asyncio.sleep(0)
            call = made.call_for(candidate, self.begun[1], self.named, self.rewrite)
        reply = await made.adapters[candidate.id].send(call)
        left = self._limits.heard(reply.headers)
        if left is not None:
            self.begun[0].attributes[names.RATE_LIMIT_LEFT] = left
        if self.rewrite is not None:
            reply = self.rewrite.restore(reply)
        if reply.events is None:
            usage = reply.tally.usage
            made.services.load.answered(reserved, self._first_byte(), usage.completion_tokens if usage else None)
            self._answer_ended(reply.tally, None, reply.body if made.keeps_content else b"")
            return reply
        first = await self._first_event(reply)
        made.services.load.first_byte(reserved, self._first_byte())
        kept = Kept() if made.keeps_content else None
        deadline = made.deadline
        left_s = (lambda: deadline.whole_s - made.clock.now_s()) if deadline.whole_s != math.inf else None

        def ended(error: BackendError | None) -> None:
            self._stream_ended(reply.tally, error, kept)

        relay = Relay(first, reply.events, ended, kept, left_s, deadline.whole_by)

        async def close() -> None:
            self._is_discarded = not (
                self.is_given or self.is_part
            )  # by the executor then: no client has seen anything of it
            relay.leave()
            await reply.close()

        return reply.followed(relay, close)

    async def _first_event(self, reply: Reply) -> bytes:
        wait_s = self.named.limits.first_byte_s
        left_s = wait_s - (self.attempts.clock.now_s() - self.started_s)
        events = reply.events
        try:
            async with asyncio.timeout(max(left_s, 0.0)):
                return await anext(events)  # type: ignore[arg-type]
        except TimeoutError as error:
            await reply.close()
            raise BackendError(Fault.TIMEOUT, "the backend sent no first token in time") from error
        except StopAsyncIteration as error:
            raise BackendError(Fault.DISCONNECTED, "the stream ended before it began") from error
        except asyncio.CancelledError:
            await reply.close()
            raise

    def _first_byte(self) -> float:
        """Note the time to the first byte, in seconds."""
        ttfb_s = self.attempts.clock.now_s() - self.started_s
        self.begun[0].attributes[names.TTFB_S] = ttfb_s
        return ttfb_s

    def _stream_ended(self, tally: Tally, error: BackendError | None, kept: Kept | None) -> None:
        if self._is_discarded:
            self.begun[0].attributes[names.ATTEMPT_DISCARDED] = True
            error = None
        if error is not None:
            self.named.name(error)
        self._answer_ended(tally, error, bytes(kept.pieces) if kept else b"")

    def _answer_ended(self, tally: Tally, error: BackendError | None, content: bytes) -> None:
        self.end(tally, error)
        self._ended = (tally, error, content)
        if self.is_given:
            self.attempts.on_end(self.candidate, *self._ended)

    def give(self) -> None:
        """This is the answer that the caller gets."""
        self.is_given = True
        if self._ended is not None:
            self.attempts.on_end(self.candidate, *self._ended)

    @property
    def unused(self) -> Unused:
        """What it came to, for nobody; of an answer that was not read to its end, about that."""
        usage = self.tally.usage if self.tally is not None else None
        if usage is None and (self._is_discarded or self.is_part) and self.tally is not None:
            prompt, answer = self.attempts.prompt_tokens(), self.tally.events
            usage = Usage(prompt, answer, prompt + answer)
        cost = None if usage is None else cost_usd(self.candidate, usage)
        return Unused(model=self.candidate, usage=usage, cost_usd=cost)

    def end(self, tally: Tally | None, error: BackendError | None) -> None:
        """Close the books of this attempt; once."""
        if self._is_over:
            return
        self._is_over = True
        made, candidate = self.attempts, self.candidate
        span, handle = self.begun
        span.end_ns = made.clock.time_ns()
        if tally is not None:
            describe_tally(span, tally)
        usage = tally.usage if tally is not None else None
        tokens = usage.completion_tokens if usage else None
        if self._reserved is not None:
            duration_s = made.clock.now_s() - self.started_s
            made.services.load.finished(self._reserved, duration_s, ok=error is None, completion_tokens=tokens)
        self._limits.ended(error, usage.prompt_tokens + usage.completion_tokens if usage else 0)
        health = made.services.health
        if error is None:
            span.status = Status.OK
            health.record_success(candidate.endpoint)
        else:
            describe_error(span, error)
            health.record_failure(candidate.endpoint, error.kind)
        made.bridge.end_attempt(handle, span)
