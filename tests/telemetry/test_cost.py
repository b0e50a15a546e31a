"""What an answer costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.call import Usage
from kvfleet.config.schema import LongContextPrices, ModelConfig
from kvfleet.registry.models import ModelRegistry
from kvfleet.telemetry.cost import Price, cost_usd, with_known_prices


def priced(**prices: float) -> ModelConfig:
    """A model at the provider's."""
    return ModelConfig(name="m", **{f"cost_per_1k_{name}_tokens": price for name, price in prices.items()})


def test_cached_tokens_cost_what_cached_tokens_cost() -> None:
    """The rest of the prompt costs the full price."""
    model = priced(input=2.0, cached_input=0.5, output=4.0)
    assert cost_usd(model, Usage(1000, 100, 1100, 600)) == pytest.approx(0.8 + 0.3 + 0.4)


def test_tokens_written_to_a_cache_cost_what_writing_costs() -> None:
    """As Anthropic bills them; those cached and those written are both part of the prompt."""
    model = priced(input=2.0, cached_input=0.5, cache_write=2.5, output=4.0)
    usage = Usage(1000, 0, 1000, cached_tokens=600, cache_creation_tokens=300)
    assert cost_usd(model, usage) == pytest.approx(0.3 + 0.75 + 0.2)
    listed = with_known_prices(ModelConfig(name="m", model_id="claude-sonnet-4-6"))
    assert listed.cost_per_1k_cache_write_tokens == 0.00375


def test_without_a_price_of_their_own_cached_tokens_cost_the_same() -> None:
    """No discount is made up."""
    assert cost_usd(priced(input=2.0, output=4.0), Usage(1000, 0, 1000, 600)) == pytest.approx(2.0)


def test_an_unknown_price_makes_an_unknown_cost() -> None:
    """Unless nothing of that kind was used."""
    assert cost_usd(priced(), Usage(10, 10)) is None
    assert cost_usd(priced(input=1.0), Usage(10, 10)) is None
    assert cost_usd(priced(input=1.0), Usage(10, 0)) == pytest.approx(0.01)


def test_a_long_prompt_is_billed_whole_at_the_long_price() -> None:
    """Answer and cached tokens too."""
    long = LongContextPrices(
        from_tokens=100,
        cost_per_1k_input_tokens=10.0,
        cost_per_1k_output_tokens=20.0,
        cost_per_1k_cached_input_tokens=1.0,
    )
    model = ModelConfig(name="m", cost_per_1k_input_tokens=1.0, cost_per_1k_output_tokens=2.0, long_context=long)
    assert cost_usd(model, Usage(100, 10)) == pytest.approx(0.12)
    assert cost_usd(model, Usage(101, 10, 111, 1)) == pytest.approx(1.0 + 0.001 + 0.2)


def test_the_list_prices_a_model_that_the_file_does_not() -> None:
    """By the engine's name, cached and long prices included; the source says so."""
    found = with_known_prices(ModelConfig(name="premium", model_id="gpt-5.4-2026-03-05"))
    assert found.cost_per_1k_input_tokens == 0.0025
    assert found.cost_per_1k_output_tokens == 0.015
    assert found.cost_per_1k_cached_input_tokens == 0.00025
    assert found.long_context is not None
    assert found.long_context.from_tokens == 272_000
    assert (found.cost_per_1k_batch_input_tokens, found.cost_per_1k_batch_output_tokens) == (0.00125, 0.0075)
    assert found.price_source == "built-in list, 2026-11-23"


def test_the_files_price_is_never_mixed_with_the_lists() -> None:
    """One price given is a price list of its own."""
    model = ModelConfig(name="premium", model_id="gpt-4o", cost_per_1k_input_tokens=1.0)
    found = with_known_prices(model)
    assert (found.cost_per_1k_input_tokens, found.cost_per_1k_output_tokens) == (1.0, None)
    assert found.cost_per_1k_cached_input_tokens is None
    assert found.price_source == "configured"


def test_open_weights_are_free_only_where_we_run_them() -> None:
    """The list's zero does not make somebody's service free."""
    assert with_known_prices(ModelConfig(name="llama-3-8b")).cost_per_1k_input_tokens is None
    own = with_known_prices(ModelConfig(name="llama-3-8b", provider="vllm"))
    assert (own.cost_per_1k_input_tokens, own.cost_per_1k_output_tokens, own.price_source) == (0.0, 0.0, "self-hosted")


def test_a_self_hosted_engine_never_gets_a_services_price() -> None:
    """Whatever name it serves its model under."""
    own = with_known_prices(ModelConfig(name="gpt-4o", provider="vllm"))
    assert own.cost_per_1k_input_tokens == 0.0


def test_replicas_have_the_prices_that_hold() -> None:
    """So the router scores and bills with them."""
    registry = ModelRegistry.from_configs(
        [ModelConfig(name="premium", endpoint="https://api.example", model_id="gpt-4o")]
    )
    assert registry.replicas[0].cost_per_1k_input_tokens == 0.0025
    assert registry.get("premium").cost_per_1k_input_tokens is None


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_cache_never_makes_an_answer_dearer(prompt: int, answer: int, cached: int) -> None:
    """And never gives money back, even if more was reported as cached than the prompt has."""
    price = Price.of(priced(input=2.0, cached_input=0.5, output=4.0))
    assert price is not None
    assert 0 <= price.cost_usd(prompt, answer, cached) <= price.cost_usd(prompt, answer)
