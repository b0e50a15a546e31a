"""What an API beside OpenAI's chat is to the gateway: a way to read a request as a chat, and to render its answer."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs
import orjson

from kvfleet.adapters.call import Native, Tally, Usage
from kvfleet.errors import BadRequestError

__all__ = ["Asked", "Surface", "Writer", "an_object", "event", "kind_of", "objects", "refused", "usage_in"]

Body = Mapping[str, Any]


@attrs.frozen(kw_only=True)
class Asked:
    """One request, as read from a surface.

    Attributes:
        chat: It as an OpenAI chat body, every text of it included.
        native: It in its own words, for engines that speak them.
        session: The conversation's key, if the client's headers name one.
    """

    chat: dict[str, Any]
    native: Native
    session: str = ""


class Writer(abc.ABC):
    """Renders one streamed chat as the surface's events."""

    @abc.abstractmethod
    def feed(self, chunk: Body) -> bytes:
        """The events for one chunk of the chat; empty if it says nothing here."""

    @abc.abstractmethod
    def finish(self, usage: Usage | None) -> bytes:
        """The events that end the answer."""

    @abc.abstractmethod
    def fail(self, error: Body, status: int) -> bytes:
        """The events that end a broken answer.

        Args:
            error: OpenAI's error object, without its wrapper.
            status: The HTTP status it would have had.
        """


class Surface(abc.ABC):
    """One API. It keeps no state; what belongs to one request is in `Asked` and `Writer`."""

    name: ClassVar[str]
    path: ClassVar[str]

    @abc.abstractmethod
    def read(self, body: Body, fields: Sequence[tuple[bytes, bytes]]) -> Asked:
        """A request as a chat.

        Args:
            body: Parsed; never changed.
            fields: The request's headers.

        Raises:
            BadRequestError: naming the field at fault.
        """

    @abc.abstractmethod
    def render(self, answer: Body, asked: Asked, identifier: str, tally: Tally) -> dict[str, Any]:
        """A whole chat answer in the surface's words.

        Raises:
            BackendError: (`Fault.PROTOCOL`) if it is none.
        """

    @abc.abstractmethod
    def writer(self, asked: Asked, identifier: str) -> Writer:
        """What renders a streamed answer."""

    @abc.abstractmethod
    def error(self, wrapped: dict[str, Any], status: int) -> dict[str, Any]:
        """OpenAI's error answer, ``{"error": …}``, in the surface's shape."""


def event(kind: str, data: Body) -> bytes:
    r"""One server-sent event with its type.

    >>> event("ping", {"type": "ping"})
    b'event: ping\ndata: {"type":"ping"}\n\n'
    """
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(data))


def kind_of(value: Any) -> str:
    """JSON's word for a value's type."""
    words = {str: "text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number")


def refused(message: str, param: str) -> BadRequestError:
    """The error for a field that is wrong."""
    return BadRequestError(message, param=param)


def an_object(value: Any, place: str) -> Mapping[str, Any]:
    """The value if it is an object.

    Raises:
        BadRequestError: if not.
    """
    if not isinstance(value, Mapping):
        raise refused(f"{place} must be an object, not {kind_of(value)}", place)
    return value


def objects(value: Any, place: str) -> Sequence[Mapping[str, Any]]:
    """The value if it is a list of objects.

    Raises:
        BadRequestError: if not.
    """
    if not isinstance(value, list):
        raise refused(f"{place} must be a list, not {kind_of(value)}", place)
    return [an_object(item, f"{place}[{index}]") for index, item in enumerate(value)]


def usage_in(answer: Body, tally: Tally) -> Usage | None:
    """The usage of a whole answer: what the adapter read of it, which knows its engine's fields, else what it says."""
    return tally.usage or (Usage.from_openai(found) if isinstance(found := answer.get("usage"), Mapping) else None)
