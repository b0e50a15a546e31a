"""The other workers of a gateway, and what they are asked: so that any of them can answer for all.

What they answer is in `kvfleet.gateway.siblings_door`.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import orjson
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from kvfleet.errors import RouteError
from kvfleet.gateway.feedback import Feedback
from kvfleet.gateway.merging import MergedMetrics, dumped
from kvfleet.gateway.workers import Seat

__all__ = ["Siblings"]

_log = logging.getLogger(__name__)

_PATIENCE_S = 5.0


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
