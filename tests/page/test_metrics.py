"""Prometheus Metrics."""

from __future__ import annotations

import httpx

from kvfleet.errors import Fault
from kvfleet.testing.fakes import FakeReply
from tests.docs.running import free_ports
from tests.page.living import live
from tests.page.printed import fleet, run

EXAMPLE = """
from kvfleet.telemetry.metrics import MetricsExporter

metrics = MetricsExporter(port=9090, enabled=True)
metrics.start_server()  # → http://localhost:9090/metrics

# Auto-recorded by Router:
# kvfleet_route_requests_total{strategy="hybrid_score", status="success"}
# kvfleet_route_latency_seconds{strategy="hybrid_score"}
# kvfleet_model_selected_total{model="llama-3-8b"}
# kvfleet_fallback_triggered_total{from_model="llama-8b", to_model="llama-70b"}
# kvfleet_cache_affinity_hits_total{type="session"}
# kvfleet_policy_blocks_total{rule="pii_detection"}
# kvfleet_model_health{model="llama-8b", endpoint="http://gpu-1:8000"}
"""

FLEET = """\
models:
  - {name: llama-8b, endpoint: "http://gpu-1:8000", provider: vllm, quality_score: 0.9}
  - {name: llama-70b, endpoint: "http://gpu-2:8000", provider: vllm}
  - {name: gpt-4o, endpoint: "https://api.openai.com"}
policy: {enabled: true, pii_detection: true}
"""


async def test_the_example_serves_metrics() -> None:
    """Where the comment says, under the documented names."""
    (port,) = free_ports(1)
    ran = await run(EXAMPLE.replace("port=9090", f"port={port}"))
    metrics = ran["metrics"]
    try:
        metrics.record_route("hybrid_score", "llama-3-8b", 0.5)
        async with httpx.AsyncClient(trust_env=False) as http:
            page = (await http.get(f"http://localhost:{port}/metrics")).text
    finally:
        metrics.stop_server()
    assert 'kvfleet_route_requests_total{status="success",strategy="hybrid_score"} 1.0' in page
    assert 'kvfleet_model_selected_total{model="llama-3-8b"} 1.0' in page


async def test_the_gateway_records_them_all() -> None:
    """Each of the seven lines, from requests that really did what it counts."""
    broken = {"llama-8b": [FakeReply(fail=Fault.SERVER_ERROR), FakeReply(text="Fine.")]}
    async with live(fleet(FLEET), scripts=broken) as gateway:
        await gateway.ask()
        talk = [{"role": "system", "content": "You answer in verse, and you never explain yourself. " * 20}]
        for text in ("One", "Two"):
            talk += [{"role": "user", "content": text}, {"role": "assistant", "content": "Fine."}]
            body = {"model": "llama-8b", "messages": talk[:-1]}
            await gateway.ask(body, X_Session_ID="s-1")
        await gateway.ask("My SSN is 123-45-6789")
        value = gateway.metric
        assert value("kvfleet_route_requests_total", strategy="hybrid_score", status="success") == 4
        assert value("kvfleet_route_latency_seconds_count", strategy="hybrid_score") == 4
        assert (value("kvfleet_model_selected_total", model="llama-8b") or 0) >= 3
        assert value("kvfleet_fallback_triggered_total", from_model="llama-8b", to_model="llama-70b") == 1
        assert (value("kvfleet_cache_affinity_hits_total", type="session") or 0) >= 1
        assert value("kvfleet_policy_blocks_total", rule="pii_detection") == 1
        page = (await gateway.http.get("/metrics")).text
        assert 'kvfleet_model_health{endpoint="http://gpu-1:8000",model="llama-8b"} 1.0' in page
