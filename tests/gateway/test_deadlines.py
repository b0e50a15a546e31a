"""One deadline for a request, whoever set it: the smallest counts, nothing outlasts it, and the error names it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from kvfleet.config.schema import (
    FallbackConfig,
    FleetConfig,
    GatewayConfig,
    ModelConfig,
    TelemetryConfig,
    TraceStoreConfig,
)
from kvfleet.errors import BadRequestError
from kvfleet.gateway.deadlines import DeadlineReader, TimeLimits
from kvfleet.gateway.server import Serving, running
from kvfleet.runtime import Router
from kvfleet.trace import names
from kvfleet.trace.spans import Trace
from tests.gateway.upstream import SSE_HEAD, chunk, upstream

EVENT = chunk(b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n')
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
READER = DeadlineReader(b"x-kvfleet-timeout", 100.0)


class Sink:
    """Keeps finished traces."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)


@contextlib.asynccontextmanager
async def gateway_to(
    *urls: str,
    sink: Sink | None = None,
    gateway: GatewayConfig | None = None,
    fallback: FallbackConfig | None = None,
    **model: Any,
) -> AsyncIterator[Serving]:
    """A gateway before some replicas of one model."""
    config = FleetConfig(
        models=(ModelConfig(name="m", endpoint=urls[0], replicas=urls[1:], provider="vllm", **model),),
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
        gateway=gateway or GatewayConfig(),
        fallback=fallback or FallbackConfig(),
    )
    async with running(config, router=Router(config, polls=False, sinks=[sink] if sink else [])) as serving:
        yield serving


async def ask(
    serving: Serving, *, stream: bool = False, headers: dict[str, str] | None = None, **body: Any
) -> httpx.Response:
    """One chat."""
    async with httpx.AsyncClient() as client:
        return await client.post(
            f"{serving.url}/v1/chat/completions",
            json={"messages": MESSAGES, "stream": stream, **body},
            headers=headers or {},
        )


class TestReading:
    """What a request says of its time."""

    @pytest.mark.parametrize(
        ("headers", "body", "stream", "limits"),
        [
            ({}, {}, False, TimeLimits(100.0, "gateway.request_timeout_seconds")),
            ({b"x-kvfleet-timeout": b"2500"}, {}, True, TimeLimits(2.5, "x-kvfleet-timeout")),
            ({b"x-request-timeout": b"2.5"}, {"timeout": 3}, True, TimeLimits(2.5, "x-request-timeout")),
            ({b"x-request-timeout": b"4"}, {"timeout": 3}, False, TimeLimits(3.0, "timeout")),
            ({b"x-stainless-read-timeout": b"2.0"}, {}, False, TimeLimits(1.9, "x-stainless-read-timeout")),
            (
                {b"x-stainless-timeout": b"60"},
                {},
                True,
                TimeLimits(100.0, "gateway.request_timeout_seconds", 59.75, "x-stainless-timeout"),
            ),
            (
                {b"x-stainless-read-timeout": b"NOT_GIVEN"},
                {"timeout": None},
                True,
                TimeLimits(100.0, "gateway.request_timeout_seconds"),
            ),
        ],
    )
    def test_the_smallest_counts(self, headers: Any, body: Any, stream: bool, limits: TimeLimits) -> None:
        """A client's own patience limits a whole answer, and of a stream the first byte; a little less than it says."""
        assert READER.read(headers, body, is_stream=stream) == limits

    def test_nothing_said(self) -> None:
        """Then there is no limit."""
        assert DeadlineReader(b"x-kvfleet-timeout").read({}, {}, is_stream=True) == TimeLimits()

    @pytest.mark.parametrize(
        ("headers", "body", "param"),
        [
            ({b"x-request-timeout": b"soon"}, {}, "x-request-timeout"),
            ({b"x-request-timeout": b"0"}, {}, "x-request-timeout"),
            ({b"x-kvfleet-timeout": b"1.5"}, {}, "x-kvfleet-timeout"),
            ({}, {"timeout": "5"}, "timeout"),
            ({}, {"timeout": True}, "timeout"),
            ({}, {"timeout": -1}, "timeout"),
        ],
    )
    def test_what_is_no_time_is_refused(self, headers: Any, body: Any, param: str) -> None:
        """It is the caller's, and must not be taken for none."""
        with pytest.raises(BadRequestError) as raised:
            READER.read(headers, body, is_stream=False)
        assert raised.value.param == param


