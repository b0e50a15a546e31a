"""From an HTTP request to a `RouteRequest`: one parse, and checks that name the field at fault.

Only what routing needs is checked. Everything else, unknown fields included, is the backend's to judge and passes
through as it came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio.to_thread
import attrs
import orjson
import xxhash

from kvfleet.adapters.call import Operation
from kvfleet.config.schema import AUTO_MODEL
from kvfleet.errors import BadRequestError
from kvfleet.gateway.deadlines import DeadlineReader
from kvfleet.gateway.headers import HeaderNames, Headers, data_class_of, names_of, text_of
from kvfleet.gateway.parsing import loaded
from kvfleet.gateway.surfaces.surface import Asked, Surface
from kvfleet.plugin.contract import RouteRequest
from kvfleet.turns import in_turns

__all__ = ["RequestReader", "parse"]

MOST_MESSAGES = 10_000
MOST_TAGS = 16
MOST_DEPTH = 64
LONGEST_NAME = 256

Body = dict[str, Any]


def parse(raw: bytes, most_depth: int = MOST_DEPTH) -> Body:
    """The body as a JSON object, nested no deeper than that.

    Raises:
        BadRequestError: if it is not one; says at which character, never what stands there.
    """
    if not raw:
        raise BadRequestError("the request has no body; send a JSON object")
    try:
        body = _object_of(orjson.loads(raw))
    except orjson.JSONDecodeError as error:
        raise _no_json(error) from error
    _check_depth(body, raw, most_depth)
    return body


async def _loaded_in_turns(raw: bytes) -> Body:
    """The same of a large body, others having their turn meanwhile; its depth is not looked at."""
    await asyncio.sleep(0)
    try:
        return _object_of(await in_turns(loaded(raw)))
    except orjson.JSONDecodeError as error:
        raise _no_json(error) from error


def _no_json(error: orjson.JSONDecodeError) -> BadRequestError:
    place = f"line {error.lineno} column {error.colno}"
    return BadRequestError(f"the request body is not valid JSON (near {place})", code="invalid_json")


def _object_of(body: Any) -> Body:
    if not isinstance(body, dict):
        raise BadRequestError(f"the request body must be a JSON object, not {_kind(body)}", code="invalid_json")
    keys = "".join(body)
    if not (keys.isascii() and keys.islower()):
        _check_spelling(body)
    return body


def _check_depth(body: Body, raw: bytes, most_depth: int) -> None:
    # What opens no more brackets than that cannot be deeper: only what opens more is looked at again.
    if _opens_more(raw, most_depth) and _is_deeper(body, most_depth):
        raise BadRequestError(f"the request body is nested deeper than {most_depth} levels", code="invalid_json")


_READ = frozenset(
    {
        *("model", "messages", "prompt", "suffix", "input", "query", "documents", "system", "instructions", "metadata"),
        *("stream", "stream_options", "tools", "functions", "max_tokens", "max_completion_tokens", "max_output_tokens"),
        *("n", "timeout", "temperature", "response_format"),
    }
)
"""Fields that decide where a request goes, and what it may cost."""


def _check_spelling(body: Body) -> None:
    """Go reads ``"Model"`` as ``"model"``: an engine written in it would do what nobody here has seen.

    Raises:
        BadRequestError: for a field that differs from one of those in its letters' case alone.
    """
    for key in body:
        if key not in _READ and (meant := key.casefold()) in _READ:
            raise BadRequestError(f"the field {meant!r} must be written in lower case", param=meant)


def _opens_more(raw: bytes, brackets: int) -> bool:
    """True if there are more opening brackets than that; to count them all would take 1.5 ms for a megabyte."""
    if len(raw) < _SMALL:
        return raw.count(b"{") + raw.count(b"[") > brackets
    find, left = raw.find, brackets
    for bracket in (b"{", b"["):
        at = find(bracket)
        while at >= 0:
            left -= 1
            if left < 0:
                return True
            at = find(bracket, at + 1)
    return False


_CONTAINERS = frozenset({dict, list})
_SMALL = 65_536
"""Bytes of a body that are looked through at once."""


def _is_deeper(body: Body, levels: int) -> bool:
    """True if a value is nested deeper than that; level by level, so that no nesting is deep for us."""
    level: list[Any] = [body]
    for _ in range(levels):
        inside = [one.values() if type(one) is dict else one for one in level]
        level = [value for values in inside for value in values if type(value) in _CONTAINERS]
        if not level:
            return False
    return True


@attrs.frozen
class RequestReader:
    """Makes route requests of what the configured headers and the body say.

    Args:
        names: The headers.
        most_depth: Deepest nesting of a body.
        timeout_s: The configuration's own limit on a request, in seconds; None for none.
    """

    names: HeaderNames
    most_depth: int = MOST_DEPTH
    timeout_s: float | None = None
    _deadlines: DeadlineReader = attrs.field(init=False)

    @_deadlines.default
    def _make_deadlines(self) -> DeadlineReader:
        return DeadlineReader(self.names.timeout, self.timeout_s)

    def read(
        self, operation: Operation, raw: bytes, headers: Headers, request_id: str, *, key: str = ""
    ) -> RouteRequest:
        """The request of one call.

        Raises:
            BadRequestError: naming the field or header that is wrong.
        """
        body = parse(raw, self.most_depth)
        _CHECKS[operation](body)
        return self._request(operation, body, raw, headers=headers, request_id=request_id, key=key)

    async def read_in_turns(
        self, operation: Operation, raw: bytes, headers: Headers, request_id: str, *, key: str = ""
    ) -> RouteRequest:
        """The same for a large body: others have their turn while it is parsed, and go on while it is checked."""
        body = await _loaded_in_turns(raw)

        def check() -> None:
            _check_depth(body, raw, self.most_depth)
            _CHECKS[operation](body)

        await anyio.to_thread.run_sync(check)
        return self._request(operation, body, raw, headers=headers, request_id=request_id, key=key)

    def read_as(
        self,
        surface: Surface,
        raw: bytes,
        headers: Headers,
        request_id: str,
        *,
        fields: Sequence[tuple[bytes, bytes]],
        key: str = "",
    ) -> tuple[Asked, RouteRequest]:
        """The request of one call over another API than OpenAI's chat: a chat that also has its client's own words.

        Raises:
            BadRequestError: naming the field or header that is wrong.
        """
        asked = _asked(surface, parse(raw, self.most_depth), fields)
        return asked, self._as_chat(asked, len(raw), headers, request_id, key)

    async def read_as_in_turns(
        self,
        surface: Surface,
        raw: bytes,
        headers: Headers,
        request_id: str,
        *,
        fields: Sequence[tuple[bytes, bytes]],
        key: str = "",
    ) -> tuple[Asked, RouteRequest]:
        """The same for a large body, as `read_in_turns`."""
        body = await _loaded_in_turns(raw)

        def read() -> Asked:
            _check_depth(body, raw, self.most_depth)
            return _asked(surface, body, fields)

        asked = await anyio.to_thread.run_sync(read)
        return asked, self._as_chat(asked, len(raw), headers, request_id, key)

    def _as_chat(self, asked: Asked, size: int, headers: Headers, request_id: str, key: str) -> RouteRequest:
        request = self._request(Operation.CHAT, asked.chat, b"", headers=headers, request_id=request_id, key=key)
        session = request.session or asked.session
        return request.changed(native=asked.native, session=session, body_bytes=size)

    def read_any(self, raw: bytes, headers: Headers, request_id: str, *, key: str = "") -> RouteRequest:
        """The request of a dry run, whose operation is the one its fields belong to.

        Raises:
            BadRequestError: naming the field or header that is wrong.
        """
        body = parse(raw, self.most_depth)
        operation = next((op for field, op in _FIELD_OF.items() if field in body), Operation.CHAT)
        _CHECKS[operation](body)
        return self._request(operation, body, raw, headers=headers, request_id=request_id, key=key)

    def _request(
        self, operation: Operation, body: Body, raw: bytes, *, headers: Headers, request_id: str, key: str
    ) -> RouteRequest:
        names = self.names
        strategy = text_of(headers, names.strategy)
        stream = _stream(body, operation)
        limits = self._deadlines.read(headers, body, is_stream=stream)
        return RouteRequest(
            operation=operation,
            body=body,
            raw=raw,
            model=_model(body),
            models=names_of(headers, names.models),
            strategy=strategy,
            is_override=bool(strategy),
            stream=stream,
            request_id=request_id,
            key=key,
            tenant=text_of(headers, names.tenant),
            data_class=data_class_of(headers, names.data_class),
            region=text_of(headers, names.region),
            tags=_tags(body),
            session=text_of(headers, names.session) or _session(body),
            headers=names.passed_on(headers),
            condition_headers=names.for_conditions(headers),
            traceparent=headers.get(b"traceparent", b"").decode("latin-1"),
            tracestate=headers.get(b"tracestate", b"").decode("latin-1"),
            timeout_s=limits.timeout_s,
            timeout_by=limits.timeout_by,
            first_byte_s=limits.first_byte_s,
            first_byte_by=limits.first_byte_by,
        )


def _asked(surface: Surface, body: Body, fields: Sequence[tuple[bytes, bytes]]) -> Asked:
    """What is asked over a surface, of which a chat is made that is checked as any other."""
    asked = surface.read(body, fields)
    _check_chat(asked.chat)
    return asked


def _model(body: Body) -> str:
    model = body.get("model")
    if model is None:
        return AUTO_MODEL
    if not isinstance(model, str):
        raise BadRequestError(f"model must be text, not {_kind(model)}", param="model")
    if not model or len(model) > LONGEST_NAME:
        raise BadRequestError(f"model must be 1 to {LONGEST_NAME} characters long", param="model")
    return model


def _stream(body: Body, operation: Operation) -> bool:
    stream = body.get("stream")
    if stream is None or stream is False:
        return False
    if stream is not True:
        raise BadRequestError(f"stream must be true or false, not {_kind(stream)}", param="stream")
    if operation not in (Operation.CHAT, Operation.COMPLETION):
        raise BadRequestError(f"an answer to {operation.path} cannot be streamed", param="stream")
    return True


def _tags(body: Body) -> Mapping[str, str]:
    """OpenAI's ``metadata`` (up to 16 pairs of text) is what rules see as ``tags.X``."""
    metadata = body.get("metadata")
    if not isinstance(metadata, dict) or len(metadata) > MOST_TAGS:
        return {}
    return {key: value for key, value in metadata.items() if isinstance(value, str)}


