"""Scores, rankings and the weighted sum."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.adapters.base import EndpointHealth
from kvfleet.config.schema import ModelConfig, ScoringWeights
from kvfleet.router.scoring import Column, Ranking, ScoringContext, ScoringEngine, Unit, rank, utilities

PAGE = [
    ModelConfig(
        name="cheap-fast",
        endpoint="http://a:8000",
        quality_score=0.6,
        cost_per_1k_input_tokens=0.001,
        latency_p50_ms=150,
    ),
    ModelConfig(
        name="balanced", endpoint="http://b:8000", quality_score=0.8, cost_per_1k_input_tokens=0.01, latency_p50_ms=400
    ),
    ModelConfig(
        name="premium", endpoint="http://c:8000", quality_score=0.95, cost_per_1k_input_tokens=0.05, latency_p50_ms=350
    ),
]


def plain(name: str, endpoint: str = "") -> ModelConfig:
    """A model like any other."""
    return ModelConfig(name=name, endpoint=endpoint or f"http://{name}")


def test_the_pages_example_comes_out_in_its_order() -> None:
    """With cost weighing most: cheap-fast, balanced, premium; the first is selected."""
    scores = ScoringEngine(ScoringWeights(cost=0.6, latency=0.2, quality=0.2)).score_candidates(PAGE)
    assert [s.model_name for s in scores] == ["cheap-fast", "balanced", "premium"]
    assert [s.selected for s in scores] == [True, False, False]
    assert scores[0].cost_score == 1.0
    assert [s.quality_score for s in scores] == [0.6, 0.8, 0.95]
    assert scores[0].total_score > scores[1].total_score > scores[2].total_score


def test_real_prices_differ() -> None:
    """Prices of a cent and of five are told apart plainly, not clamped to almost the same."""
    values = utilities(Column(Unit.USD, [0.001, 0.01, 0.05]))
    assert values == pytest.approx([1.0, 0.82, 0.02])


def test_a_millisecond_is_not_a_difference_of_everything() -> None:
    """Two replicas that differ by half a percent score alike, so noise does not outweigh a warm cache."""
    fast, slow = utilities(Column(Unit.SECONDS, [0.2, 0.201]))
    assert fast == 1.0
    assert 0.99 < slow < 1.0


def test_what_is_not_known_is_worse_than_what_is() -> None:
    """An unknown price does not pass for a low one; where nothing is known, nobody is better."""
    assert utilities(Column(Unit.USD, [0.0, None, 0.0])) == [1.0, 0.0, 1.0]
    assert utilities(Column(Unit.USD, [None, None])) == [0.5, 0.5]
    assert utilities(Column(Unit.UTILITY, [0.9, None])) == [0.9, 0.5]
    assert utilities(Column(Unit.TOKENS, [None, 1000.0, 500.0])) == [0.0, 1.0, 0.5]


def test_a_few_cached_tokens_count_for_little() -> None:
    """A prompt of two tokens does not bind its sender to a replica; a long one does."""
    assert utilities(Column(Unit.TOKENS, [2.0, 0.0])) == [2 / 128, 0.0]
    assert utilities(Column(Unit.TOKENS, [2000.0, 0.0])) == [1.0, 0.0]


def test_nothing_cached_is_worth_nothing() -> None:
    """A column of no tokens does not count as full marks for all."""
    assert list(utilities(Column(Unit.TOKENS, [0.0, 0.0]))) == [0.0, 0.0]


def test_free_everywhere_is_best_everywhere() -> None:
    """A column of zero costs does not divide by zero."""
    assert list(utilities(Column(Unit.USD, [0.0, 0.0]))) == [1.0, 1.0]


numbers = st.one_of(st.none(), st.floats(0, 1e6))


@settings(deadline=None)
@given(st.lists(numbers, max_size=20), st.sampled_from([Unit.SECONDS, Unit.USD, Unit.TOKENS]))
def test_utilities_stay_in_range_and_keep_the_order(values: list[float | None], unit: Unit) -> None:
    """Every utility lies within 0..1, and what is better is never worth less."""
    found = utilities(Column(unit, values))
    assert len(found) == len(values)
    assert all(-1e-9 <= u <= 1 + 1e-9 for u in found)
    known = [(v, u) for v, u in zip(values, found, strict=True) if v is not None]
    for v, u in known:
        for w, x in known:
            if v < w:
                assert u >= x - 1e-9 if unit.less_is_better else u <= x + 1e-9


def test_the_pipelines_column_wins_over_what_is_declared() -> None:
    """A measured time replaces the declared one."""
    context = ScoringContext(columns={"latency": Column(Unit.SECONDS, [9.0, 0.1, 9.0])})
    engine = ScoringEngine(ScoringWeights(cost=0, latency=1, quality=0, cache_affinity=0))
    assert engine.score_candidates(PAGE, context)[0].model_name == "balanced"


def test_every_dimension_counts_when_weighed() -> None:
    """Affinity, load and clearance come from the context where no column gives them."""
    one, two = plain("one"), ModelConfig(name="two", endpoint="http://two", allowed_data_classes=("public",))
    context = ScoringContext(
        data_class="internal",
        cache_affinity_scores={one.id: 0.2, "two": 0.8},
        endpoint_health={"http://two": EndpointHealth(endpoint="http://two", healthy=True, queue_depth=16)},
    )
    weights = ScoringWeights(cost=0, latency=0, quality=0, cache_affinity=0.1, hardware_load=0.1, compliance=0.1)
    scores = {s.model_name: s for s in ScoringEngine(weights).score_candidates([one, two], context)}
    assert [scores["one"].cache_affinity_score, scores["two"].cache_affinity_score] == [0.2, 0.8]
    assert [scores["one"].hardware_load_score, scores["two"].hardware_load_score] == [0.5, 0.5]
    assert [scores["one"].compliance_score, scores["two"].compliance_score] == [1.0, 0.0]


def test_a_sick_replica_has_no_free_capacity() -> None:
    """What is down is full."""
    context = ScoringContext(endpoint_health={"http://one": EndpointHealth(endpoint="http://one", healthy=False)})
    weights = ScoringWeights(cost=0, latency=0, quality=0, cache_affinity=0, hardware_load=1)
    assert ScoringEngine(weights).score_candidates([plain("one")], context)[0].total_score == 0.0


def test_weights_can_be_changed() -> None:
    """Some change, the rest stay, and the next ranking uses them."""
    engine = ScoringEngine()
    assert engine.score_candidates(PAGE)[0].model_name == "cheap-fast"
    engine.update_weights(cost=0.0, latency=0.0, quality=1.0)
    assert engine.weights == ScoringWeights(cost=0, latency=0, quality=1, cache_affinity=0.1)
    assert engine.score_candidates(PAGE)[0].model_name == "premium"


def test_nobody_is_ranked_to_nobody() -> None:
    """An empty fleet gives an empty ranking."""
    assert list(ScoringEngine().score_candidates([])) == []


def test_rank_puts_the_best_first_by_its_unit() -> None:
    """The most of a utility, the least of a cost; equals keep their order."""
    models = [plain("a"), plain("b"), plain("c")]
    assert [m.name for m in rank(models, [0.1, 0.9, 0.9]).models] == ["b", "c", "a"]
    assert [m.name for m in rank(models, [0.1, 0.9, 0.1], unit=Unit.SECONDS).models] == ["a", "c", "b"]


def test_terms_follow_their_candidates() -> None:
    """The parts of a total are reordered with it."""
    ranking = rank([plain("a"), plain("b")], [1.0, 2.0], terms={"quality": [0.25, 0.75]})
    assert [(s.model_name, s.quality_score, s.signals) for s in ranking] == [
        ("b", 0.75, {"quality": 0.75}),
        ("a", 0.25, {"quality": 0.25}),
    ]


def test_equally_good_replicas_of_the_best_model_take_turns() -> None:
    """By seed, all of them come first alike; another model with the same total does not."""
    models = [plain("m", f"http://{i}") for i in range(3)] + [plain("other")]
    firsts = [rank(models, [0.5] * 4, seed=seed).models[0].endpoint for seed in range(1, 7)]
    assert firsts == ["http://1", "http://2", "http://0"] * 2
    assert {rank(models, [0.5] * 4, seed=seed).models[3].name for seed in range(9)} == {"other"}
    assert [m.endpoint for m in rank(models, [0.5] * 4).models][:3] == ["http://0", "http://1", "http://2"]


def test_a_ranking_reads_as_a_list() -> None:
    """Indices, slices, iteration and length are those of a list of scores."""
    ranking = ScoringEngine().score_candidates(PAGE)
    assert len(ranking) == 3
    assert ranking[-1].model_name == list(ranking)[2].model_name
    assert [s.model_name for s in ranking[:2]] == [ranking[0].model_name, ranking[1].model_name]
    assert repr(rank([plain("a")], [0.5])) == "Ranking(a@http://a=0.5)"


def test_a_list_of_scores_becomes_a_ranking() -> None:
    """What a third party's strategy returned is read by id, or by name and endpoint; a stranger is refused."""
    ranking = rank(PAGE, [1.0, 2.0, 3.0])
    again = Ranking.of(PAGE, list(ranking))
    assert (again.models, again.totals) == (ranking.models, ranking.totals)
    assert Ranking.of(PAGE, ranking) is ranking
    with pytest.raises(ValueError, match="'stranger@http://stranger', which is not a candidate"):
        Ranking.of(PAGE, list(rank([plain("stranger")], [1.0])))


