"""The dashboard of one's own program: the state it fills, and the server in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import HTTPServer

import httpx
import pytest

from kvfleet.config.schema import FleetConfig, ModelConfig
from kvfleet.gateway.dashboard import DashboardState, start_dashboard
from kvfleet.runtime import Router


def documented() -> DashboardState:
    """The documented example."""
    state = DashboardState()
    state.fleet_name = "my-fleet"
    state.strategy = "semantic"
    state.model_count = 5
    state.record_route(
        prompt_preview="Write a Python class...",
        selected_model="deepseek-coder",
        strategy="semantic",
        latency_ms=350.0,
        scores={"deepseek-coder": 0.85, "llama-70b": 0.62},
    )
    state.update_health("llama-8b", "http://gpu-1:8000", healthy=True, latency_ms=50)
    return state


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    """The documented example, served."""
    one = start_dashboard(documented(), port=0)
    yield one
    one.shutdown()
    one.server_close()


def url(server: HTTPServer) -> str:
    """Where it is."""
    return f"http://127.0.0.1:{server.server_port}"


class TestState:
    def test_the_documented_example(self) -> None:
        """Every documented key, with what was recorded."""
        found = documented().to_dict()
        assert found["fleet"] | {"name": "my-fleet", "strategy": "semantic", "models": 5} == found["fleet"]
        assert found["counters"] == {
            "total_requests": 1,
            "total_errors": 0,
            "total_fallbacks": 0,
            "total_cache_hits": 0,
            "total_policy_blocks": 0,
            "avg_latency_ms": 350.0,
            "error_rate": "0.0%",
        }
        assert found["model_stats"] == {"deepseek-coder": {"requests": 1, "errors": 0, "avg_latency_ms": 350.0}}
        assert found["health"]["llama-8b@http://gpu-1:8000"]["healthy"] is True
        assert set(found) >= {"rate_limits", "budgets", "recent_routes"}
        assert found["recent_routes"][0]["prompt"] == "Write a Python class..."

    def test_counters_count_what_they_say(self) -> None:
        """Errors, fallbacks, cache hits and policy blocks, each by its own."""
        state = DashboardState()
        state.record_route(selected_model="a", latency_ms=100, error="timeout")
        state.record_route(selected_model="a", latency_ms=300, fallback=True)
        state.record_route(selected_model="b", latency_ms=200, cache_hit=True)
        state.record_policy_block()
        found = state.to_dict()
        counters = found["counters"]
        assert [counters[f"total_{name}"] for name in ("requests", "errors", "fallbacks", "cache_hits", "policy_blocks")] == [3, 1, 1, 1, 1]  # fmt: skip
        assert (counters["avg_latency_ms"], counters["error_rate"]) == (200.0, "33.3%")
        assert found["model_stats"]["a"] == {"requests": 2, "errors": 1, "avg_latency_ms": 200.0}

    def test_everything_is_bounded(self) -> None:
        """Routes by max_history (20 are shown), previews by 80 characters, names by a thousand."""
        state = DashboardState(max_history=30)
        for i in range(1200):
            state.record_route(prompt_preview="x" * 200, selected_model=f"m{i}")
            state.update_health(f"m{i}", "http://x", healthy=True)
        found = state.to_dict()
        assert len(found["recent_routes"]) == 20
        assert len(state._routes) == 30
        assert len(found["recent_routes"][0]["prompt"]) == 80
        assert found["recent_routes"][0]["selected_model"] == "m1199"
        assert (len(found["model_stats"]), len(found["health"])) == (1000, 1000)
        assert found["counters"]["total_requests"] == 1200

    def test_limits_and_budgets_are_as_told(self) -> None:
        """The newest word replaces the one before."""
        state = DashboardState()
        state.update_rate_limits({"http://gpu-1": {"used": 1}})
        state.update_rate_limits({"http://gpu-2": {"used": 2}})
        state.update_budgets({"team-a": {"spent_usd": 3.2}})
        found = state.to_dict()
        assert found["rate_limits"] == {"http://gpu-2": {"used": 2}}
        assert found["budgets"] == {"team-a": {"spent_usd": 3.2}}

    def test_many_threads_may_record(self) -> None:
        """Nothing is lost."""
        state = DashboardState()
        threads = [
            threading.Thread(target=lambda: [state.record_route(selected_model="a") for _ in range(200)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert state.to_dict()["counters"]["total_requests"] == 800

    async def test_a_router_records_by_itself(self) -> None:
        """As a sink it gets every route with its trace, and no prompt."""
        state = DashboardState()
        config = FleetConfig(models=(ModelConfig(name="m", provider="mock"),))
        async with Router(config, sinks=[state]) as router:
            await router.route(prompt="CANARYPROMPT")
        (row,) = state.to_dict()["recent_routes"]
        assert (row["selected_model"], row["outcome"]) == ("m", "answered")
        assert "CANARYPROMPT" not in str(state.to_dict())
        assert state.find(row["id"]) is not None


class TestServer:
    @pytest.mark.parametrize("path", ["/", "/dashboard"])
    def test_the_page(self, server: HTTPServer, path: str) -> None:
        """The gateway's own page, which asks this server's API."""
        answer = httpx.get(url(server) + path)
        assert answer.status_code == 200
        assert 'data-api="api" data-events=""' in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]

    def test_the_api(self, server: HTTPServer) -> None:
        """`/api/state` and `/api/health`, as documented; anything else is 404."""
        assert httpx.get(url(server) + "/api/health").json() == {"status": "ok"}
        assert httpx.get(url(server) + "/api/state").json()["fleet"]["name"] == "my-fleet"
        assert httpx.get(url(server) + "/api/route/9").status_code == 404
        assert httpx.get(url(server) + "/etc/passwd").status_code == 404

    def test_it_listens_on_loopback_unless_asked(self, server: HTTPServer) -> None:
        """The network sees it only when somebody says so."""
        assert server.server_address[0] == "127.0.0.1"

    def test_a_name_pointed_at_loopback_is_not_served(self, server: HTTPServer) -> None:
        """A web page whose name resolves to this machine cannot read it."""
        answer = httpx.get(url(server) + "/api/state", headers={"host": "evil.example:80"})
        assert answer.status_code == 421

    def test_a_key_if_there_is_one(self) -> None:
        """The page is free, the data is not."""
        one = start_dashboard(documented(), port=0, api_key="s3cret")
        try:
            assert httpx.get(url(one) + "/").status_code == 200
            assert httpx.get(url(one) + "/api/state").status_code == 401
            key = {"authorization": "Bearer s3cret"}
            assert httpx.get(url(one) + "/api/state", headers=key).status_code == 200
        finally:
            one.shutdown()
            one.server_close()

    def test_what_a_user_sent_is_data(self, server: HTTPServer) -> None:
        """It leaves as JSON, with a type no browser renders."""
        state = server.RequestHandlerClass.state  # type: ignore[attr-defined]
        state.record_route(prompt_preview="<script>alert(1)</script>")
        answer = httpx.get(url(server) + "/api/state")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["recent_routes"][0]["prompt"] == "<script>alert(1)</script>"
        assert "alert(1)" not in httpx.get(url(server)).text
