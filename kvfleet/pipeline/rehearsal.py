"""Decides on a request with the same code as for a live one, and calls nobody."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping

import attrs

from kvfleet.adapters.base import InferenceAdapter
from kvfleet.adapters.native import portable
from kvfleet.builtin.facts import prompt_tokens
from kvfleet.clock import Clock
from kvfleet.errors import BackendError, RouteError
from kvfleet.pipeline.engine import Decision
from kvfleet.pipeline.route import route_attributes
from kvfleet.pipeline.stage import BoundStage, Pipeline
from kvfleet.plugin.contract import RouteRequest, RoutingContext
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Span, Status, Trace

__all__ = ["Rehearsal"]


@attrs.frozen(kw_only=True)
class Rehearsal:
    """Runs a pipeline up to its choice.

    Attributes:
        prepare: Resolves a request's names, for a dry run.
        pipeline: What to run.
        adapters: By replica; asked for nothing but the tokens of a prompt.
        clock: For the records' times.
        fleet: Its name.
        random: Makes the identifiers of traces.
    """

    prepare: Callable[[RouteRequest], tuple[RoutingContext, BoundStage]]
    pipeline: Pipeline
    adapters: Mapping[str, InferenceAdapter]
    clock: Clock
    fleet: str
    random: random.Random

    async def explain(self, request: RouteRequest) -> Explanation:
        """The decision; that nobody is left is said in it.

        Raises:
            RouteError: if the request itself is wrong.
        """
        decision, select = self._begin(request)
        trace = decision.trace
        span = trace.route
        try:
            await decision.run(select)
        except RouteError as error:
            span.fail(error.message)
            span.attributes[names.ERROR_TYPE] = error.code
            span.attributes[names.STATUS_CODE] = error.status
        else:
            span.status = Status.OK
        if decision.ranking is not None:
            first = decision.ranking.models[0]
            span.attributes[names.MODEL_SELECTED] = first.name
            span.attributes[names.REPLICA_SELECTED] = first.id
        span.attributes[names.OUTCOME] = "simulated"
        span.end_ns = self.clock.time_ns()
        return Explanation(trace)

    async def count_tokens(self, request: RouteRequest) -> tuple[int, bool]:
        """About how many tokens a request's prompt has; and True if an engine counted them.

        The engine asked is the one that is chosen: nobody sees a prompt whom the policy keeps from it.

        Raises:
            RouteError: if the request is wrong, or nobody may serve it.
        """
        decision, select = self._begin(request)
        await decision.run(select)
        first = decision.ranking.models[0] if decision.ranking is not None else None
        if first is not None and first.is_private:  # others may be sent only what the execute stage lets them see
            with contextlib.suppress(BackendError):
                ids = await self.adapters[first.id].prompt_tokens(request.operation, portable(request.body))
                if ids is not None:
                    return len(ids), True
        return prompt_tokens(decision.ctx), False

    def _begin(self, request: RouteRequest) -> tuple[Decision, BoundStage]:
        ctx, select = self.prepare(request)
        span = Span(names.ROUTE_SPAN, self.clock.time_ns())
        span.attributes = route_attributes(ctx, self.fleet, self.pipeline, select)
        trace = Trace(f"{self.random.getrandbits(128):032x}", [span])
        return Decision(self.pipeline, ctx, trace, self.clock), select
