"""Multi-Objective Scoring."""

from __future__ import annotations

import re

from tests.page.models import MODELS
from tests.page.printed import run

EXAMPLE = """
# Weight cost heavily
engine = ScoringEngine(ScoringWeights(cost=0.6, latency=0.2, quality=0.2))
scores = engine.score_candidates(models)
for s in scores:
    print(f"{s.model_name}: {s.total_score:.3f} (cost={s.cost_score:.2f}, quality={s.quality_score:.2f})")
# → cheap-fast: 0.769 (cost=1.00, quality=0.60)
# → balanced:   0.662 (cost=0.99, quality=0.80)
# → premium:    0.530 (cost=0.95, quality=0.95)
"""


async def test_the_example_comes_out_in_its_order() -> None:
    """The page's own slip: its numbers contradict its columns. The order holds, and the format does."""
    ran = await run(MODELS + EXAMPLE)
    rows = [re.fullmatch(r"([\w-]+): (\d\.\d{3}) \(cost=(\d\.\d\d), quality=(\d\.\d\d)\)", line) for line in ran.lines]
    assert all(rows)
    assert [row[1] for row in rows if row] == ["cheap-fast", "balanced", "premium"]
    totals = [float(row[2]) for row in rows if row]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 3
    assert ran["scores"][0].cost_score == 1.0


async def test_all_six_dimensions_can_be_weighed() -> None:
    """As the section says, "across 6 dimensions": each has a weight, and a column in the score."""
    six = """
engine = ScoringEngine(ScoringWeights(cost=0.1, latency=0.1, quality=0.1, cache_affinity=0.3, hardware_load=0.2, compliance=0.2))
best = engine.score_candidates(models, ScoringContext(data_class="internal", cache_affinity_scores={"premium": 1.0}))[0]
print(best.model_name, best.cost_score, best.latency_score, best.quality_score, best.cache_affinity_score,
      best.hardware_load_score, best.compliance_score)
"""
    name, *scores = (await run(MODELS + six)).printed.split()
    assert name == "premium"
    assert all(0.0 <= float(score) <= 1.0 for score in scores)
    assert len(scores) == 6
