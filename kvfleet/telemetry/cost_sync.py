"""What models cost: the built-in list, and what the fleet's file or an installed LiteLLM says instead."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from kvfleet.config.schema import ModelConfig
from kvfleet.telemetry.pricelist import ModelCostInfo, find, known_costs

__all__ = ["KNOWN_MODEL_COSTS", "CostSyncManager", "ModelCostInfo"]

KNOWN_MODEL_COSTS: Mapping[str, ModelCostInfo]
"""The built-in list, by model; see `kvfleet.telemetry.pricelist`."""

_PRICES = ("cost_per_1k", "cost_per_image")
_ABOVE = re.compile(r"input_cost_per_token_above_(\d+)k_tokens")
_LITELLM_FILES = ("model_prices_and_context_window_backup.json", "model_prices_and_context_window.json")


def __getattr__(name: str) -> Any:
    if name == "KNOWN_MODEL_COSTS":  # read when asked for: an import does no work
        return known_costs()
    raise AttributeError(name)


@attrs.define
class CostSyncManager:
    """Prices by model, to begin with the built-in ones; later ones replace earlier ones.

    Names are found by the rule of `kvfleet.telemetry.pricelist`: exact and dated names, never part of a name.

    >>> costs = CostSyncManager()
    >>> costs.get_cost("gpt-4o-2024-08-06").input_cost_per_1k
    0.0025
    >>> costs.get_cheapest_model(["gpt-4o", "gpt-4o-mini", "gpt-4"])
    'gpt-4o-mini'
    """

    _costs: dict[str, ModelCostInfo] = attrs.field(init=False, repr=False)

    @_costs.default
    def _built_in(self) -> dict[str, ModelCostInfo]:
        return dict(known_costs())

    @property
    def model_count(self) -> int:
        """How many models have a price."""
        return len(self._costs)

    def get_cost(self, model_id: str) -> ModelCostInfo | None:
        """What a model costs; None if that is not known."""
        return find(model_id, self._costs)

    def set_cost(
        self,
        model_id: str,
        input_cost: float | None,
        output_cost: float | None,
        source: str = "manual",
        *,
        cached_input_cost: float | None = None,
        cache_write_cost: float | None = None,
        batch_input_cost: float | None = None,
        batch_output_cost: float | None = None,
        last_updated: str = "",
    ) -> ModelCostInfo:
        """Set a model's prices, in US dollars for 1,000 tokens; None for one that is not known.

        Raises:
            ValueError: for a negative price.
        """
        return self._put(
            ModelCostInfo(
                model_id=model_id,
                input_cost_per_1k=input_cost,
                output_cost_per_1k=output_cost,
                cached_input_cost_per_1k=cached_input_cost,
                cache_write_cost_per_1k=cache_write_cost,
                batch_input_cost_per_1k=batch_input_cost,
                batch_output_cost_per_1k=batch_output_cost,
                source=source,
                last_updated=last_updated,
            )
        )

    def _put(self, info: ModelCostInfo) -> ModelCostInfo:
        prices = [value for name, value in attrs.asdict(info).items() if name.endswith(_PRICES)]
        if any(price is not None and price < 0 for price in prices):
            raise ValueError(f"the prices of {info.model_id!r} must not be negative")
        self._costs[info.model_id] = info
        return info

    def sync_from_config(self, models: Iterable[ModelConfig]) -> int:
        """Take over what a fleet's file says, under each model's and its engine's name; how many models said it."""
        count = 0
        for model in models:
            if model.cost_per_1k_input_tokens is None and model.cost_per_1k_output_tokens is None:
                continue
            count += 1
            for name in dict.fromkeys((model.name, model.get_model_id())):
                self._put(_of_config(name, model))
        return count

    def sync_from_litellm(self) -> int:
        """Take over the price list of an installed LiteLLM; how many prices it had, 0 if it is not installed.

        The list is read from its package, without importing it: importing LiteLLM would ask the network for a newer.
        """
        found = litellm_prices()
        version = f"LiteLLM {_litellm_version()}".strip()
        taken = {name: info for name, row in found.items() if (info := _of_litellm(name, row, version)) is not None}
        self._costs.update(taken)
        return len(taken)

    def estimate_request_cost(
        self, model_id: str, input_tokens: int = 500, output_tokens: int = 500, *, batch: bool = False
    ) -> float:
        """What a request would cost, in US dollars; 0.0 if a price it needs is not known, which `get_cost` tells.

        Args:
            model_id: Who is asked.
            input_tokens: Length of the prompt.
            output_tokens: Length of the answer.
            batch: True for a request through the provider's batch interface, which has prices of its own.
        """
        cost = self.get_cost(model_id)
        if cost is None:
            return 0.0
        price_in, price_out = _prices(cost, input_tokens, is_batch=batch)
        if (price_in is None and input_tokens) or (price_out is None and output_tokens):
            return 0.0
        return (input_tokens * (price_in or 0.0) + output_tokens * (price_out or 0.0)) / 1000

    def get_cheapest_model(self, model_ids: Iterable[str]) -> str | None:
        """The one with the lowest mean of both prices; one without known prices does not count. None if none has."""
        known = [(cost.avg_cost_per_1k, name) for name in model_ids if (cost := self.get_cost(name)) is not None]
        priced = [(price, place) for place, (price, _) in enumerate(known) if price is not None]
        return known[min(priced)[1]][1] if priced else None

    def summary(self) -> list[dict[str, Any]]:
        """Every price as plain data, by model."""
        return [attrs.asdict(self._costs[name]) for name in sorted(self._costs)]


