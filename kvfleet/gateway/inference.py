"""The handlers of inference: from a request's body to a route, and from its reply to the client."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from kvfleet.adapters.call import LARGE_BYTES, Operation
from kvfleet.config.schema import GatewayConfig
from kvfleet.errors import BackendError, RouteError
from kvfleet.gateway.answer_id import AnswerId
from kvfleet.gateway.decision_headers import decision_headers
from kvfleet.gateway.exchange import Exchange
from kvfleet.gateway.headers import HeaderNames
from kvfleet.gateway.meters import Meters
from kvfleet.gateway.relay import Relay
from kvfleet.gateway.replicas import ReplicaNames
from kvfleet.gateway.surfaces.messages import Messages
from kvfleet.gateway.surfaces.responses import Responses
from kvfleet.gateway.surfaces.serving import SurfaceAnswer
from kvfleet.gateway.surfaces.surface import Asked, Surface
from kvfleet.gateway.tenants import bind
from kvfleet.gateway.wire import RequestReader
from kvfleet.plugin.contract import RouteRequest
from kvfleet.trace.spans import SpanKind

if TYPE_CHECKING:
    from kvfleet.runtime import Router

__all__ = ["MESSAGES", "RESPONSES", "Inference"]

MESSAGES, RESPONSES = Messages(), Responses()


class Inference:
    """Answers what engines are asked.

    Args:
        router: Decides, and calls.
        config: The gateway's.
        headers: The names of the headers that are read.
        replicas: Names for the replicas in answers.
        meters: Count who left.
    """

    def __init__(
        self, router: Router, config: GatewayConfig, headers: HeaderNames, replicas: ReplicaNames, meters: Meters
    ) -> None:
        self._router, self._replicas, self._meters = router, replicas, meters
        self._reader = RequestReader(headers, config.limits.max_json_depth, config.request_timeout_seconds)
        self._max_body_bytes = config.max_body_bytes
        self._renames_answers = config.response_id == "request"

    async def infer(self, operation: Operation, exchange: Exchange) -> None:
        """Answer one call of OpenAI's."""
        raw = await exchange.body(self._max_body_bytes)
        caller = exchange.caller
        if len(raw) <= LARGE_BYTES:
            asked = self._reader.read(operation, raw, exchange.headers, exchange.request_id, key=caller.name)
        else:
            asked = await self._reader.read_in_turns(
                operation, raw, exchange.headers, exchange.request_id, key=caller.name
            )
        request = bind(asked, caller)
        exchange.watch()
        try:
            await self._answer(exchange, request)
        except asyncio.CancelledError:
            if not exchange.has_left:
                raise
            self._meters.departed(exchange)

    async def _answer(self, exchange: Exchange, request: RouteRequest) -> None:
        answer_id = AnswerId(exchange.request_id) if self._renames_answers else None
        try:
            dispatch = await self._router.dispatch(request, kind=SpanKind.SERVER)
            reply = dispatch.answer.reply
            headers = decision_headers(dispatch.answer, dispatch.trace, self._replicas)
            if reply.events is not None:
                await Relay(exchange, self._replicas, answer_id).pass_on(reply, headers)
                return
        except BackendError as error:
            broken = RouteError(f"the answer broke off: {error.message}", status=502, code="stream_interrupted")
            raise broken from error
        exchange.unwatch()
        body = reply.body if answer_id is None else answer_id.in_answer(reply.body, reply.tally.response_id)
        await exchange.whole(200, body, [(b"content-type", b"application/json"), *headers])

    # Other APIs than OpenAI's chat

    async def _read_as(self, surface: Surface, exchange: Exchange) -> tuple[Asked, RouteRequest]:
        raw = await exchange.body(self._max_body_bytes)
        caller, headers, request_id = exchange.caller, exchange.headers, exchange.request_id
        fields, key, reader = exchange.fields, caller.name, self._reader
        if len(raw) <= LARGE_BYTES:
            asked, request = reader.read_as(surface, raw, headers, request_id, fields=fields, key=key)
        else:
            asked, request = await reader.read_as_in_turns(surface, raw, headers, request_id, fields=fields, key=key)
        return asked, bind(request, caller)

    async def converse(self, surface: Surface, exchange: Exchange) -> None:
        """Answer one call in another API's words."""
        asked, request = await self._read_as(surface, exchange)
        exchange.common.append((b"request-id", exchange.request_id.encode()))
        exchange.watch()
        try:
            await self._answer_as(surface, asked, exchange, request)
        except asyncio.CancelledError:
            if not exchange.has_left:
                raise
            self._meters.departed(exchange)

    async def _answer_as(self, surface: Surface, asked: Asked, exchange: Exchange, request: RouteRequest) -> None:
        try:
            dispatch = await self._router.dispatch(request, kind=SpanKind.SERVER)
            reply = dispatch.answer.reply
            headers = decision_headers(dispatch.answer, dispatch.trace, self._replicas)
            own = "" if self._renames_answers else reply.tally.response_id
            answer = SurfaceAnswer(
                exchange=exchange,
                names=self._replicas,
                surface=surface,
                asked=asked,
                identifier=own or exchange.request_id,
            )
            await (answer.whole(reply, headers) if reply.events is None else answer.pass_on(reply, headers))
        except BackendError as error:
            broken = RouteError(f"the answer broke off: {error.message}", status=502, code="stream_interrupted")
            raise broken from error

    async def count_tokens(self, exchange: Exchange) -> None:
        """Say how many tokens a prompt has."""
        _, request = await self._read_as(MESSAGES, exchange)
        count, is_exact = await self._router.count_tokens(request)
        headers = [(b"x-kvfleet-tokens", b"exact" if is_exact else b"estimate")]
        await exchange.json(200, {"input_tokens": count}, headers)

    async def explain_as(self, surface: Surface, exchange: Exchange) -> None:
        """The same of a request in another API's words."""
        _, request = await self._read_as(surface, exchange)
        explanation = await self._router.simulate_request(request)
        await exchange.json(200, self._replicas.hide_in(explanation.to_dict()))

    async def explain(self, exchange: Exchange) -> None:
        """Decide on a request, and call nobody."""
        raw = await exchange.body(self._max_body_bytes)
        caller = exchange.caller
        asked = self._reader.read_any(raw, exchange.headers, exchange.request_id, key=caller.name)
        request = bind(asked, caller)
        explanation = await self._router.simulate_request(request)
        await exchange.json(200, self._replicas.hide_in(explanation.to_dict()))
