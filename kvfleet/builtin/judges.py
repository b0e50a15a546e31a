"""The built-in judges of answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import anyio
import anyio.to_thread
import attrs

from kvfleet.adapters.call import Operation
from kvfleet.builtin.facts import prompt_of
from kvfleet.config.fields import choice, flag, listing, number, text
from kvfleet.errors import KVFleetError
from kvfleet.eval.asking import mean, similarity
from kvfleet.eval.confidence import REFUSALS, Signs, percentile_probability, typical_probability
from kvfleet.eval.rating import rating_of, rating_request
from kvfleet.eval.schema_check import SchemaCheck, wanted_schema
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.judging import Grade, Submission
from kvfleet.plugin.spec import hookimpl

__all__ = ["ModelJudge", "SchemaJudge", "SelfConsistency", "SignsJudge", "TokenJudge"]

_MOST_IN_LOOP = 16_384


@attrs.define
class SignsJudge:
    """Trust an answer unless it is empty, cut off at its longest length, or says that it has no answer."""

    cut_off: float = number(0.3, ge=0, le=1, doc="Confidence in an answer that was cut off at its longest length.")
    refused: float = number(0.1, ge=0, le=1, doc="Confidence in an answer that refuses, or does not know.")
    refusals: tuple[str, ...] = listing(
        (), doc="Further patterns (regular expressions, any case) of answers that are none.", example=["keine Ahnung"]
    )
    _signs: Signs = attrs.field(init=False, repr=False, eq=False)

    @_signs.default
    def _make_signs(self) -> Signs:
        """The patterns, compiled; one that is wrong is a finding."""
        return Signs((*REFUSALS, *self.refusals), self.cut_off, self.refused)

    async def grade(self, submission: Submission) -> Grade:
        """By what the answer gives away about itself."""
        response = submission.response
        return Grade(
            *self._signs.grade(
                response.content,
                response.finish_reason,
                calls_tool=bool(response.tool_calls),
                is_whole=submission.is_whole,
            )
        )


@attrs.define
class TokenJudge:
    """Trust an answer as far as its model was sure of its tokens (`logprobs`, asked for and taken out again)."""

    wants_logprobs: ClassVar[bool] = True

    measure: str = choice(
        "mean", of=("mean", "percentile"), doc="The geometric mean of all tokens, or one of the least sure."
    )
    percentile: float = number(10, gt=0, lt=100, unit="%", doc="Which: so many percent are not surer than it.")

    async def grade(self, submission: Submission) -> Grade:
        """By the tokens' probabilities."""
        logprobs = submission.logprobs
        if not logprobs:
            return Grade(None, "the engine told no probabilities")
        if self.measure == "mean":
            value = typical_probability(logprobs)
            return Grade(value, f"probability {value:.2f}, mean of {len(logprobs)} tokens")
        value = percentile_probability(logprobs, self.percentile)
        return Grade(value, f"probability {value:.2f}, {self.percentile:g} % of {len(logprobs)} tokens are below")


@attrs.define
class SelfConsistency:
    """Trust an answer that its model gives again: ask some more times, and compare (Wang et al. 2022)."""

    is_costly: ClassVar[bool] = True

    samples: int = number(2, ge=1, le=8, doc="How often to ask again.")
    temperature: float = number(0.7, gt=0, le=2, doc="Temperature of those answers.")
    compare: str = choice(
        "words",
        of=("words", "exact"),
        doc="By shared words, or as right or wrong: the same text, spaces and case aside.",
    )

    @property
    def answers_each(self) -> int:
        """Further answers for each answer that is judged."""
        return self.samples

    async def grade(self, submission: Submission) -> Grade:
        """By how far the others agree."""
        response = submission.response
        if not submission.is_whole or response.tool_calls or not response.content.strip():
            return Grade(None, "only a whole answer in words can be compared")
        body = {
            key: value for key, value in submission.ctx.request.body.items() if key not in ("n", "logprobs", "seed")
        }
        body |= {"temperature": self.temperature}
        others = await self._others(submission, body)
        alike = mean([self._alike(response.content, other) for other in others])
        if alike is None:
            return Grade(None, "asked again, it did not answer")
        return Grade(alike, f"agrees {alike:.2f} with {len(others)} further answer{'s' if len(others) > 1 else ''}")

    async def _others(self, submission: Submission, body: dict[str, Any]) -> list[str]:
        found: list[str] = []

        async def once() -> None:
            try:
                found.append((await submission.ask(body)).content)
            except KVFleetError:
                return

        async with anyio.create_task_group() as group:
            for _ in range(self.samples):
                group.start_soon(once)
        return found

    def _alike(self, one: str, other: str) -> float:
        if self.compare == "words":
            return similarity(one, other)
        return float(one.casefold().split() == other.casefold().split())


