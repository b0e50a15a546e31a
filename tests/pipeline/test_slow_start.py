"""A replica that has come back gets its share bit by bit, under every strategy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs
import pytest

from kvfleet.clock import FrozenClock
from kvfleet.config.health import HealthConfig
from kvfleet.config.schema import FleetConfig, ModelConfig, TelemetryConfig
from kvfleet.errors import Fault
from kvfleet.pipeline.slow_start import SlowStart
from kvfleet.plugin.contract import RouteRequest
from kvfleet.router.scoring import ModelScore, Ranking, ScoringContext
from kvfleet.runtime import Router
from kvfleet.telemetry.health import HealthManager

A, B = (ModelConfig(name="m", endpoint=f"mock://{name}", provider="mock") for name in "ab")
OTHER = ModelConfig(name="other", endpoint="mock://other", provider="mock")
FLEET = (A, B, OTHER)


@attrs.define
class InOrder:
    """Always ranks the candidates as they come."""

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Sequence[ModelScore]:
        return Ranking(models, [3.0, 2.0, 1.0][: len(models)], terms={"t": [1, 2, 3][: len(models)]})


def returning(clock: FrozenClock, model: ModelConfig, after_s: float) -> HealthManager:
    """A fleet of which one replica has come back so many seconds ago."""
    health = HealthManager.of(HealthConfig(slow_start_seconds=10), FLEET, clock)
    come_back(health, clock, model)
    clock.advance(after_s)
    return health


def come_back(health: HealthManager, clock: FrozenClock, model: ModelConfig) -> None:
    """Let a replica fail and recover."""
    for _ in range(3):
        health.record_failure(model.endpoint, Fault.CONNECT)
    clock.advance(61)
    health.begin(model.endpoint)
    health.record_success(model.endpoint)


@pytest.mark.parametrize(("after_s", "share"), [(0, 0.1), (3, 0.3), (7, 0.7), (10, 1.0)])
def test_its_share_of_first_places_grows(after_s: float, share: float) -> None:
    """Of 4,000 decisions that its strategy gives to it, it gets the share that its return allows."""
    clock = FrozenClock()
    strategy = SlowStart(InOrder(), returning(clock, A, after_s))
    firsts = Counter(
        Ranking.of(FLEET, strategy.select(FLEET, ScoringContext(now_s=clock.now_s(), seed=seed))).models[0].id
        for seed in range(4000)
    )
    assert firsts[A.id] / 4000 == pytest.approx(share, abs=0.03)
    assert firsts[B.id] == 4000 - firsts[A.id]


def test_it_stands_behind_its_own_models_replicas_and_before_other_models() -> None:
    """It stays a way out, its scores go with it, and the mode says why it is not first."""
    clock = FrozenClock()
    strategy = SlowStart(InOrder(), returning(clock, A, 0))
    context = ScoringContext(now_s=clock.now_s(), seed=1)
    ranking = Ranking.of(FLEET, strategy.select(FLEET, context))
    assert [model.id for model in ranking.models] == [B.id, A.id, OTHER.id]
    assert (ranking.totals, ranking.terms["t"], ranking.mode) == ((2.0, 3.0, 1.0), [2, 1, 3], "slow_start")


def test_a_replica_without_peers_is_used_at_once() -> None:
    """Nobody else can take its part, and another model is no substitute."""
    clock = FrozenClock()
    strategy = SlowStart(InOrder(), returning(clock, OTHER, 0))
    ranked = Ranking.of(FLEET, strategy.select((OTHER, A), ScoringContext(now_s=clock.now_s(), seed=1)))
    assert ranked.models[0] is OTHER


@pytest.mark.parametrize("strategy", ["round_robin", "random", "expected_latency", "hybrid_score", "cost_first"])
async def test_every_strategy_obeys(strategy: str) -> None:
    """In the live router, whatever the strategy, a replica that has just come back is first far more rarely."""
    clock = FrozenClock()
    config = FleetConfig(models=(attrs.evolve(A, replicas=(B.endpoint,)),), strategy=strategy)
    config = attrs.evolve(config, telemetry=TelemetryConfig(prometheus_enabled=False))
    async with Router(config, clock=clock, polls=False, seed=7) as router:
        request = RouteRequest(body={"messages": [{"role": "user", "content": "Hi"}]})

        async def firsts() -> Counter[str | None]:
            found = [(await router.simulate_request(request)).selected_replica for _ in range(200)]
            return Counter(found)

        usual = await firsts()
        for model in (A, B):
            if usual[model.id]:
                come_back(router.services.health, clock, model)
                assert (await firsts())[model.id] <= usual[model.id] * 0.35 + 5
                clock.advance(100)
