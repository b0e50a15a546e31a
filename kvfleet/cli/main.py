"""The ``kvfleet`` command: which commands there are, and where each one lives.

A command's module is imported when the command runs: ``kvfleet --help`` imports no HTTP client, no server and no
OpenTelemetry. Commands of plugins are looked for only if a distribution other than kvfleet itself has an entry point.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import sys
from typing import Any

import click

from kvfleet.cli import render
from kvfleet.cli.options import Failure
from kvfleet.errors import KVFleetError

__all__ = ["COMMANDS", "cli", "main"]

COMMANDS: dict[str, tuple[str, str, str]] = {
    "run": ("Run", "kvfleet.cli.serve:run", "Start the gateway; without a file, with three mock engines."),
    "serve": ("Run", "kvfleet.cli.serve:serve", "Start the gateway, as `run` does."),
    "mock-engine": ("Run", "kvfleet.cli.mock_engine:mock_engine", "Serve simulated engines that speak as vLLM does."),
    "init": ("Run", "kvfleet.cli.serve:init", "Write a commented fleet file to begin with."),
    "keys": ("Run", "kvfleet.cli.keys:keys", "Make keys of the gateway, and their digests."),
    "validate": ("Check", "kvfleet.cli.check:validate", "Check fleet files; all findings at once."),
    "test": ("Check", "kvfleet.cli.tests:test", "Run the tests that stand in fleet files."),
    "graph": ("Check", "kvfleet.cli.check:graph", "Draw the pipeline."),
    "simulate": ("Decide", "kvfleet.cli.route:simulate", "Say where a request would go; asks no backend."),
    "explain": ("Decide", "kvfleet.cli.route:explain", "Show the whole decision about a request; asks no backend."),
    "trace": ("Look", "kvfleet.cli.trace:trace", "Look at what a gateway decided."),
    "fleet": ("Look", "kvfleet.cli.fleet:fleet", "Show the models and replicas, live if a gateway runs."),
    "tenants": ("Look", "kvfleet.cli.tenants:tenants", "Show what tenants spent, live if a gateway runs."),
    "prices": ("Look", "kvfleet.cli.prices:prices", "Show what models cost, and where that was read."),
    "health": ("Look", "kvfleet.cli.fleet:health", "Ask every backend whether it is up."),
    "shadow": ("Evaluate", "kvfleet.cli.shadow:shadow", "Show how shadow models did beside those that answered."),
    "compare": ("Evaluate", "kvfleet.cli.compare:compare", "Put prompts to several models, side by side."),
    "replay": (
        "Evaluate",
        "kvfleet.cli.replay:replay",
        "Send a trace through pipelines and simulated engines, in virtual time.",
    ),
    "rerun": ("Evaluate", "kvfleet.cli.rerun:rerun", "Decide recorded requests again, or put them to other models."),
    "components": ("Extend", "kvfleet.cli.plugins:components", "List stages, strategies, adapters and actions."),
    "plugins": ("Extend", "kvfleet.cli.plugins:plugins", "List plugins, broken ones too, or begin a new one."),
    "schema": ("Extend", "kvfleet.cli.check:schema", "Print the JSON Schema of fleet files, for editors."),
}
"""By name: the section of the help, where the command lives, and its help in one line."""

_OWN = "kvfleet"


class LazyGroup(click.Group):
    """A group that imports a command when it is needed, and asks plugins for theirs only then."""

    _asked_plugins = False

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Every command, kvfleet's own first."""
        self._ask_plugins()
        return [*COMMANDS, *sorted(name for name in self.commands if name not in COMMANDS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's
        """The command of that name, imported now."""
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            module, _, attribute = COMMANDS[cmd_name][1].partition(":")
            self.commands[cmd_name] = getattr(importlib.import_module(module), attribute)
        if cmd_name not in self.commands:
            self._ask_plugins()
        return self.commands.get(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments begin with; an unknown one gets the nearest name."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            from kvfleet.config.findings import did_you_mean  # noqa: PLC0415 - only for this error

            ctx.fail(f"no such command {args[0]!r}; {did_you_mean(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The help's list of commands by section, without importing any."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, (section, _, short) in COMMANDS.items():
            sections.setdefault(section, []).append((name, short))
        for name in self.list_commands(ctx):
            if name not in COMMANDS:
                sections.setdefault("From plugins", []).append((name, self.commands[name].get_short_help_str()))
        wide = max(len(name) for rows in sections.values() for name, _ in rows)
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(wide), short) for name, short in rows])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of kvfleet's own is told in words."""
        try:
            return super().invoke(ctx)
        except KVFleetError as error:
            raise Failure(error) from error

    def _ask_plugins(self) -> None:
        if self._asked_plugins:
            return
        self._asked_plugins = True
        points = importlib.metadata.entry_points(group=_OWN)
        others = [point for point in points if point.dist is None or point.dist.name != _OWN]
        if not others:
            return
        from kvfleet.plugin.manager import discover  # noqa: PLC0415 - only if there is a plugin

        table = discover(entry_points=others)
        # The plugins get a group in which kvfleet's own names are taken.
        extra = click.Group(_OWN, commands={name: click.Command(name) for name in COMMANDS})
        problems = list(table.add_commands(extra))
        problems += [
            f"plugin {p.label} is broken: {p.cause} (`kvfleet plugins -v`)" for p in table.plugins if p.is_broken
        ]
        self.commands.update({name: command for name, command in extra.commands.items() if name not in COMMANDS})
        for problem in problems:
            render.echo(f"{render.warn('Warning:')} {problem}", err=True)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name=_OWN, prog_name=_OWN)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Route requests to a fleet of LLM engines by a declarative pipeline, and say why each went where it went.

    \b
    Begin:   kvfleet run                       three mock engines, no GPU needed
    Then:    kvfleet init, kvfleet validate fleet.yaml, kvfleet run fleet.yaml
    """  # noqa: D301 - click's mark for lines that stay as they are
    ctx.color = render.choose_colour()


def main() -> None:
    """The entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a tree's lines shows question marks, not a traceback.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    cli(prog_name=_OWN)
