"""One call beside a route, made through the pipeline's own execute stage with its model as the only candidate."""

from __future__ import annotations

import contextlib

import attrs
import orjson

from kvfleet.adapters.call import Call, Reply
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault, RouteError
from kvfleet.eval.asking import Asked, ask, whole_call
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Answer, Rewrite, RoutingContext
from kvfleet.router.scoring import Ranking

__all__ = ["mirror"]


async def mirror(
    ctx: RoutingContext, model: ModelConfig, services: Services, timeout_s: float, *, mark: str = "shadow"
) -> Asked:
    """Put a request to a model beside its route; what goes wrong is part of what is found.

    The execute stage decides what the model is sent: one that redacts for models that are not private does so here. The
    call carries the header ``x-kvfleet-MARK: 1``.
    """
    attempt = _Attempt(ctx, model, services, timeout_s, mark)
    if services.execute is None:
        return Asked(error="there is no pipeline to execute it", fault=Fault.PROTOCOL.value)
    started_s = services.clock.now_s()
    reserved = services.load.started(model.id)
    try:
        with contextlib.suppress(RouteError):  # the attempt knows why
            await services.execute(ctx, Ranking((model,), (1.0,)), attempt)
    finally:
        is_ok = attempt.asked is not None and attempt.asked.response is not None
        services.load.finished(reserved, services.clock.now_s() - started_s, ok=is_ok)
    return attempt.asked or Asked(error="the execute stage made no call", fault=Fault.PROTOCOL.value)


@attrs.define
class _Attempt:
    """What the execute stage is given to call: that model and nobody else, for a whole answer, marked."""

    ctx: RoutingContext
    model: ModelConfig
    services: Services
    timeout_s: float
    mark: str
    asked: Asked | None = None

    async def __call__(
        self,
        candidate: ModelConfig,
        *,
        timeout_s: float | None = None,  # noqa: ARG002 - a mirror has limits of its own
        reason: str = "first",  # noqa: ARG002 - it has no trace of its own
        rewrite: Rewrite | None = None,
    ) -> Answer:
        """See `kvfleet.plugin.contract.Attempt`."""
        if candidate.id != self.model.id or self.asked is not None:
            raise BackendError(Fault.NOT_FOUND, "a mirrored request is one call to one model")
        request = self.ctx.request
        call = whole_call(
            request.operation,
            request.body if rewrite is None else rewrite.body,
            timeout_s=self.timeout_s,
            headers=(
                *request.headers,
                ("x-request-id", f"{request.request_id}-{self.mark}"),
                (f"x-kvfleet-{self.mark}", "1"),
            ),
        )
        self.asked = await self._ask(call, rewrite)
        if self.asked.response is None:
            raise BackendError(Fault(self.asked.fault), self.asked.error)
        return Answer(Reply(body=orjson.dumps(self.asked.response.raw)), candidate)

    async def _ask(self, call: Call, rewrite: Rewrite | None) -> Asked:
        """Make the call; it counts for the provider's rate limits as any other."""
        services = self.services
        limits = services.limits.begin(self.model.id)
        error, tokens = None, 0

        def read(reply: Reply) -> Reply:
            limits.heard(reply.headers)
            return reply if rewrite is None else rewrite.restore(reply)

        try:
            asked = await ask(
                services.adapters[self.model.id],
                call,
                timeout_s=self.timeout_s,
                clock=services.clock,
                restore=read,
            )
            error = asked.failed
            usage = asked.response.usage if asked.response is not None else None
            tokens = usage.prompt_tokens + usage.completion_tokens if usage is not None else 0
            return asked
        finally:
            limits.ended(error, tokens)
