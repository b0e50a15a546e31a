"""Models asked one after the other, for programs that call adapters themselves.

What is retried, in which order and for how long is decided by the rules of `execute.fallback`
(`kvfleet.router.attempts`). A pipeline does more: it ranks, filters, watches health and budgets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.adapters.base import ChatRequest, ChatResponse, InferenceAdapter
from kvfleet.adapters.call import Operation, Tally
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.schema import FallbackConfig, ModelConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.eval.confidence import confidence_of
from kvfleet.router.attempts import FallbackRules
from kvfleet.router.tries import Tries
from kvfleet.router.verdicts import exhausted
from kvfleet.trace import names
from kvfleet.trace.attempts import attempt_attributes, describe_error, describe_tally
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Span, SpanKind, Status, Trace

__all__ = ["EscalationChain", "FallbackChain", "Scorer"]


@attrs.define
class FallbackChain:
    """Models asked one after the other until one answers.

    Args:
        config: Order, number and time limits of the attempts; with ``enabled=False`` only the first is made.
        clock: For the times in an explanation.
    """

    config: FallbackConfig = attrs.field(factory=FallbackConfig)
    clock: Clock = attrs.field(factory=SystemClock, repr=False, eq=False)

    async def execute_with_fallback(
        self,
        primary_model: str,
        adapters: Mapping[str, InferenceAdapter],
        request: ChatRequest,
        explanation: Explanation | None = None,
        fallback_order: Sequence[str] | None = None,
    ) -> ChatResponse:
        """The first answer; who gave it stands in the explanation.

        Args:
            primary_model: Whom to ask first.
            adapters: By model name; a model that has none counts as a failed attempt.
            request: What to ask; its ``model`` does not count.
            explanation: Each attempt is added to its trace, and who answered; one that `Router.simulate` gave, or one
                made for this. Read it afterwards: what was read before is kept as it was.
            fallback_order: Whom to ask next, instead of the configuration's order.

        Raises:
            AttemptsExhaustedError: if nobody answers.
        """
        order = self.config.fallback_order if fallback_order is None else fallback_order
        models = [_replica(name, adapters.get(name)) for name in dict.fromkeys((primary_model, *order))]
        calls = _Calls(adapters, request, None if explanation is None else explanation.trace, self.clock)

        async def attempt(model: ModelConfig, timeout_s: float | None, reason: str) -> ChatResponse:
            response = await calls.make(model, timeout_s, reason)
            calls.gave(model)
            return response

        tries = Tries(rules=FallbackRules.of(self.config), ranked=models, clock=self.clock)
        return await tries.first_answer(attempt, is_stream=False)


Scorer = Callable[[ChatResponse], float | Awaitable[float]]
"""Says how far an answer can be trusted, 0..1; may be async."""


@attrs.define
class EscalationChain:
    """Models asked in order until one gives an answer that can be trusted: the cheapest first, the best last.

    Args:
        chain: The models.
        confidence_threshold: Confidence from which on an answer is given, 0..1.
        clock: For the time each attempt takes.
    """

    chain: Sequence[str] = attrs.field(validator=attrs.validators.min_len(1))
    confidence_threshold: float = attrs.field(default=0.7, validator=[attrs.validators.ge(0), attrs.validators.le(1)])
    clock: Clock = attrs.field(factory=SystemClock, repr=False, eq=False)
    _tells_nothing: set[str] = attrs.field(init=False, factory=set, repr=False, eq=False)

    async def execute_with_escalation(
        self,
        adapters: Mapping[str, InferenceAdapter],
        request: ChatRequest,
        confidence_scorer: Scorer | None = None,
    ) -> tuple[ChatResponse, str]:
        """The first answer that is trusted, or else the most trusted one (the later of equals), and who gave it.

        Args:
            adapters: By model name; a model that has none counts as a failed attempt.
            request: What to ask; its ``model`` does not count.
            confidence_scorer: Judges each answer; by default what it gives away about itself (empty, cut off, a
                refusal) and its tokens' probabilities. These are asked for too, unless ``logprobs`` stands in the
                request's `extra`; a model that refuses to tell them is asked without.

        Raises:
            AttemptsExhaustedError: if nobody answers.
        """
        rules = FallbackRules(max_attempts=len(self.chain))
        queue = [_replica(name, adapters.get(name)) for name in dict.fromkeys(self.chain)]
        calls = _Calls(adapters, request, None, self.clock)
        faults: list[tuple[ModelConfig, BackendError]] = []
        answers: list[tuple[float, ChatResponse, str]] = []
        while queue:
            model = queue.pop(0)
            try:
                response = await self._ask(calls, model, "low_confidence" if answers else "first", confidence_scorer)
            except BackendError as error:
                faults.append((model, error))
                queue = rules.worth_trying(queue, model, error)
                continue
            confidence = await _scored(confidence_scorer or confidence_of, response)
            answers.append((confidence, response, model.name))
            if confidence >= self.confidence_threshold:
                break
        if not answers:
            raise exhausted(faults)
        _, response, name = max(reversed(answers), key=lambda answer: answer[0])
        return response, name

    async def _ask(self, calls: _Calls, model: ModelConfig, reason: str, scorer: Scorer | None) -> ChatResponse:
        """One answer, with its tokens' probabilities if the scorer reads them and the model tells them.

        Raises:
            BackendError: if there is none.
        """
        extra = calls.request.extra
        if scorer is not None or "logprobs" in extra or model.name in self._tells_nothing:
            return await calls.make(model, None, reason)
        try:
            return await calls.make(model, None, reason, extra={**extra, "logprobs": True})
        except BackendError as error:
            if error.kind is not Fault.BAD_REQUEST:
                raise
        response = await calls.make(model, None, reason)
        self._tells_nothing.add(model.name)  # it was that, and will be again
        return response


async def _scored(scorer: Scorer, response: ChatResponse) -> float:
    found = scorer(response)
    return await found if isinstance(found, Awaitable) else found


def _replica(name: str, adapter: InferenceAdapter | None) -> ModelConfig:
    """A model as the rules know it, from its adapter; each is asked once."""
    if adapter is None:
        return ModelConfig(name=name, max_retries=0)
    return ModelConfig(
        name=name,
        endpoint=adapter.endpoint,
        model_id=adapter.model_id,
        timeout_seconds=adapter.timeout,
        max_retries=0,
    )


@attrs.define
class _Calls:
    """Makes attempts by adapters, and writes each into a trace, if there is one."""

    adapters: Mapping[str, InferenceAdapter]
    request: ChatRequest
    trace: Trace | None
    clock: Clock
    _made: int = attrs.field(init=False, default=0)

    async def make(
        self, model: ModelConfig, timeout_s: float | None, reason: str, *, extra: Mapping[str, Any] | None = None
    ) -> ChatResponse:
        """One whole answer, with other `extra` than the request's if there is any.

        Raises:
            BackendError: if there is none.
        """
        self._made += 1
        span = Span(f"{Operation.CHAT} {model.name}", self.clock.time_ns(), kind=SpanKind.CLIENT)
        span.attributes = attempt_attributes(model, Operation.CHAT, number=self._made, reason=reason)
        if self.trace is not None:
            self.trace.spans.append(span)
        try:
            response = await self._ask(model, timeout_s, self.request.extra if extra is None else extra)
        except BackendError as error:
            describe_error(span, error)
            raise
        finally:
            span.end_ns = self.clock.time_ns()
        describe_tally(span, Tally(response.usage, response.finish_reason, response.model))
        span.status = Status.OK
        return response

    async def _ask(self, model: ModelConfig, timeout_s: float | None, extra: Mapping[str, Any]) -> ChatResponse:
        adapter = self.adapters.get(model.name)
        if adapter is None:
            raise BackendError(Fault.NOT_FOUND, f"there is no adapter for {model.name!r}")
        limit_s = adapter.timeout if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await adapter.chat(attrs.evolve(self.request, model="", extra=extra))
        except TimeoutError as error:
            raise BackendError(Fault.TIMEOUT, f"no answer within {limit_s:g} s") from error
        except BackendError:
            raise
        except Exception as error:
            # The plugin border: an adapter that breaks is a failed attempt, and the next one may work.
            raise BackendError(Fault.PROTOCOL, f"the adapter failed: {type(error).__name__}") from error

    def gave(self, model: ModelConfig) -> None:
        """Note whose answer is the one."""
        if self.trace is None:
            return
        route = self.trace.route
        route.attributes.pop(names.DRY_RUN, None)  # it was one, and now somebody has answered
        route.attributes |= {
            names.MODEL_SERVED: model.name,
            names.REPLICA_SERVED: model.id,
            names.OUTCOME: "answered",
        }
        route.status, route.end_ns = Status.OK, self.clock.time_ns()
