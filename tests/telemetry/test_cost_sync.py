"""The price list, and what replaces it."""

from __future__ import annotations

import csv
import importlib.resources
import json
import sys
from datetime import date
from pathlib import Path

import pytest

from kvfleet.config.schema import LongContextPrices, ModelConfig
from kvfleet.telemetry import cost_sync
from kvfleet.telemetry.cost_sync import KNOWN_MODEL_COSTS, CostSyncManager, ModelCostInfo
from kvfleet.telemetry.pricelist import SELF_HOSTED, find

PAGE = [
    "gpt-4o",
    "gpt-4o-mini",
    "gpt-4-turbo",
    "gpt-4",
    "gpt-3.5-turbo",
    "o1",
    "o1-mini",
    "o3-mini",
    "claude-3-opus",
    "claude-3.5-sonnet",
    "claude-3.5-haiku",
    "claude-3-haiku",
    "gemini-2.0-flash",
    "gemini-1.5-pro",
    "gemini-1.5-flash",
    "llama-3-8b",
    "llama-3-70b",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "llama-3.1-405b",
    "mistral-7b",
    "mixtral-8x7b",
    "mistral-large",
    "mistral-small",
    "deepseek-v3",
    "deepseek-r1",
    "deepseek-coder",
    "groq/llama-3-8b",
    "groq/llama-3-70b",
    "groq/mixtral-8x7b",
    "together/llama-3-8b",
    "together/llama-3-70b",
]


def test_the_pages_example() -> None:
    """It tells what the page says."""
    lines: list[str] = []
    told = lines.append
    cost_mgr = CostSyncManager()
    cost = cost_mgr.get_cost("gpt-4o")
    assert cost is not None
    told(f"Input: ${cost.input_cost_per_1k}/1K tokens")
    told(f"Output: ${cost.output_cost_per_1k}/1K tokens")
    est = cost_mgr.estimate_request_cost("gpt-4o", input_tokens=1000, output_tokens=500)
    told(f"Estimated cost: ${est:.4f}")
    told(f"Cheapest: {cost_mgr.get_cheapest_model(['gpt-4o', 'gpt-4o-mini', 'gpt-4'])}")
    cost_mgr.set_cost("my-private-model", input_cost=0.001, output_cost=0.002)
    assert lines == [
        "Input: $0.0025/1K tokens",
        "Output: $0.01/1K tokens",
        "Estimated cost: $0.0075",
        "Cheapest: gpt-4o-mini",
    ]
    assert cost_mgr.estimate_request_cost("my-private-model", 1000, 1000) == pytest.approx(0.003)


@pytest.mark.parametrize("name", PAGE)
def test_every_model_of_the_page_has_a_price(name: str) -> None:
    """All 32."""
    cost = CostSyncManager().get_cost(name)
    assert cost is not None
    assert cost.input_cost_per_1k is not None
    assert cost.output_cost_per_1k is not None


def test_every_row_says_where_and_when_it_was_read() -> None:
    """And no price is negative, or below what cached tokens cost."""
    text = (importlib.resources.files("kvfleet.telemetry") / "prices.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert len({row["model"] for row in rows}) == len(rows) == len(KNOWN_MODEL_COSTS)
    for row in rows:
        assert row["basis"]
        assert row["source"].startswith("https://") or row["basis"].startswith(SELF_HOSTED)
        assert date.fromisoformat(row["checked"]) <= date(2026, 11, 23)
        assert float(row["input"]) >= float(row["cached_input"] or 0) >= 0
        assert not row["long_input"] or float(row["long_input"]) > float(row["input"])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gpt-4o-2024-08-06", "gpt-4o"),
        ("gpt-4o-2024-05-13", "gpt-4o-2024-05-13"),
        ("openai/gpt-4o-mini-2024-07-18", "gpt-4o-mini"),
        ("claude-haiku-4-5-20251001", "claude-haiku-4-5"),
        ("claude-3-5-sonnet-20241022", "claude-3.5-sonnet"),
        ("claude-3-5-haiku-latest", "claude-3.5-haiku"),
        ("gpt-4-0613", "gpt-4"),
    ],
)
def test_dated_names_resolve_to_their_own_family(name: str, found: str) -> None:
    """By a rule; a version with a price of its own keeps it."""
    cost = find(name)
    assert cost is not None
    assert cost.model_id == found


@pytest.mark.parametrize(
    "name", ["gpt-4o-audio", "my-gpt-4", "gpt", "gpt-4o-2024", "gpt-4-32k", "azure/gpt-4o", "llama", "", "o1-mini-x"]
)
def test_part_of_a_name_is_nobodys_name(name: str) -> None:
    """Unknown is unknown: no substring matches."""
    assert find(name) is None
    assert CostSyncManager().estimate_request_cost(name) == 0.0


def test_long_prompts_are_estimated_at_their_own_price() -> None:
    """Beyond the border all tokens cost more."""
    costs = CostSyncManager()
    assert costs.estimate_request_cost("gemini-2.5-pro", 200_000, 1000) == pytest.approx(0.26)
    assert costs.estimate_request_cost("gemini-2.5-pro", 200_001, 1000) == pytest.approx(0.5150025)


