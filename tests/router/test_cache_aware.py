"""The rules of other routers, on our knowledge."""

from __future__ import annotations

from typing import Any

import pytest

from kvfleet.adapters.base import EngineLoad
from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.component import Services
from kvfleet.router.balancing import ConsistentHashStrategy, PowerOfTwoStrategy, SessionStrategy
from kvfleet.router.cache_aware import (
    BlockCostStrategy,
    LatencyProductStrategy,
    LeastLoadStrategy,
    LeastTokensStrategy,
    PrefixThresholdStrategy,
    WeightedPrefixStrategy,
)
from kvfleet.router.scoring import ScoringContext
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.reservations import Work

FLEET = tuple(ModelConfig(name="m", endpoint=f"http://{i}") for i in range(3))


class Fleet:
    """Three replicas, and a strategy on them."""

    def __init__(self, strategy: Any) -> None:
        self.load = FleetLoad(FrozenClock())
        self.load.register(FLEET)
        self.strategy = strategy
        strategy.provision(Services(load=self.load))

    def send(self, place: int, count: int = 1, **work: Any) -> None:
        """Requests under way."""
        for _ in range(count):
            self.load.started(FLEET[place].id, Work(**work))

    def first(self, *cached: float, prompt: float = 1000, **context: Any) -> str:
        """The replica chosen."""
        affinity = {model.id: tokens for model, tokens in zip(FLEET, cached, strict=False)}
        ctx = ScoringContext(affinity=affinity, prompt_tokens=prompt, **context)
        return self.strategy.select(FLEET, ctx).models[0].endpoint[-1]


def test_least_tokens_counts_what_is_to_do() -> None:
    """One long prompt is more than three short ones."""
    fleet = Fleet(LeastTokensStrategy())
    fleet.send(0, prompt_tokens=9000)
    fleet.send(1, 3, prompt_tokens=100)
    fleet.send(2, 9, prompt_tokens=900)
    assert fleet.first() == "1"


def test_least_load_is_seconds_and_a_barrier() -> None:
    """A short queue on a full cache is worse than a longer one on an empty one."""
    fleet = Fleet(LeastLoadStrategy())
    fleet.send(0, prompt_tokens=1000)
    fleet.load.report("http://1", EngineLoad(kv_usage=0.97), 1000.0)
    fleet.send(2, prompt_tokens=4000)
    assert fleet.first() == "0"


def test_prefix_threshold_follows_the_match_unless_one_is_imbalanced() -> None:
    """Below the threshold, and beyond the imbalance, the fewest requests."""
    fleet = Fleet(PrefixThresholdStrategy())
    fleet.send(0, 5)
    fleet.send(1, 2)
    assert fleet.first(400, 0, 0) == "0"
    assert fleet.first(300, 0, 0) == "2"
    fleet.send(0, 65)
    assert fleet.first(400, 0, 0) == "2"


def test_block_cost_adds_what_is_computed_and_what_is_held() -> None:
    """A cached prompt is worth its blocks, and no more."""
    fleet = Fleet(BlockCostStrategy())
    fleet.send(0, prompt_tokens=300)
    fleet.send(1, prompt_tokens=100)
    fleet.send(2, prompt_tokens=2000)
    assert fleet.first(800, 0, 0) == "0"
    assert fleet.first(100, 0, 0) == "1"


def test_weighted_prefix_is_a_sum_of_scores() -> None:
    """The whole prompt outweighs the longest queue by as much as they weigh."""
    fleet = Fleet(WeightedPrefixStrategy())
    fleet.send(0, 4)
    assert fleet.first(1000, 0, 0) in "012"
    assert Fleet(WeightedPrefixStrategy(prefix=3)).first(1000, 0, 0) == "0"
    heavy = Fleet(WeightedPrefixStrategy(prefix=1))
    heavy.send(0, 4)
    assert heavy.first(1000, 0, 0) != "0"


def test_latency_product_multiplies_tokens_by_the_batch() -> None:
    """Half the tokens are worth twice the requests."""
    fleet = Fleet(LatencyProductStrategy())
    fleet.send(0, 3)
    fleet.send(1, 2)
    fleet.send(2, 2)
    assert fleet.first(500, 0, 0) == "0"
    assert fleet.first(100, 0, 0) != "0"


def test_two_are_drawn_and_the_better_wins() -> None:
    """The most loaded of three is never chosen; the draw is the seed's."""
    fleet = Fleet(PowerOfTwoStrategy())
    fleet.send(0, 9)
    fleet.send(1, 5)
    chosen = [fleet.first(seed=seed) for seed in range(60)]
    assert set(chosen) == {"1", "2"}
    assert chosen == [fleet.first(seed=seed) for seed in range(60)]


def test_a_session_has_a_home_by_hash_until_it_is_overloaded() -> None:
    """Others' sessions do not move."""
    fleet = Fleet(ConsistentHashStrategy())
    homes = {f"s{i}": fleet.first(session=f"s{i}") for i in range(30)}
    assert set(homes.values()) == {"0", "1", "2"}
    fleet.send(0, 20)
    moved = {key: fleet.first(session=key) for key in homes}
    assert all(moved[key] == home for key, home in homes.items() if home != "0")
    assert "0" not in moved.values()


def test_a_session_stays_where_it_began() -> None:
    """Whatever happens there; a dry run binds nobody."""
    fleet = Fleet(SessionStrategy(max_sessions=2))
    assert fleet.first(session="dry", dry_run=True)
    assert not fleet.strategy._homes
    home = fleet.first(session="s")
    fleet.send(int(home), 50)
    assert fleet.first(session="s") == home
    assert fleet.first(session="t") != home
    fleet.first(session="u")
    assert len(fleet.strategy._homes) == 2


@pytest.mark.parametrize(
    "cls",
    [
        BlockCostStrategy,
        ConsistentHashStrategy,
        LatencyProductStrategy,
        LeastLoadStrategy,
        LeastTokensStrategy,
        PowerOfTwoStrategy,
        PrefixThresholdStrategy,
        SessionStrategy,
        WeightedPrefixStrategy,
    ],
)
def test_all_rank_everybody_and_nobody(cls: type[Any]) -> None:
    """A permutation of the candidates, also of none."""
    ranking = cls().select(FLEET, ScoringContext(seed=3))
    assert sorted(model.id for model in ranking.models) == sorted(model.id for model in FLEET)
    assert list(cls().select([], ScoringContext()).models) == []