@attrs.define
class SchemaJudge:
    """Trust an answer that is JSON of the schema its request asks for; what asks for none is not judged.

    Regular expressions and formats in a schema are not checked, references out of it are not followed.
    """

    _check: SchemaCheck | None = attrs.field(init=False, default=None, repr=False, eq=False)

    def provision(self, services: Services) -> None:  # noqa: ARG002 - the contract's signature
        """Load the library.

        Raises:
            ComponentError: if it is not installed.
        """
        self._check = SchemaCheck()

    async def grade(self, submission: Submission) -> Grade:
        """1 if it fits, 0 if it does not."""
        schema = wanted_schema(submission.ctx.request.body)
        if schema is None or submission.response.tool_calls:
            return Grade(None, "no JSON was asked for")
        if not submission.is_whole:
            return Grade(None, "JSON can be checked only when it is whole")
        said = submission.response.content
        check = self._check if self._check is not None else SchemaCheck()
        fits = (
            await anyio.to_thread.run_sync(check.fits, said, schema)
            if len(said) > _MOST_IN_LOOP
            else check.fits(said, schema)
        )
        if fits is None:
            return Grade(None, "the schema cannot be checked")
        what = "JSON" if schema is True else "JSON of the schema"
        return Grade(float(fits), f"it is {what}" if fits else f"it is not {what}")


@attrs.define
class ModelJudge:
    """Let a model of the fleet grade the answer, if every filter lets it see the request.

    It is told the request's last question and the answer. Answers can talk to their judge: use it to save money, not
    as a guard.
    """

    is_costly: ClassVar[bool] = True

    model: str = text(doc="The model that judges.", refers_to="model", example="house-70b")
    instructions: str = text("", doc="What it is told of its task; it must reply with a number from 0 to 10.")
    max_tokens: int = number(16, ge=1, unit="tokens", doc="Longest verdict; more for a model that thinks aloud.")
    whole_prompt: bool = flag(doc="Show it the whole conversation instead of the last question.")

    async def grade(self, submission: Submission) -> Grade:
        """By the number it says."""
        ctx, response = submission.ctx, submission.response
        if not submission.is_whole or ctx.request.operation is not Operation.CHAT or not response.content.strip():
            return Grade(None, "only a whole answer in words to a chat can be judged")
        if submission.model.name == self.model:
            return Grade(None, f"{self.model} does not judge its own answers")
        prompt = prompt_of(ctx)
        question = prompt.text if self.whole_prompt else prompt.question
        body = rating_request(question, response.content, instructions=self.instructions, max_tokens=self.max_tokens)
        score = rating_of((await submission.ask(body, model=self.model)).content)
        if score is None:
            return Grade(None, f"{self.model} gave no number")
        return Grade(score, f"{self.model} gives it {score:g}")


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The judges."""
    yield Component(Kind.JUDGE, "signs", SignsJudge)
    yield Component(Kind.JUDGE, "logprobs", TokenJudge)
    yield Component(Kind.JUDGE, "self_consistency", SelfConsistency)
    yield Component(Kind.JUDGE, "json_schema", SchemaJudge)
    yield Component(Kind.JUDGE, "model", ModelJudge)
