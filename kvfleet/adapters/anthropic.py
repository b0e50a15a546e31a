"""Anthropic's native Messages API, which has what its OpenAI route has not: prompt caching, thoughts, its own tools.

``POST /v1/messages`` and ``GET /v1/models``. Source: the types of the `anthropic` package, 2.12.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import attrs

from kvfleet.adapters.anthropic_bodies import chat_body
from kvfleet.adapters.anthropic_wire import AnthropicChat
from kvfleet.adapters.base import EndpointHealth
from kvfleet.adapters.call import Call, Operation, Reply
from kvfleet.adapters.native import send_native
from kvfleet.adapters.refusals import refuse
from kvfleet.adapters.translated import TranslatedAdapter
from kvfleet.adapters.translation import Translation
from kvfleet.config.fields import choice, listing, number, text
from kvfleet.config.schema import DEFAULT_ENDPOINTS
from kvfleet.errors import BackendError, Fault

__all__ = ["AnthropicAdapter"]

_MODELS = "/v1/models?limit=1000"
# An account without money is refused as if the caller had written a wrong request.
_NO_CREDIT = re.compile(rb"credit balance is too low|spend limit", re.IGNORECASE)


@attrs.define(kw_only=True)
class AnthropicAdapter(TranslatedAdapter):
    """Speaks Anthropic's Messages API.

    `anthropic-beta` and other headers go under the model's `custom_headers`. Anthropic's own fields (`thinking`,
    `top_k`, `cache_control` on messages, parts and tools) may stand in the request.
    """

    keeps_marks: ClassVar[bool] = True
    endpoint: str = DEFAULT_ENDPOINTS["anthropic"]
    max_tokens: int = number(
        4096, ge=1, unit="tokens", doc="Longest answer where the request has no limit; Anthropic needs one."
    )
    version: str = text("2023-06-01", doc="The `anthropic-version` to speak.")
    json_object: str = choice(
        "refuse",
        of=("refuse", "instruct"),
        doc="What becomes of `response_format: json_object`, which Anthropic has not: a refusal, or an instruction in "
        "the system prompt, which nothing enforces. A `json_schema` is enforced by Anthropic itself.",
    )
    ignored_fields: tuple[str, ...] = listing(
        (),
        doc="Fields of OpenAI's that Anthropic lacks, to leave out instead of refusing the request.",
        example=["seed", "frequency_penalty"],
    )

    def auth_headers(self) -> Mapping[str, str]:
        """The key, and the version of the API, without which no call is accepted."""
        key = {"x-api-key": self.api_key} if self.api_key else {}
        return {**key, "anthropic-version": self.version}

    def error_of(self, status: int, headers: Mapping[str, str], body: bytes, *, received: bool = False) -> BackendError:
        """The error that a refusing answer stands for; an unpaid account is no mistake of the caller's."""
        if status == 400 and _NO_CREDIT.search(body):
            return BackendError(Fault.UNAUTHORIZED, "the backend's account has no credit (status 400)", status=status)
        return super().error_of(status, headers, body, received=received)

    def speaks(self, surface: str) -> bool:
        """See `InferenceAdapter.speaks`."""
        return surface == "messages"

    async def send(self, call: Call) -> Reply:
        """Make one call; what the client said in Anthropic's words is passed through."""
        if call.native is not None and call.native.surface == "messages":
            return await send_native(self, "/v1/messages", call)
        return await super().send(call)

    def translate(self, call: Call) -> Translation:
        """The call in Anthropic's words."""
        if call.operation is not Operation.CHAT:
            raise refuse(f"Anthropic has no {call.operation.value} endpoint", "model")
        theirs = chat_body(
            call.body,
            model=self.model_id,
            is_stream=call.stream,
            max_tokens=self.max_tokens,
            ignored=self.ignored_fields,
            may_instruct=self.json_object == "instruct",
        )
        return AnthropicChat.of(call.body, theirs, self.chunks(call.operation))

    async def health_check(self) -> EndpointHealth:
        """Whether Anthropic answers and takes the key, and which models it lets it use."""
        health = await self.probe(_MODELS)
        if not health.healthy:
            return health
        try:
            return attrs.evolve(health, models=await self.list_models())
        except BackendError as error:
            return attrs.evolve(health, healthy=False, error=error.message)

    async def list_models(self) -> tuple[str, ...]:
        """Names of the models the key may use."""
        found = await self.control_json("GET", _MODELS)
        return tuple(str(model["id"]) for model in found.get("data") or () if "id" in model)
