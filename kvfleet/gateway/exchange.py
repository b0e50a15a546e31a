"""One HTTP request and its answer, whoever carries the bytes: what a handler reads and writes."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import orjson

from kvfleet.errors import BadRequestError
from kvfleet.gateway.auth import ANYBODY, Caller
from kvfleet.gateway.headers import Headers

__all__ = ["JSON", "ClientLeftError", "Exchange", "Pairs", "check_announced", "too_large"]

Pairs = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
"""The header that says so."""


class ClientLeftError(Exception):
    """The client closed its connection before its request was whole."""


@attrs.define(eq=False)
class Exchange(abc.ABC):
    """What a handler gets. Who carries the bytes is a subclass's matter: our own server, or another one over ASGI.

    Attributes:
        method: Of the request, in upper case.
        path: The requested path, percent-decoded.
        fields: All headers of the request as sent, but for their names, which are in lower case.
        headers: The headers that are looked at.
        request_id: The request's identifier; it stands on every answer.
        common: Headers of every answer to this request.
        caller: Whose key the request came with.
        status: Of the answer, once it has begun; 0 before.
        closes: True if the connection is not to be used for another request.
        has_left: True once the client has left, if it was watched.
    """

    method: str
    path: str
    fields: Sequence[tuple[bytes, bytes]]
    headers: Headers = attrs.field(init=False, factory=dict)
    request_id: str = attrs.field(init=False, default="")
    common: Pairs = attrs.field(init=False, factory=list)
    caller: Caller = attrs.field(init=False, default=ANYBODY)
    status: int = attrs.field(init=False, default=0)
    closes: bool = attrs.field(init=False, default=False)
    has_left: bool = attrs.field(init=False, default=False)

    # Who carries the bytes

    @abc.abstractmethod
    async def body(self, limit: int) -> bytes:
        """The request's body.

        Args:
            limit: Most bytes; what is announced as longer is not read at all.

        Raises:
            BadRequestError: 413 if it is longer, 415 if it is compressed.
            ClientLeftError: if the client left.
        """

    @abc.abstractmethod
    async def start(self, status: int, headers: Pairs) -> None:
        """Begin the answer; the status and the headers may leave together with its first piece."""

    @abc.abstractmethod
    async def whole(self, status: int, body: bytes, headers: Pairs) -> None:
        """Send a whole answer; `headers` say its type."""

    @abc.abstractmethod
    async def piece(self, body: bytes) -> None:
        """Send a piece of a streamed answer; waits while the client does not read."""

    def push(self, body: bytes) -> bool:  # noqa: ARG002 - a carrier that cannot do it
        """Send a piece of a streamed answer at once; False if that cannot be, because the client does not read, say."""
        return False

    @abc.abstractmethod
    async def end(self, body: bytes = b"") -> None:
        """End a streamed answer."""

    @abc.abstractmethod
    def watch(self) -> None:
        """From now on, cancel the current task as soon as the client leaves, with `has_left` set.

        Without it every engine would finish what nobody reads. Needs the request's body to have been read.
        """

    @abc.abstractmethod
    def unwatch(self) -> None:
        """Stop watching; safe twice. Needed before an answer's end: the client may go then."""

    @abc.abstractmethod
    def finish(self) -> None:
        """The handler has returned: an answer that it began and did not end is cut off."""

    def check_head(self) -> None:  # noqa: B027 - who carries the bytes has looked, unless it says otherwise
        """Refuse a head that others on the way might have read differently; `headers` have been read.

        Raises:
            BadRequestError: for a body whose end is not certain, or a missing ``Host``.
        """

    # What follows

    async def json(self, status: int, data: Any, headers: Pairs | None = None) -> None:
        """Send data as JSON."""
        await self.whole(status, orjson.dumps(data, option=orjson.OPT_NON_STR_KEYS), [JSON, *(headers or [])])


def check_announced(headers: Mapping[bytes, bytes], limit: int) -> None:
    """Refuse a body that is not worth reading.

    Raises:
        BadRequestError: 413 if it is announced as longer than the limit, 415 if it is compressed.
    """
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise BadRequestError(
            "compressed request bodies are not accepted", status=415, code="unsupported_content_encoding"
        )
    announced = headers.get(b"content-length")
    if announced is not None and announced.isdigit() and int(announced) > limit:
        raise too_large(limit)


def too_large(limit: int) -> BadRequestError:
    """The error for a body beyond the limit."""
    return BadRequestError(f"the request body is larger than {limit} bytes", status=413, code="body_too_large")
