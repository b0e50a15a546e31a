"""The gateway's application: a table of routes, each with its auth policy, and their handlers.

It answers exchanges (`kvfleet.gateway.exchange`), which its own server makes; it is an ASGI application too.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from kvfleet.adapters.call import Operation
from kvfleet.errors import RouteError
from kvfleet.gateway.asgi import ASGIExchange, Message, Receive, Send, live
from kvfleet.gateway.auth import Caller, Keys
from kvfleet.gateway.board import PATH, Board
from kvfleet.gateway.cors import Cors
from kvfleet.gateway.errors import error_headers, error_object, shutting_down
from kvfleet.gateway.exchange import ClientLeftError, Exchange
from kvfleet.gateway.feedback import read_feedback
from kvfleet.gateway.headers import HeaderNames, new_request_id, request_id
from kvfleet.gateway.health import Phase
from kvfleet.gateway.hosts import Hosts
from kvfleet.gateway.inference import MESSAGES, RESPONSES, Inference
from kvfleet.gateway.lookups import Lookups
from kvfleet.gateway.meters import Meters
from kvfleet.gateway.replicas import ReplicaNames
from kvfleet.gateway.surfaces.surface import Surface
from kvfleet.gateway.table import Access, Handler, Route, Table

if TYPE_CHECKING:
    from kvfleet.gateway.siblings import Siblings
    from kvfleet.runtime import Router

__all__ = ["Gateway", "OperatorsDoor"]

_log = logging.getLogger(__name__)

Reload = Callable[[str], Coroutine[Any, Any, Mapping[str, Any]]]
"""Reads the configuration again, for a reason, and says what came of it."""

_CLOSING = frozenset({"invalid_http", "duplicate_header"})
SPOKEN: Mapping[str, Surface] = {
    MESSAGES.path: MESSAGES,
    f"{MESSAGES.path}/count_tokens": MESSAGES,
    RESPONSES.path: RESPONSES,
}
"""Whose errors a path has, if not OpenAI's."""