def _prices(cost: ModelCostInfo, input_tokens: int, *, is_batch: bool) -> tuple[float | None, float | None]:
    """The prices of prompt and answer that hold for a request; those of long prompts in batches are not known."""
    is_long = cost.long_context_from_tokens is not None and input_tokens > cost.long_context_from_tokens
    if is_long:
        return (None, None) if is_batch else (cost.long_input_cost_per_1k, cost.long_output_cost_per_1k)
    if is_batch:
        return cost.batch_input_cost_per_1k, cost.batch_output_cost_per_1k
    return cost.input_cost_per_1k, cost.output_cost_per_1k


def _of_config(name: str, model: ModelConfig) -> ModelCostInfo:
    """What a fleet's file says of a model."""
    beyond = model.long_context
    return ModelCostInfo(
        model_id=name,
        input_cost_per_1k=model.cost_per_1k_input_tokens,
        output_cost_per_1k=model.cost_per_1k_output_tokens,
        cached_input_cost_per_1k=model.cost_per_1k_cached_input_tokens,
        cache_write_cost_per_1k=model.cost_per_1k_cache_write_tokens,
        batch_input_cost_per_1k=model.cost_per_1k_batch_input_tokens,
        batch_output_cost_per_1k=model.cost_per_1k_batch_output_tokens,
        long_context_from_tokens=None if beyond is None else beyond.from_tokens,
        long_input_cost_per_1k=None if beyond is None else beyond.cost_per_1k_input_tokens,
        long_output_cost_per_1k=None if beyond is None else beyond.cost_per_1k_output_tokens,
        long_cached_input_cost_per_1k=None if beyond is None else beyond.cost_per_1k_cached_input_tokens,
        source="config",
    )


def litellm_prices() -> Mapping[str, Mapping[str, Any]]:
    """The price list inside an installed LiteLLM; empty if there is none."""
    spec = importlib.util.find_spec("litellm")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        for name in _LITELLM_FILES:
            path = Path(place) / name
            if path.is_file():
                found = json.loads(path.read_text(encoding="utf-8"))
                return found if isinstance(found, dict) else {}
    return {}


def _litellm_version() -> str:
    try:
        return importlib.metadata.version("litellm")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _of_litellm(name: str, row: Mapping[str, Any], source: str) -> ModelCostInfo | None:
    """One row of LiteLLM's list, which counts by the token; None for one without a price for prompts."""
    price_in = _per_1k(row.get("input_cost_per_token"))
    if price_in is None or name == "sample_spec":
        return None
    above = _long_context(row)
    return ModelCostInfo(
        model_id=name,
        input_cost_per_1k=price_in,
        output_cost_per_1k=_per_1k(row.get("output_cost_per_token")),
        cached_input_cost_per_1k=_per_1k(row.get("cache_read_input_token_cost")),
        cache_write_cost_per_1k=_per_1k(row.get("cache_creation_input_token_cost")),
        batch_input_cost_per_1k=_per_1k(row.get("input_cost_per_token_batches")),
        batch_output_cost_per_1k=_per_1k(row.get("output_cost_per_token_batches")),
        long_context_from_tokens=above,
        long_input_cost_per_1k=_per_1k(row.get(f"input_cost_per_token_above_{_thousands(above)}_tokens")),
        long_output_cost_per_1k=_per_1k(row.get(f"output_cost_per_token_above_{_thousands(above)}_tokens")),
        long_cached_input_cost_per_1k=_per_1k(row.get(f"cache_read_input_token_cost_above_{_thousands(above)}_tokens")),
        image_cost_per_image=row["input_cost_per_image"] if _is_price(row.get("input_cost_per_image")) else None,
        source=source,
    )


def _long_context(row: Mapping[str, Any]) -> int | None:
    """The border beyond which a row has other prices, the first if it has several; None if it has none."""
    found = [int(match[1]) for key in row if (match := _ABOVE.fullmatch(key)) and _is_price(row[key])]
    return min(found) * 1000 if found else None


def _thousands(tokens: int | None) -> str:
    return "" if tokens is None else f"{tokens // 1000}k"


def _is_price(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _per_1k(per_token: Any) -> float | None:
    return round(per_token * 1000, 12) if _is_price(per_token) else None
