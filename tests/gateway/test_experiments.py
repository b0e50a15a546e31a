"""A/B tests and canaries behind a running gateway: who gets what, what guards do by themselves, and what traces say."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx

from kvfleet.config.schema import (
    FleetConfig,
    GatewayConfig,
    ModelConfig,
    StageConfig,
    TelemetryConfig,
    TenantConfig,
    TraceStoreConfig,
)
from kvfleet.eval.shadow_store import ShadowStore
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Trace

QUICK: Mapping[str, Any] = {"speed": 1000, "reply": "The sky is blue."}
V1 = ModelConfig(name="v1", provider="mock", endpoint="mock://v1", options=QUICK)
V2 = ModelConfig(name="v2", provider="mock", endpoint="mock://v2", options=QUICK)
CANARY = {"canary": "v2", "steps": [0.3, 1.0], "min_requests": 10, "hold_s": 0, "max_latency_ratio": 1000}


@attrs.define
class Live:
    """A gateway that serves, and what it recorded."""

    client: httpx.AsyncClient
    router: Router
    traces: list[Trace] = attrs.field(factory=list)

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)

    async def ask(self, number: int = 1, **headers: str) -> Counter[str]:
        """So many requests one after another; by which models they were answered."""
        found: Counter[str] = Counter()
        for _ in range(number):
            answer = await self.client.post(
                "/v1/chat/completions",
                json={"messages": [{"role": "user", "content": "Why is the sky blue?"}]},
                headers={name.replace("_", "-"): value for name, value in headers.items()},
            )
            assert answer.status_code == 200, answer.text
            found[answer.headers["x-kvfleet-model"]] += 1
            await self.router.settled()
        return found

    def modes(self) -> Counter[str]:
        """What the strategy said of its choices, in the traces."""
        chosen = (stage for trace in self.traces for stage in Explanation(trace).stages if stage.kind == "select")
        return Counter(stage.mode for stage in chosen)


@asynccontextmanager
async def live(*stages: StageConfig, second: ModelConfig = V2, state_dir: Path | None = None) -> AsyncIterator[Live]:
    """A fleet of two versions of a model behind a gateway."""
    config = FleetConfig(
        models=(V1, second),
        pipeline=(StageConfig(use="filter.policy"), *stages),
        gateway=GatewayConfig(tenant_header="X-Tenant-ID"),
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )
    router = Router(config, polls=False, seed=1, state_dir=state_dir)
    async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        found = Live(client, router)
        router.add_sink(found)
        yield found


def select(use: str, **options: Any) -> tuple[StageConfig, StageConfig]:
    """The strategy, and fallbacks."""
    return StageConfig(use=use, options=options), StageConfig(use="execute.fallback")


async def test_a_tenant_keeps_to_its_side_of_an_ab_test() -> None:
    """Every request of a tenant goes to one model, tenants are spread by the shares, and the trace has the share."""
    sides: Counter[str] = Counter()
    async with live(*select("select.weighted", weights={"v1": 0.5, "v2": 0.5}, sticky="tenant")) as gateway:
        for tenant in range(24):
            answered = await gateway.ask(3, X_Tenant_ID=f"t{tenant}")
            assert len(answered) == 1
            sides += answered
        state = (await gateway.client.get("/dashboard/api/state")).json()
    assert min(sides.values()) >= 3 * 6
    assert all("share" in c.terms for trace in gateway.traces for c in Explanation(trace).candidates)
    assert state["stages"]["select.weighted"]["weights"] == {"v1": 0.5, "v2": 0.5}


async def test_a_canary_that_does_well_is_promoted_step_by_step(tmp_path: Path) -> None:
    """It begins with its share, gets everything in the end, and is still promoted after a restart."""
    async with live(*select("select.canary", **CANARY), state_dir=tmp_path) as gateway:
        first = await gateway.ask(20)
        await gateway.ask(100)
        told = (await gateway.client.get("/dashboard/api/state")).json()["stages"]["select.canary"]
        metrics = (await gateway.client.get("/metrics")).text
    assert 1 <= first["v2"] < first["v1"]
    assert (told["status"], told["share"]) == ("promoted", 1.0)
    assert 'kvfleet_canary_changes_total{model="v2",to="promoted"} 1.0' in metrics
    assert {"canary at 30%", "baseline at 30%"} <= gateway.modes().keys()
    async with live(*select("select.canary", **CANARY), state_dir=tmp_path) as gateway:
        assert await gateway.ask(5) == {"v2": 5}


async def test_a_canary_that_fails_is_taken_out_and_goes_on_as_a_shadow(tmp_path: Path) -> None:
    """Every client is answered; the guard rolls back by itself, over a restart too; what comes after is mirrored."""
    broken = attrs.evolve(V2, options={**QUICK, "fail": "server_error"}, max_retries=0)
    mirror = {"shadow_models": ["v2"], "sample_rate": 1.0, "compare_outputs": True}
    stages = (*select("select.canary", **CANARY), StageConfig(use="observe.shadow", options=mirror))
    async with live(*stages, second=broken, state_dir=tmp_path) as gateway:
        assert await gateway.ask(80) == {"v1": 80}
        rolled_back = gateway.router.state()["stages"]["select.canary"]
        metrics = (await gateway.client.get("/metrics")).text
    assert rolled_back["status"] == "rolled_back"
    assert "100.0% of its calls fail" in rolled_back["reason"]
    assert 'kvfleet_canary_changes_total{model="v2",to="rolled_back"} 1.0' in metrics

    async with live(*stages, state_dir=tmp_path) as gateway:  # mended, and started again
        assert await gateway.ask(5) == {"v1": 5}
        assert gateway.modes() == {"rolled back": 5}
        mirrored = [trace.route.attributes[names.SHADOW_REPLICAS] for trace in gateway.traces]
        stage = next(one.component for one in gateway.router.pipeline.observe if one.name == "shadow")
        await stage.settled()
    assert mirrored == [("v2@mock://v2",)] * 5
    store = ShadowStore(tmp_path / "shadow.sqlite")
    compared = [(row.primary, row.shadow, row.similarity) for row in store.last(5)]
    store.close()
    assert compared == [("v1", "v2", 1.0)] * 5


async def test_what_a_tenants_strategy_learned_is_shown(tmp_path: Path) -> None:
    """A strategy that a tenant has is among the stages that tell of themselves, and learns from that tenant alone."""
    config = FleetConfig(
        models=(V1, V2),
        strategy="cost_first",
        tenants={"a": TenantConfig(strategy="ucb1"), "b": TenantConfig()},
        gateway=GatewayConfig(tenant_header="X-Tenant-ID"),
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )
    router = Router(config, polls=False, state_dir=tmp_path)
    async with running(config, router=router) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        gateway = Live(client, router)
        await gateway.ask(3, X_Tenant_ID="b")
        await gateway.ask(4, X_Tenant_ID="a")
        stages = (await client.get("/dashboard/api/state")).json()["stages"]
    assert stages["select.ucb1"]["total_pulls"] == 4
