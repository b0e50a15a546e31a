"""What the SDKs of Anthropic and OpenAI make of an answer: its bytes are given to them as if they had asked for it."""

from __future__ import annotations

import contextlib
import enum
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import anthropic
import attrs
import httpx
import httpx2
import openai

from tests.faults.tongues import MESSAGES, RESPONSES, Tongue

__all__ = ["End", "Made", "made_of"]

_UNREADABLE = (json.JSONDecodeError, UnicodeError, LookupError, TypeError, AttributeError, ValueError, AssertionError)


class End(enum.Enum):
    """How an answer ended for the program that asked for it."""

    WHOLE = enum.auto()
    RAISED = enum.auto()
    OPEN = enum.auto()
    """Without an end, and without an error either."""
    UNREADABLE = enum.auto()


@attrs.define
class Made:
    """What a program got: the text so far, and how it ended."""

    text: str = ""
    end: End = End.OPEN


async def made_of(tongue: Tongue, body: bytes, *, stream: bool) -> Made:
    """What the SDK of an API makes of an answer under 200."""
    made = Made()
    kind = "text/event-stream" if stream else "application/json"
    try:
        await _READERS[tongue.name](body, kind, {**tongue.ask, "stream": stream}, made)
    except (anthropic.APIError, openai.APIError):
        made.end = End.RAISED
    except _UNREADABLE:
        made.end = End.UNREADABLE
    return made


async def _message(body: bytes, kind: str, ask: Mapping[str, Any], made: Made) -> None:
    answer = httpx2.Response(200, headers={"content-type": kind}, content=body)
    given = {key: value for key, value in ask.items() if key != "stream"}
    async with httpx2.AsyncClient(transport=httpx2.MockTransport(lambda _: answer)) as client:
        sdk = anthropic.AsyncAnthropic(api_key="k", http_client=client, max_retries=0)
        if not ask["stream"]:
            message = await sdk.messages.create(**given)
        else:
            async with sdk.messages.stream(**given) as stream:
                async for text in stream.text_stream:
                    made.text += text
                message = await stream.get_final_message()
    made.text = "".join(block.text for block in message.content)
    made.end = End.WHOLE if message.stop_reason else End.OPEN


@contextlib.asynccontextmanager
async def _openai(body: bytes, kind: str) -> AsyncIterator[openai.AsyncOpenAI]:
    answer = httpx.Response(200, headers={"content-type": kind}, content=body)
    async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: answer)) as client:
        yield openai.AsyncOpenAI(api_key="k", http_client=client, max_retries=0)


async def _response(body: bytes, kind: str, ask: Mapping[str, Any], made: Made) -> None:
    async with _openai(body, kind) as sdk:
        if not ask["stream"]:
            response = await sdk.responses.create(**ask)
            made.text, made.end = response.output_text, End.WHOLE if response.status == "completed" else End.OPEN
            return
        async for event in await sdk.responses.create(**ask):
            if event.type == "response.output_text.delta":
                made.text += event.delta
            if event.type == "response.completed":
                made.text, made.end = event.response.output_text, End.WHOLE


_READERS: Mapping[str, Callable[[bytes, str, Mapping[str, Any], Made], Awaitable[None]]] = {
    MESSAGES.name: _message,
    RESPONSES.name: _response,
}
