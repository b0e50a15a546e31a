"""Escalation behind a running gateway: OpenAI's own client, a real socket, the pipeline of the examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import httpx
import openai
import pytest

from kvfleet.config.loader import load_config
from kvfleet.config.schema import TelemetryConfig, TraceStoreConfig
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Trace

PIPELINE = Path(__file__).parent.parent.parent / "pipelines" / "escalation.yaml"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


class Kept:
    """A sink that keeps traces."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_gets_the_answer_that_is_trusted(stream: bool) -> None:
    """The small mock is not sure of its words: the client sees the large one's alone, whole or streamed, and no logprobs."""
    telemetry = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False))
    config = attrs.evolve(load_config(PIPELINE), telemetry=telemetry)
    kept = Kept()
    router = Router(config, sinks=[kept], polls=False)
    async with (
        running(config, router=router) as served,
        openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="x", max_retries=0, default_headers={"X-Tenant-ID": "anybody"}
        ) as client,
    ):
        if stream:
            said, names = "", set()
            async for chunk in await client.chat.completions.create(model="auto", messages=QUESTION, stream=True):
                names.add(chunk.model)
                said += chunk.choices[0].delta.content or ""
                assert chunk.choices[0].logprobs is None
        else:
            answer = await client.chat.completions.with_raw_response.create(model="auto", messages=QUESTION)
            assert answer.headers["x-kvfleet-model"] == "large"
            parsed = answer.parse()
            said, names = parsed.choices[0].message.content, {parsed.model}
            assert parsed.choices[0].logprobs is None
        await router.settled()
        async with httpx.AsyncClient(base_url=served.url) as http:
            metrics = (await http.get("/metrics")).text
            statement = (await http.get("/v1/tenants")).json()["data"][0]
    assert (said, names) == ("It is Paris.", {"large"})
    (trace,) = kept.traces
    explanation = Explanation(trace)
    assert [(a.model, a.reason, a.confidence) for a in explanation.attempts] == [
        ("small", "first", pytest.approx(0.45)),
        ("large", "low_confidence", pytest.approx(0.97)),
    ]
    assert explanation.cost_usd is not None
    assert statement["spent_usd"] == pytest.approx(explanation.cost_usd, abs=1e-9)
    assert statement["reserved_usd"] == 0
    assert 'kvfleet_escalations_total{from_model="small",to_model="large"} 1.0' in metrics
