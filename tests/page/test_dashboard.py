"""Admin Dashboard."""

from __future__ import annotations

from http.server import HTTPServer

import httpx

from tests.docs.running import free_ports
from tests.page.fleets import QUICKSTART
from tests.page.living import live
from tests.page.printed import fleet, run

EXAMPLE = """
from kvfleet.gateway.dashboard import DashboardState, start_dashboard

# Initialize state
state = DashboardState()
state.fleet_name = "my-fleet"
state.strategy = "semantic"
state.model_count = 5

# Start dashboard (background thread)
server = start_dashboard(state, host="0.0.0.0", port=8501)
# → Admin dashboard running at http://localhost:8501

# Record routing events (happens automatically in Router)
state.record_route(
    prompt_preview="Write a Python class...",
    selected_model="deepseek-coder",
    strategy="semantic",
    latency_ms=350.0,
    scores={"deepseek-coder": 0.85, "llama-70b": 0.62},
)

# Update health, rate limits, budgets
state.update_health("llama-8b", "http://gpu-1:8000", healthy=True, latency_ms=50)
"""


async def test_the_example_is_shown() -> None:
    """At the address of its comment: the page, and `GET /api/state` with what was recorded."""
    (port,) = free_ports(1)
    server = (await run(EXAMPLE.replace("port=8501", f"port={port}")))["server"]
    assert isinstance(server, HTTPServer)
    try:
        async with httpx.AsyncClient(base_url=f"http://localhost:{port}", trust_env=False) as http:
            page = await http.get("/")
            state = (await http.get("/api/state")).json()
    finally:
        server.shutdown()
        server.server_close()
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert {key: state["fleet"][key] for key in ("name", "strategy", "models")} == {
        "name": "my-fleet",
        "strategy": "semantic",
        "models": 5,
    }
    (route,) = state["recent_routes"]
    assert (route["selected_model"], route["latency_ms"], route["prompt"]) == ("deepseek-coder", 350.0, "Write a Python class...")  # fmt: skip
    assert state["model_stats"]["deepseek-coder"]["requests"] == 1
    assert state["health"]["llama-8b@http://gpu-1:8000"]["healthy"]


async def test_a_live_gateway_feeds_its_own() -> None:
    """Every part that the page lists: fleet, counters, models, history; limits are with the engines' states."""
    async with live(fleet(QUICKSTART)) as gateway:
        for _ in range(3):
            await gateway.ask()
        assert (await gateway.http.get("/dashboard")).status_code == 200
        state = (await gateway.http.get("/dashboard/api/state")).json()
        assert state["fleet"]["name"] == "my-fleet"
        assert state["counters"]["total_requests"] == 3
        assert state["recent_routes"][0]["selected_model"] == "llama-3-8b"
        assert {"fleet", "counters", "recent_routes"} <= set(state)
        assert len(state["recent_routes"]) == 3
