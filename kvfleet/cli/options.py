"""What several commands share: the fleet file, ``--json``, and how failures are told."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from kvfleet.cli import render
from kvfleet.errors import ConfigError, KVFleetError, RouteError

if TYPE_CHECKING:
    from kvfleet.config.schema import FleetConfig
    from kvfleet.plugin.manager import ComponentTable

__all__ = [
    "CONFIG_VARIABLE",
    "Failure",
    "config_argument",
    "default_config",
    "json_option",
    "named_files",
    "read_fleet",
    "reports",
]

P = ParamSpec("P")
R = TypeVar("R")
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

CONFIG_VARIABLE = "KVFLEET_CONFIG"
_NO_FILE = f"no fleet file: name one, or set {CONFIG_VARIABLE}; `kvfleet init` writes a first one"


class Failure(click.ClickException):
    """An expected failure: told in words or, under ``--json``, as JSON on standard output; exit status 1."""

    def __init__(self, error: Exception, *, as_json: bool = False) -> None:
        super().__init__(_words(error))
        self.error = error
        self.as_json = as_json

    def show(self, file: IO[Any] | None = None) -> None:  # noqa: ARG002 - click's signature
        """Print it."""
        if self.as_json:
            render.echo_json(_as_json(self.error))
        elif isinstance(self.error, ConfigError):
            render.findings(self.error.findings, err=True)
        else:
            render.echo(f"{render.bad('Error:')} {self.message}", err=True)


def _words(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    if error.filename:
        return f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    remedy = "; take another with --port" if error.errno == errno.EADDRINUSE else ""
    return (error.strerror or str(error)) + remedy


def _as_json(error: Exception) -> dict[str, Any]:
    if isinstance(error, ConfigError):
        return {"findings": [finding.to_dict() for finding in error.findings]}
    if isinstance(error, RouteError):
        shown = {"message": error.message, "code": error.code, "status": error.status}
        return {"error": shown | ({"kvfleet": error.details} if error.details else {})}
    return {"error": {"message": _words(error)}}


def reports(function: Callable[P, R]) -> Callable[P, R]:
    """Tell errors of kvfleet and of files as a `Failure`; anything else is a defect and keeps its traceback."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BrokenPipeError:
            raise  # whoever read the output has seen enough; click ends quietly
        except (KVFleetError, OSError) as error:
            raise Failure(error, as_json=bool(kwargs.get("as_json"))) from error

    return wrapped


def default_config() -> str:
    """The file that `CONFIG_VARIABLE` names; empty if it is not set."""
    return os.environ.get(CONFIG_VARIABLE, "")


def config_argument(*, required: bool = True) -> Decorator:
    """The fleet file, by default the one that `CONFIG_VARIABLE` names.

    Args:
        required: False for a command that can do without; it then gets None.
    """

    def fill(ctx: click.Context, _: click.Parameter, value: str | None) -> Path | None:
        found = value or default_config()
        if not found and required and not ctx.resilient_parsing:
            raise click.UsageError(_NO_FILE, ctx)
        return Path(found) if found else None

    return click.argument("config", required=False, metavar="[FILE]", callback=fill, type=click.Path())


def named_files(ctx: click.Context, files: Sequence[Path]) -> Sequence[Path]:
    """The files named on the command line, or the one that `CONFIG_VARIABLE` names.

    Raises:
        UsageError: if there is none.
    """
    found = list(files) or [Path(path) for path in [default_config()] if path]
    if not found:
        raise click.UsageError(_NO_FILE, ctx)
    return found


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def read_fleet(path: Path | None, table: ComponentTable) -> FleetConfig:
    """Load a fleet file; plugins resolve the references to secrets that are theirs.

    Raises:
        ConfigError: with all findings.
        OSError: if it cannot be read.
    """
    from kvfleet.config.loader import load_config  # noqa: PLC0415 - brings in the YAML reader, which the help does not need

    return load_config(path, resolvers=(table.secret,))