@settings(deadline=None)
@given(st.integers(0, 40), st.randoms(use_true_random=False))
def test_the_weighted_sum_is_what_it_says(count: int, chance: random.Random) -> None:
    """Each total is the sum of weight times utility, and the ranking is a sorted permutation."""
    models = [plain("m", f"http://{i}") for i in range(count)]
    columns = {
        "cost": Column(Unit.USD, [chance.choice([None, chance.random()]) for _ in models]),
        "latency": Column(Unit.SECONDS, [chance.random() for _ in models]),
        "cache_affinity": Column(Unit.TOKENS, [chance.choice([0.0, 100.0]) for _ in models]),
        "hardware_load": Column(Unit.UTILITY, [chance.random() for _ in models]),
    }
    weights = ScoringWeights(cost=0.5, latency=0.25, quality=0, cache_affinity=0.125, hardware_load=0.125)
    ranking = ScoringEngine(weights).score_candidates(
        models, ScoringContext(columns=columns, seed=chance.getrandbits(8))
    )
    by_id = dict(zip([m.id for m in models], range(count), strict=True))
    for score in ranking:
        i = by_id[score.id]
        expected = sum(getattr(weights, name) * utilities(column)[i] for name, column in columns.items())
        assert score.total_score == pytest.approx(expected)
    assert sorted(m.id for m in ranking.models) == sorted(by_id)
    assert list(ranking.totals) == sorted(ranking.totals, reverse=True)
