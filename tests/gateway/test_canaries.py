"""What must not get out, does not: keys, prompts, answers and addresses, over every path that can fail."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from kvfleet.config.schema import (
    FallbackConfig,
    FleetConfig,
    GatewayConfig,
    ModelConfig,
    TelemetryConfig,
    TraceStoreConfig,
)
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.trace.spans import Trace
from tests.gateway.upstream import SSE_HEAD, chunk, upstream, whole

TLS = httpx.create_ssl_context()
GATEWAY_KEY = "sk-gateway-CANARYKEY"
BACKEND_KEY = "sk-backend-CANARYKEY"
PROMPT = "CANARYPROMPT"
ANSWER = "CANARYANSWER"


def said(status: bytes, message: str) -> bytes:
    """A backend's error."""
    return whole(json.dumps({"error": {"message": message}}).encode(), status)


PATHS: Mapping[str, tuple[bytes, ...]] = {
    "refused key": (said(b"401 Unauthorized", f"Incorrect API key provided: {BACKEND_KEY}"),),
    "failure": (said(b"500 Internal Server Error", f"Traceback: {PROMPT} in {BACKEND_KEY}"),),
    "rate limit": (said(b"429 Too Many Requests", f"Limit of org {BACKEND_KEY} reached"),),
    "not JSON": (whole(f"<html>{ANSWER}".encode()),),
    "not HTTP": (f"{ANSWER} {BACKEND_KEY}\r\n\r\n".encode(),),
    "cut off": (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9\r\nconnection: close\r\n\r\n",
    ),
    "stream of nonsense": (SSE_HEAD, chunk(b'data: {"oops\n\n'), b"0\r\n\r\n"),
}


BODIES: Mapping[str, Any] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}]},
    "/v1/messages": {"max_tokens": 9, "system": PROMPT, "messages": [{"role": "user", "content": PROMPT}]},
    "/v1/responses": {"instructions": PROMPT, "input": [{"role": "user", "content": PROMPT}]},
}
ENGINES = {
    "chat": ("openai_compat", {}),
    "messages, passed through": ("anthropic", {}),
    "both, passed through": ("openai_compat", {"surfaces": ["messages", "responses"]}),
}


class Kept:
    """A sink that keeps what a trace store would."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)

    @property
    def text(self) -> str:
        """All that is in them."""
        return "".join(f"{span.name} {span.attributes} {span.status}" for one in self.traces for span in one.spans)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("surface", BODIES)
@pytest.mark.parametrize("path", PATHS)
async def test_no_failure_tells_what_it_should_not(
    path: str, surface: str, engine: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Answer, headers, logs, traces and metrics of a failed request hold no key, no prompt, no answer and no address."""
    caplog.set_level(logging.DEBUG)
    provider, options = ENGINES[engine]
    async with upstream(*PATHS[path]) as backend:
        model = ModelConfig(
            name="m",
            endpoint=backend.url,
            provider=provider,
            options=options,
            api_key=BACKEND_KEY,
            max_retries=0,
            timeout_seconds=0.5,
            idle_timeout_seconds=0.5,
        )
        kept = Kept()
        config = FleetConfig(
            models=(model,),
            fallback=FallbackConfig(timeout_ms=500),
            gateway=GatewayConfig(api_keys={"team": GATEWAY_KEY}),
            telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False), log_route_decisions=True),
        )
        async with (
            running(config, router=Router(config, sinks=[kept], polls=False)) as serving,
            httpx.AsyncClient(
                base_url=serving.url, headers={"authorization": f"Bearer {GATEWAY_KEY}"}, verify=TLS
            ) as client,
        ):
            body = {**BODIES[surface], "stream": stream}
            secret = {"x-secret": "CANARYHEADER", "anthropic-beta": "CANARYHEADER"}
            answer = await client.post(surface, json=body, headers=secret)
            wrong = await client.post(surface, json=body, headers={"authorization": "Bearer CANARYKEY"})
            odd = await client.post(surface, json={**body, "model": {PROMPT: 1}})
            explained = await client.post("/v1/route/explain", json=BODIES["/v1/chat/completions"])
            metrics = await client.get("/metrics")
            await serving.router.settled()
    told = f"{answer.text} {answer.headers} {wrong.text} {wrong.headers} {odd.text} {odd.headers} {explained.text}"
    told += caplog.text + kept.text
    assert kept.traces
    assert "CANARY" not in told + metrics.text
    assert backend.url.removeprefix("http://") not in f"{answer.text} {answer.headers}"
    assert backend.requests
    assert (wrong.status_code, odd.status_code) == (401, 400)
    assert answer.status_code >= 400 or "error" in answer.text