def test_batches_are_estimated_at_their_own_price() -> None:
    """Unknown where the list has none, and for long prompts, whose batch prices no list has."""
    costs = CostSyncManager()
    assert costs.estimate_request_cost("gpt-4o", 1000, 1000, batch=True) == pytest.approx(0.00125 + 0.005)
    assert costs.estimate_request_cost("gpt-4", 1000, 1000, batch=True) == 0.0
    assert costs.estimate_request_cost("gemini-2.5-pro", 200_001, 1, batch=True) == 0.0
    costs.set_cost("mine", 0.002, 0.004, batch_input_cost=0.001, batch_output_cost=0.002)
    assert costs.estimate_request_cost("mine", 1000, 1000, batch=True) == pytest.approx(0.003)


def test_every_price_of_the_file_is_taken_over() -> None:
    """Cached, written, batch and long-context prices too."""
    beyond = LongContextPrices(from_tokens=9, cost_per_1k_input_tokens=7, cost_per_1k_output_tokens=8)
    model = ModelConfig(
        name="m",
        cost_per_1k_input_tokens=1,
        cost_per_1k_output_tokens=2,
        cost_per_1k_cached_input_tokens=0.1,
        cost_per_1k_cache_write_tokens=1.5,
        cost_per_1k_batch_input_tokens=0.5,
        cost_per_1k_batch_output_tokens=1.1,
        long_context=beyond,
    )
    costs = CostSyncManager()
    costs.sync_from_config([model])
    assert costs.get_cost("m") == ModelCostInfo(
        model_id="m",
        input_cost_per_1k=1,
        output_cost_per_1k=2,
        cached_input_cost_per_1k=0.1,
        cache_write_cost_per_1k=1.5,
        batch_input_cost_per_1k=0.5,
        batch_output_cost_per_1k=1.1,
        long_context_from_tokens=9,
        long_input_cost_per_1k=7,
        long_output_cost_per_1k=8,
        source="config",
    )


def test_the_file_replaces_the_list() -> None:
    """Under the model's name and the engine's; models without prices change nothing."""
    costs = CostSyncManager()
    models = [
        ModelConfig(name="big", model_id="gpt-4o", cost_per_1k_input_tokens=0.1, cost_per_1k_output_tokens=0.2),
        ModelConfig(name="plain"),
    ]
    assert costs.sync_from_config(models) == 1
    for name in ("big", "gpt-4o"):
        cost = costs.get_cost(name)
        assert cost is not None
        assert (cost.input_cost_per_1k, cost.source) == (0.1, "config")
    assert costs.get_cost("plain") is None


def test_models_without_prices_are_never_the_cheapest() -> None:
    """Unknown is not free."""
    costs = CostSyncManager()
    costs.set_cost("half", 0.0, None)
    assert costs.get_cheapest_model(["nobody", "half", "gpt-4"]) == "gpt-4"
    assert costs.get_cheapest_model(["nobody"]) is None


def test_a_negative_price_is_refused() -> None:
    """Nothing pays for being asked."""
    with pytest.raises(ValueError, match="must not be negative"):
        CostSyncManager().set_cost("m", -1, 0)


def test_litellm_absent_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """0, and no error."""
    monkeypatch.setattr(sys, "path", [])
    assert CostSyncManager().sync_from_litellm() == 0


def test_litellms_own_list_is_read_without_importing_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Importing it would ask the network."""
    package = tmp_path / "litellm"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    rows = {
        "sample_spec": {"input_cost_per_token": 0.0},
        "new-model": {
            "input_cost_per_token": 1e-06,
            "output_cost_per_token": 2e-06,
            "cache_read_input_token_cost": 1e-07,
            "input_cost_per_token_batches": 5e-07,
            "output_cost_per_token_batches": 1e-06,
            "input_cost_per_token_above_256k_tokens": 9e-06,
            "input_cost_per_token_above_200k_tokens": 2e-06,
            "output_cost_per_token_above_200k_tokens": 3e-06,
            "input_cost_per_token_above_200k_tokens_batches": 1e-06,
        },
        "pictures": {"input_cost_per_image": 0.04},
    }
    (package / "model_prices_and_context_window_backup.json").write_text(json.dumps(rows))
    monkeypatch.syspath_prepend(str(tmp_path))
    costs = CostSyncManager()
    assert costs.sync_from_litellm() == 1
    cost = costs.get_cost("new-model")
    assert cost is not None
    assert (cost.input_cost_per_1k, cost.output_cost_per_1k, cost.cached_input_cost_per_1k) == (0.001, 0.002, 0.0001)
    assert (cost.batch_input_cost_per_1k, cost.batch_output_cost_per_1k) == (0.0005, 0.001)
    assert (cost.long_context_from_tokens, cost.long_input_cost_per_1k) == (200_000, 0.002)
    assert (cost.long_output_cost_per_1k, cost.long_cached_input_cost_per_1k) == (0.003, None)
    assert costs.get_cost("pictures") is None
    assert "litellm" not in sys.modules


def test_the_list_has_a_summary_and_a_count() -> None:
    """As plain data."""
    costs = CostSyncManager()
    assert costs.model_count == len(costs.summary()) == len(KNOWN_MODEL_COSTS)
    with pytest.raises(AttributeError):
        cost_sync.NOTHING  # noqa: B018 - the access is the test