class TestLive:
    """Through a running gateway."""

    @pytest.mark.parametrize(
        ("headers", "body", "limit"),
        [
            ({"X-KVFleet-Timeout": "200"}, {}, "x-kvfleet-timeout"),
            ({"X-Request-Timeout": "0.2"}, {}, "x-request-timeout"),
            ({}, {"timeout": 0.2}, "timeout"),
            ({"X-Stainless-Read-Timeout": "0.2"}, {}, "x-stainless-read-timeout"),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    async def test_each_of_them_ends_a_request(self, headers: Any, body: Any, limit: str, stream: bool) -> None:
        """504 in time, which says which limit it was; the trace has the deadline and what was left of it."""
        sink = Sink()
        async with upstream() as backend, gateway_to(backend.url, sink=sink) as serving:
            began_s = time.monotonic()
            answer = await ask(serving, stream=stream, headers=headers, **body)
            took_s = time.monotonic() - began_s
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (504, "deadline_exceeded", "timeout_error")
        assert limit in error["message"]
        assert 0.15 < took_s < 2.0
        attempt = sink.traces[0].stages[-1]
        assert sink.traces[0].route.attributes[names.DEADLINE_BY] == limit
        assert sink.traces[0].route.attributes[names.DEADLINE_S] == pytest.approx(0.2, abs=0.02)
        assert sink.traces[0].route.attributes[names.DEADLINE_LEFT_S] == pytest.approx(0, abs=0.5)
        assert attempt.attributes[names.DEADLINE_LEFT_S] <= 0.2
        assert (attempt.attributes[names.ERROR_TYPE], attempt.attributes[names.LIMIT]) == ("deadline", limit)

    async def test_it_is_spent_over_all_attempts(self) -> None:
        """Two silent replicas do not get a full wait each: the second has what the first left over."""
        sink = Sink()
        async with upstream(SSE_HEAD) as one, upstream(SSE_HEAD) as two:
            fallback = FallbackConfig(timeout_ms=200)
            async with gateway_to(one.url, two.url, sink=sink, fallback=fallback) as serving:
                began_s = time.monotonic()
                answer = await ask(serving, stream=True, headers={"X-Request-Timeout": "0.3"})
                took_s = time.monotonic() - began_s
        assert answer.status_code == 504
        assert took_s < 2.0
        first, second = [span for span in sink.traces[0].stages if names.ATTEMPT in span.attributes]
        assert (first.attributes[names.LIMIT], second.attributes[names.LIMIT]) == (
            "fallback.timeout_ms",
            "x-request-timeout",
        )
        assert 0 < second.attributes[names.DEADLINE_LEFT_S] <= 0.1

    async def test_a_configured_deadline_ends_a_stream(self) -> None:
        """The whole stream counts, and its error event says so."""
        gateway = GatewayConfig(request_timeout_seconds=0.3)
        async with upstream(SSE_HEAD, EVENT) as backend, gateway_to(backend.url, gateway=gateway) as serving:
            answer = await ask(serving, stream=True)
        error = json.loads(answer.text.strip().rpartition("data: ")[2])["error"]
        assert error["kvfleet"]["fault"] == "deadline"
        assert "gateway.request_timeout_seconds" in error["message"]

    async def test_a_clients_patience_does_not_cut_a_stream_that_flows(self) -> None:
        """It waits so long for each byte, not for all of them."""
        sink = Sink()

        async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(SSE_HEAD)
            for _ in range(8):
                writer.write(EVENT)
                await asyncio.sleep(0.06)
            last = b'data: {"id":"1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
            writer.write(chunk(last) + b"0\r\n\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(trickle, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, gateway_to(url, sink=sink) as serving:
            answer = await ask(serving, stream=True, headers={"X-Stainless-Read-Timeout": "0.3"})
        assert answer.text.endswith("data: [DONE]\n\n")

    async def test_a_clients_patience_is_the_longest_silence(self) -> None:
        """Of a stream that stops the client hears before it would have left."""
        async with upstream(SSE_HEAD, EVENT) as backend, gateway_to(backend.url) as serving:
            answer = await ask(serving, stream=True, headers={"X-Stainless-Read-Timeout": "0.3"})
        error = json.loads(answer.text.strip().rpartition("data: ")[2])["error"]
        assert "x-stainless-read-timeout" in error["message"]

    async def test_openais_client_gets_an_error_instead_of_its_own_timeout(self) -> None:
        """It tells its timeout; the gateway answers just before, and keeps it from trying again."""
        async with upstream() as backend, gateway_to(backend.url) as serving:
            url = f"{serving.url}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="x", timeout=0.6, max_retries=2) as client:
                with pytest.raises(openai.InternalServerError) as caught:
                    await client.chat.completions.create(model="m", messages=MESSAGES)
            assert len(backend.requests) == 1
        assert caught.value.status_code == 504

    @pytest.mark.parametrize(
        ("model", "says", "stream", "limit"),
        [
            ({"timeout_seconds": 0.2}, (), False, "timeout_seconds"),
            (
                {"idle_timeout_seconds": 0.2},
                (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{",),
                False,
                "idle_timeout_seconds",
            ),
        ],
    )
    async def test_a_backends_own_limits_are_named_too(self, model: Any, says: Any, stream: bool, limit: str) -> None:
        """First byte and silence are limits of their own; the error says which one ended the attempt."""
        fallback = FallbackConfig(timeout_ms=100)  # of a stream; a whole answer may take its model's time
        async with upstream(*says) as backend, gateway_to(backend.url, fallback=fallback, **model) as serving:
            answer = await ask(serving, stream=stream)
        error = answer.json()["error"]
        assert answer.status_code == 504
        assert error["kvfleet"]["attempts"][0]["limit"] == limit
        assert f"({limit}: 0.2 s)" in error["message"]
