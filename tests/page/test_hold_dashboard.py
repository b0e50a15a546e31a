"""What must hold of the dashboard and the metrics, asked of a running gateway."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from kvfleet.config.schema import FallbackConfig, FleetConfig, ModelConfig
from kvfleet.errors import Fault
from kvfleet.telemetry.metric_table import METRICS
from kvfleet.testing.fakes import FakeReply
from tests.docs.running import free_ports
from tests.page.living import live
from tests.page.test_gateway import page_s_gateway

MODEL = ModelConfig(name="m", endpoint="http://gpu-1:8000", provider="vllm")


async def test_it_is_fed_live_and_counters_count_what_they_say() -> None:
    """Two answers and one failure: in the dashboard's counters, in the metrics and in the traces alike."""
    script = [FakeReply(text="Yes."), FakeReply(fail=Fault.BAD_REQUEST), FakeReply(text="Yes.")]
    config = FleetConfig(models=(MODEL,), fallback=FallbackConfig(enabled=False))
    async with live(config, scripts={"m": script}) as gateway:
        statuses = [(await gateway.ask()).status_code for _ in range(3)]
        assert statuses == [200, 400, 200]
        counters = (await gateway.http.get("/dashboard/api/state")).json()["counters"]
        assert (counters["total_requests"], counters["total_errors"]) == (3, 1)
        value = gateway.metric
        assert value("kvfleet_route_requests_total", strategy="hybrid_score", status="success") == 2
        assert value("kvfleet_route_requests_total", strategy="hybrid_score", status="error") == 1
        assert [trace.route.attributes["kvfleet.outcome"] for trace in gateway.kept.traces].count("failed") == 1


async def test_it_is_behind_the_key_and_escaped() -> None:
    """The page is empty for everybody; its data needs the key, and leaves as JSON that no browser renders."""
    evil = "<script>alert(1)</script>"
    config = FleetConfig(models=(MODEL,), fleet_name=evil)
    async with live(config, api_key="k") as gateway:
        page = await gateway.http.get("/dashboard")
        assert (page.status_code, evil in page.text) == (200, False)
        assert (await gateway.http.get("/dashboard/api/state")).status_code == 401
        data = await gateway.http.get("/dashboard/api/state", headers={"Authorization": "Bearer k"})
        assert data.headers["content-type"] == "application/json"
        assert data.json()["fleet"]["name"] == evil


def test_latency_histograms_reach_minutes() -> None:
    """Those that measure an answer: ten minutes at the least."""
    (latency,) = [info for info in METRICS if info.name == "kvfleet_route_latency_seconds"]
    assert max(latency.buckets) >= 600


async def test_metrics_are_on_the_gateway_and_on_their_own_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second only where it is configured."""
    (port,) = free_ports(1)
    monkeypatch.setenv("KVFLEET__TELEMETRY__PROMETHEUS_PORT", str(port))
    with page_s_gateway(tmp_path) as (url, _):
        async with httpx.AsyncClient(trust_env=False) as http:
            pages = [(await http.get(f"{where}/metrics")).text for where in (url, f"http://127.0.0.1:{port}")]
    found = [re.search(r'^kvfleet_fleet_info\{fleet="my-fleet".*\} 1\.0$', page, re.MULTILINE) for page in pages]
    assert all(found)
