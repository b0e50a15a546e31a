"""The other workers of a gateway, and what they are asked: so that any of them can answer for all."""

from __future__ import annotations

import asyncio
import http.client
import logging
import socket
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import orjson
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from kvfleet.errors import RouteError
from kvfleet.gateway.exchange import Exchange
from kvfleet.gateway.feedback import Feedback, read_feedback
from kvfleet.gateway.merging import MergedMetrics, dumped
from kvfleet.gateway.table import Access, Route, Table
from kvfleet.gateway.workers import Seat
from kvfleet.turns import in_turns

if TYPE_CHECKING:
    from kvfleet.gateway.app import Gateway, Reload

__all__ = ["Siblings", "SiblingsDoor"]

_log = logging.getLogger(__name__)

_PATIENCE_S = 5.0
_MOST_BYTES = 64 * 1024


class _Connection(http.client.HTTPConnection):
    """HTTP over a socket of the file system."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@attrs.frozen(eq=False)
class Siblings:
    """Asks the other workers. One that is gone, or too slow, says nothing.

    Args:
        seat: This worker's place.
    """

    seat: Seat
    _threads: ThreadPoolExecutor = attrs.field(
        init=False, factory=lambda: ThreadPoolExecutor(8, "kvfleet-siblings"), repr=False
    )

    def close(self) -> None:
        """Ask no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def ask(self, number: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """What a worker says: a status, which is 0 if it says nothing, and a body."""
        connection = _Connection(self.seat.path(number))
        try:
            connection.request(method, path, body or None)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            _log.warning("worker says nothing number=%d error=%s", number, type(error).__name__)
            return 0, b""
        finally:
            connection.close()

    def ask_all(self, method: str, path: str, body: bytes = b"") -> list[tuple[int, bytes]]:
        """What all others say, in their order."""
        asked = [self._threads.submit(self.ask, number, method, path, body) for number in self.seat.others]
        return [one.result() for one in asked]

    async def all(self, method: str, path: str, body: bytes = b"") -> list[tuple[int, bytes]]:
        """The same, without holding up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(None, self.ask_all, method, path, body)

    async def bodies(self, path: str) -> list[bytes]:
        """The whole answers to a question."""
        return [body for status, body in await self.all("GET", path) if status == 200]

    async def feedback(self, given: Feedback) -> str:
        """Have whichever worker answered a request learn how good the answer was; gives the model.

        Raises:
            RouteError: 404 if no worker knows the request.
        """
        body = orjson.dumps({"request_id": given.identifier, "score": given.score})
        answers = await self.all("POST", "/-/worker/feedback", body)
        found = next((orjson.loads(answer)["model"] for status, answer in answers if status == 200), None)
        if found is None:
            raise RouteError(
                "no strategy that learns remembers an answer to this request", status=404, code="unknown_request"
            )
        return str(found)

    def rendered(self, registry: CollectorRegistry) -> bytes:
        """The metrics of all workers, for Prometheus; for a thread."""
        return self.metrics(dumped(registry)).render()

    def metrics(self, own: bytes) -> MergedMetrics:
        """This worker's metrics, dumped, and the others'; for a thread."""
        return MergedMetrics.of(
            [own, *(body for status, body in self.ask_all("GET", "/-/worker/metrics") if status == 200)]
        )

    def registry(self, own: CollectorRegistry) -> _Everywhere:
        """A registry that shows the metrics of all workers, for a server of threads."""
        return _Everywhere(self, own)

    async def snapshots(self) -> Sequence[Mapping[str, Any]]:
        """What the others' dashboards would show of their own."""
        return [orjson.loads(body) for body in await self.bodies("/-/worker/snapshot")]


@attrs.frozen(eq=False)
class _Everywhere(Collector):
    """Asks all workers at each scrape."""

    siblings: Siblings
    own: CollectorRegistry

    def collect(self) -> Iterator[Metric]:
        """The families, merged."""
        return self.siblings.metrics(dumped(self.own)).collect()


class SiblingsDoor:
    """A gateway as its sibling workers see it, on a socket of the file system that is this user's alone.

    Args:
        gateway: Whose.
        reload: Reloads this worker alone; None if there is no file.
    """

    def __init__(self, gateway: Gateway, reload: Reload | None) -> None:
        self.gateway = gateway
        self._reload_here = reload
        self._table = Table.of(
            (
                Route("GET", "/-/worker/metrics", Access.OPEN, self._metrics),
                Route("GET", "/-/worker/snapshot", Access.OPEN, self._snapshot),
                Route("GET", "/-/worker/route/{id}", Access.OPEN, self._route),
                Route("POST", "/-/worker/reload", Access.OPEN, self._reload),
                Route("POST", "/-/worker/feedback", Access.OPEN, self._feedback),
            )
        )

    def handle(self, exchange: Exchange) -> Coroutine[Any, Any, None]:
        """Answer one question."""
        return self.gateway.handle(exchange, self._table)

    async def _metrics(self, exchange: Exchange) -> None:
        metrics = self.gateway.router.services.metrics
        await in_turns(metrics.read_ahead())
        body = await asyncio.to_thread(dumped, metrics.registry)
        await exchange.whole(200, body, [(b"content-type", b"application/json")])

    async def _snapshot(self, exchange: Exchange) -> None:
        await exchange.json(200, await in_turns(self.gateway.board.own_snapshot()))

    async def _route(self, exchange: Exchange) -> None:
        await self.gateway.board.own_route(exchange, exchange.path.removeprefix("/-/worker/route/"))

    async def _reload(self, exchange: Exchange) -> None:
        if self._reload_here is None:
            raise RouteError("there is no file", status=409, code="nothing_to_reload")
        await exchange.json(200, await self._reload_here("told by another worker"))

    async def _feedback(self, exchange: Exchange) -> None:
        given = read_feedback(await exchange.body(_MOST_BYTES))
        await exchange.json(200, {"model": self.gateway.router.feedback(given.identifier, given.score)})
