"""The command as a whole: its help, its errors, its speed, and plugins' commands."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kvfleet.cli.main import COMMANDS, cli
from tests.cli.running import install, kvfleet, python

HEAVY = ("httpx", "httpcore", "h2", "httptools", "opentelemetry", "prometheus_client", "ruamel", "cattrs")


def test_the_help_imports_nothing_heavy() -> None:
    """No HTTP client, no server, no OpenTelemetry and no YAML reader for a list of commands."""
    code = f"""
import sys
from kvfleet.cli.main import cli
cli(["--help"], standalone_mode=False)
print(sorted(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)
"""
    done = python(code)
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_help_lists_every_command_by_section() -> None:
    """The table is what the help shows."""
    shown = CliRunner().invoke(cli, ["--help"]).output
    assert [name for name in COMMANDS if f"  {name} " not in shown] == []
    assert "  Begin:   kvfleet run  " in shown
    assert [s for s in ("Run:", "Check:", "Decide:", "Look:", "Extend:") if s not in shown] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(name: str) -> None:
    """Each entry of the table is a command that can say what it does."""
    result = CliRunner().invoke(cli, [name, "--help"])
    assert (result.exit_code, result.exception) == (0, None)
    assert result.output.startswith(f"Usage: cli {name}")
    assert "\\b" not in result.output


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"init", "mock-engine", "run", "serve"}))
def test_everything_that_prints_can_print_json(name: str) -> None:
    """`--json` everywhere: on the command, or on each of its subcommands."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None

    def has_json(one: click.Command) -> bool:
        return any("--json" in parameter.opts for parameter in one.params)

    below = list(command.commands.values()) if isinstance(command, click.Group) else []
    assert has_json(command) or (below and all(has_json(one) for one in below)) or name == "schema"


def test_a_misspelt_command_gets_the_nearest() -> None:
    """A usage error, exit status 2."""
    result = CliRunner().invoke(cli, ["valdate"])
    assert result.exit_code == 2
    assert "no such command 'valdate'; did you mean validate?" in result.output


def test_the_version_is_the_distributions() -> None:
    """`kvfleet --version` says what is installed."""
    from importlib.metadata import version

    assert CliRunner().invoke(cli, ["--version"]).output == f"kvfleet, version {version('kvfleet')}\n"


COMMAND = """
import click
from kvfleet.plugin.spec import hookimpl

@hookimpl
def kvfleet_commands(cli):
    @cli.command()
    def hello():
        "Say hello."
        click.echo("hello")

    cli.add_command(click.Command("run", help="mine now"))
"""


def test_a_plugin_adds_a_command(tmp_path: Path) -> None:
    """It is in the help, it runs, and it cannot replace one of kvfleet's own."""
    install(tmp_path, "acme-hello", COMMAND)
    assert kvfleet(tmp_path, "hello").stdout == "hello\n"
    shown = kvfleet(tmp_path, "--help")
    assert re.search(r"From plugins:\n  hello +Say hello\.", shown.stdout)
    assert "mine now" not in shown.stdout
    assert "Warning: plugin acme_hello (acme-hello 1.0) may not replace the command 'run'" in shown.stderr


def test_a_broken_plugin_does_not_break_the_command_line(tmp_path: Path) -> None:
    """The help still comes, and names the plugin and the cause."""
    install(tmp_path, "acme-hello", "import nothing_of_that_name\n")
    shown = kvfleet(tmp_path, "--help")
    assert shown.returncode == 0
    assert "validate" in shown.stdout
    assert (
        "Warning: plugin acme_hello (acme-hello 1.0) is broken: ModuleNotFoundError: No module named " in shown.stderr
    )


def test_a_terminal_that_cannot_show_a_sign_gets_a_question_mark(tmp_path: Path) -> None:
    """An ASCII terminal costs a sign, not a traceback."""
    done = kvfleet(tmp_path, "graph", "/nonexistent/…", PYTHONIOENCODING="ascii")
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
