"""What must not get out, does not: keys, prompts, answers and addresses, over every path that can fail."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

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
from tests.gateway.upstream import SSE_HEAD, chunk, upstream, whole

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


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_no_failure_tells_what_it_should_not(path: str, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Answer, headers, logs and metrics of a failed request hold no key, no prompt, no answer and no address."""
    caplog.set_level(logging.DEBUG)
    async with upstream(*PATHS[path]) as backend:
        model = ModelConfig(
            name="m",
            endpoint=backend.url,
            provider="openai_compat",
            api_key=BACKEND_KEY,
            max_retries=0,
            timeout_seconds=0.5,
            idle_timeout_seconds=0.5,
        )
        config = FleetConfig(
            models=(model,),
            fallback=FallbackConfig(timeout_ms=500),
            gateway=GatewayConfig(api_keys={"team": GATEWAY_KEY}),
            telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False), log_route_decisions=True),
        )
        async with (
            running(config, router=Router(config, polls=False)) as serving,
            httpx.AsyncClient(base_url=serving.url, headers={"authorization": f"Bearer {GATEWAY_KEY}"}) as client,
        ):
            body = {"messages": [{"role": "user", "content": PROMPT}], "stream": stream}
            answer = await client.post("/v1/chat/completions", json=body)
            wrong = await client.post("/v1/chat/completions", json=body, headers={"authorization": "Bearer CANARYKEY"})
            metrics = await client.get("/metrics")
            await serving.router.settled()
    told = f"{answer.text} {answer.headers} {wrong.text} {wrong.headers} {caplog.text}"
    assert "CANARY" not in told + metrics.text
    assert backend.url.removeprefix("http://") not in f"{answer.text} {answer.headers}"
    assert backend.requests
    assert wrong.status_code == 401


async def test_the_backend_gets_its_own_key_and_not_the_gateways() -> None:
    """The client's credential stays here; request id, trace context and chosen headers travel on."""
    async with upstream(whole(b'{"id":"1","object":"chat.completion","choices":[]}')) as backend:
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
    assert answer.json() == {"id": "my-trace-001", "object": "chat.completion", "choices": []}
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
