"""One request from its arrival to the end of its answer: decide, execute, and close the books exactly once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import attrs
import orjson

from kvfleet.adapters.base import InferenceAdapter
from kvfleet.adapters.call import Tally, Usage
from kvfleet.builtin.facts import prompt_tokens, work_of
from kvfleet.clock import Clock
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import AdmissionError, BackendError, DeadlineExceededError, Fault, NoCandidatesError, RouteError
from kvfleet.pipeline.attempt import Attempts
from kvfleet.pipeline.deadline import Deadline
from kvfleet.pipeline.engine import Decision
from kvfleet.pipeline.stage import BoundStage, Pipeline
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Answer, Outcome, RoutingContext, Unused
from kvfleet.telemetry.cost import cost_usd
from kvfleet.telemetry.reservations import Work
from kvfleet.trace import names
from kvfleet.trace.otel import Bridge, RouteHandle
from kvfleet.trace.spans import AttributeValue, Span, SpanKind, Status, Trace

__all__ = ["Route"]

log = logging.getLogger(__name__)


@attrs.define(kw_only=True)
class Route:
    """One live request.

    Attributes:
        closed: Told once, with the outcome, when the answer has ended, however it ended.
        keeps_content: True to put prompt and answer into the trace (`telemetry.capture_content`).
        wants_content: True if a component asked to be told the answer with the outcome.
    """

    pipeline: Pipeline
    ctx: RoutingContext
    select: BoundStage
    adapters: Mapping[str, InferenceAdapter]
    services: Services
    bridge: Bridge
    clock: Clock
    fleet: str
    kind: SpanKind
    closed: Callable[[Outcome], None]
    keeps_content: bool = False
    wants_content: bool = False
    trace: Trace = attrs.field(init=False)
    decision: Decision = attrs.field(init=False)
    _handle: RouteHandle = attrs.field(init=False)
    _started_s: float = attrs.field(init=False, default=0.0)
    _deadline: Deadline = attrs.field(init=False)
    _ttfb_s: float | None = attrs.field(init=False, default=None)
    _content: bytes = attrs.field(init=False, default=b"", repr=False)
    _attempts: Attempts | None = attrs.field(init=False, default=None)
    _is_closed: bool = attrs.field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        """Start the clock and the live span."""
        request = self.ctx.request
        self._started_s = self.ctx.now_s
        start_ns = self.clock.time_ns()
        self._handle = self.bridge.start_route(
            names.ROUTE_SPAN,
            kind=self.kind,
            start_ns=start_ns,
            traceparent=request.traceparent,
            tracestate=request.tracestate,
        )
        span = Span(names.ROUTE_SPAN, start_ns, kind=self.kind, span_id=self._handle.span_id)
        span.attributes = route_attributes(self.ctx, self.fleet, self.pipeline, self.select)
        if self.keeps_content:
            span.attributes[names.PROMPT] = orjson.dumps(request.body).decode()
        self.trace = Trace(self._handle.trace_id, [span], self._handle.parent_span_id)
        self._deadline = deadline = Deadline.of(request, self._started_s)
        if deadline.is_set:
            span.attributes[names.DEADLINE_S], span.attributes[names.DEADLINE_BY] = deadline.told(self._started_s)
        self.decision = Decision(self.pipeline, self.ctx, self.trace, self.clock)

    async def run(self) -> Answer:
        """The answer; for a stream, its beginning.

        Raises:
            RouteError: with ``.trace``, if there is none.
        """
        try:
            if not self._deadline.is_set:
                return await self._run()
            async with asyncio.timeout(self._deadline.first_s - self.clock.now_s()):
                return await self._run()
        except RouteError as error:
            self._fail(error)
            raise
        except TimeoutError as error:
            late = self._too_late()
            self._fail(late)
            raise late from error
        except asyncio.CancelledError:
            self._fail(_client_left())
            raise
        except Exception as error:
            # The plugin border: an executor may raise anything, and the books must still be closed.
            failed = RouteError(f"the route failed: {type(error).__name__}")
            self._fail(failed)
            raise failed from error

    async def _run(self) -> Answer:
        decision = self.decision
        answer = await decision.run(self.select)
        self.ctx = decision.ctx
        if answer is not None:
            return self._short_circuit(answer)
        ranking = decision.ranking
        assert ranking is not None  # noqa: S101 - `Decision.run` sets it or answers or raises
        first = ranking.models[0]
        attributes = self.trace.route.attributes
        attributes[names.MODEL_SELECTED] = first.name
        attributes[names.REPLICA_SELECTED] = first.id
        self._attempts = attempts = Attempts(
            request=self.ctx.request,
            adapters=self.adapters,
            services=self.services,
            bridge=self.bridge,
            handle=self._handle,
            trace=self.trace,
            clock=self.clock,
            begins=self._attempt_begins,
            on_end=self._attempt_ended,
            prompt_tokens=lambda: prompt_tokens(self.ctx),
            keeps_content=self.keeps_content or self.wants_content,
            deadline=self._deadline,
            passes_native=self.pipeline.passes_native,
            passes_bytes=self.pipeline.passes_bytes,
        )
        given: Answer = await self.pipeline.execute.run(self.ctx, ranking, attempts)
        attributes.update(given.details)
        if not attempts.give(given):
            return self._short_circuit(given)
        if self._ttfb_s is None:
            self._ttfb_s = self.clock.now_s() - self._started_s
        return given

    def _short_circuit(self, answer: Answer) -> Answer:
        self._ttfb_s = self.clock.now_s() - self._started_s
        reply = answer.reply
        if reply.events is None:
            self._close("cached", None, reply.tally, None)
            return answer
        events = reply.events

        async def relay() -> AsyncIterator[bytes]:
            async for piece in events:
                yield piece
            self._close("cached", None, reply.tally, None)

        async def close() -> None:
            self._close("cancelled", None, reply.tally, _client_left())
            await reply.close()

        return Answer(reply.followed(relay(), close), answer.served_by)

    def _attempt_begins(self, model: ModelConfig) -> Work:
        for stage in self.pipeline.placers:
            stage.component.placed(self.ctx, model)
        return work_of(self.ctx, model)

    def _attempt_ended(self, model: ModelConfig, tally: Tally, error: BackendError | None, content: bytes) -> None:
        """The attempt whose answer was given has ended."""
        self._content = content if self.wants_content and error is None else b""
        if content and self.keeps_content:
            self.trace.route.attributes[names.ANSWER] = content.decode(errors="replace")
        if self._ttfb_s is None:
            self._ttfb_s = self.clock.now_s() - self._started_s
        if error is None:
            self._close("answered", model, tally, None)
        elif error.kind is Fault.CANCELLED:
            self._close("cancelled", model, tally, _client_left())
        else:
            broken = RouteError(f"the answer broke off: {error.message}", status=502, code="stream_interrupted")
            self._close("failed", model, tally, broken)

    def _too_late(self) -> DeadlineExceededError:
        deadline = self._deadline
        given_s = deadline.first_s - self._started_s
        return DeadlineExceededError(
            f"no answer within the request's own {given_s:g} s ({deadline.first_by})",
            details={"limit": deadline.first_by},
        )

    def _fail(self, error: RouteError) -> None:
        error.trace = self.trace
        if stopped := error.details.get("stopped"):
            self.trace.route.attributes[names.RETRY_STOPPED] = stopped
        if isinstance(error, NoCandidatesError):
            outcome = "no_candidates"
        elif isinstance(error, AdmissionError):
            outcome = "refused"
        else:
            outcome = "cancelled" if error.code == "client_left" else "failed"
        self._close(outcome, None, None, error)

    def _close(self, word: str, model: ModelConfig | None, tally: Tally | None, error: RouteError | None) -> None:
        """Close the books, once: the span, the leases, the observers, the export."""
        if self._is_closed:
            return
        self._is_closed = True
        usage = tally.usage if tally is not None else None
        attempts, self._attempts = self._attempts, None
        unused = attempts.close() if attempts is not None else ()
        cost = _cost_of(model, usage, unused)
        span = self.trace.route
        span.end_ns = self.clock.time_ns()
        self._describe_end(span, word, model, error, cost)
        outcome = Outcome(
            context=self.ctx,
            trace=self.trace,
            ranking=self.decision.ranking,
            served_by=model,
            usage=usage,
            unused=unused,
            error=error,
            cost_usd=cost,
            ttfb_s=self._ttfb_s,
            duration_s=self.clock.now_s() - self._started_s,
            traceparent=self._handle.traceparent,
            content=self._content,
        )
        for lease in self.decision.leases:
            lease.release(outcome)
        for stage in self.pipeline.markers:
            self._mark(stage, outcome)
        self.bridge.end_route(self._handle, self.trace)
        self.closed(outcome)

    def _mark(self, stage: BoundStage, outcome: Outcome) -> None:
        try:
            self.trace.route.attributes.update(stage.component.mark(outcome))
        except Exception as error:  # noqa: BLE001 - the plugin border: an observer must not cost the answer
            log.warning("marking failed stage=%s error=%s", stage.key, type(error).__name__)

    def _describe_end(
        self, span: Span, word: str, model: ModelConfig | None, error: RouteError | None, cost: float | None
    ) -> None:
        attributes = span.attributes
        attributes[names.OUTCOME] = word
        if self._ttfb_s is not None:
            attributes[names.TTFB_S] = self._ttfb_s
        if self._deadline.is_set:
            first_s = None if self._ttfb_s is None else self._started_s + self._ttfb_s
            attributes[names.DEADLINE_LEFT_S] = self._deadline.left_s(self.clock.now_s(), first_s)
        if model is not None:
            attributes[names.MODEL_SERVED] = model.name
            attributes[names.REPLICA_SERVED] = model.id
        if cost is not None:
            attributes[names.COST_USD] = cost
        if error is None:
            span.status = Status.OK
            return
        span.fail(error.message)
        attributes[names.ERROR_TYPE] = error.code
        attributes[names.STATUS_CODE] = error.status


def _cost_of(model: ModelConfig | None, usage: Usage | None, unused: Sequence[Unused]) -> float | None:
    """What the route cost: the answer that was given, and those that were not; None if one of them is not known."""
    costs = [one.cost_usd for one in unused]
    if model is not None:
        costs.append(None if usage is None else cost_usd(model, usage))
    known = [cost for cost in costs if cost is not None]
    return sum(known) if costs and len(known) == len(costs) else None


def _client_left() -> RouteError:
    return RouteError("the client left", status=499, code="client_left")


def route_attributes(
    ctx: RoutingContext, fleet: str, pipeline: Pipeline, select: BoundStage
) -> dict[str, AttributeValue]:
    """What the route's span says from the start."""
    request = ctx.request
    attributes: dict[str, AttributeValue] = {
        names.REQUEST_ID: request.request_id,
        names.OPERATION: request.operation.value,
        names.MODEL_REQUESTED: request.model,
        names.STREAM: request.stream,
        names.DATA_CLASS: ctx.data_class,
        names.FLEET: fleet,
        names.PIPELINE_HASH: pipeline.hash,
        names.SEED: ctx.seed,
        names.CANDIDATES: tuple([c.id for c in ctx.candidates]),
        names.STRATEGY: select.name,
        names.STRATEGY_OVERRIDDEN: request.is_override,
    }
    if request.key:
        attributes[names.KEY] = request.key
    if ctx.tenant:
        attributes[names.TENANT] = ctx.tenant
    if ctx.region:
        attributes[names.REGION] = ctx.region
    if ctx.dry_run:
        attributes[names.DRY_RUN] = True
    return attributes
