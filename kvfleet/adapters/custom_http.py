"""Any HTTP API that takes a conversation and gives a text: paths, a body template and the place of the answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Self

import attrs
import httpx
import orjson

from kvfleet.adapters.base import EndpointHealth
from kvfleet.adapters.call import Call, Operation, Reply
from kvfleet.adapters.custom_wire import CustomCall, Paths, fill, nothing_lost, placeholders, values_of
from kvfleet.adapters.prompting import TEMPLATES
from kvfleet.adapters.refusals import one_prompt, refuse
from kvfleet.adapters.translated import TranslatedAdapter
from kvfleet.adapters.translation import Framing, Translation, as_stream, wants_usage
from kvfleet.config.fields import choice, mapping, text
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError

__all__ = ["CustomHTTPAdapter"]

_WHOLE = "whole"
_CARRIERS = frozenset({"prompt", "messages"})


@attrs.define(kw_only=True)
class CustomHTTPAdapter(TranslatedAdapter):
    """Speaks to an HTTP API of one's own.

    Without a `request_template` it gets the OpenAI body, with the conversation as one text under ``prompt`` beside it.
    Without a `response_content_key` its answer must have OpenAI's shape. In a fleet file the first four options are the
    model's ``custom_chat_path``, ``custom_health_path``, ``custom_request_template`` and ``custom_content_key``.
    """

    chat_path: str = text("/generate", doc="Path of the call.")
    health_path: str = text("/health", doc="Path of the health check.")
    request_template: Mapping[str, Any] = mapping(
        doc="Body of a call; `{prompt}`, `{messages}`, `{model}` and any other field of the request are filled in.",
        example={"input": "{prompt}", "limit": "{max_tokens}"},
    )
    response_content_key: str = text("", doc="Where the answer's text stands, as in `output` or `data.0.text`.")
    stream_format: str = choice(
        _WHOLE,
        of=(_WHOLE, *(framing.value for framing in Framing)),
        doc="How it streams; `whole`: not at all, and a stream is made of its whole answer.",
    )
    stream_path: str = text("", doc="Path of a streamed call; that of the call if empty.")
    stream_content_key: str = text("", doc="Where an event's text stands; as in the whole answer if empty.")
    stream_end: str = text("", doc="The event that ends a stream, as in `[DONE]`; if empty, the end of the body does.")
    finish_key: str = text("", doc="Where the finish reason stands.")
    prompt_tokens_key: str = text("", doc="Where the number of prompt tokens stands.")
    completion_tokens_key: str = text("", doc="Where the number of answer tokens stands.")
    prompt_format: str = choice(
        "plain", of=tuple(TEMPLATES), doc="How `{prompt}` is written; a single user message is put in as it is."
    )
    _used: frozenset[str] = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        """Read the template's placeholders. The endpoint is taken as it stands: a ``/v1`` at its end is the API's own.

        Raises:
            ValueError: if the template has no place for the conversation.
        """
        super().__attrs_post_init__()
        self._base = httpx.URL(self.endpoint.rstrip("/"))
        self._used = placeholders(self.request_template)
        if self.request_template and not self._used & _CARRIERS:
            raise ValueError("the request template must have {prompt} or {messages} in it")

    @classmethod
    def from_config(cls, model: ModelConfig, *, connections: Any = None, **options: Any) -> Self:
        """Make the adapter for one replica: the model's ``custom_*`` fields, and its ``options``."""
        own = {
            "chat_path": model.custom_chat_path,
            "health_path": model.custom_health_path,
            "request_template": model.custom_request_template,
            "response_content_key": model.custom_content_key,
        }
        return super().from_config(model, connections=connections, **{**own, **options})

    def translate(self, call: Call) -> Translation:
        """The call as the API wants it."""
        if call.operation not in (Operation.CHAT, Operation.COMPLETION):
            raise refuse(f"a custom HTTP model has no {call.operation.value} endpoint", "model")
        is_stream = call.stream and self.stream_format != _WHOLE
        chunks = self.chunks(call.operation)
        chunks.include_usage = wants_usage(call.body)
        return CustomCall(
            operation=call.operation,
            path=(self.stream_path if is_stream else "") or self.chat_path,
            body=self._body(call, is_stream=is_stream),
            framing=Framing(self.stream_format) if is_stream else Framing.NDJSON,
            chunks=chunks,
            paths=self._paths(),
            end_mark=self.stream_end,
        )

    def _paths(self) -> Paths:
        return Paths(
            content=self.response_content_key,
            stream_content=self.stream_content_key,
            finish=self.finish_key,
            prompt_tokens=self.prompt_tokens_key,
            completion_tokens=self.completion_tokens_key,
        )

    def _body(self, call: Call, *, is_stream: bool) -> Mapping[str, Any]:
        values = values_of(call.body, model=self.model_id, is_stream=is_stream)
        if not self.request_template:
            return {**values, **self._prompt_if_text(call)}
        nothing_lost(call.body, self._used)
        if "prompt" in self._used:
            values["prompt"] = self._prompt(call)
        filled: Mapping[str, Any] = fill(self.request_template, values)
        return filled

    def _prompt(self, call: Call) -> str:
        if call.operation is Operation.COMPLETION:
            return one_prompt(call.body, "this model")
        messages = call.body.get("messages")
        if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0].get("content"), str):
            only: str = messages[0]["content"]
            return only
        return TEMPLATES[self.prompt_format].render(messages, "this model")

    def _prompt_if_text(self, call: Call) -> dict[str, str]:
        """The prompt as one text where there can be one: the whole conversation goes along with it."""
        try:
            return {"prompt": self._prompt(call)}
        except BackendError:
            return {}

    async def send(self, call: Call) -> Reply:
        """Make one call; an API that cannot stream is asked for the whole, which is then told as a stream."""
        if not call.stream or self.stream_format != _WHOLE:
            return await super().send(call)
        reply = await super().send(attrs.evolve(call, stream=False))
        told = as_stream(call.operation, orjson.loads(reply.body), include_usage=wants_usage(call.body))
        return Reply(status=reply.status, headers=reply.headers, events=_once(told), tally=reply.tally)

    async def health_check(self) -> EndpointHealth:
        """Whether the health path answers with 2xx."""
        return await self.probe(self.health_path)


async def _once(piece: bytes) -> AsyncIterator[bytes]:
    yield piece
