"""What a request costs, by the prices of the replica that serves it."""

from __future__ import annotations

import attrs

from kvfleet.adapters.call import Usage
from kvfleet.config.schema import LongContextPrices, ModelConfig
from kvfleet.telemetry.pricelist import SELF_HOSTED, find

__all__ = ["Price", "cost_usd", "with_known_prices"]

CONFIGURED = "configured"
"""The source of prices that the fleet's file gives."""


@attrs.frozen
class Price:
    """US dollars for one token, prompts and answers; `cached` is for prompt tokens found in the provider's cache.

    Attributes:
        prompt, cached, answer: For one token.
        written: For a prompt token written to a cache that is paid for; as any other if None.
        long_from: Prompts longer than this are billed at `long`; None for no such border.
        long: The prices beyond it.
        knows_answer: False if only the price of prompts is known, and answers are taken to cost the same.
    """

    prompt: float
    cached: float
    answer: float
    long_from: int | None = None
    long: Price | None = None
    knows_answer: bool = True
    written: float | None = None

    @classmethod
    def of(cls, model: ModelConfig) -> Price | None:
        """The prices of a model; None if that of its prompts is not known.

        A price list with one price means it for all tokens. Cached tokens cost what others do unless a price is given.
        """
        price_in, price_out = model.cost_per_1k_input_tokens, model.cost_per_1k_output_tokens
        if price_in is None:
            return None
        written = model.cost_per_1k_cache_write_tokens
        cached, beyond = model.cost_per_1k_cached_input_tokens, model.long_context
        long = None
        if beyond is not None:
            long_cached = beyond.cost_per_1k_cached_input_tokens
            long = cls(
                beyond.cost_per_1k_input_tokens / 1000,
                (beyond.cost_per_1k_input_tokens if long_cached is None else long_cached) / 1000,
                beyond.cost_per_1k_output_tokens / 1000,
            )
        return cls(
            price_in / 1000,
            (price_in if cached is None else cached) / 1000,
            (price_in if price_out is None else price_out) / 1000,
            beyond.from_tokens if beyond is not None else None,
            long,
            price_out is not None,
            None if written is None else written / 1000,
        )

    def cost_usd(self, prompt: float, answer: float, cached: float = 0.0, written: float = 0.0) -> float:
        """What so many tokens cost; `prompt` includes those `cached` and those `written` to the cache.

        >>> Price(2.0, 0.5, 4.0).cost_usd(10, 1, cached=4)
        18.0
        """
        if self.long_from is not None and self.long is not None and prompt > self.long_from:
            return self.long.cost_usd(prompt, answer, cached, written)
        cached = min(cached, prompt)
        cost = (prompt - cached) * self.prompt + cached * self.cached + answer * self.answer
        if self.written is not None and written:
            cost += min(written, prompt - cached) * (self.written - self.prompt)
        return cost


def cost_usd(model: ModelConfig, usage: Usage) -> float | None:
    """What an answer cost by the model's prices; None if a price it needs is unknown."""
    price = Price.of(model)
    if price is None or (not price.knows_answer and usage.completion_tokens):
        return None
    cached, written = usage.cached_tokens or 0, usage.cache_creation_tokens or 0
    return price.cost_usd(usage.prompt_tokens, usage.completion_tokens, cached, written)


def with_known_prices(model: ModelConfig) -> ModelConfig:
    """The model with the prices that hold: the file's; else nothing for a self-hosted engine; else the built-in list's.

    The list is asked for the name by which the engine knows the model. A price that the file gives is never mixed with
    one of the list. What nobody knows stays unknown.
    """
    if model.cost_per_1k_input_tokens is not None or model.cost_per_1k_output_tokens is not None:
        return (
            attrs.evolve(model, price_source=model.price_source or CONFIGURED) if not _is_free(model) else _free(model)
        )
    if model.is_self_hosted:
        return _free(model)
    found = find(model.get_model_id())
    if found is None or found.source.startswith(SELF_HOSTED):
        return model
    long = None
    if found.long_context_from_tokens and found.long_input_cost_per_1k and found.long_output_cost_per_1k:
        long = LongContextPrices(
            from_tokens=found.long_context_from_tokens,
            cost_per_1k_input_tokens=found.long_input_cost_per_1k,
            cost_per_1k_output_tokens=found.long_output_cost_per_1k,
            cost_per_1k_cached_input_tokens=found.long_cached_input_cost_per_1k,
        )
    return attrs.evolve(
        model,
        cost_per_1k_input_tokens=found.input_cost_per_1k,
        cost_per_1k_output_tokens=found.output_cost_per_1k,
        cost_per_1k_cached_input_tokens=found.cached_input_cost_per_1k,
        cost_per_1k_cache_write_tokens=found.cache_write_cost_per_1k,
        cost_per_1k_batch_input_tokens=found.batch_input_cost_per_1k,
        cost_per_1k_batch_output_tokens=found.batch_output_cost_per_1k,
        long_context=long,
        price_source=f"built-in list, {found.last_updated}",
    )


def _is_free(model: ModelConfig) -> bool:
    return model.is_self_hosted and None in (model.cost_per_1k_input_tokens, model.cost_per_1k_output_tokens)


def _free(model: ModelConfig) -> ModelConfig:
    """A self-hosted engine: what the file does not price costs nothing."""
    return attrs.evolve(
        model,
        cost_per_1k_input_tokens=model.cost_per_1k_input_tokens or 0.0,
        cost_per_1k_output_tokens=model.cost_per_1k_output_tokens or 0.0,
        price_source=model.price_source or SELF_HOSTED,
    )