def _session(body: Body) -> str:
    """``prompt_cache_key`` names what shares a prompt's beginning.

    ``user`` does not: it names a person, who may have many conversations. A long key is replaced by its hash, so that
    what is kept of a session is bounded.
    """
    key = body.get("prompt_cache_key")
    if not isinstance(key, str):
        return ""
    return key if len(key) <= LONGEST_NAME else xxhash.xxh3_128_hexdigest(key.encode())


def _check_chat(body: Body) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list):
        what = "is missing" if messages is None else f"must be a list, not {_kind(messages)}"
        raise BadRequestError(f"messages {what}", param="messages")
    if not messages:
        raise BadRequestError("messages must not be empty", param="messages")
    if len(messages) > MOST_MESSAGES:
        raise BadRequestError(f"messages must be at most {MOST_MESSAGES}", param="messages")
    tools = body.get("tools")
    if tools is not None:
        _check_objects(tools, "tools")
    for index, message in enumerate(messages):
        _check_message(message, index)


def _check_message(message: Any, index: int) -> None:
    """What every reader of a message relies on: its role, and the shapes of its content and tool calls."""
    if not isinstance(message, dict):
        raise BadRequestError(f"messages[{index}] must be an object, not {_kind(message)}", param="messages")
    content = message.get("content")
    if isinstance(message.get("role"), str) and isinstance(content, str) and "tool_calls" not in message:
        return
    place = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise BadRequestError(f"{place}.role must be text", param=f"{place}.role")
    if not isinstance(content, _CONTENT):
        raise BadRequestError(f"{place}.content must be text, a list of parts or null", param=f"{place}.content")
    for field, items in (("content", content), ("tool_calls", message.get("tool_calls"))):
        if items is not None and not isinstance(items, str):
            _check_objects(items, f"{place}.{field}")


