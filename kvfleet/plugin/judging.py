"""What a judge is: it says how good one answer is. `execute.escalate` and `observe.judge` use judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import attrs

from kvfleet.adapters.base import ChatResponse
from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.contract import RoutingContext

__all__ = ["Ask", "Grade", "Judge", "Submission"]


@attrs.frozen
class Grade:
    """A verdict.

    Attributes:
        score: 0, useless, to 1, as good as can be; None if the judge cannot tell.
        reason: Why, in words that a trace may show: never what was asked or answered.
    """

    score: float | None
    reason: str


class Ask(Protocol):
    """Makes one more call for a judge's sake. It is bounded, traced and paid for as every other call."""

    async def __call__(self, body: Mapping[str, Any], *, model: str = "") -> ChatResponse:
        """The whole answer.

        Args:
            body: A body in the OpenAI shape; which model and whether it streams is not its business.
            model: A model of the fleet; whoever gave the answer in question if empty.

        Raises:
            KVFleetError: if there is no answer: the call failed, or no filter lets that model see the request.
        """


@attrs.frozen(kw_only=True)
class Submission:
    """An answer to be judged.

    Attributes:
        ctx: The request, and what was found out about it.
        model: Who answered.
        response: The answer; of a stream, what has come of it.
        is_whole: False if there may be more to come.
        logprobs: Logarithms of its tokens' probabilities; None if the engine does not tell, or nobody asked.
        ask: Makes further calls.
    """

    ctx: RoutingContext
    model: ModelConfig
    response: ChatResponse
    is_whole: bool = True
    logprobs: Sequence[float] | None = None
    ask: Ask


@runtime_checkable
class Judge(Protocol):
    """Says how good an answer is.

    A judge may set two class variables: ``is_costly = True`` if it asks (it is then asked after those that do not, and
    not where nobody could answer instead), ``wants_logprobs = True`` to have the tokens' probabilities asked for.
    """

    is_costly: ClassVar[bool] = False
    wants_logprobs: ClassVar[bool] = False

    async def grade(self, submission: Submission) -> Grade:
        """The verdict."""
