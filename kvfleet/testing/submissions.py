"""Answers for judges on trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from kvfleet.adapters.base import ChatResponse
from kvfleet.errors import BackendError, Fault
from kvfleet.plugin.contract import RoutingContext
from kvfleet.plugin.judging import Submission

__all__ = ["NOT_ASKED", "submissions"]

NOT_ASKED = "nobody may be asked now"
"""What a call of a judge's fails with on trial; a judge may let it through."""

_WHOLE = ChatResponse("Sorting puts the smallest first.", finish_reason="stop")
_ANSWERS = (
    _WHOLE,
    attrs.evolve(_WHOLE, content="I don't know."),
    ChatResponse(""),
    ChatResponse('{"sorted": true}', finish_reason="length"),
    ChatResponse("", finish_reason="tool_calls", tool_calls=({"id": "1", "function": {"name": "look"}},)),
)


@attrs.define
class _Asking:
    """Answers a judge's calls with the same words, or with none."""

    says: str

    async def __call__(self, body: Mapping[str, Any], *, model: str = "") -> ChatResponse:  # noqa: ARG002 - the contract's
        if not self.says:
            raise BackendError(Fault.OVERLOADED, NOT_ASKED)
        return ChatResponse(self.says)


def submissions(ctx: RoutingContext) -> Iterator[Submission]:
    """Answers of many kinds to a request: whole and begun, with probabilities and without, with and without calls."""
    model = ctx.candidates[0]
    for response in _ANSWERS:
        for says in ("7", "Sorting puts the smallest first.", ""):
            yield Submission(ctx=ctx, model=model, response=response, ask=_Asking(says), logprobs=(-0.1, -2.0))
        yield Submission(ctx=ctx, model=model, response=response, ask=_Asking("8"), is_whole=False)
