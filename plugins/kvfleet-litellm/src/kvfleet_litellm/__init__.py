"""Every provider that LiteLLM knows, as a candidate of a kvfleet fleet."""

from __future__ import annotations

from collections.abc import Iterable

from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.spec import hookimpl
from kvfleet_litellm.adapter import LiteLLMAdapter

__all__ = ["LiteLLMAdapter", "kvfleet_components"]


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The adapter; a model's ``provider: litellm`` names it."""
    yield Component(Kind.ADAPTER, "litellm", LiteLLMAdapter)
