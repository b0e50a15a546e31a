"""Passes a request through in the words of another API than OpenAI's chat, to an engine that speaks them.

The engine is sent what the client said, and its events go on byte by byte; `kvfleet.adapters.native_wire` has the
words.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import attrs
import orjson

from kvfleet.adapters.base import InferenceAdapter
from kvfleet.adapters.call import LARGE_BYTES, Call, Native, Reply, Tally
from kvfleet.adapters.http import HTTPAdapter
from kvfleet.adapters.incoming import Incoming
from kvfleet.adapters.native_wire import WIRES, ErrorMaker, NativeWire
from kvfleet.adapters.refusals import refuse
from kvfleet.adapters.relaying import RelayedEvents, cut_off
from kvfleet.adapters.splitters import data_of
from kvfleet.errors import BackendError, Fault

__all__ = ["NativeRelay", "fitted", "portable", "send_native"]

_KIND = re.compile(rb'"type" ?: ?"([a-z_.]+)"')

# What Anthropic reads of a chat body and nobody else does: see `kvfleet.adapters.anthropic_bodies`.
_OWN_FIELDS = frozenset({"thinking"})
_OWN_MARKS = frozenset({"cache_control", "is_error", "thinking_blocks", "reasoning_content"})


def portable(body: Mapping[str, Any]) -> dict[str, Any]:
    """A chat body without what only Anthropic reads of it, which other engines refuse or do not know.

    >>> portable({"thinking": {}, "messages": [{"role": "user", "content": "Hi", "cache_control": {}}]})
    {'messages': [{'role': 'user', 'content': 'Hi'}]}
    """
    out = {key: value for key, value in body.items() if key not in _OWN_FIELDS}
    for key in ("messages", "tools"):
        if isinstance(given := out.get(key), list):
            out[key] = [_unmarked(item) for item in given if not _is_only_thought(item)]
    return out


def _is_only_thought(item: Any) -> bool:
    return (
        isinstance(item, Mapping) and "reasoning_content" in item and not (item.get("content") or "tool_calls" in item)
    )


def _unmarked(item: Any) -> Any:
    if not isinstance(item, Mapping):
        return item
    out = {key: value for key, value in item.items() if key not in _OWN_MARKS}
    if isinstance(parts := out.get("content"), list):
        out["content"] = [_unmarked(part) for part in parts]
    return out


def fitted(call: Call, native: Native, adapter: InferenceAdapter, *, may_pass: bool) -> Call:
    """The call as one adapter takes it: in the client's own words if it speaks them, else with a body it can read.

    Args:
        call: The chat.
        native: The same in the client's own words.
        adapter: Who is to send it.
        may_pass: True if the answer may come in those words.

    Raises:
        BackendError: (`Fault.BAD_REQUEST`) if only they will do, and this adapter does not speak them or must not.
    """
    passes = may_pass and adapter.speaks(native.surface)
    if native.only and not passes:
        raise refuse(f"only an engine that speaks the {native.surface} API itself can take {native.only}", native.only)
    body = call.body if adapter.keeps_marks or passes else portable(call.body)
    return attrs.evolve(call, body=body, native=native if passes else None)


async def send_native(adapter: HTTPAdapter, path: str, call: Call) -> Reply:
    """Make one call in the client's own words.

    Args:
        adapter: Who sends it.
        path: Where the engine has the API.
        call: Its `native` is what is said.

    Raises:
        BackendError: as `InferenceAdapter.send`.
    """
    native = call.native
    assert native is not None  # noqa: S101 - the caller looked
    wire = WIRES[native.surface]
    # encoded anew, so that no key stands twice: what the policy read is what the engine reads
    body = orjson.dumps({**native.body, **wire.fixed, "model": adapter.model_id, "stream": call.stream})
    if len(body) > LARGE_BYTES:  # putting it down took its turn
        await asyncio.sleep(0)
    headers = (*call.headers, *native.headers)
    incoming = await adapter.exchange("POST", path, body, headers=headers, limits=call.limits)

    def error_of(data: Mapping[str, Any]) -> BackendError:
        return adapter.error_of(wire.status_of(data), incoming.headers, orjson.dumps(data), received=call.stream)

    try:
        kind = incoming.headers.get("content-type", "").partition(";")[0].strip().lower()
        if call.stream and kind != "application/json":
            relay = NativeRelay(incoming, Tally(), wire, error_of)
            return Reply(
                status=incoming.status,
                headers=incoming.headers,
                events=relay,
                tally=relay.tally,
                close=relay.aclose,
                surface=native.surface,
            )
        answer = await incoming.read_json()
        tally = _whole(wire, answer, error_of, is_stream=call.stream)
    except BackendError as error:
        error.received = False  # nothing has been handed on
        await incoming.aclose()
        raise
    except BaseException:  # a cancelled call, too, must stop the engine
        await incoming.aclose()
        raise
    body = orjson.dumps(answer)
    return Reply(status=incoming.status, headers=incoming.headers, body=body, tally=tally, surface=native.surface)


def _whole(wire: NativeWire, answer: Any, error_of: ErrorMaker, *, is_stream: bool) -> Tally:
    tally = wire.read_whole(answer, error_of)
    if is_stream:
        raise BackendError(Fault.PROTOCOL, "the backend answered in one piece, though it was asked for a stream")
    return tally


class NativeRelay(RelayedEvents):
    """Iterates over pieces of whole events, the one that ends the answer included.

    Args:
        incoming, tally: See `RelayedEvents`.
        wire: The API's words.
        error_of: Makes the error of an error event's object.
    """

    def __init__(self, incoming: Incoming, tally: Tally, wire: NativeWire, error_of: ErrorMaker) -> None:
        super().__init__(incoming, tally)
        self._wire = wire
        self._error_of = error_of
        self._waiting = b""
        self._has_begun = False

    def _passed(self, piece: bytes) -> bytes:
        return self._one_by_one(piece)

    def _at_end(self) -> NoReturn:
        raise cut_off()

    def _read_event(self, event: bytes) -> bytes:
        """Learn from one event; those that say nothing yet wait for the first one that does."""
        kind = _kind_of(event)
        if not kind:
            if data_of(event).strip() not in (b"", b"[DONE]"):
                raise BackendError(Fault.PROTOCOL, "the backend sent an event without a type")
            return b""
        self.tally.events += 1
        data = self._parsed(event)
        if kind in self._wire.learns and self._learn(kind, data):
            self._end()
        if kind in self._wire.openers and not self._has_begun:
            self._waiting += event
            return b""
        self._has_begun = True
        waiting, self._waiting = self._waiting, b""
        return waiting + event

    def _learn(self, kind: bytes, data: Mapping[str, Any]) -> bool:
        try:
            return self._wire.read(kind, data, self.tally, self._error_of)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise BackendError(Fault.PROTOCOL, "the backend sent an event that cannot be read") from error

    @staticmethod
    def _parsed(event: bytes) -> Mapping[str, Any]:
        """An event's data, which is looked at even where nothing is learned of it: no client could read half of it."""
        try:
            found = orjson.loads(data_of(event))
        except orjson.JSONDecodeError as error:
            raise BackendError(Fault.PROTOCOL, "the backend sent an event that cannot be read") from error
        if not isinstance(found, dict):
            raise BackendError(Fault.PROTOCOL, "the backend sent an event that is no JSON object")
        return found


def _kind_of(event: bytes) -> bytes:
    """The event's type: what its ``event:`` line says, else its data; empty for a comment."""
    event = event.lstrip()
    if event.startswith(b"event:"):
        return event[6 : event.find(b"\n")].strip()
    found = _KIND.search(event) if event.startswith(b"data:") else None
    return found[1] if found else b""