class Gateway:
    """The HTTP face of a router.

    Args:
        router: Opened at the application's start and closed at its end, if the server speaks ASGI's lifespan protocol;
            else its owner opens it.
        keys: Keys clients need; the configured ones if None.
        cors: Which web pages may call; as configured if None.
        hosts: Under which names it may be called; any if None.
        condition_headers: Request headers that policy conditions read.
        before: The gateway whose place this one is to take, whose counts and shown decisions go on.
        new_id: Makes the identifier of a request that brings none.

    Raises:
        ConfigError: if the configured headers cannot be what they are to be.
    """

    def __init__(
        self,
        router: Router,
        *,
        keys: Keys | None = None,
        cors: Cors | None = None,
        hosts: Hosts | None = None,
        condition_headers: tuple[str, ...] = (),
        new_id: Callable[[], str] = new_request_id,
        before: Gateway | None = None,
    ) -> None:
        config = router.config
        self.router = router
        self.keys = Keys.of(config.gateway, tenants=config.tenants) if keys is None else keys
        self.cors = Cors.of(config.gateway.cors_origins) if cors is None else cors
        self.hosts = hosts
        self.replicas = ReplicaNames.of(router.models)
        self.meters: Meters = Meters() if before is None else before.meters
        self.board: Board = Board(router, self.replicas, before=None if before is None else before.board)
        self.phase = Phase.STARTING
        self.reload: Reload = _nothing_to_reload if before is None else before.reload
        self.siblings: Siblings | None = None if before is None else before.siblings
        self._headers = HeaderNames.of(config.gateway, condition_headers)
        self._inference = Inference(router, config.gateway, self._headers, self.replicas, self.meters)
        self._lookups = Lookups(self)
        self._max_body_bytes = config.gateway.max_body_bytes
        self._new_id = new_id
        self.routes = self._table()
        # What is listened on is decided when the process starts, whatever a reload says.
        self.is_split: bool = config.gateway.admin.port is not None if before is None else before.is_split
        self._clients = Table.of(one for one in self.routes if not (self.is_split and one.is_operators))
        self.operators = Table.of(one for one in self.routes if one.is_operators or one.method == "GET")

    def _table(self) -> tuple[Route, ...]:
        inference, lookups = self._inference, self._lookups

        def infer(operation: Operation) -> Handler:
            return partial(inference.infer, operation)

        rerank = infer(Operation.RERANK)
        return (
            Route("POST", Operation.CHAT.path, Access.KEY, infer(Operation.CHAT)),
            Route("POST", Operation.COMPLETION.path, Access.KEY, infer(Operation.COMPLETION)),
            Route("POST", Operation.EMBEDDING.path, Access.KEY, infer(Operation.EMBEDDING)),
            Route("POST", Operation.RERANK.path, Access.KEY, rerank),
            Route("POST", "/v2/rerank", Access.KEY, rerank),
            Route("POST", "/rerank", Access.KEY, rerank),
            Route("POST", MESSAGES.path, Access.KEY, partial(inference.converse, MESSAGES)),
            Route("POST", f"{MESSAGES.path}/count_tokens", Access.KEY, inference.count_tokens),
            Route("POST", RESPONSES.path, Access.KEY, partial(inference.converse, RESPONSES)),
            Route("POST", "/v1/route/explain", Access.KEY, inference.explain),
            Route("POST", "/v1/route/explain/messages", Access.KEY, partial(inference.explain_as, MESSAGES)),
            Route("POST", "/v1/route/explain/responses", Access.KEY, partial(inference.explain_as, RESPONSES)),
            Route("POST", "/v1/feedback", Access.KEY, self._feedback),
            Route("GET", "/v1/models", Access.KEY, lookups.models),
            Route("GET", "/v1/models/{id}", Access.KEY, lookups.model),
            Route("GET", "/v1/tenants", Access.KEY, lookups.tenants),
            Route("GET", "/health", Access.KEY, lookups.health),
            Route("GET", "/metrics", Access.ADMIN, lookups.metrics),
            Route("POST", "/-/reload", Access.ADMIN, self._reload),
            Route("GET", PATH, Access.OPEN, self.board.page, is_operators=True),
            Route("GET", f"{PATH}/api/state", Access.ADMIN, self.board.state),
            Route("GET", f"{PATH}/api/route/{{id}}", Access.ADMIN, self.board.route),
            Route("GET", f"{PATH}/events", Access.ADMIN, self.board.events),
            Route("GET", "/openapi.json", Access.KEY, lookups.openapi),
            Route("GET", "/livez", Access.OPEN, lookups.livez),
            Route("GET", "/readyz", Access.OPEN, lookups.readyz),
        )

    # Life ------------------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one HTTP request of an ASGI server, or take part in its start and stop."""
        if scope["type"] == "http":
            await self.handle(ASGIExchange.of(scope, receive, send))
        elif scope["type"] == "lifespan":
            await live(receive, send, self.start, self.stop)
        else:
            raise RuntimeError(f"the gateway does not speak {scope['type']}")

    async def start(self) -> None:
        """Open the router and be ready."""
        await self.router.open()
        self.router.services.metrics.registry.register(self.meters)
        self.board.open()
        self.phase = Phase.SERVING

    async def stop(self) -> None:
        """Close the router; whoever calls has waited for the requests in flight."""
        self.drain()
        self.router.services.metrics.registry.unregister(self.meters)
        await self.router.aclose()

    def join(self, siblings: Siblings) -> None:
        """Answer for other workers too, where it does not matter who is asked."""
        self.siblings = self.board.siblings = siblings
        self.board.recent.mark = f"{siblings.seat.number}-"

    async def open_beside(self) -> None:
        """Open the router, and leave the rest to `take_over`."""
        await self.router.open()

    def take_over(self, before: Gateway) -> None:
        """Answer from now on instead of the gateway before, which finishes what it has begun; in one step."""
        self.router.take_over(before.router)
        self.board.open()
        before.board.close()
        self.phase = before.phase

    async def retire(self) -> None:
        """End a gateway that another one has taken over from; nobody may ask it anything any more."""
        await self.router.retire()
        vars(self).clear()

    def drain(self) -> None:
        """Be not ready any more, but go on answering; only dashboards, which never end by themselves, end here."""
        self.phase = Phase.STOPPING
        self.board.close()

    # Requests --------------------------------------------------------------------------------------------------------

    async def handle(self, exchange: Exchange, table: Table | None = None) -> None:
        """Answer one request, whatever happens.

        Args:
            exchange: The request.
            table: What may be asked for; what clients may, if None.
        """
        template, meters = "other", self.meters
        meters.in_flight += 1
        try:
            exchange.headers = self._headers.read(exchange.fields)
            self._prepare(exchange)
            table = self._clients if table is None else table
            route = self._find(exchange, table)
            if route is not None:
                template = route.path
                await route.handler(exchange)
            else:
                await self._preflight(exchange, table)
        except RouteError as error:
            await self._refuse(exchange, error)
        except ClientLeftError:
            self.meters.departed(exchange)
        except asyncio.CancelledError:
            # The server is out of patience while it stops. This is the outermost frame of its task, and ends here.
            await self._refuse(exchange, shutting_down())
        except Exception as error:  # noqa: BLE001 - a defect must still end in an answer that says nothing of it
            await self._refuse(exchange, _unexpected(exchange, error))
        finally:
            meters.in_flight -= 1
            meters.responses[template, exchange.status] += 1
            exchange.finish()

    def _prepare(self, exchange: Exchange) -> None:
        exchange.check_head()
        headers = exchange.headers
        if self.hosts is not None:
            self.hosts.check(headers.get(b"host"))
        exchange.request_id = request_id(headers, self._new_id)
        exchange.common.append((b"x-request-id", exchange.request_id.encode()))
        exchange.closes = self.phase is Phase.STOPPING
        exchange.common.extend(self.cors.headers_for(headers.get(b"origin")))

    def _find(self, exchange: Exchange, table: Table) -> Route | None:
        """The route of a request, once its caller may use it; None for a browser's preflight.

        What is not in the table needs a key too, so that nobody without one learns what is.

        Raises:
            RouteError: 401, 404 or 405.
        """
        methods, method = table.methods(exchange.path), exchange.method
        if method == "OPTIONS" and methods and b"origin" in exchange.headers:
            return None
        route = methods.get("GET" if method == "HEAD" else method)
        if route is None or route.access is not Access.OPEN:
            headers = exchange.headers
            exchange.caller = self.keys.caller(headers.get(b"authorization"), headers.get(b"x-api-key"))
            self._admit(exchange.caller, route)
        if route is not None:
            return route
        if methods:
            allowed = ", ".join(methods)
            exchange.common.append((b"allow", allowed.encode()))
            raise RouteError(f"{exchange.path} takes {allowed}", status=405, code="method_not_allowed")
        raise RouteError(f"there is no {exchange.path}{self._hint(exchange.path)}", status=404, code="unknown_url")

    def _admit(self, caller: Caller, route: Route | None) -> None:
        if route is not None and route.access is Access.ADMIN and not caller.is_admin:
            raise RouteError(
                f"{route.path} tells of all tenants, and this is a client's key; GET /v1/tenants tells of its budgets",
                status=403,
                code="operators_only",
            )

    def _hint(self, path: str) -> str:
        """The usual slip: a base URL without ``/v1``, or with it twice; or an operator at the clients' door."""
        usual = "/v1" + path.removeprefix("/v1")
        if usual != path and self._clients.methods(usual):
            return f"; did you mean {usual}?"
        return " here; operators have a listener of their own: gateway.admin" if self.operators.methods(path) else ""

    async def _preflight(self, exchange: Exchange, table: Table) -> None:
        asked = exchange.headers.get(b"access-control-request-headers", b"")
        methods = table.methods(exchange.path)
        await exchange.start(204, self.cors.preflight(methods, asked))
        await exchange.end()

    async def _refuse(self, exchange: Exchange, error: RouteError) -> None:
        if exchange.status:
            # The answer has begun: the server cuts the connection, which is the only honest end left.
            return
        if not exchange.request_id:
            exchange.request_id = self._new_id()
            exchange.common.append((b"x-request-id", exchange.request_id.encode()))
        headers = error_headers(error)
        if error.trace is not None:
            headers.append((b"x-kvfleet-trace", error.trace.trace_id.encode()))
        if error.status == 413 or error.code in _CLOSING:
            exchange.closes = True  # what is still being sent is not read, nor what may be smuggled behind it
        told = error_object(error, self.replicas, exchange.request_id)
        surface = SPOKEN.get(exchange.path)
        if surface is not None:
            told = surface.error(told, error.status)
            if not any(name == b"request-id" for name, _ in exchange.common):
                headers.append((b"request-id", exchange.request_id.encode()))
        await exchange.json(error.status, told, headers)

    async def _feedback(self, exchange: Exchange) -> None:
        given = read_feedback(await exchange.body(self._max_body_bytes))
        try:
            model = self.router.feedback(given.identifier, given.score)
        except RouteError:
            if self.siblings is None:
                raise
            model = await self.siblings.feedback(given)
        await exchange.json(200, {"object": "feedback", "model": model, "score": given.score})

    async def _reload(self, exchange: Exchange) -> None:
        await exchange.json(200, await self.reload("asked for"))


class OperatorsDoor:
    """A gateway as operators' own listener has it.

    Args:
        gateway: Whose.
    """

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    def handle(self, exchange: Exchange) -> Coroutine[Any, Any, None]:
        """Answer one request."""
        return self.gateway.handle(exchange, self.gateway.operators)


async def _nothing_to_reload(why: str) -> Mapping[str, Any]:  # noqa: ARG001 - what a `Reloader` takes
    raise RouteError("this gateway was not started from a fleet file", status=409, code="nothing_to_reload")


def _unexpected(exchange: Exchange, error: Exception) -> RouteError:
    """The error for a defect of ours, logged with the place but without its text, which may hold content."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    place = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
    _log.error("request failed request_id=%s error=%s at=%s", exchange.request_id, type(error).__name__, place)
    return RouteError("internal error; the gateway's log has the request's identifier")
