"""The hooks of kvfleet, and the marker with which a plugin implements them.

A plugin is a module (or any object) that an entry point of the group ``kvfleet`` names. It implements the hooks it
needs::

    from kvfleet.plugin.component import Component
    from kvfleet.plugin.contract import Kind
    from kvfleet.plugin.spec import hookimpl

    @hookimpl
    def kvfleet_components():
        yield Component(Kind.SELECT, "least_busy", LeastBusy)

Hooks are called when kvfleet starts, or has finished a route; none runs while a request waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

from kvfleet.config.findings import Finding
from kvfleet.config.schema import FleetConfig
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Outcome

if TYPE_CHECKING:
    import click

__all__ = [
    "ENTRY_POINT_GROUP",
    "PROJECT",
    "hookimpl",
    "hookspec",
    "kvfleet_commands",
    "kvfleet_components",
    "kvfleet_lint",
    "kvfleet_route_finished",
    "kvfleet_secret",
]

PROJECT = "kvfleet"
"""pluggy's name of the project; it marks the hooks."""

ENTRY_POINT_GROUP = "kvfleet"
"""The entry-point group in which distributions name their plugins."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def kvfleet_components() -> Iterable[Component]:  # type: ignore[empty-body]
    """Every stage, strategy, adapter and policy action this plugin brings.

    Called once for each discovery. It must not connect to anything or read files: it only says what there is.
    """


@hookspec
def kvfleet_commands(cli: click.Group) -> None:
    """Add commands to the command line.

    Args:
        cli: The ``kvfleet`` command; use ``cli.add_command`` or ``@cli.command()``. A name that kvfleet itself uses is
            refused.
    """


@hookspec(firstresult=True)
def kvfleet_secret(reference: str) -> str | None:
    """The value behind a secret reference, or None if it is not one of this plugin's.

    Args:
        reference: As the file has it, for instance ``vault:kv/openai#key``. ``env:`` and ``file:`` never come here.
    """


@hookspec
def kvfleet_lint(config: FleetConfig) -> Iterable[Finding]:  # type: ignore[empty-body]
    """Findings of this plugin's own about a fleet file, added to those of ``kvfleet validate``.

    Args:
        config: The file; its vocabulary is right, its pipeline may still have findings of kvfleet's own.
            ``config.origin.finding(path, …)`` places a finding.
    """


@hookspec
def kvfleet_route_finished(outcome: Outcome) -> None:
    """A route has ended, and its answer has left.

    Called on the event loop for every request: it must return at once. A component's ``observe`` may wait, this may
    not.

    Args:
        outcome: How the route ended.
    """
