"""`expected_latency`: cache and load in seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest

from kvfleet.clock import FrozenClock
from kvfleet.config.schema import ModelConfig
from kvfleet.router.expected import ExpectedLatencyStrategy
from kvfleet.router.scoring import Column, ScoringContext, Unit
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.reservations import Work

FLEET = tuple(ModelConfig(name="m", endpoint=f"http://{i}") for i in range(3))
PROMPT = 8000.0


class Fleet:
    """Three replicas that read 8,000 tokens in a second, and what they hold of a prompt."""

    def __init__(self) -> None:
        self.clock = FrozenClock()
        self.load = FleetLoad(self.clock)
        self.load.register(FLEET)
        for tokens in (1000, 8000, 2000, 4000) * 8:
            for model in FLEET:
                one = self.load.started(model.id, Work(tokens))
                self.clock.advance(tokens / 8000)
                self.load.first_byte(one, tokens / 8000)
                self.load.finished(one, tokens / 8000, True)
        self.clock.advance(200)  # so that they count as idle
        self.strategy = ExpectedLatencyStrategy()

    def choose(
        self, *cached: float, seed: int = 0, prompt: float = PROMPT, returns: Mapping[float, float] | None = None
    ) -> ScoringContext:
        """The context of one decision."""
        found = self.load.waits(FLEET, prompt, cached, self.clock.now_s(), returns or {})
        seconds = [q + p for q, p in zip(found.queue_s, found.prompt_s, strict=True)]
        column = Column(Unit.SECONDS, seconds, found.terms)
        return ScoringContext(columns={"latency": column}, seed=seed, now_s=self.clock.now_s())

    def first(self, *cached: float, seed: int = 0, returns: Mapping[float, float] | None = None) -> str:
        """The replica chosen."""
        return self.strategy.select(FLEET, self.choose(*cached, seed=seed, returns=returns)).models[0].endpoint[-1]


def test_a_session_stays_until_moving_is_cheaper() -> None:
    """Half a second of cached prompt is worth half a second of queue, and no more."""
    fleet = Fleet()
    assert {fleet.first(0, 4000, 0, seed=seed) for seed in range(10)} == {"1"}
    fleet.load.started(FLEET[1].id, Work(2000))
    fleet.clock.advance(0.01)
    assert fleet.first(0, 4000, 0) == "1"
    fleet.load.started(FLEET[1].id, Work(4000))
    assert fleet.first(0, 4000, 0) != "1"


def test_what_everybody_shares_decides_nothing() -> None:
    """A system prompt that all hold leaves the choice to the queues, and equals take turns."""
    fleet = Fleet()
    assert Counter(fleet.first(6000, 6000, 6000, seed=seed) for seed in range(30)) == {"0": 10, "1": 10, "2": 10}
    fleet.load.started(FLEET[0].id, Work(4000))
    assert "0" not in {fleet.first(6000, 6000, 6000, seed=seed) for seed in range(10)}


def test_a_hot_prefix_is_computed_again_where_the_queue_costs_more() -> None:
    """A burst under one prompt that one replica holds: it gets as many as its queue is worth, then others begin."""
    fleet = Fleet()
    chosen = []
    cached = [7500.0, 0.0, 0.0]
    for seed in range(30):
        place = int(fleet.first(*cached, seed=seed))
        chosen.append(place)
        fleet.load.started(FLEET[place].id, Work(PROMPT, cached[place]))
        cached[place] = 7500.0  # what is on its way there counts at once
    assert set(chosen[:6]) == {0}
    assert set(chosen) == {0, 1, 2}
    shares = Counter(chosen)
    assert shares[0] > shares[1] >= 1


def test_a_prefix_that_many_will_use_is_computed_again_sooner() -> None:
    """A queue of a quarter of a second is not worth a second of computing, unless nine others will share that."""
    fleet = Fleet()
    fleet.load.started(FLEET[1].id, Work(2000))
    fleet.clock.advance(0.01)
    assert fleet.first(0, 7800, 0) == "1"
    assert fleet.first(0, 7800, 0, returns={4000: 9.0}) == "1"
    assert fleet.first(0, 7800, 0, returns={4000: 9.0, 7800: 9.0}) != "1"
    terms = fleet.strategy.select(FLEET, fleet.choose(0, 7800, 0, returns={4000: 9.0, 7800: 1.0})).terms
    assert sorted(terms["returns_s"]) == pytest.approx([0.0, *[0.45 + 0.2375] * 2], rel=0.05)


def test_who_waits_already_is_not_to_wait_longer() -> None:
    """A prompt that has not been begun would be computed in one step with this one; one that has been would not."""
    fleet = Fleet()
    fleet.load.started(FLEET[0].id, Work(800))
    fleet.load.started(FLEET[1].id, Work(800))
    fleet.clock.advance(0.05)
    fleet.load.started(FLEET[2].id, Work(400))
    terms = fleet.choose(0, 0, 0).columns["latency"].terms
    assert terms["queue_s"] == pytest.approx([0.05, 0.05, 0.05], abs=0.01)
    assert terms["delayed_s"] == [0.0, 0.0, pytest.approx(1.0, rel=0.1)]
    assert fleet.first(0, 0, 0) != "2"


def test_the_busier_the_fleet_the_more_a_cache_is_worth_waiting_for() -> None:
    """A queue of half a second costs more than to compute half a second's prompt again, unless all are busy of late."""
    fleet = Fleet()
    fleet.load.started(FLEET[1].id, Work(4300))
    fleet.clock.advance(0.01)
    assert fleet.first(0, 4000, 0) != "1"
    before = fleet.choose(0, 4000, 0).columns["latency"].terms["later_s"]
    busy = [fleet.load.started(FLEET[i % 3].id, Work(8000)) for i in range(30)]
    for one in busy:
        fleet.load.finished(one, 1.0, ok=True)
    after = fleet.choose(0, 4000, 0).columns["latency"].terms["later_s"]
    assert max(before) < 0.05
    assert after[0] == after[2] == pytest.approx(2 * after[1], rel=0.15)
    assert fleet.first(0, 4000, 0) == "1"


