"""Engines and providers that speak OpenAI's API."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import attrs
import orjson

from kvfleet.adapters import faults, sse
from kvfleet.adapters.base import EndpointHealth
from kvfleet.adapters.call import LARGE_BYTES, Call, Native, Operation, Reply, Tally, Usage
from kvfleet.adapters.http import HTTPAdapter
from kvfleet.adapters.incoming import Incoming, parsed
from kvfleet.adapters.native import portable, send_native
from kvfleet.adapters.native_wire import WIRES
from kvfleet.adapters.patching import body_for, body_in_turns, hides_usage
from kvfleet.config.fields import listing, text
from kvfleet.errors import BackendError, Fault

__all__ = ["OpenAICompatAdapter"]

# Parsing some megabytes of vectors would hold up everybody else for what stands in their last hundred bytes.
READ_WHOLE_BELOW_BYTES = 256 * 1024
_TAIL_BYTES = 4096
_LOOKED_INTO_BYTES = 1024 * 1024
_ERROR = re.compile(rb'\s*\{\s*"(?:error"\s*:\s*[{"]|(?:object|type)"\s*:\s*"error")')
_OPENAI = "api.openai.com"

# Some engines and proxies leave the type out, or say less than they could.
_JSON_TYPES = frozenset({"application/json", "text/plain", "application/octet-stream", ""})
_STREAM_TYPES = frozenset({"text/event-stream", "text/plain", "application/octet-stream", ""})


@attrs.define(kw_only=True)
class OpenAICompatAdapter(HTTPAdapter):
    """OpenAI's API: chat, completions, embeddings, rerank. A body goes on byte by byte, but for the model's name."""

    api_prefix: str = text(
        "/v1",
        doc="Path between the endpoint and `/chat/completions`; an endpoint may end in `/v1` or not.",
        pattern="(/[A-Za-z0-9._~-]+)*",
        pattern_doc="a path such as /v1 or /openai/v1, or empty",
    )
    surfaces: tuple[str, ...] = listing(
        ("usual",),
        of=("usual", "messages", "responses"),
        doc="APIs beside OpenAI's chat that the engine speaks: requests that come over them are passed through, others "
        "are translated. `usual`: what engines of this kind have.",
        example=["messages", "responses"],
    )
    usual_surfaces: ClassVar[frozenset[str]] = frozenset()
    _paths: Mapping[Operation, str] = attrs.field(init=False, repr=False, eq=False)
    _spoken: set[str] = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self._spoken = set(self.surfaces) - {"usual"}
        if "usual" in self.surfaces:
            self._spoken |= self._usual_surfaces()
        self._paths = {operation: self._api(operation.path) for operation in Operation}

    def _api(self, path: str) -> str:
        return self.api_prefix + path.removeprefix("/v1")

    def _usual_surfaces(self) -> frozenset[str]:
        # Who calls OpenAI itself need not say that it has its own API.
        return frozenset({"responses"}) if self._base.host == _OPENAI else self.usual_surfaces

    def speaks(self, surface: str) -> bool:
        """See `InferenceAdapter.speaks`; an API that the engine turned out not to have is not spoken any more."""
        return surface in self._spoken

    async def send(self, call: Call) -> Reply:
        """Make one call; see `InferenceAdapter.send`."""
        if call.native is not None:
            if call.native.surface in self._spoken:
                return await self._send_native(call, call.native)
            call = self._as_chat(call)
        incoming = await self.exchange(
            "POST",
            self._paths[call.operation],
            body_for(call, self.model_id) if len(call.raw) <= LARGE_BYTES else await body_in_turns(call, self.model_id),
            headers=call.headers,
            limits=call.limits,
        )
        try:
            kind = _kind_of(incoming)
            if not call.stream:
                return self._whole(call, incoming, kind, await incoming.read())
            if kind == "application/json":  # a refusal under a 200, or an engine that does not stream
                return self._unstreamed(incoming, await incoming.read())
            return self._streamed(call, incoming, kind)
        except BackendError as error:
            error.received = False  # nothing has been handed on
            await incoming.aclose()
            raise
        except BaseException:  # a cancelled call, too, must stop the engine
            await incoming.aclose()
            raise

    async def _send_native(self, call: Call, native: Native) -> Reply:
        """The same in the client's own words; as a chat if the engine, being older, does not have that API."""
        try:
            return await send_native(self, self._api(WIRES[native.surface].path), call)
        except BackendError as error:
            if error.kind is not Fault.NOT_FOUND or native.only:
                raise
        reply = await self.send(self._as_chat(call))
        self._spoken.discard(native.surface)  # it knows the model, so it was the path that it does not know
        return reply

    def _as_chat(self, call: Call) -> Call:
        return attrs.evolve(call, body=call.body if self.keeps_marks else portable(call.body), native=None)

    async def health_check(self) -> EndpointHealth:
        """Ask ``/health``, and where nobody knows that path, for the list of models."""
        return await self.probe("/health", self._api("/v1/models"))

    async def list_models(self) -> tuple[str, ...]:
        """Names of the models it serves.

        Raises:
            BackendError: if it cannot be asked.
        """
        listed = await self.control_json("GET", self._api("/v1/models"))
        models = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(models, list):
            raise BackendError(Fault.PROTOCOL, "the backend's list of models has no data")
        return tuple(str(model["id"]) for model in models if isinstance(model, dict) and "id" in model)

    def read_usage(self, answer: Mapping[str, Any]) -> Usage | None:
        """The usage in an answer or a chunk; engines that say more than OpenAI's fields read theirs here."""
        return sse.usage_of(answer)

    def _whole(self, call: Call, incoming: Incoming, kind: str, body: bytes) -> Reply:
        if kind not in _JSON_TYPES:
            raise BackendError(Fault.PROTOCOL, f"the backend answered with {kind}, not JSON", status=incoming.status)
        is_read = len(body) < READ_WHOLE_BELOW_BYTES
        answer = parsed(body, incoming.status) if is_read else _end_of(body)
        if not is_read and (_begins_as_error(body) or not _may_fit(call.operation, body)):
            raise self.error_of(incoming.status, incoming.headers, body if len(body) <= _LOOKED_INTO_BYTES else b"")
        if isinstance(answer, dict) and (answer.get("error") or answer.get("object") == "error"):
            raise self.error_of(incoming.status, incoming.headers, body)
        if is_read and not _fits(call.operation, answer):
            raise BackendError(Fault.PROTOCOL, f"the backend's answer is none to {call.operation}")
        return Reply(status=incoming.status, headers=incoming.headers, body=body, tally=self._tally(answer))

    def _tally(self, answer: Any) -> Tally:
        if not isinstance(answer, dict):
            return Tally(is_complete=True)
        choices = answer.get("choices")
        first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        return Tally(
            usage=self.read_usage(answer),
            finish_reason=first.get("finish_reason"),
            model=str(answer.get("model") or ""),
            response_id=str(answer.get("id") or ""),
            is_complete=True,
        )

    def _streamed(self, call: Call, incoming: Incoming, kind: str) -> Reply:
        if kind not in _STREAM_TYPES:
            raise BackendError(Fault.PROTOCOL, f"the backend answered with {kind}, not a stream of events")
        tally = Tally()
        relay = sse.EventRelay(
            incoming,
            tally,
            choices=_choices_of(call.body),
            hide_usage=hides_usage(call),
            error_of=lambda data: self.error_of(incoming.status, incoming.headers, data),
            read_usage=self.read_usage,
        )
        return Reply(status=incoming.status, headers=incoming.headers, events=relay, tally=tally, close=relay.aclose)

    def _unstreamed(self, incoming: Incoming, body: bytes) -> NoReturn:
        if faults.error_object(parsed(body, incoming.status)) is not None:
            raise self.error_of(incoming.status, incoming.headers, body)
        raise BackendError(Fault.PROTOCOL, "the backend answered in one piece, though it was asked for a stream")


