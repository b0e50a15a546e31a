"""The adapter: one model of any provider, called through LiteLLM's SDK.

Source of the arguments, answers and exceptions: LiteLLM 1.106.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any

import attrs

from kvfleet.adapters.base import EndpointHealth, InferenceAdapter
from kvfleet.adapters.call import Call, Limits, Operation, Reply, Tally
from kvfleet.adapters.refusals import refuse
from kvfleet.adapters.translation import wants_usage
from kvfleet.config.fields import flag, listing, mapping
from kvfleet.errors import BackendError, Fault
from kvfleet_litellm.answers import DONE, chat_answer, embedding_answer, events_of
from kvfleet_litellm.faults import error_of
from kvfleet_litellm.library import litellm
from kvfleet_litellm.requests import chat_arguments, embedding_arguments

__all__ = ["LiteLLMAdapter"]


@attrs.define(kw_only=True)
class LiteLLMAdapter(InferenceAdapter):
    """Calls a model by LiteLLM's name for it, as in ``bedrock/us.anthropic.claude-haiku-4-5`` or ``gemini/gemini-2.5``.

    LiteLLM is told the credential, the endpoint and the parameters that stand in the fleet file; for those that do not,
    it looks in the provider's usual environment variables. Its own retries are off: kvfleet does that.
    """

    credentials: Mapping[str, str] = mapping(
        doc="Further credentials by LiteLLM's names; values may be secrets.",
        example={"aws_access_key_id": "env:AWS_KEY", "aws_secret_access_key": "env:AWS_SECRET"},
        is_secret=True,
    )
    params: Mapping[str, Any] = mapping(
        doc="Further parameters of LiteLLM's call, the same for every request.",
        example={"aws_region_name": "eu-west-1", "drop_params": True},
        is_shown=False,
    )
    fields: tuple[str, ...] = listing(
        (),
        doc="Fields of requests that this provider takes as parameters of LiteLLM's call; other unknown fields are put "
        "into the body of the call as they are.",
        example=["cached_content"],
    )
    fetch_urls: bool = flag(
        doc="Let messages point at pictures and files by address. LiteLLM may fetch them from this machine, so clients "
        "could reach what it can reach."
    )

    async def send(self, call: Call) -> Reply:
        """Make one call; a stream has begun when this returns."""
        if call.operation is Operation.CHAT:
            arguments = chat_arguments(call.body, self.fields, may_fetch=self.fetch_urls)
            return await (self._streamed if call.stream else self._whole)(call, arguments)
        if call.operation is Operation.EMBEDDING:
            return await self._embedded(call, embedding_arguments(call.body, self.fields))
        raise refuse(f"kvfleet calls no {call.operation.value} endpoint through LiteLLM", "model")

    async def health_check(self) -> EndpointHealth:
        """Whether LiteLLM can be imported; nothing is asked of the provider, which would charge for it.

        Whether a provider is up is learned from the calls made of it.
        """
        try:
            await litellm()
        except ImportError as error:
            return EndpointHealth(endpoint=self.endpoint, healthy=False, error=f"litellm cannot be imported: {error}")
        return EndpointHealth(endpoint=self.endpoint, healthy=True, models=(self.model_id,))

    async def _whole(self, call: Call, arguments: Mapping[str, Any]) -> Reply:
        tally = Tally()
        answer = await self._ask("acompletion", call.limits, arguments)
        return Reply(headers=_headers(answer), body=_shaped(chat_answer, answer, tally), tally=tally)

    async def _embedded(self, call: Call, arguments: Mapping[str, Any]) -> Reply:
        tally = Tally()
        answer = await self._ask("aembedding", call.limits, arguments)
        is_base64 = call.body.get("encoding_format") == "base64"
        return Reply(
            headers=_headers(answer), body=_shaped(embedding_answer, answer, tally, is_base64=is_base64), tally=tally
        )

    async def _streamed(self, call: Call, arguments: Mapping[str, Any]) -> Reply:
        tally = Tally()
        asked = {**arguments, "stream": True, "stream_options": {"include_usage": True}}
        pieces = await self._ask("acompletion", call.limits, asked)
        events = self._events(pieces, call, tally)
        try:
            first = await anext(events)
        except BaseException:  # a cancelled call, too, must stop the provider
            await _closed(pieces)
            raise
        return Reply(
            headers=_headers(pieces),
            events=_resumed(first, events),
            tally=tally,
            close=lambda: _closed(pieces),
        )

    async def _events(self, pieces: Any, call: Call, tally: Tally) -> AsyncIterator[bytes]:
        """The stream's events to its end.

        LiteLLM gives a stream that breaks off a clean end. That no reason for it came from the provider tells.
        """
        tells_usage = wants_usage(call.body)
        is_real = "mock_response" not in self.params
        pieces_ = aiter(pieces)
        while True:
            wait_s = call.limits.idle_s if tally.events else call.limits.first_byte_s
            piece = await _timed(anext(pieces_, None), wait_s, received=tally.events > 0)
            if piece is None:
                break
            for event in _shaped(events_of, piece, tally, tells_usage=tells_usage):
                if tally.finish_reason and is_real and not getattr(pieces, "received_finish_reason", "told"):
                    raise _cut(tally)
                tally.events += 1
                yield event
        if not tally.finish_reason:
            raise _cut(tally)
        tally.is_complete = True
        yield DONE

    async def _ask(self, name: str, limits: Limits, arguments: Mapping[str, Any]) -> Any:
        try:
            package = await litellm()
        except ImportError as error:
            raise error_of(error, received=False) from error
        fixed = {**self.credentials, "model": self.model_id, "num_retries": 0, "max_retries": 0}
        # without the last one, a call with tools needs the package `mcp`, and may have LiteLLM call servers itself
        fixed |= {"timeout": limits.first_byte_s, **({"_skip_mcp_handler": True} if name == "acompletion" else {})}
        fixed |= {"api_key": self.api_key} if self.api_key else {}
        fixed |= {"api_base": self.endpoint} if self.endpoint.startswith(("http://", "https://")) else {}
        fixed |= {"extra_headers": dict(self.headers)} if self.headers else {}
        if "extra_body" in arguments and isinstance(self.params.get("extra_body"), Mapping):
            fixed["extra_body"] = {**arguments["extra_body"], **self.params["extra_body"]}
        call = getattr(package, name)(**{**arguments, **self.params, **fixed})
        return await _timed(call, limits.first_byte_s, received=False)


def _cut(tally: Tally) -> BackendError:
    message = "the provider's stream ended before it was finished"
    return BackendError(Fault.DISCONNECTED, message, received=tally.events > 0)


async def _timed(work: Awaitable[Any], limit_s: float, *, received: bool) -> Any:
    """What is awaited, within its time; every failure of LiteLLM's as kvfleet's own."""
    try:
        async with asyncio.timeout(limit_s):
            return await work
    except TimeoutError as error:
        kind = Fault.IDLE_TIMEOUT if received else Fault.TIMEOUT
        raise BackendError(kind, "the provider sent nothing in time", received=received) from error
    except Exception as error:  # whatever a provider's code in LiteLLM raises is that call's failure
        raise error_of(error, received=received) from error


def _shaped(read: Any, answer: Any, *more: Any, **options: Any) -> Any:
    try:
        return read(answer, *more, **options)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise BackendError(Fault.PROTOCOL, f"LiteLLM's answer has not the shape it should: {error!r}") from error


async def _resumed(first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in events:
        yield event


async def _closed(pieces: Any) -> None:
    close = getattr(pieces, "aclose", None)
    if close is not None:
        await close()


def _headers(answer: Any) -> dict[str, str]:
    """The provider's headers, of which LiteLLM keeps those it knows, under a name of its own."""
    hidden = getattr(answer, "_hidden_params", None)
    found = hidden.get("additional_headers") if isinstance(hidden, Mapping) else None
    kept = found.items() if isinstance(found, Mapping) else ()
    return {str(name).lower().removeprefix("llm_provider-"): str(value) for name, value in kept}
