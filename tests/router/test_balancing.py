"""Strategies that only spread the load."""

from __future__ import annotations

from collections import Counter

import pytest

from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.component import Services
from kvfleet.router.balancing import LeastRequestsStrategy, RandomStrategy, RoundRobinStrategy
from kvfleet.router.scoring import ScoringContext

FLEET = tuple(ModelConfig(name="m", endpoint=f"http://{i}") for i in range(4))


def test_round_robin_takes_each_replica_in_turn() -> None:
    """One after the other, and round again; the rest of the ranking goes on from there."""
    strategy = RoundRobinStrategy()
    orders = [[m.endpoint[-1] for m in strategy.select(FLEET).models] for _ in range(5)]
    assert orders == [list("0123"), list("1230"), list("2301"), list("3012"), list("0123")]


def test_a_dry_run_does_not_take_a_turn() -> None:
    """Simulating shows whose turn it is, as often as one likes."""
    strategy = RoundRobinStrategy()
    strategy.select(FLEET)
    for _ in range(3):
        assert strategy.select(FLEET, ScoringContext(dry_run=True)).models[0] is FLEET[1]
    assert strategy.select(FLEET, ScoringContext()).models[0] is FLEET[1]


def test_each_set_of_candidates_has_its_own_turn() -> None:
    """Requests that only two can serve do not skew the turns of those that all can."""
    strategy = RoundRobinStrategy()
    first = Counter()
    for _ in range(40):
        first[strategy.select(FLEET).models[0].id] += 1
        strategy.select(FLEET[:2])
    assert set(first.values()) == {10}


def test_turns_are_bounded() -> None:
    """However many sets of candidates there are, memory has an end."""
    strategy = RoundRobinStrategy()
    for i in range(2000):
        strategy.select([ModelConfig(name=f"m{i}", endpoint="http://x")])
    assert len(strategy._cursors) == 1024


def test_random_gives_each_replica_the_same_chance() -> None:
    """Over many seeds each comes first about equally often."""
    strategy = RandomStrategy()
    first = Counter(strategy.select(FLEET, ScoringContext(seed=seed)).models[0].id for seed in range(4000))
    assert {key: count / 4000 for key, count in first.items()} == {m.id: pytest.approx(0.25, abs=0.03) for m in FLEET}


def test_random_without_a_context_is_not_always_the_same() -> None:
    """No seed does not mean seed 0."""
    strategy = RandomStrategy()
    assert len({strategy.select(FLEET).models[0].id for _ in range(200)}) == 4


def test_least_requests_chooses_whoever_has_the_fewest() -> None:
    """In flight decides, replica by replica."""
    services = Services(models=FLEET)
    for i, count in enumerate((2, 1, 3, 0)):
        for _ in range(count):
            made = services.load.started(FLEET[i].id)
    strategy = LeastRequestsStrategy()
    strategy.provision(services)
    ranking = strategy.select(FLEET)
    assert [m.endpoint[-1] for m in ranking.models] == list("3102")
    assert list(ranking.totals) == [1.0, 1 / 2, 1 / 3, 1 / 4]
    services.load.finished(made, 1.0, True)
    services.load.started(FLEET[3].id)
    services.load.started(FLEET[3].id)
    assert strategy.select(FLEET).models[0] is FLEET[1]


def test_least_requests_spreads_an_idle_fleet() -> None:
    """Equals take turns by the seed."""
    strategy = LeastRequestsStrategy()
    first = Counter(strategy.select(FLEET, ScoringContext(seed=seed)).models[0].id for seed in range(40))
    assert set(first.values()) == {10}
