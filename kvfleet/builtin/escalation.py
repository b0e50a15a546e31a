"""One request on its way up: who is asked, what is thought of the answers, and which of them is given in the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import attrs

from kvfleet.adapters.base import ChatResponse
from kvfleet.adapters.call import Reply, Tally
from kvfleet.builtin.beside import judging_replica
from kvfleet.builtin.execute import Fallback
from kvfleet.builtin.facts import answer_tokens, prompt_tokens
from kvfleet.builtin.held import Held, response_of
from kvfleet.builtin.logprobs import Logprobs
from kvfleet.builtin.panel import Panel
from kvfleet.config.fields import choice, number
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Answer, Attempt, RoutingContext
from kvfleet.plugin.judging import Grade, Submission
from kvfleet.router.verdicts import exhausted
from kvfleet.telemetry.cost import Price, cost_usd
from kvfleet.trace import names
from kvfleet.trace.spans import AttributeValue

__all__ = ["Escalation", "EscalationRules"]

T = TypeVar("T")

_ANSWER_TOKENS = 1024
_MARGIN_S = 0.25
"""Kept of the request's own deadline for giving the answer there is."""


@attrs.define(kw_only=True)
class EscalationRules(Fallback):
    """When an answer is trusted, and how much of a stream is read to tell."""

    threshold: float = number(0.7, ge=0, le=1, doc="Confidence from which on an answer is given.")
    if_unknown: str = choice(
        "accept", of=("accept", "escalate"), doc="What happens to an answer of which no judge can tell."
    )
    streams: str = choice(
        "beginning", of=("beginning", "whole"), doc="How much of a stream is read before it is judged and passed on."
    )
    beginning_tokens: int = number(32, ge=1, unit="tokens", doc="Tokens of a stream's beginning.")
    most_held_bytes: int = number(
        262_144, ge=1024, unit="bytes", doc="Most that is held back of a stream; then what there is is judged."
    )

    @property
    def reads_answers(self) -> bool:
        """True: judging one is reading it."""
        return True

    def suffices(self, grade: Grade) -> bool:
        """True if an answer of this grade is given at once."""
        return self.if_unknown == "accept" if grade.score is None else grade.score >= self.threshold


