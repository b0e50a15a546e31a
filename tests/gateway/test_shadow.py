"""Shadow traffic behind a running gateway: a client's request over HTTP, and what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from kvfleet.config.schema import (
    FleetConfig,
    ModelConfig,
    PolicyConfig,
    ShadowConfig,
    TelemetryConfig,
    TraceStoreConfig,
)
from kvfleet.eval.shadow_store import ShadowStore
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Trace

SLOW: Any = {"speed": 1000, "reply": "The sky is blue."}
FLEET = FleetConfig(
    models=(
        ModelConfig(name="in-use", provider="mock", options=SLOW),
        ModelConfig(name="next", provider="mock", options=SLOW),
        ModelConfig(name="outside", provider="mock", private=False, allowed_data_classes=("public",), options=SLOW),
    ),
    shadow=ShadowConfig(
        enabled=True, shadow_models=("next", "outside"), sample_rate=1.0, exclusive=True, compare_outputs=True
    ),
    policy=PolicyConfig(enabled=True),
    telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
)


class Kept:
    """A sink that keeps traces."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)


async def test_live_requests_are_mirrored_under_the_same_policy(tmp_path: Path) -> None:
    """The client gets one answer; trace, store and metrics tell of the mirrors, and of whom policy kept out."""
    sink = Kept()
    router = Router(FLEET, sinks=[sink], polls=False, state_dir=tmp_path)
    async with running(FLEET, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        ask = {"model": "auto", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
        for data_class, stream in (("public", False), ("confidential", True)):
            answer = await client.post(
                "/v1/chat/completions",
                json={**ask, "stream": stream},
                headers={"X-KVFleet-Data-Class": data_class, "X-Request-ID": data_class},
            )
            assert answer.status_code == 200
            assert "blue" in answer.text
        await router.settled()
        stage = next(one.component for one in router.pipeline.observe if one.name == "shadow")
        await stage.settled()
        metrics = (await client.get("/metrics")).text
        assert (await client.post("/v1/chat/completions", json={**ask, "model": "next"})).status_code == 403
    public, confidential, _ = (Explanation(trace).to_dict() for trace in sink.traces)
    assert (public["served_by"], public["shadow_models"]) == ("in-use", ["next", "outside"])
    assert (confidential["served_by"], confidential["shadow_models"]) == ("in-use", ["next"])
    (why,) = sink.traces[1].route.attributes["kvfleet.shadow.excluded"]  # type: ignore[misc]
    assert "outside: " in why
    assert "[filter.policy]" in why
    assert 'kvfleet_shadow_requests_total{model="next"} 2.0' in metrics
    assert 'kvfleet_shadow_requests_total{model="outside"} 1.0' in metrics
    store = ShadowStore(tmp_path / "shadow.sqlite")
    rows = sorted((row.request_id, row.shadow, row.similarity, row.prompt) for row in store.last(9))
    store.close()
    assert rows == [
        ("confidential", "next", 1.0, ""),
        ("public", "next", 1.0, ""),
        ("public", "outside", 1.0, ""),
    ]