async def test_the_backend_gets_its_own_key_and_not_the_gateways() -> None:
    """The client's credential stays here; request id, trace context and chosen headers travel on."""
    async with upstream(
        whole(b'{"id":"1","object":"chat.completion","choices":[{"index":0,"message":{}}]}')
    ) as backend:
        config = FleetConfig(
            models=(ModelConfig(name="m", endpoint=backend.url, provider="openai_compat", api_key=BACKEND_KEY),),
            gateway=GatewayConfig(api_key=GATEWAY_KEY, passthrough_headers=("X-Correlation-ID",)),
            telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
        )
        async with (
            running(config, router=Router(config, polls=False)) as serving,
            httpx.AsyncClient(base_url=serving.url, headers={"authorization": f"Bearer {GATEWAY_KEY}"}) as client,
        ):
            answer = await client.post(
                "/v1/chat/completions",
                content=b'{ "model" : "auto", "messages": [{"role":"user","content":"Hi"}], "odd" : 1.0 }',
                headers={
                    "x-request-id": "my-trace-001",
                    "x-correlation-id": "req-789",
                    "x-secret": "kept",
                    "cookie": "a=b",
                    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                },
            )
    assert answer.json() == {
        "id": "my-trace-001",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {}}],
    }
    head, _, body = backend.requests[0].partition(b"\r\n\r\n")
    sent = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert sent[b"authorization"] == f"bearer {BACKEND_KEY}".lower().encode()
    assert sent[b"x-request-id"] == b"my-trace-001"
    assert sent[b"x-correlation-id"] == b"req-789"
    assert sent[b"traceparent"].startswith(b"00-0af7651916cd43dd8448eb211c80319c-")
    assert b"b7ad6b7169203331" not in sent[b"traceparent"]
    assert not {b"x-secret", b"cookie"} & sent.keys()
    assert GATEWAY_KEY.encode() not in backend.requests[0]
    assert body == b'{ "model" : "m", "messages": [{"role":"user","content":"Hi"}], "odd" : 1.0 }'
    assert answer.headers["x-kvfleet-trace"] == "0af7651916cd43dd8448eb211c80319c"


ANSWERED: Mapping[str, bytes] = {
    "/v1/chat/completions": b'{"id":"1","choices":[{"index":0,"message":{"role":"assistant","content":"CANARYANSWER"},'
    b'"finish_reason":"stop"}],"usage":{"prompt_tokens":5,"completion_tokens":2}}',
    "/v1/messages": b'{"id":"m","type":"message","role":"assistant","model":"m","content":[{"type":"text",'
    b'"text":"CANARYANSWER"}],"stop_reason":"end_turn","usage":{"input_tokens":5,"output_tokens":2}}',
    "/v1/responses": b'{"id":"r","object":"response","model":"m","output":[{"type":"message","role":"assistant",'
    b'"content":[{"type":"output_text","text":"CANARYANSWER"}]}],"usage":{"input_tokens":5,"output_tokens":2}}',
}


@pytest.mark.parametrize("surface", BODIES)
@pytest.mark.parametrize("captures", [False, True])
async def test_content_is_kept_only_where_that_was_asked_for(
    surface: str, captures: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompt and answer reach the client, and a trace only with `telemetry.capture_content`; keys reach nobody."""
    caplog.set_level(logging.DEBUG)
    # with the capture on, the answer is asked for as a chat, whatever the engine speaks
    said = whole(ANSWERED["/v1/chat/completions" if captures else surface])
    async with upstream(said) as backend:
        kept = Kept()
        config = FleetConfig(
            models=(
                ModelConfig(
                    name="m",
                    endpoint=backend.url,
                    api_key=BACKEND_KEY,
                    options={"surfaces": ["messages", "responses"]},
                ),
            ),
            gateway=GatewayConfig(api_keys={"team": GATEWAY_KEY}),
            telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False), capture_content=captures),
        )
        async with (
            running(config, router=Router(config, sinks=[kept], polls=False)) as serving,
            httpx.AsyncClient(base_url=serving.url, headers={"x-api-key": GATEWAY_KEY}, verify=TLS) as client,
        ):
            answer = await client.post(surface, json=BODIES[surface])
            metrics = (await client.get("/metrics")).text
            await serving.router.settled()
    assert ANSWER in answer.text
    assert PROMPT in backend.requests[0].decode()
    assert GATEWAY_KEY not in backend.requests[0].decode()
    assert "CANARY" not in f"{answer.headers} {caplog.text} {metrics}"
    assert "CANARYKEY" not in kept.text
    assert (PROMPT in kept.text, ANSWER in kept.text) == (captures, captures)
