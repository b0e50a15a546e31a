"""The built-in price list: what it says of a model, and by which name a model is found in it.

The rows stand in ``prices.csv``, in US dollars for a million tokens, each with where it was read and when. A name is
found by an explicit rule, never because it contains another:

1. exactly, or as an alias that the row names;
2. without a full date at its end (``gpt-4o-2024-08-06``, ``claude-haiku-4-5-20251001``, ``…@20251001``) or ``-latest``;
3. without the prefix of the provider whose model it is (``openai/gpt-4o``).

A dated version with a price of its own has a row of its own (``gpt-4o-2024-05-13``), which the first step finds.
"""

from __future__ import annotations

import csv
import functools
import importlib.resources
import re
from collections.abc import Iterator, Mapping

import attrs

__all__ = ["SELF_HOSTED", "ModelCostInfo", "candidates_of", "find", "known_costs"]

SELF_HOSTED = "self-hosted"
"""The source of rows for open weights, which cost nothing by the token where the operator runs them, and only there."""

_DATED = re.compile(r"(.+?)(?:[-@]\d{4}-\d{2}-\d{2}|[-@]20\d{6}|-latest)")
_PREFIXES = ("openai/", "anthropic/", "gemini/", "google/", "mistral/", "mistralai/", "deepseek/", "models/")


@attrs.frozen(kw_only=True)
class ModelCostInfo:
    """What one model costs, in US dollars for 1,000 tokens; None where a price is not known.

    Attributes:
        model_id: The name the prices stand under.
        cached_input_cost_per_1k: Prompt tokens that the provider found in its cache.
        cache_write_cost_per_1k: Prompt tokens that the provider was asked to write to its cache.
        batch_input_cost_per_1k, batch_output_cost_per_1k: Through the provider's batch interface.
        long_context_from_tokens: A prompt longer than this is billed, whole, at the `long_…` prices.
        image_cost_per_image: For one picture, where pictures are not billed as tokens.
        source: Where the prices were read.
        last_updated: When, as YYYY-MM-DD.
    """

    model_id: str
    input_cost_per_1k: float | None = None
    output_cost_per_1k: float | None = None
    cached_input_cost_per_1k: float | None = None
    cache_write_cost_per_1k: float | None = None
    batch_input_cost_per_1k: float | None = None
    batch_output_cost_per_1k: float | None = None
    long_context_from_tokens: int | None = None
    long_input_cost_per_1k: float | None = None
    long_output_cost_per_1k: float | None = None
    long_cached_input_cost_per_1k: float | None = None
    image_cost_per_image: float | None = None
    source: str = ""
    last_updated: str = ""

    @property
    def avg_cost_per_1k(self) -> float | None:
        """The mean of the prices of prompt and answer; None if one is not known."""
        if self.input_cost_per_1k is None or self.output_cost_per_1k is None:
            return None
        return (self.input_cost_per_1k + self.output_cost_per_1k) / 2


@functools.cache
def known_costs() -> Mapping[str, ModelCostInfo]:
    """The list, by model; read once, when first asked for."""
    return {info.model_id: info for info, _ in _rows()}


@functools.cache
def _aliases() -> Mapping[str, str]:
    return {alias: info.model_id for info, aliases in _rows() for alias in aliases}


def _rows() -> Iterator[tuple[ModelCostInfo, tuple[str, ...]]]:
    text = (importlib.resources.files("kvfleet.telemetry") / "prices.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        long_from = row["long_from_tokens"]
        info = ModelCostInfo(
            model_id=row["model"],
            input_cost_per_1k=_per_1k(row["input"]),
            output_cost_per_1k=_per_1k(row["output"]),
            cached_input_cost_per_1k=_per_1k(row["cached_input"]),
            cache_write_cost_per_1k=_per_1k(row["cache_write"]),
            batch_input_cost_per_1k=_per_1k(row["batch_input"]),
            batch_output_cost_per_1k=_per_1k(row["batch_output"]),
            long_context_from_tokens=int(long_from) if long_from else None,
            long_input_cost_per_1k=_per_1k(row["long_input"]),
            long_output_cost_per_1k=_per_1k(row["long_output"]),
            long_cached_input_cost_per_1k=_per_1k(row["long_cached_input"]),
            source=f"{row['basis']} ({row['source']})" if row["source"] else row["basis"],
            last_updated=row["checked"],
        )
        yield info, tuple(row["aliases"].split())


def _per_1k(per_million: str) -> float | None:
    # Six digits beyond the list's own: 2.5 / 1000 must be 0.0025 and nothing near it.
    return round(float(per_million) / 1000, 12) if per_million else None


def candidates_of(name: str) -> Iterator[str]:
    """The names a model may stand under, the most exact first.

    >>> list(candidates_of("openai/gpt-4o-2024-08-06"))
    ['openai/gpt-4o-2024-08-06', 'openai/gpt-4o', 'gpt-4o-2024-08-06', 'gpt-4o']
    """
    bare = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), None)
    for one in (name, bare):
        if one:
            yield one
            dated = _DATED.fullmatch(one)
            if dated:
                yield dated[1]


def find(name: str, costs: Mapping[str, ModelCostInfo] | None = None) -> ModelCostInfo | None:
    """What a model of that name costs; None if it is not known.

    Args:
        name: As the provider calls it.
        costs: Where to look; the built-in list if None.

    >>> find("gpt-4o-2024-08-06") is find("gpt-4o")
    True
    >>> find("my-gpt-4o") is None
    True
    """
    where = known_costs() if costs is None else costs
    for one in candidates_of(name):
        found = where.get(one) or where.get(_aliases().get(one, ""))
        if found is not None:
            return found
    return None
