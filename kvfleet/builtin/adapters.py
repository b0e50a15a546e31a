"""The built-in adapters."""

from __future__ import annotations

from collections.abc import Iterable

from kvfleet.adapters.openai_compat import OpenAICompatAdapter
from kvfleet.plugin.component import Component, Stability
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.spec import hookimpl

__all__ = ["kvfleet_components"]


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """Every adapter that comes with kvfleet; a model's ``provider`` names one."""
    yield Component(Kind.ADAPTER, "openai_compat", OpenAICompatAdapter, stability=Stability.STABLE)
