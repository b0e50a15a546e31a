"""Routing Strategies: static, rules, cost, latency and quality first, and the cheap cascade."""

from __future__ import annotations

from collections import Counter

from kvfleet.clock import FrozenClock
from tests.page.living import live, question
from tests.page.models import MODELS
from tests.page.printed import fleet, run, upto

FLEET = (
    MODELS
    + """
models += [ModelConfig(name=name, endpoint=f"http://{name}:8000") for name in ("llama-3-70b", "deepseek", "med-llama")]
"""
)
"""The scoring section's models, and those that the strategies' examples name."""

STATIC = """
from kvfleet.router.strategies import StaticStrategy

strategy = StaticStrategy(default_model="llama-3-70b")
scores = strategy.select(models)
# Always routes to llama-3-70b
"""

RULES = """
from kvfleet.config.schema import RouteRuleConfig
from kvfleet.router.strategies import RulesStrategy
from kvfleet.router.scoring import ScoringContext

rules = [
    RouteRuleConfig(name="coding", condition={"tags.domain": "coding"}, target_model="deepseek", priority=1),
    RouteRuleConfig(name="medical", condition={"tags.domain": "medical"}, target_model="med-llama", priority=1),
]
strategy = RulesStrategy(rules=rules)
scores = strategy.select(models, ScoringContext(tags={"domain": "coding"}))
"""

FIRST = """
from kvfleet.router.strategies import CostFirstStrategy, LatencyFirstStrategy, QualityFirstStrategy

# Cheapest model wins
scores = CostFirstStrategy().select(models)

# Fastest model wins
scores = LatencyFirstStrategy().select(models)

# Highest quality wins
scores = QualityFirstStrategy().select(models)
"""

CASCADE = """
from kvfleet.router.strategies import CheapCascadeStrategy

# Try cheapest first, escalate on failure
strategy = CheapCascadeStrategy()
scores = strategy.select(models)
# Order: cheap-fast → balanced → premium
"""


def chosen(scores: object) -> str:
    """The model that is marked as selected."""
    (one,) = [score.model_name for score in scores if score.selected]  # type: ignore[attr-defined]
    return str(one)


async def test_static_always_goes_there() -> None:
    """Whatever the other models are like."""
    assert chosen((await run(FLEET + STATIC))["scores"]) == "llama-3-70b"


async def test_rules_choose_by_tag() -> None:
    """A coding request goes to the coding model, a medical one to the medical model."""
    ran = await run(FLEET + RULES)
    assert chosen(ran["scores"]) == "deepseek"
    medical = ran["strategy"].select(ran["models"], ran["ScoringContext"](tags={"domain": "medical"}))
    assert chosen(medical) == "med-llama"


async def test_the_cheapest_the_fastest_the_best() -> None:
    """One dimension decides, and the declared values are what counts without a pipeline."""
    beginnings = ("# Cheapest model wins", "# Fastest model wins", "# Highest quality wins")
    scores = [(await run(MODELS + upto(FIRST, beginning)))["scores"] for beginning in beginnings]
    assert [chosen(one) for one in scores] == ["cheap-fast", "cheap-fast", "premium"]


async def test_the_cascade_climbs_from_the_cheapest() -> None:
    """The ranking is the order in which they are tried."""
    ran = await run(MODELS + CASCADE)
    assert [score.model_name for score in ran["scores"]] == ["cheap-fast", "balanced", "premium"]


LIVE = """
models:
  - {name: llama-3-70b, endpoint: "http://a:8000", provider: vllm}
  - {name: deepseek, endpoint: "http://b:8000", provider: vllm}
  - {name: med-llama, endpoint: "http://c:8000", provider: vllm, weight: 3}
default_model: llama-3-70b
route_rules:
  - {name: coding, condition: {tags.domain: coding}, target_model: deepseek, priority: 1}
  - {name: medical, condition: {tags.domain: medical}, target_model: med-llama, priority: 1}
strategy: STRATEGY
"""


async def test_static_routes_live_requests() -> None:
    """To its one model, as the trace says."""
    async with live(fleet(LIVE.replace("STRATEGY", "static"))) as gateway:
        assert {await gateway.served(f"Question {i}") for i in range(5)} == {"llama-3-70b"}
        assert gateway.last.strategy == "static"


async def test_rules_route_live_requests_by_their_tags() -> None:
    """Tags are OpenAI's `metadata`; the trace names the rule."""
    async with live(fleet(LIVE.replace("STRATEGY", "rules"))) as gateway:
        assert await gateway.served(question(metadata={"domain": "coding"})) == "deepseek"
        assert await gateway.served(question(metadata={"domain": "medical"})) == "med-llama"
        choice = gateway.last.choice
        assert choice is not None
        assert "medical" in choice.mode


async def test_weighted_shares_live_requests() -> None:
    """Three of five to the model of weight three."""
    async with live(fleet(LIVE.replace("STRATEGY", "weighted")), clock=FrozenClock()) as gateway:
        served = Counter([await gateway.served(f"Question {i}") for i in range(200)])
        assert 90 <= served["med-llama"] <= 150
        assert 20 <= served["deepseek"] <= 65
