"""The built-in actions of policy rules."""

from __future__ import annotations

from collections.abc import Iterable

from kvfleet.plugin.component import Component, Stability
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.spec import hookimpl
from kvfleet.policy.engine import ACTIONS

__all__: list[str] = []


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """One action component for each built-in action."""
    for name, cls in ACTIONS.items():
        yield Component(Kind.ACTION, name, cls, stability=Stability.STABLE)