def test_the_same_seed_gives_the_same_choice() -> None:
    """Ties are broken by the seed and nothing else."""
    fleet = Fleet()
    for seed in range(20):
        assert fleet.first(0, 0, 0, seed=seed) == fleet.first(0, 0, 0, seed=seed)


def test_answers_being_written_count() -> None:
    """Among replicas that would begin at the same time, the one with the fewest answers."""
    fleet = Fleet()
    for place, count in ((0, 6), (1, 3)):
        for _ in range(count):
            fleet.load.first_byte(fleet.load.started(FLEET[place].id), 0.0)
    ranking = fleet.strategy.select(FLEET, fleet.choose(0, 0, 0))
    assert [model.endpoint[-1] for model in ranking.models] == ["2", "1", "0"]


def test_a_filling_cache_is_a_barrier() -> None:
    """It rises steeply towards the end, and a full one has an end all the same."""
    fleet = Fleet()
    context = fleet.choose(0, 0, 0)
    column = context.columns["latency"]
    column.terms["usage"][:] = [0.0, 0.9, 1.7]  # type: ignore[index]
    ranking = fleet.strategy.select(FLEET, context)
    by_place = {m.endpoint[-1]: value for m, value in zip(ranking.models, ranking.terms["memory_s"], strict=True)}
    assert by_place == {"0": 0.0, "1": pytest.approx(0.18), "2": pytest.approx(0.98)}


def test_the_terms_and_the_other_choices_are_told() -> None:
    """Every part of the total, and what the second choice, round robin and least requests would have cost."""
    fleet = Fleet()
    fleet.load.started(FLEET[0].id, Work(8000))
    ranking = fleet.strategy.select(FLEET, fleet.choose(8000, 0, 4000))
    assert next(iter(ranking.models)) is FLEET[2]
    assert set(ranking.terms) == {
        "first_token_s",
        "queue_s",
        "prompt_s",
        "saved_s",
        "returns_s",
        "later_s",
        "delayed_s",
        "held_up_s",
        "slower_s",
        "memory_s",
    }
    assert ranking.unit is Unit.SECONDS
    assert ranking.details["second_choice_s"] == ranking.totals[1]
    assert ranking.details["round_robin_s"] == pytest.approx(sum(ranking.totals) / 3)
    assert ranking.details["least_requests_s"] >= ranking.totals[0]


def test_it_works_with_what_is_declared() -> None:
    """Without a pipeline, as a library class."""
    models = [ModelConfig(name="a", endpoint="http://a"), ModelConfig(name="b", endpoint="http://b", latency_p50_ms=10)]
    assert ExpectedLatencyStrategy().select(models).models[0].name == "b"
    assert list(ExpectedLatencyStrategy().select([]).models) == []