@attrs.define(kw_only=True)
class Escalation:
    """The attempts of one request.

    Attributes:
        rules, panel, services: The component's.
        ctx, attempt: What the engine gave it.
        tells_nothing: Replicas that refuse to tell their tokens' probabilities; shared between requests.
    """

    rules: EscalationRules
    panel: Panel
    services: Services
    ctx: RoutingContext
    attempt: Attempt
    tells_nothing: set[str]
    judged: list[Held] = attrs.field(init=False, factory=list)
    stopped: str = attrs.field(init=False, default="nobody_left")
    _held: list[Held] = attrs.field(init=False, factory=list)
    _faults: list[tuple[ModelConfig, BackendError]] = attrs.field(init=False, factory=list)
    _made: list[tuple[ModelConfig, Tally]] = attrs.field(init=False, factory=list)
    _out_of: str = attrs.field(init=False, default="")

    async def run(self, ranked: Sequence[ModelConfig]) -> Answer:
        """The answer that is trusted, or else the best there was.

        Raises:
            AttemptsExhaustedError: if there was none.
        """
        try:
            await self._climb(list(self.rules.order(ranked)))
            if not self._held:
                raise exhausted(self._faults, stopped=self._out_of)
            best = max(reversed(self._held), key=self._worth)
            self._held.remove(best)
        finally:
            for held in self._held:
                if held.is_open:
                    await held.close()
        return attrs.evolve(best.given(), details=self._details())

    async def _climb(self, queue: list[ModelConfig]) -> None:
        """Ask one after the other until an answer is trusted or nobody may be asked any more."""
        reason, left, first = "first", self.rules.max_attempts, queue[0].name
        self.rules.budget.asked(first)
        while queue and left:
            candidate, left = queue.pop(0), left - 1
            try:
                held = await self._in_time(lambda: self._ask(candidate, reason))  # noqa: B023 - awaited at once
            except BackendError as error:
                self._faults.append((candidate, error))
                reason, queue = error.kind.value, self.rules.worth_trying(queue, candidate, error)
                if error.kind is Fault.CIRCUIT_OPEN:  # not called: that is no attempt
                    left += 1
                    continue
                if queue and left and (whose := self.rules.budget.take(first)):
                    self._out_of, queue = f"{whose}_budget", []
                continue
            if held is None:
                self.stopped = "deadline"
                return
            await self._settle(held)
            queue = [model for model in queue if model.name != candidate.name]
            if await self._is_trusted(held, may_go_on=bool(queue and left)):
                return
            reason, queue = "low_confidence", self._affordable(queue)
        if queue:
            self.stopped = "max_attempts"

    async def _settle(self, held: Held) -> None:
        """Keep an answer; a stream that was kept for the case that nothing better came is given up."""
        for before in [one for one in self._held if one.is_open]:
            self._held.remove(before)
            await before.close()
        self._held.append(held)

    async def _is_trusted(self, held: Held, *, may_go_on: bool) -> bool:
        grade = await self._in_time(lambda: self._judge(held, may_ask=may_go_on))
        held.grade = await self._judge(held, may_ask=False) if grade is None else grade
        self.judged.append(held)
        if self.rules.suffices(held.grade):
            self.stopped = "unknown" if held.grade.score is None else "confident"
            return True
        if grade is None:
            self.stopped = "deadline"
        return grade is None

    async def _in_time(self, work: Callable[[], Awaitable[T]]) -> T | None:
        """What the work gives; None if the request's own deadline comes first, and there is an answer to give then."""
        timeout_s = self.ctx.request.timeout_s
        if timeout_s is None or not self._held:
            return await work()
        left_s = self.ctx.now_s + timeout_s - self.services.clock.now_s() - min(_MARGIN_S, timeout_s / 10)
        if left_s <= 0:
            return None
        try:
            async with asyncio.timeout(left_s) as deadline:
                return await work()
        except TimeoutError:
            if not deadline.expired():
                raise
            return None

    # Asking

    async def _ask(self, candidate: ModelConfig, reason: str) -> Held:
        """One answer, held back.

        Raises:
            BackendError: if there is none, or its stream breaks off while nobody has seen anything of it.
        """
        logprobs = self._logprobs(candidate)
        try:
            answer = await self._call(candidate, reason, logprobs)
        except BackendError as error:
            if logprobs is None or not logprobs.hides or error.kind is not Fault.BAD_REQUEST:
                raise
            answer = await self._call(candidate, reason, None)
            self.tells_nothing.add(candidate.id)  # it was that, and will be again
            logprobs = None
        rules = self.rules
        most_tokens = rules.beginning_tokens if rules.streams == "beginning" else None
        try:
            held = await Held.of(answer, candidate, most_tokens=most_tokens, most_bytes=rules.most_held_bytes)
        except BaseException:
            await answer.reply.close()
            raise
        held.logprobs = logprobs
        return held

    def _logprobs(self, candidate: ModelConfig) -> Logprobs | None:
        if not self.panel.wants_logprobs or candidate.id in self.tells_nothing:
            return None
        return Logprobs.of(self.ctx.request)

    async def _call(self, candidate: ModelConfig, reason: str, rewrite: Any) -> Answer:
        timeout_s = self.rules.timeout_s(candidate, is_stream=self.ctx.request.stream)
        answer = await self.attempt(candidate, timeout_s=timeout_s, reason=reason, rewrite=rewrite)
        self._made.append((candidate, answer.reply.tally))
        return answer

    # Judging

    async def _judge(self, held: Held, *, may_ask: bool) -> Grade:
        if held.response is None:
            return Grade(None, "the answer cannot be read")
        values = held.logprobs.values if held.logprobs is not None else None

        async def ask(body: Mapping[str, Any], *, model: str = "") -> ChatResponse:
            return await self._ask_for_judge(held, body, model)

        submission = Submission(
            ctx=self.ctx,
            model=held.model,
            response=held.response,
            is_whole=not held.is_open,
            logprobs=values or None,
            ask=ask,
        )
        return await self.panel.grade(submission, enough=self.rules.threshold, may_ask=may_ask)

    async def _ask_for_judge(self, held: Held, body: Mapping[str, Any], name: str) -> ChatResponse:
        """A judge's call: an attempt of this route, so that it is traced and paid for.

        Raises:
            BackendError: if it fails.
            NoCandidatesError: if no filter lets the judge see the request.
        """
        model = judging_replica(name, self.ctx, self.services) if name else held.model
        answer = await self._call(model, "judge" if name else "sample", _Asking(body))
        try:
            return await response_of(answer.reply)
        finally:
            await answer.reply.close()

    # Limits, and the end

    def _affordable(self, queue: list[ModelConfig]) -> list[ModelConfig]:
        """Those with whom the route stays within what one request may cost."""
        limit_usd = self.services.limit_usd(self.ctx)
        if limit_usd is None or not queue:
            return queue
        spent = [None if tally.usage is None else cost_usd(model, tally.usage) for model, tally in self._made]
        known = [cost for cost in spent if cost is not None]
        if len(known) < len(spent):
            known.append(limit_usd)  # what is not known may be all of it
        prompt, answer = prompt_tokens(self.ctx), answer_tokens(self.ctx, _ANSWER_TOKENS)
        left_usd = limit_usd - sum(known)
        found = [m for m in queue if (price := Price.of(m)) is not None and price.cost_usd(prompt, answer) <= left_usd]
        if not found:
            self.stopped = "cost_limit"
        return found

    def _worth(self, held: Held) -> float:
        """By what the answers are compared in the end; one of which nobody could tell is taken as good enough."""
        return self.rules.threshold if held.grade.score is None else held.grade.score

    def _details(self) -> dict[str, AttributeValue]:
        """What the trace says: each verdict, and why it ended."""
        judged = self.judged
        return {
            names.CONFIDENCE_THRESHOLD: self.rules.threshold,
            names.CONFIDENCE_ATTEMPTS: tuple([held.answer.attempt for held in judged]),
            names.CONFIDENCE_VALUES: tuple([-1.0 if h.grade.score is None else float(h.grade.score) for h in judged]),
            names.CONFIDENCE_REASONS: tuple([held.grade.reason for held in judged]),
            names.ESCALATION_STOPPED: self.stopped,
        }


@attrs.frozen
class _Asking:
    """A body of a judge's own; its answer is left as it is."""

    body: Mapping[str, Any]
    types: tuple[str, ...] = ()

    def restore(self, reply: Reply) -> Reply:
        return reply
