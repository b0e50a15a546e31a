"""Whether the weaker model suffices, and who is asked then."""

from __future__ import annotations

import random
import time
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.config.schema import ModelConfig
from kvfleet.errors import ComponentError
from kvfleet.plugin.component import Services
from kvfleet.router.quality import QualityThresholdStrategy
from kvfleet.router.scoring import ScoringContext
from kvfleet.router.sufficiency import FIGURES, PLACES, Sufficiency, figures_of, places_of, shipped_sufficiency

MODELS = tuple(
    ModelConfig(name=name, endpoint=f"http://{name}", quality_score=quality)
    for name, quality in (("middle", 0.7), ("small", 0.5), ("large", 0.9))
)
EASY = "What is the capital of France?"
HARD = (
    "Let G be a finite group of order 12. Prove that G has a normal Sylow subgroup, and find the number of elements of "
    "order 3 in it, for each of the 5 groups of that order. Which of these are abelian?"
)
WORDS = [
    "law",
    "court",
    "cell",
    "energy",
    "price",
    "market",
    "sum",
    "of",
    "the",
    "planet",
    "war",
    "is",
    "king",
    "gas",
    "root",
    "tax",
    "theory",
    "x",
    "y",
    "3",
    "7",
    "+",
    "=",
    "(",
    ")",
    "?",
]


def prompts(count: int, seed: int = 0) -> list[str]:
    """Prompts of all kinds."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 120))) for _ in range(count)]


def names(strategy: QualityThresholdStrategy, prompt: str, **context: object) -> list[str]:
    """The ranking for a prompt, as a library's user asks."""
    ranking = strategy.select(MODELS, ScoringContext(metadata={"prompt_text": prompt}, **context))  # type: ignore[arg-type]
    return [model.name for model in ranking.models]


def test_the_weaker_model_gets_what_it_can_do_and_the_stronger_the_rest() -> None:
    """Everybody stays in the ranking: upwards from the weaker, downwards from the stronger."""
    strategy = QualityThresholdStrategy(quality=0.5)
    assert names(strategy, EASY) == ["small", "middle", "large"]
    assert names(strategy, HARD) == ["large", "middle", "small"]


def test_the_ranking_shows_chance_and_threshold() -> None:
    """The trace has them as terms, and the mode says what they came to."""
    strategy = QualityThresholdStrategy(threshold=0.8)
    ranking = strategy.select(MODELS, ScoringContext(metadata={"prompt_text": EASY}))
    chance = shipped_sufficiency().chance(EASY)
    assert ranking.terms == {"chance": (chance,) * 3, "threshold": (0.8,) * 3}
    assert ranking.mode == "the weaker model suffices"
    assert list(ranking.totals) == sorted(ranking.totals, reverse=True)


def test_the_pair_may_be_named() -> None:
    """They come first, whatever their quality; one that was dropped is missed by nobody."""
    strategy = QualityThresholdStrategy(weak="middle", strong="large", threshold=0.0)
    assert names(strategy, EASY) == ["middle", "large", "small"]
    assert names(attrs.evolve(strategy, threshold=1.0), EASY) == ["large", "middle", "small"]
    left = strategy.select(MODELS[1:], ScoringContext(metadata={"prompt_text": EASY}))
    assert [model.name for model in left.models] == ["large", "small"]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_a_share_of_calls_is_held_on_any_traffic(share: float) -> None:
    """These prompts are nothing like the training's: the threshold follows them within a few hundred requests."""
    strategy = QualityThresholdStrategy(strong_share=share)
    for prompt in prompts(3000):
        names(strategy, prompt)
    strong = [names(strategy, prompt)[0] == "large" for prompt in prompts(1500, seed=1)]
    assert sum(strong) / len(strong) == pytest.approx(share, abs=0.05)


def test_a_dry_run_moves_nothing() -> None:
    """Simulating tells the same, and does not count as traffic."""
    strategy = QualityThresholdStrategy(strong_share=0.3)
    before = strategy.state()
    names(strategy, HARD, dry_run=True)
    assert strategy.state() == before
    names(strategy, HARD)
    assert strategy.state() != before