def _kind_of(incoming: Incoming) -> str:
    """The answer's media type; empty if it does not say."""
    if incoming.headers.get("content-encoding", "identity").lower() != "identity":
        raise BackendError(Fault.PROTOCOL, "the backend compressed its answer, though it was told not to")
    kind, _, _ = incoming.headers.get("content-type", "").partition(";")
    return kind.strip().lower()[:80]


def _fits(operation: Operation, answer: Any) -> bool:
    """True if it answers at all: a list of choices without one, or with one that says nothing, is no answer."""
    if operation is Operation.RERANK:
        return isinstance(answer, dict | list)
    if not isinstance(answer, dict):
        return False
    if operation is Operation.EMBEDDING:
        return isinstance(answer.get("data"), list)
    choices = answer.get("choices")
    return isinstance(choices, list) and bool(choices) and all(map(_says_something, choices))


def _says_something(choice: Any) -> bool:
    return isinstance(choice, dict) and (isinstance(choice.get("message"), dict) or isinstance(choice.get("text"), str))


def _end_of(body: bytes) -> dict[str, Any]:
    """What the last keys of a large answer say; its bulk is not looked at."""
    if not (body.lstrip()[:1] == b"{" and body.rstrip()[-1:] == b"}"):
        raise BackendError(Fault.PROTOCOL, "the backend's answer is not JSON")
    found: dict[str, Any] = {}
    at = body.rfind(b'"usage"', len(body) - _TAIL_BYTES)
    if at >= 0:
        with contextlib.suppress(orjson.JSONDecodeError):
            found |= orjson.loads(b"{" + body[at:])
    return found


def _begins_as_error(body: bytes) -> bool:
    return _ERROR.match(body) is not None


def _may_fit(operation: Operation, body: bytes) -> bool:
    """True if a large answer has the list that it should have."""
    if operation is Operation.RERANK:
        return True
    return body.find(b'"data"' if operation is Operation.EMBEDDING else b'"choices"', 0, _LOOKED_INTO_BYTES) >= 0


def _choices_of(body: Mapping[str, Any]) -> int:
    """How many choices a body asks for: ``n``, for each prompt of a text completion."""
    n = body.get("n")
    prompts = body.get("prompt")
    many = len(prompts) if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list) else 1
    return (n if isinstance(n, int) and n > 0 else 1) * many
