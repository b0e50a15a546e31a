"""``kvfleet run``, ``serve`` and ``init``: from nothing to a gateway that answers."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kvfleet.cli import render
from kvfleet.cli.check import check_file
from kvfleet.cli.options import CONFIG_VARIABLE, Decorator, config_argument, json_option, read_fleet, reports
from kvfleet.cli.skeleton import template
from kvfleet.config.schema import AUTO_MODEL, FleetConfig
from kvfleet.config.secrets import Problem, SecretReader
from kvfleet.errors import ConfigError
from kvfleet.gateway.auth import Keys
from kvfleet.gateway.reload import FleetFile
from kvfleet.gateway.server import Serving
from kvfleet.gateway.server import serve as serve_fleet
from kvfleet.pipeline.graph import as_text, describe
from kvfleet.plugin.manager import ComponentTable, discover

__all__ = ["checked_fleet", "init", "run", "secret", "serve"]

_LEVELS = ("debug", "info", "warning", "error")


def secret(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """A key, or a reference to one: a key on the command line is seen by everybody on the machine."""
    found = SecretReader().read(value) if value else ""
    if isinstance(found, Problem):
        raise click.BadParameter(f"{found.message}; {found.remedy}", ctx, param)
    return found


def _gateway_options() -> Decorator:
    made: list[Decorator] = [
        click.option("--host", help="Address to listen on; the file's if not given, else 127.0.0.1."),
        click.option("-p", "--port", type=click.IntRange(0, 65535), help="Port; the file's if not given, 0 for any."),
        click.option(
            "-k",
            "--api-key",
            default="",
            callback=secret,
            help="Key that clients must send; env:NAME and file:/path keep it off the list of processes.",
        ),
        click.option("--allow-unauthenticated", is_flag=True, help="Listen beyond this machine without a key."),
        click.option(
            "-w",
            "--workers",
            type=click.IntRange(1, 64),
            default=1,
            show_default=True,
            help="Processes behind the one port; more than one use more cores.",
        ),
        click.option(
            "--watch/--no-watch",
            default=None,
            help="Reload when the file changes, or a secret's file in it; as the file says if not given.",
        ),
        click.option(
            "--drain-timeout",
            type=click.FloatRange(min=0),
            default=30.0,
            show_default=True,
            help="Seconds that requests in flight have to end after SIGTERM.",
        ),
        click.option(
            "--unready",
            type=click.FloatRange(min=0),
            default=0.0,
            show_default=True,
            help="Seconds between saying on /readyz that it stops, and accepting nothing more.",
        ),
        click.option(
            "--log-level",
            type=click.Choice(_LEVELS),
            default="info",
            show_default=True,
            help="What is logged, on standard error.",
        ),
    ]

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(made):
            function = option(function)
        return function

    return add


@click.command()
@config_argument(required=False)
@_gateway_options()
@reports
def run(config: Path | None, **options: Any) -> None:
    """Start the OpenAI-compatible gateway of a fleet file.

    Without FILE it is the file that KVFLEET_CONFIG names or, if that is not set, a quickstart fleet of three mock
    engines inside this process, which need no GPU and no key. SIGTERM and Ctrl-C stop it after the last answer;
    SIGHUP reads the file again, and what is wrong with it changes nothing.
    """
    _start(config, **options)


@click.command()
@config_argument(required=False)
@_gateway_options()
@reports
def serve(config: Path | None, **options: Any) -> None:
    """Start the OpenAI-compatible gateway of a fleet file; the same as `kvfleet run`."""
    _start(config, **options)


def _start(
    path: Path | None,
    *,
    host: str | None,
    port: int | None,
    api_key: str,
    allow_unauthenticated: bool,
    log_level: str,
    watch: bool | None,
    drain_timeout: float,
    unready: float,
    workers: int,
) -> None:
    table = discover()
    config = read_quickstart() if path is None else read_fleet(path, table)
    what = "three mock engines inside this process, no GPU needed" if path is None else str(path)
    needs_key = bool(Keys.of(config.gateway, api_key, tenants=config.tenants))

    def ready(serving: Serving) -> None:
        render.echo(_welcome(serving, config, what, needs_key=needs_key))
        if path is None:
            render.echo(
                render.dim(f"\n`kvfleet init` writes a file of your own; {CONFIG_VARIABLE} or an argument names it")
            )

    serve_fleet(
        config,
        host=host,
        port=port,
        api_key=api_key,
        allow_unauthenticated=allow_unauthenticated,
        log_level=log_level,
        on_ready=ready,
        drain_s=drain_timeout,
        unready_s=unready,
        file=None if path is None else FleetFile(path, lambda: checked_fleet(path, table)),
        watches=watch,
        workers=workers,
    )


def checked_fleet(path: Path, table: ComponentTable) -> FleetConfig:
    """A fleet file without any finding.

    Raises:
        ConfigError: with all there are, as ``kvfleet validate`` has them.
    """
    checked = check_file(path, table)
    if checked.findings or checked.config is None:
        raise ConfigError(checked.findings)
    return checked.config


def read_quickstart() -> FleetConfig:
    """The packaged fleet of mock engines."""
    with importlib.resources.as_file(
        importlib.resources.files("kvfleet.cli") / "templates" / "quickstart.yaml"
    ) as path:
        return read_fleet(path, ComponentTable())


def _welcome(serving: Serving, config: FleetConfig, what: str, *, needs_key: bool) -> str:
    """Where it listens, the pipeline in a few lines, and what to try."""
    graph = as_text(describe(config, serving.router.table), compact=True)
    auth = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    body = f'{{"model": "{AUTO_MODEL}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return "\n".join(
        [
            f"{render.bold('kvfleet')} serves {render.bold(config.fleet_name)}: {what}",
            f"listening on {render.good(serving.url)}, OpenAI base URL {serving.url}/v1",
            "",
            graph,
            "",
            "try",
            f"  curl {serving.url}/v1/chat/completions -H 'Content-Type: application/json'{auth} \\",
            f"    -d '{body}'",
            "  kvfleet trace list          what was decided, and why",
            "  Ctrl-C                      stop",
        ]
    )


@click.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="fleet.yaml", show_default=True, help="File to write."
)
@click.option("-f", "--force", is_flag=True, help="Overwrite the file if it is there.")
@json_option
@reports
def init(output: Path, *, force: bool, as_json: bool) -> None:
    """Write a commented fleet file to begin with; it is valid as it stands."""
    if output.exists() and not force:
        raise FileExistsError(17, "is there already; --force overwrites it", str(output))
    output.write_text(template("fleet.yaml"), encoding="utf-8")
    if as_json:
        render.echo_json({"path": str(output)})
        return
    render.echo(f"wrote {render.bold(str(output))}")
    steps = ["validate", "simulate", "test", "run"]
    render.echo(
        "next, once the endpoints in it are yours:\n" + "\n".join(f"  kvfleet {step} {output}" for step in steps)
    )
