"""What uvicorn leaves open: limits on a request's head, and on clients that stall.

uvicorn reads heads of any size and waits for ever for a slow client. The limits here cost next to nothing on the hot
path: sizes are compared where bytes arrive, and times once a second, in `sweep`. The defaults are those that HAProxy's
and Envoy's guides give for servers at the edge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["GuardedProtocol", "Patience", "sweep"]

MOST_HEAD_BYTES = 32 * 1024
MOST_HEADERS = 100


@attrs.frozen(kw_only=True)
class Patience:
    """How long a client may take, in seconds.

    Attributes:
        head_s: To send a request's head, from the connection's beginning or the head's first byte.
        body_s: Between two pieces of a request's body.
        read_s: Between two readings of an answer, once what it has not read fills the buffers.
    """

    head_s: float = 10.0
    body_s: float = 30.0
    read_s: float = 120.0


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a limit on the head, and with the times `sweep` looks at.

    Attributes:
        in_head_since: When the head under way began, or the connection if it has sent nothing; else None.
        in_body_since: When the last piece of the body under way arrived; else None.
        stalled: Bytes in the write buffer, and since when they are as many, while the client does not read.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_head_since: float | None = None
        self.in_body_since: float | None = None
        self.stalled: tuple[int, float] | None = None
        self._head_bytes = 0
        self._read_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a head."""
        super().connection_made(transport)
        self.in_head_since = self.loop.time()

    def data_received(self, data: bytes) -> None:
        """Parse, and look how much of a head there is so far."""
        self._read_bytes = len(data)
        super().data_received(data)
        if self.in_head_since is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self.refuse(431, "the request's head is larger than 32 KiB")

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._head_bytes = 0
        self.in_head_since = self.loop.time()

    def on_headers_complete(self) -> None:
        """The head is whole: judge it.

        Raises:
            ValueError: if it is too large; uvicorn answers what its parser raises with `send_400_response`.
        """
        self.in_head_since = None
        headers = self.headers
        if len(headers) > MOST_HEADERS:
            raise ValueError
        # Only what came with a large read can be a large head, and only then are the bytes counted.
        if self._read_bytes + self._head_bytes > MOST_HEAD_BYTES and _size(headers) + len(self.url) > MOST_HEAD_BYTES:
            raise ValueError
        self.in_body_since = self.loop.time()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body arrived."""
        self.in_body_since = self.loop.time()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is whole."""
        self.in_body_since = None
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, or too much of it, in the shape of every other error."""
        if len(self.headers or ()) > MOST_HEADERS or _size(self.headers or ()) > MOST_HEAD_BYTES:
            self.refuse(431, f"the request's head has more than {MOST_HEADERS} headers or 32 KiB")
        else:
            self.refuse(400, msg)

    def refuse(self, status: int, message: str) -> None:
        """Answer without the application and close; amid another answer, only close."""
        self.in_head_since = None
        if self.is_answering:
            self.transport.abort()
            return
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_http"}
        body = orjson.dumps({"error": error})
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    @property
    def is_answering(self) -> bool:
        """True while the application owes this connection an answer."""
        cycle: Any = self.cycle  # None before the first request, though typed otherwise
        return cycle is not None and not cycle.response_complete


_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


def _size(headers: Iterable[tuple[bytes, bytes]]) -> int:
    return sum(len(name) + len(value) for name, value in headers)


def sweep(connections: Iterable[GuardedProtocol], now_s: float, patience: Patience) -> int:
    """Close the connections of clients that have stalled; how many.

    Args:
        connections: The server's open connections.
        now_s: The event loop's time.
        patience: How long they had.
    """
    return sum([_close_if_stalled(connection, now_s, patience) for connection in tuple(connections)])


def _close_if_stalled(connection: GuardedProtocol, now_s: float, patience: Patience) -> bool:
    began = connection.in_head_since
    if began is not None and now_s - began > patience.head_s and not connection.is_answering:
        connection.refuse(408, "the request's head did not come in time")
        return True
    last = connection.in_body_since
    is_body_late = last is not None and now_s - last > patience.body_s and not connection.flow.read_paused
    if is_body_late or _reads_nothing(connection, now_s, patience):
        connection.transport.abort()
        return True
    return False


def _reads_nothing(connection: GuardedProtocol, now_s: float, patience: Patience) -> bool:
    if not connection.flow.write_paused:
        connection.stalled = None
        return False
    waiting = connection.transport.get_write_buffer_size()
    if connection.stalled is None or connection.stalled[0] != waiting:
        connection.stalled = (waiting, now_s)
        return False
    return now_s - connection.stalled[1] > patience.read_s