def test_the_histogram_of_traffic_survives_its_own_weights() -> None:
    """Weights grow with each request, and are brought down before they overflow."""
    strategy = QualityThresholdStrategy(strong_share=0.5)
    strategy._traffic.newest = 9.999e8
    for prompt in prompts(200):
        names(strategy, prompt)
    assert 0 < strategy.state()["threshold"] < 1
    assert strategy._traffic.newest < 2


def test_more_quality_is_more_calls() -> None:
    """From none to all; and 0.8 is what is meant if nothing is said."""
    thresholds = [QualityThresholdStrategy(quality=q).state()["threshold"] for q in (0.0, 0.2, 0.5, 0.8, 0.95, 1.0)]
    assert thresholds == sorted(thresholds)
    assert (thresholds[0], thresholds[-1]) == (0.0, 1.0)
    assert QualityThresholdStrategy().state()["threshold"] == thresholds[3]


def test_what_contradicts_itself_is_refused() -> None:
    """Two ways of saying how much, and one model as both."""
    with pytest.raises(ValueError, match="threshold and quality exclude each other"):
        QualityThresholdStrategy(threshold=0.5, quality=0.5)
    with pytest.raises(ValueError, match="cannot be the stronger one too"):
        QualityThresholdStrategy(weak="small", strong="small")


def test_weights_of_ones_own_are_read(tmp_path: Path) -> None:
    """What the training script writes; it decides instead of those that come with kvfleet."""
    own = Sufficiency(
        bias=0.0,
        words=[0.0] * PLACES,
        figures=[0.0] * len(FIGURES),
        shares=[0.4, 0.5, 0.6],
        recovered=[0.0, 0.6, 1.0],
        name="ours",
    )
    path = tmp_path / "weights.json"
    path.write_bytes(own.to_json())
    strategy = QualityThresholdStrategy(weights=str(path), quality=0.6)
    strategy.provision(Services())
    assert strategy.state() == {"threshold": 0.5}
    ranking = strategy.select(MODELS, ScoringContext(metadata={"prompt_text": EASY}))
    assert ranking.terms["chance"] == (0.5, 0.5, 0.5)
    assert ranking.mode == "the weaker model suffices"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": 1, "bias": 0}', b'{"format": 9}'])
def test_other_files_are_no_weights(tmp_path: Path, content: bytes) -> None:
    """The error names the file and what makes one."""
    path = tmp_path / "weights.json"
    path.write_bytes(content)
    with pytest.raises(ComponentError, match=r"weights\.json holds no trained model.*quality_threshold\.py"):
        QualityThresholdStrategy(weights=str(path)).provision(Services())
    with pytest.raises(ComponentError, match="cannot be read"):
        QualityThresholdStrategy(weights=str(tmp_path / "none.json")).provision(Services())


@given(st.text(max_size=400))
def test_any_text_has_a_chance(text: str) -> None:
    """Strictly between 0 and 1; its features keep their ranges."""
    assert 0 < shipped_sufficiency().chance(text) < 1
    assert all(0 <= place < PLACES for place in places_of(text))
    assert all(0 <= figure <= 3 for figure in figures_of(text))


@given(st.floats(0, 1))
def test_shares_and_thresholds_agree(share: float) -> None:
    """A greater share never has a smaller threshold."""
    model = shipped_sufficiency()
    assert model.threshold_for(share) <= model.threshold_for(min(share + 0.01, 1))
    assert 0 <= model.share_for(share) <= 1


@pytest.mark.parametrize("text", ["python " * 10_000, "9" * 64_000, "= " * 32_000, "é" * 64_000])
def test_a_long_text_takes_no_longer(text: str) -> None:
    """Only its beginning and its end are read."""
    begun = time.thread_time()
    shipped_sufficiency().chance(text)
    assert time.thread_time() - begun < 0.25


def test_what_comes_with_kvfleet_is_what_was_measured() -> None:
    """The curve of the training, on subjects it had not seen: 80 % of the quality for 70 % of the calls."""
    model = shipped_sufficiency()
    assert "MMLU" in model.name
    assert model.share_for(0.8) == pytest.approx(0.70, abs=0.02)
    assert model.recovered[0] == 0
    assert model.recovered[-1] == 1
