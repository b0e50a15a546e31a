"""The hookspecs: each is documented, and each is called by somebody."""

from __future__ import annotations

import inspect

import attrs
import pluggy
import pytest

from kvfleet.plugin import manager, spec

HOOKS = [name for name in spec.__all__ if name.startswith("kvfleet_")]


def test_pluggy_takes_every_hook() -> None:
    """What is exported is what plugins may implement."""
    plugins = pluggy.PluginManager(spec.PROJECT)
    plugins.add_hookspecs(spec)
    assert sorted(name for name in vars(plugins.hook) if not name.startswith("_")) == sorted(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented(name: str) -> None:
    """Each says when it is called, and each argument what it is."""
    hook = getattr(spec, name)
    doc = inspect.getdoc(hook) or ""
    assert doc
    assert [argument for argument in inspect.signature(hook).parameters if f"{argument}:" not in doc] == []


def test_every_hook_is_called_by_the_table() -> None:
    """A hook that nobody calls would be a promise that is not kept."""
    called = {f"kvfleet_{field.name}" for field in attrs.fields(manager._Hooks)}
    assert called | {"kvfleet_components"} == set(HOOKS)
