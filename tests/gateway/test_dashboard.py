"""The dashboard of a running gateway: what it serves, to whom, and what it costs."""

from __future__ import annotations

import base64
import re
from hashlib import sha256

import anyio
import attrs
import httpx
import orjson
import pytest

from kvfleet.clock import FrozenClock
from kvfleet.config.schema import (
    FleetConfig,
    GatewayConfig,
    ModelConfig,
    PolicyConfig,
    TelemetryConfig,
    TenantConfig,
    TraceStoreConfig,
)
from kvfleet.errors import RouteError
from kvfleet.gateway.asgi import ASGIExchange
from kvfleet.gateway.board import Board
from kvfleet.gateway.page import load_page
from kvfleet.gateway.recent import RecentRoutes
from kvfleet.gateway.replicas import ReplicaNames
from kvfleet.gateway.server import running
from kvfleet.gateway.tallies import READ
from kvfleet.plugin.component import Services
from kvfleet.telemetry.metric_table import METRICS
from kvfleet.trace import names
from kvfleet.trace.spans import Span, Trace
from tests.gateway.asgi import Client, call
from tests.gateway.fleet import FakeRouter, fleet, gateway, trace_of

SECRET = "CANARYPROMPT"
ASK = {"model": "auto", "messages": [{"role": "user", "content": f"Hi {SECRET}"}]}
QUIET = TelemetryConfig(trace_store=TraceStoreConfig(enabled=False))


def pair(telemetry: TelemetryConfig = QUIET) -> FleetConfig:
    """One engine that fails and may be asked first, one that answers, one that policy rules out."""
    models = (
        ModelConfig(name="bad", endpoint="mock://gpu-1", provider="mock", quality_score=1.0, options={"fail": "overloaded"}),
        ModelConfig(name="good", endpoint="mock://gpu-2", provider="mock", quality_score=0.5),
        ModelConfig(name="open", endpoint="mock://gpu-3", provider="mock", allowed_data_classes=("public",)),
    )  # fmt: skip
    return FleetConfig(
        fleet_name="shop",
        models=models,
        telemetry=telemetry,
        strategy="quality_first",
        policy=PolicyConfig(enabled=True),
    )


