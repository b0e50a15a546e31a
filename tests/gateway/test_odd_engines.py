"""Engines that are right in an unusual way, and those that only look right: through a running gateway, from raw bytes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvfleet.config.access import BudgetConfig
from kvfleet.config.schema import FleetConfig, ModelConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from tests.gateway.upstream import SSE_HEAD, chunk, upstream, whole

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


@pytest.mark.parametrize(
    "choices", [[], [None], [5], [{}], [{"message": None}], [{"index": 0, "finish_reason": "stop"}]]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/completions"])
async def test_choices_that_say_nothing_are_no_answer(choices: list[Any], path: str) -> None:
    """Under a 200 too: it is the engine's failure, which another replica may make good, and not an empty answer."""
    async with gateway_of(whole(json.dumps({"id": "c", "choices": choices}).encode())) as client:
        body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Is it?"}], "prompt": "Is it?"}
        answer = await client.post(path, json=body)
    assert answer.status_code == 502
    assert answer.json()["error"]["kvfleet"]["attempts"] == [{"model": "m", "fault": "protocol"}]


USAGES: dict[str, Any] = {
    "negative": {"prompt_tokens": -300_000, "completion_tokens": -2},
    "endless": {"prompt_tokens": 3, "completion_tokens": 1e300},
    "beyond 64 bits": {"prompt_tokens": 2**64 - 1, "completion_tokens": 2**63},
    "text": {"prompt_tokens": "12", "completion_tokens": [2]},
    "a detail that is none": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": 5},
    "no object": [3, 2],
    "missing": None,
}


@pytest.mark.parametrize("usage", USAGES)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_wrong_usage_harms_nobody(usage: str, is_stream: bool, tmp_path: Path) -> None:
    """The answer is whole, the budget is charged for what was expected, and the next requests are answered too."""
    told = {"id": "c", "object": "chat.completion.chunk", "choices": [], "usage": USAGES[usage]}
    message = {"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}
    whole_answer = whole(json.dumps({**told, "object": "chat.completion", "choices": [message]}).encode())
    streamed = stream((*WHOLE, json.dumps(told).encode(), b"[DONE]"))
    async with upstream(streamed if is_stream else whole_answer) as engine:
        model = ModelConfig(name="m", endpoint=engine.url, cost_per_1k_input_tokens=1, cost_per_1k_output_tokens=1)
        config = FleetConfig(models=(model,), budget=BudgetConfig(enabled=True, monthly_budget_usd=50), telemetry=QUIET)
        router = Router(config, polls=False, state_dir=tmp_path)
        async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            asked = {"messages": [{"role": "user", "content": "Is it?"}], "stream": is_stream, "max_tokens": 100}
            for _ in range(3):
                answer = await client.post("/v1/chat/completions", json=asked)
                assert answer.status_code == 200
                assert b'"error"' not in answer.content
                assert not (is_stream and USAGES[usage] and b'"usage"' in answer.content)  # nobody asked for it
            (account,) = (await client.get("/v1/tenants")).json()["data"]
    assert account["requests"] == 3
    assert account["spent_usd"] > 0


async def test_a_client_may_ask_for_any_number_of_tokens(tmp_path: Path) -> None:
    """Also of a free engine that counts none, whose answers are booked as they were expected."""
    message = {"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}
    async with upstream(whole(json.dumps({"id": "c", "choices": [message]}).encode())) as engine:
        model = ModelConfig(name="m", endpoint=engine.url, private=True, cost_per_1k_input_tokens=0)
        config = FleetConfig(models=(model,), budget=BudgetConfig(enabled=True, monthly_budget_usd=50), telemetry=QUIET)
        router = Router(config, polls=False, state_dir=tmp_path)
        async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            for tokens in (2**64 - 1, 2**63, 10):
                asked = {"messages": [{"role": "user", "content": "Is it?"}], "max_tokens": tokens}
                answer = await client.post("/v1/chat/completions", json=asked)
                assert answer.status_code == 200, answer.text
            (account,) = (await client.get("/v1/tenants")).json()["data"]
    assert account["requests"] == 3
