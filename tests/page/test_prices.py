"""Model Cost Sync."""

from __future__ import annotations

import re

from kvfleet.adapters.call import Usage
from kvfleet.config.schema import FleetConfig, ModelConfig
from kvfleet.testing.fakes import FakeReply
from tests.page.living import live
from tests.page.printed import run

EXAMPLE = """
from kvfleet.telemetry.cost_sync import CostSyncManager

cost_mgr = CostSyncManager()  # Loads 30+ built-in prices

# Look up costs
cost = cost_mgr.get_cost("gpt-4o")
print(f"Input: ${cost.input_cost_per_1k}/1K tokens")
print(f"Output: ${cost.output_cost_per_1k}/1K tokens")

# Estimate request cost
est = cost_mgr.estimate_request_cost("gpt-4o", input_tokens=1000, output_tokens=500)
print(f"Estimated cost: ${est:.4f}")

# Find cheapest model
cheapest = cost_mgr.get_cheapest_model(["gpt-4o", "gpt-4o-mini", "gpt-4"])
print(f"Cheapest: {cheapest}")  # → gpt-4o-mini

# Sync from your fleet config
cost_mgr.sync_from_config(fleet_config.models)

# Sync from litellm (if installed)
cost_mgr.sync_from_litellm()

# Set custom pricing
cost_mgr.set_cost("my-private-model", input_cost=0.001, output_cost=0.002)
"""

PRIVATE = ModelConfig(name="ours", endpoint="http://a", cost_per_1k_input_tokens=0.1, cost_per_1k_output_tokens=0.2)

FAMILIES = "gpt-4o gpt-4o-mini gpt-4 claude-3.5-sonnet claude-3-opus gemini-2.0-flash gemini-1.5-pro llama-3-8b mistral-large deepseek-v3 groq/llama-3-8b together/llama-3-8b"  # fmt: skip
"""One of each family that the page says is included."""


async def test_the_example() -> None:
    """What it prints; and what it synchronised and set is there afterwards."""
    ran = await run(EXAMPLE, fleet_config=FleetConfig(models=(PRIVATE,)))
    assert ran.lines == [
        "Input: $0.0025/1K tokens",
        "Output: $0.01/1K tokens",
        "Estimated cost: $0.0075",
        "Cheapest: gpt-4o-mini",
    ]
    manager = ran["cost_mgr"]
    assert manager.get_cost("my-private-model").output_cost_per_1k == 0.002
    assert manager.get_cost("ours").input_cost_per_1k == 0.1


async def test_more_than_thirty_models_have_a_price() -> None:
    """Each family of the page among them, and each row says where it was read."""
    manager = (await run("from kvfleet.telemetry.cost_sync import CostSyncManager\nmanager = CostSyncManager()"))[
        "manager"
    ]
    assert manager.model_count >= 30
    rows = [manager.get_cost(name) for name in FAMILIES.split()]
    assert all(row is not None and re.search(r"\w", row.source) for row in rows)


async def test_live_answers_cost_what_the_list_says() -> None:
    """A model without a price in the file is billed by the list, cached tokens at their own price."""
    model = ModelConfig(name="cloud", endpoint="https://api.openai.com", model_id="gpt-4o")
    usage = Usage(prompt_tokens=1000, completion_tokens=500, total_tokens=1500, cached_tokens=400)
    async with live(FleetConfig(models=(model,)), scripts={"cloud": FakeReply(usage=usage)}) as gateway:
        await gateway.served()
        assert round(gateway.last.cost_usd or 0.0, 6) == round(600 * 2.5e-6 + 400 * 1.25e-6 + 500 * 1e-5, 6)
        assert gateway.metric("kvfleet_cost_usd_total", model="cloud") == gateway.last.cost_usd