class TestPage:
    async def test_it_is_one_file_that_loads_nothing(self) -> None:
        """No address of anywhere else, and a policy under which only its own script and style count."""
        answer = await call(await gateway(FakeRouter(fleet()), key="k"), "GET", "/dashboard")
        html = answer.body.decode()
        assert answer.status == 200
        assert answer.header("content-type") == "text/html; charset=utf-8"
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", html)
        assert not re.findall(r"""(?:src|href)=["'](?!data:,)""", html)
        policy = answer.header("content-security-policy") or ""
        assert "default-src 'none'" in policy
        for tag in ("script", "style"):
            (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
            assert f"{tag}-src 'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'" in policy

    def test_it_never_makes_markup_of_data(self) -> None:
        """The script has no way from a text to markup; so whatever is shown, is shown as text."""
        script = load_page(api="api").body.decode()
        ways = (
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "Function(",
            "srcdoc",
            "DOMParser",
        )
        assert [way for way in ways if way in script] == []

    def test_it_holds_no_data(self) -> None:
        """It is the same for everybody, since it is served without a key."""
        assert b"shop" not in load_page(api="dashboard/api", events="dashboard/events").body


class TestAuth:
    @pytest.mark.parametrize("path", ["/dashboard/api/state", "/dashboard/api/route/1", "/dashboard/events"])
    async def test_data_needs_the_key(self, path: str) -> None:
        """Everything but the empty page is behind the gateway's key, and takes it from the header alone."""
        app = await gateway(FakeRouter(fleet()), key="s3cret")
        assert (await call(app, "GET", path)).status == 401
        assert (await call(app, "GET", path, headers={"Authorization": "Bearer wrong"})).status == 401
        assert (await call(app, "GET", f"{path}?key=s3cret")).status == 401

    @pytest.mark.parametrize("path", ["/dashboard/api/state", "/dashboard/api/route/1", "/dashboard/events"])
    async def test_a_tenant_s_key_does_not_open_it(self, path: str) -> None:
        """It shows what all tenants ask for and spend, so it is for the operator's keys."""
        gate = GatewayConfig(api_key="operator", api_keys={"team-a": "tenant"})
        config = attrs.evolve(fleet(), tenants={"team-a": TenantConfig()}, gateway=gate)
        app = await gateway(FakeRouter(config))
        answer = await call(app, "GET", path, headers={"Authorization": "Bearer tenant"})
        assert (answer.status, answer.json["error"]["code"]) == (403, "operators_only")
        state = await call(app, "GET", "/dashboard/api/state", headers={"Authorization": "Bearer operator"})
        assert state.status == 200


class TestState:
    async def test_counters_count_what_they_say(self) -> None:
        """After three answers, each by the second choice, every counter agrees with the metrics and with the traces."""
        async with running(pair()) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            for _ in range(3):
                assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 200
            await serving.router.settled()
            state = (await client.get("/dashboard/api/state")).json()
            metrics = (await client.get("/metrics")).text
        counters = state["counters"]
        assert (counters["total_requests"], counters["total_errors"], counters["error_rate"]) == (3, 0, "0.0%")
        fallbacks = sum(row["fallback"] for row in state["recent_routes"])
        assert counters["total_fallbacks"] == fallbacks > 0
        assert counters["total_policy_blocks"] == 3
        assert state["model_stats"]["good"]["attempts"] == 3
        assert state["model_stats"]["bad"]["errors"] == state["model_stats"]["bad"]["attempts"] == fallbacks
        assert state["series"]["latency"]["count"] == 3
        assert f'kvfleet_fallback_triggered_total{{from_model="bad",to_model="good"}} {fallbacks}.0' in metrics
        assert state["fleet"] | {"name": "shop", "models": 3, "replicas": 3} == state["fleet"]

    async def test_a_failed_request_is_an_error(self) -> None:
        """Nobody answered: one request, one error, 100 %."""
        config = attrs.evolve(pair(), models=pair().models[:1])
        async with running(config) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            await client.post("/v1/chat/completions", json=ASK)
            await serving.router.settled()
            state = (await client.get("/dashboard/api/state")).json()
        counters = state["counters"]
        assert (counters["total_requests"], counters["total_errors"], counters["error_rate"]) == (1, 1, "100.0%")
        assert state["recent_routes"][0]["outcome"] == "failed"

    async def test_without_metrics_there_are_no_counters(self) -> None:
        """Switched off is not zero."""
        telemetry = attrs.evolve(QUIET, prometheus_enabled=False)
        async with running(pair(telemetry)) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            state = (await client.get("/dashboard/api/state")).json()
        assert (state["counters"], state["series"], state["model_stats"]) == (None, None, {})

    def test_every_metric_it_reads_exists(self) -> None:
        """A renamed metric would otherwise count as zero."""
        assert set(READ) <= {info.name for info in METRICS}


class TestRoute:
    async def test_a_decision_tells_everything_but_addresses_and_content(self) -> None:
        """Candidates, drops with rule and reason, attempts; replicas by opaque names; no prompt and no answer."""
        async with running(pair()) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            said = (await client.post("/v1/chat/completions", json=ASK)).json()["choices"][0]["message"]["content"]
            state = await client.get("/dashboard/api/state")
            (row,) = state.json()["recent_routes"]
            found = await client.get(f"/dashboard/api/route/{row['id']}")
            by_trace = await client.get(f"/dashboard/api/route/{row['trace_id']}")
        detail = found.json()
        assert by_trace.json() == detail
        assert {one["id"] for one in detail["candidates"]} == {"bad#1", "good#1", "open#1"}
        (drop,) = detail["drops"]
        assert (drop["candidate"], drop["stage"]) == ("open#1", "filter.policy")
        assert drop["rule"]
        assert drop["reason"]
        assert [one["fault"] for one in detail["attempts"]] == ["overloaded", ""]
        assert row["served_by"] == "good#1"
        for text in (state.text, found.text):
            assert SECRET not in text
            assert said not in text
            assert "gpu-" not in text

    async def test_content_is_there_only_if_it_was_captured(self) -> None:
        """`telemetry.capture_content` puts it into the trace, and so into the dashboard's view of it."""
        telemetry = attrs.evolve(QUIET, capture_content=True)
        async with running(pair(telemetry)) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            await client.post("/v1/chat/completions", json=ASK)
            state = await client.get("/dashboard/api/state")
            detail = (await client.get("/dashboard/api/route/1")).json()
        assert SECRET in detail["content"]["prompt"]
        assert SECRET not in state.text

    async def test_what_is_not_kept_is_404(self) -> None:
        """With the command that may still know it."""
        answer = await call(await gateway(FakeRouter(fleet())), "GET", "/dashboard/api/route/7")
        assert (answer.status, answer.json["error"]["code"]) == (404, "trace_not_found")
        assert "kvfleet trace show" in answer.json["error"]["message"]


class TestRing:
    def test_it_keeps_the_newest(self) -> None:
        """Never more than its size, newest first, each under a number of its own."""
        ring = RecentRoutes(3)
        for _ in range(5):
            ring.write(trace_of(FakeRouter(fleet()).models[0]))
        assert len(ring) == 3
        assert [row["id"] for row in ring.rows(10)] == ["5", "4", "3"]
        assert [row["id"] for row in ring.rows(2)] == ["5", "4"]
        assert ring.find("5") is not None
        assert ring.find("2") is None

    def test_captured_content_is_cut(self) -> None:
        """A ring of whole prompts would have no bound worth the name; the trace itself stays as it is."""
        trace = Trace("a" * 32, [Span(names.ROUTE_SPAN, 1, 2, {names.PROMPT: "x" * 100_000})])
        ring = RecentRoutes()
        ring.write(trace)
        kept = ring.find("1")
        assert kept is not None
        assert len(str(kept.route.attributes[names.PROMPT])) == 8_000
        assert len(str(trace.route.attributes[names.PROMPT])) == 100_000

    async def test_nobody_pays_who_does_not_look(self) -> None:
        """A route costs one append: nothing is read from its trace until somebody asks."""
        async with running(pair()) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            await client.post("/v1/chat/completions", json=ASK)
            ring = serving.gateway.board.recent
            assert len(ring) == 1
            assert [kept.row for kept in ring._kept] == [None]


def board(router: FakeRouter, **options: float) -> Board:
    """A board with a clock that stands."""
    router.services = attrs.evolve(router.services, clock=FrozenClock())
    return Board(router, ReplicaNames.of(router.models), **options)  # type: ignore[arg-type]


@attrs.define
class Watched:
    """An application that is nothing but a board's event stream."""

    board: Board

    async def __call__(self, scope: dict[str, object], receive: object, send: object) -> None:
        exchange = ASGIExchange("GET", "/dashboard/events", [], receive, send)  # type: ignore[arg-type]
        await self.board.events(exchange)


class TestEvents:
    async def test_they_tell_the_state_until_the_watcher_leaves(self) -> None:
        """A whole state at once and again; when the watcher leaves, nothing is left running."""
        one = board(FakeRouter(fleet()), every_s=0.001)
        watcher = Client(Watched(one))
        async with anyio.create_task_group() as group:
            group.start_soon(watcher.call, "GET", "/dashboard/events")
            await watcher.until(3)
            assert one.watchers == 1
            watcher.leave.set()
        assert one.watchers == 0
        assert watcher.answer.header("content-type") == "text/event-stream; charset=utf-8"
        first = watcher.answer.pieces[0]
        assert first.startswith(b"data: ")
        assert first.endswith(b"\n\n")
        assert orjson.loads(first[6:])["fleet"]["name"] == "test"

    async def test_they_end_when_the_gateway_stops(self) -> None:
        """A stream that never ends by itself must not hold up a stop."""
        one = board(FakeRouter(fleet()), every_s=60)
        watcher = Client(Watched(one))
        async with anyio.create_task_group() as group:
            group.start_soon(watcher.call, "GET", "/dashboard/events")
            await watcher.until(1)
            one.close()
        assert watcher.answer.is_complete

    async def test_a_running_gateway_stops_under_a_watcher_and_counts_no_departure(self) -> None:
        """Over real sockets: leaving is a watcher's way to end, not a client lost; and the stop takes no patience."""
        async with running(pair()) as serving, httpx.AsyncClient(base_url=serving.url) as client:
            async with client.stream("GET", "/dashboard/events") as answer:
                assert (await anext(answer.aiter_lines())).startswith("data: {")
            async with client.stream("GET", "/dashboard/events") as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                gateway = serving.gateway
                gateway.drain()
                assert [line for line in [line async for line in lines] if not line.startswith("data: ")] == [""]
        assert gateway.meters.left == 0
        assert gateway.board.watchers == 0

    async def test_watchers_are_bounded(self) -> None:
        """One more than allowed is told so."""
        one = board(FakeRouter(fleet()), most_watchers=0)
        with pytest.raises(RouteError, match="dashboards are open") as caught:
            await call(Watched(one), "GET", "/dashboard/events")
        assert caught.value.status == 503

    async def test_the_state_is_gathered_once_for_all(self) -> None:
        """Within the interval every watcher gets the same bytes; after it, new ones."""

        @attrs.define
        class Counting:
            router: FakeRouter
            asked: int = 0

        router = FakeRouter(fleet())
        counting = Counting(router)
        state = router.state

        def counted() -> dict[str, object]:
            counting.asked += 1
            return state()

        router.state = counted  # type: ignore[method-assign]
        one = board(router)
        assert await one._gather() is await one._gather()
        assert counting.asked == 1
        assert isinstance(router.services, Services)
        router.services.clock.advance(1.0)  # type: ignore[attr-defined]
        await one._gather()
        assert counting.asked == 2
