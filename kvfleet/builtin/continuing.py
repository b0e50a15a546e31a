"""A stream that is gone on with by another replica, should the one that writes it fail amid it.

The other replica gets the request with what was said so far as the beginning of its answer, as vLLM takes it
(``continue_final_message``); the client gets what follows. That is safe only where an answer is one text and nothing
else, so it is not done with tools, log probabilities, several choices, or a format that has to be kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import anyio
import attrs
import orjson

from kvfleet.adapters.base import InferenceAdapter
from kvfleet.adapters.call import OWN_COMMENT, Operation, Reply
from kvfleet.adapters.splitters import data_of
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.plugin.contract import Answer, Attempt, RouteRequest

__all__ = ["CONTINUATION", "Continued", "obstacle"]

CONTINUATION = "continuation"
"""The reason of an attempt that goes on with a stream."""

_FINAL = frozenset(
    {
        *(Fault.BAD_REQUEST, Fault.CONTENT_POLICY, Fault.CONTEXT_LENGTH),
        *(Fault.DEADLINE, Fault.CANCELLED, Fault.UNAUTHORIZED, Fault.NOT_FOUND),
    }
)
_UNSAFE = ("tools", "tool_choice", "functions", "logprobs", "top_logprobs", "prompt_logprobs", "echo", "suffix")
_FORMATS = ("response_format", "guided_json", "guided_regex", "guided_grammar", "guided_choice", "structured_outputs")
_LIMITS = ("max_tokens", "max_completion_tokens")
_TEXT = frozenset({"role", "content"})  # of a chat's delta; anything else cannot be said again
_MOST_TEXT = 1024 * 1024
_COUNT_S = 1.0
"""Longest wait for the engine that goes on to count the tokens of what was said."""


def obstacle(request: RouteRequest) -> str:
    """Why an answer to a request could not be gone on with by somebody else; empty if it could."""
    body = request.body
    for key in _UNSAFE:
        if body.get(key):
            return key
    for key in _FORMATS:
        said = body.get(key)
        if said and not (isinstance(said, Mapping) and said.get("type") == "text"):
            return key
    if (body.get("n") or 1) != 1 or (body.get("best_of") or 1) != 1:
        return "n"
    if request.operation is Operation.COMPLETION:
        return "" if isinstance(body.get("prompt"), str) else "prompt"
    last = body["messages"][-1] if body.get("messages") else {}
    return "messages" if last.get("role") == "assistant" else ""  # the client itself wants one gone on with


@attrs.frozen
class _Beginning:
    """The request with the beginning of its answer, for one more backend."""

    body: Mapping[str, Any]
    types: Sequence[str] = ()

    def restore(self, reply: Reply) -> Reply:
        """What follows is taken as it is."""
        return reply


@attrs.define(kw_only=True)
class Continued(AsyncIterator[bytes]):
    """The events of one answer, whoever writes them.

    Attributes:
        request: What was asked.
        first: The answer as it began.
        attempt: Makes an attempt.
        others: Who may go on, in order.
        adapters: By replica id; whose class says what its engine can go on with.
        timeout_s: Seconds to the first event of who goes on; None for the model's own.
        may_call: Asked before each attempt; says why not, or nothing.
        told: Told how each break ended: ``continued``, or why it was not.
    """

    request: RouteRequest
    first: Answer
    attempt: Attempt
    others: list[ModelConfig]
    adapters: Mapping[str, InferenceAdapter]
    timeout_s: float | None
    may_call: Callable[[ModelConfig], str]
    told: Callable[[str], None]
    _reply: Reply = attrs.field(init=False)
    _obstacle: str = attrs.field(init=False)
    _text: list[str] = attrs.field(init=False, factory=list)
    _size: int = attrs.field(init=False, default=0)
    _is_finished: bool = attrs.field(init=False, default=False)
    _is_continuing: bool = attrs.field(init=False, default=False)
    _said_tokens: int = attrs.field(init=False, default=0)

    @_reply.default
    def _of_first(self) -> Reply:
        return self.first.reply

    @_obstacle.default
    def _of_request(self) -> str:
        return obstacle(self.request)

    def answer(self) -> Answer:
        """The answer to give instead of the first one."""
        reply = attrs.evolve(self.first.reply, events=self, close=self.aclose)
        return attrs.evolve(self.first, reply=reply, goes_on=True)

    async def __anext__(self) -> bytes:
        while True:
            events = self._reply.events
            assert events is not None  # noqa: S101 - only streams are gone on with
            try:
                piece = await anext(events)
            except BackendError as error:
                return await self._go_on(error)
            if passed := self._passed(piece):
                return passed

    async def aclose(self) -> None:
        """End it, whoever writes; safe twice."""
        await self._reply.close()

    # Going on

    async def _go_on(self, error: BackendError) -> bytes:
        """A comment that says who follows; the next events are theirs.

        Raises:
            BackendError: the one that broke the stream, if nobody can go on.
        """
        why_not = self._why_not(error)
        while not why_not:
            chosen = next((model for model in self.others if self._is_able(model)), None)
            if chosen is None:
                why_not = "nobody_left"
                break
            self.others.remove(chosen)
            if why_not := self.may_call(chosen):
                break
            self._said_tokens = await self._count(self.adapters[chosen.id])
            rewrite = _Beginning(self._body())
            try:
                answer = await self.attempt(chosen, timeout_s=self.timeout_s, reason=CONTINUATION, rewrite=rewrite)
            except BackendError as failed:
                why_not = failed.kind.value if failed.kind in _FINAL else ""
                continue
            self._reply, self._is_continuing = answer.reply, True
            self.told("continued")
            return OWN_COMMENT + b"gone on with by another replica, attempt %d, after %b\n\n" % (
                answer.attempt,
                error.kind.value.encode(),
            )
        self.told(why_not)
        error.message = f"{error.message}; nobody went on with it ({why_not})"
        raise error

    def _why_not(self, error: BackendError) -> str:
        if error.kind in _FINAL:
            return error.kind.value
        if self._is_finished:
            return "finished"
        if self._text and self._obstacle:
            return f"unsafe: {self._obstacle}"
        return "too_long" if self._size > _MOST_TEXT else ""

    def _is_able(self, model: ModelConfig) -> bool:
        """True if its engine can go on with a text; anybody can begin one of which nothing was said."""
        return not self._text or self.request.operation in self.adapters[model.id].continues

    async def _count(self, adapter: InferenceAdapter) -> int:
        """How many tokens were said: as the engine that goes on counts them, or else as many as there were events.

        An engine that is busy puts several tokens into one event.
        """
        text = "".join(self._text)
        tokens = None
        if text:
            asked = {"prompt": text, "add_special_tokens": False}
            with contextlib.suppress(BackendError), anyio.move_on_after(_COUNT_S):
                tokens = await adapter.prompt_tokens(Operation.COMPLETION, asked)
        return len(tokens) if tokens else len(self._text)

    def _body(self) -> Mapping[str, Any]:
        body = dict(self.request.body)
        if not self._text:
            return body
        said = "".join(self._text)
        if self.request.operation is Operation.COMPLETION:
            body["prompt"] += said
        else:
            body["messages"] = [*body["messages"], {"role": "assistant", "content": said}]
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        for key in _LIMITS:
            if isinstance(limit := body.get(key), int):
                body[key] = max(limit - self._said_tokens, 1)
        return body

    # Reading what passes

    def _passed(self, piece: bytes) -> bytes:
        """The piece, after something was learned of it; of one who goes on without what was said before."""
        events = [event + b"\n\n" for event in piece.replace(b"\r\n", b"\n").split(b"\n\n") if event]
        kept = [self._read(event) for event in events]
        return b"".join(kept) if self._is_continuing else piece

    def _read(self, event: bytes) -> bytes:
        data = data_of(event).strip()
        if not data.startswith(b"{"):
            return event
        chunk = orjson.loads(data)
        choices = chunk.get("choices") or ()
        for choice in choices:
            self._learn(choice)
        if self._is_continuing and chunk.get("usage"):
            return self._recounted(chunk)
        return b"" if self._is_continuing and _only_names_the_role(choices) else event

    def _learn(self, choice: Mapping[str, Any]) -> None:
        delta = choice.get("delta")
        said = choice.get("text") if delta is None else delta.get("content")
        if delta and any(value for key, value in delta.items() if key not in _TEXT):
            self._obstacle = self._obstacle or "the answer is more than a text"
            self._text.append("")  # so that it is not begun anew either
        if said:
            self._size += len(said)
            if self._size <= _MOST_TEXT:
                self._text.append(said)
        self._is_finished = self._is_finished or bool(choice.get("finish_reason"))

    def _recounted(self, chunk: dict[str, Any]) -> bytes:
        """The usage as if one had written it all: what was said before was a part of the prompt only to the other."""
        usage = dict(chunk["usage"])
        before = min(self._said_tokens, int(usage.get("prompt_tokens") or 0))
        usage["prompt_tokens"] = int(usage.get("prompt_tokens") or 0) - before
        usage["completion_tokens"] = int(usage.get("completion_tokens") or 0) + before
        return b"data: " + orjson.dumps({**chunk, "usage": usage}) + b"\n\n"


def _only_names_the_role(choices: Sequence[Mapping[str, Any]]) -> bool:
    """True for the event that begins a chat: it has been sent before."""
    if not choices or any(choice.get("finish_reason") for choice in choices):
        return False
    return all("role" in (delta := choice.get("delta") or {}) and not delta.get("content") for choice in choices)