def _check_objects(items: Any, place: str) -> None:
    if not isinstance(items, list):
        raise BadRequestError(f"{place} must be a list, not {_kind(items)}", param=place)
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise BadRequestError(f"{place}[{index}] must be an object, not {_kind(item)}", param=place)


_CONTENT = (str, list, type(None))


def _check_prompt(body: Body) -> None:
    _check_input(body, "prompt")


def _check_embedding(body: Body) -> None:
    _check_input(body, "input")


def _check_input(body: Body, field: str) -> None:
    """Text, a list of texts, a list of tokens, or a list of those."""
    value = body.get(field)
    if value is None:
        raise BadRequestError(f"{field} is missing", param=field)
    if not isinstance(value, str | list):
        raise BadRequestError(f"{field} must be text or a list, not {_kind(value)}", param=field)
    if isinstance(value, list) and not value:
        raise BadRequestError(f"{field} must not be empty", param=field)


def _check_rerank(body: Body) -> None:
    if not isinstance(body.get("query"), str | dict):
        raise BadRequestError("query is missing or not text", param="query")
    documents = body.get("documents")
    if not isinstance(documents, list) or not documents:
        raise BadRequestError("documents must be a list that is not empty", param="documents")


_CHECKS: Mapping[Operation, Callable[[Body], None]] = {
    Operation.CHAT: _check_chat,
    Operation.COMPLETION: _check_prompt,
    Operation.EMBEDDING: _check_embedding,
    Operation.RERANK: _check_rerank,
}
_FIELD_OF = {
    "messages": Operation.CHAT,
    "prompt": Operation.COMPLETION,
    "input": Operation.EMBEDDING,
    "documents": Operation.RERANK,
}


def _kind(value: Any) -> str:
    """JSON's word for a value's type."""
    if value is None:
        return "null"
    return _KINDS.get(type(value), "a number")


_KINDS = {str: "text", list: "a list", dict: "an object", bool: "true or false"}
