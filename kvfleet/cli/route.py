"""``kvfleet simulate`` and ``kvfleet explain``: decisions without a backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import click

from kvfleet.cli import render
from kvfleet.cli.options import Decorator, config_argument, json_option, read_fleet, reports
from kvfleet.cli.trace import PAINT
from kvfleet.config.schema import AUTO_MODEL, DATA_CLASSES
from kvfleet.plugin.manager import discover
from kvfleet.runtime import Router
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.render import render as render_route

__all__ = ["decide", "explain", "simulate"]

_BEST = 5
_EVERY = 1_000_000


def _request_options(prompt: str) -> Decorator:
    """The options that describe a request to decide about."""
    made: list[Decorator] = [
        click.option("-p", "--prompt", default=prompt, show_default=True, help="The user's message."),
        click.option(
            "-d",
            "--data-class",
            type=click.Choice(DATA_CLASSES),
            default=None,
            help="The request's data class; the policy's default if not given.",
        ),
        click.option("-t", "--tenant", default="", help="The tenant that asks."),
        click.option("-m", "--model", default=AUTO_MODEL, show_default=True, help="The model or alias asked for."),
        click.option("-s", "--strategy", default="", help="Strategy for this request; the file's if not given."),
        json_option,
    ]

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(made):
            function = option(function)
        return function

    return add


@click.command()
@config_argument()
@_request_options("Hello, what can you help me with?")
@click.pass_context
@reports
def simulate(ctx: click.Context, /, config: Path, *, as_json: bool, **request: Any) -> None:
    """Say where a request would go, and why not elsewhere.

    The decision is made by the code that makes live ones, with every replica idle and none known to be down. No backend
    is asked. Exit status 1 if nobody may or can serve the request.
    """
    _show(ctx, decide(config, **request), as_json=as_json, words=Explanation.summary)


@click.command()
@config_argument()
@_request_options("Hello")
@click.option("--all", "is_all", is_flag=True, help="Show every candidate of a ranking, not the best ones alone.")
@click.pass_context
@reports
def explain(ctx: click.Context, /, config: Path, *, is_all: bool, as_json: bool, **request: Any) -> None:
    """Show the whole decision about a request: every stage, candidate, drop and score.

    The decision is made as `kvfleet simulate` makes it. `kvfleet trace show` gives the same of a request that a gateway
    has answered. Exit status 1 if nobody may or can serve the request.
    """

    def tree(explanation: Explanation) -> str:
        return render_route(explanation, columns=render.width(), paint=PAINT, most=_EVERY if is_all else _BEST)

    _show(ctx, decide(config, **request), as_json=as_json, words=tree)


def decide(path: Path, *, prompt: str, data_class: str | None, tenant: str, model: str, strategy: str) -> Explanation:
    """Decide about one request.

    Raises:
        ConfigError: with every finding of the file.
        RouteError: if the request names what does not exist.
    """
    table = discover()
    config = read_fleet(path, table)

    async def run() -> Explanation:
        async with Router(config, table=table, polls=False) as router:
            return await router.simulate(
                prompt=prompt, model=model, data_class=data_class or "", tenant_id=tenant, strategy_override=strategy
            )

    return anyio.run(run)


def _show(ctx: click.Context, explanation: Explanation, *, as_json: bool, words: Callable[[Explanation], str]) -> None:
    if as_json:
        render.echo_json(explanation.to_dict())
    else:
        render.echo(words(explanation))
    if explanation.error:
        if not as_json:
            render.echo(f"{render.bad('Error:')} {explanation.error}", err=True)
        ctx.exit(1)
