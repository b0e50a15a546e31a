"""Engines that are right in an unusual way, and those that only look right: through a running gateway, from raw bytes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from kvfleet.config.schema import FleetConfig, ModelConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from tests.gateway.upstream import SSE_HEAD, chunk, upstream

QUIET = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False))
LINE_ENDS = {"LF": b"\n", "CRLF": b"\r\n"}


def said(delta: dict[str, Any], finish: str | None = None) -> bytes:
    """The data of one event."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return json.dumps({"id": "c", "object": "chat.completion.chunk", "choices": [choice]}).encode()


BEGUN = (said({"role": "assistant", "content": ""}), said({"content": "Yes"}), said({"content": "."}))
WHOLE = (*BEGUN, said({}, "stop"))


def stream(events: Sequence[bytes], line_end: bytes = b"\n", field: bytes = b"data: ") -> bytes:
    """An engine's whole HTTP answer."""
    return SSE_HEAD + b"".join(chunk(field + one + 2 * line_end) for one in events) + b"0\r\n\r\n"


@asynccontextmanager
async def gateway_of(answer: bytes) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway with one engine, which always says that."""
    async with upstream(answer) as engine:
        model = ModelConfig(name="m", endpoint=engine.url, provider="openai_compat", max_retries=0)
        router = Router(FleetConfig(models=(model,), telemetry=QUIET), polls=False)
        async with running(router.config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            yield client


async def ask(client: httpx.AsyncClient, path: str = "/v1/chat/completions") -> httpx.Response:
    """A streamed answer."""
    messages = [{"role": "user", "content": "Is it?"}]
    return await client.post(path, json={"model": "m", "stream": True, "max_tokens": 9, "messages": messages})


@pytest.mark.parametrize("field", [b"data: ", b"data:"])
@pytest.mark.parametrize("line_end", LINE_ENDS)
@pytest.mark.parametrize("is_ended", [True, False])
async def test_a_whole_stream_is_whole_however_its_lines_end(line_end: str, field: bytes, is_ended: bool) -> None:
    """llama-cpp-python ends lines with CRLF (sse-starlette), others write no space: the answer ends in one ``[DONE]``."""
    events = (*WHOLE, b"[DONE]") if is_ended else WHOLE
    async with gateway_of(stream(events, LINE_ENDS[line_end], field)) as client:
        answer = await ask(client)
    lines = [line for line in answer.text.splitlines() if line]
    texts = [json.loads(line[5:])["choices"][0]["delta"].get("content") for line in lines[:-1]]
    assert texts == ["", "Yes", ".", None]
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("line_end", LINE_ENDS)
async def test_the_same_translated(line_end: str) -> None:
    """A client that speaks Messages has its whole answer too."""
    async with gateway_of(stream((*WHOLE, b"[DONE]"), LINE_ENDS[line_end])) as client:
        answer = await ask(client, "/v1/messages")
    assert answer.text.count("event: error") == 0
    assert answer.text.rstrip().endswith('data: {"type":"message_stop"}')


@pytest.mark.parametrize("line_end", LINE_ENDS)
async def test_done_without_a_finish_reason_is_no_end(line_end: str) -> None:
    """A proxy in front of an engine that died says ``[DONE]`` all the same; its client must not take that for an answer."""
    async with gateway_of(stream((*BEGUN, b"[DONE]"), LINE_ENDS[line_end])) as client:
        answer = await ask(client)
    last = answer.text.strip().splitlines()[-1]
    assert "[DONE]" not in answer.text
    assert json.loads(last[6:])["error"]["code"] == "stream_interrupted"
