"""Data Residency."""

from __future__ import annotations

import pytest

from kvfleet.config.schema import ModelConfig
from tests.page.living import live
from tests.page.printed import fleet, run

EXAMPLE = """
from kvfleet.policy.residency import ResidencyEngine, ResidencyRule

engine = ResidencyEngine(rules=[
    ResidencyRule(
        name="eu-data-stays-in-eu",
        source_regions=["eu-west-1", "eu-central-1"],
        allowed_model_regions=["eu-west-1", "eu-central-1"],
        blocked_providers=["openai_compat", "bedrock"],
    ),
])

assert engine.is_compliant("eu-west-1", "eu-west-1", "vllm")      # ✓
assert not engine.is_compliant("eu-west-1", "us-east-1", "vllm")  # ✗ Wrong region
"""

PIPELINE = """\
models:
  - {name: here, endpoint: "http://eu:8000", provider: vllm, region: eu-west-1}
  - {name: there, endpoint: "http://us:8000", provider: vllm, region: us-east-1, quality_score: 1.0}
  - {name: cloud, endpoint: "https://cloud", provider: openai_compat, region: eu-west-1, quality_score: 1.0}
strategy: quality_first
pipeline:
  - classify.prompt
  - use: filter.residency
    with:
      rules:
        - name: eu-data-stays-in-eu
          source_regions: [eu-west-1, eu-central-1]
          allowed_model_regions: [eu-west-1, eu-central-1]
          blocked_providers: [openai_compat, bedrock]
  - select
  - execute
"""


async def test_the_example() -> None:
    """Its own assertions hold, and a blocked provider is not compliant wherever it is."""
    engine = (await run(EXAMPLE))["engine"]
    assert not engine.is_compliant("eu-west-1", "eu-west-1", "openai_compat")
    assert engine.is_compliant("us-east-1", "us-east-1", "openai_compat")


async def test_a_live_request_stays_in_its_region() -> None:
    """By the region header; the trace names the rule, and requests from elsewhere are free."""
    async with live(fleet(PIPELINE)) as gateway:
        assert await gateway.served(X_KVFleet_Region="eu-central-1") == "here"
        assert {(drop.model, drop.rule) for drop in gateway.last.drops} == {
            ("there", "eu-data-stays-in-eu"),
            ("cloud", "eu-data-stays-in-eu"),
        }
        assert await gateway.served(X_KVFleet_Region="us-east-1") in {"there", "cloud"}


@pytest.mark.parametrize("region", ["", "us-east-1"])
def test_a_model_has_a_region(region: str) -> None:
    """Which a fleet file says."""
    assert ModelConfig(name="m", endpoint="http://m", region=region).region == region
