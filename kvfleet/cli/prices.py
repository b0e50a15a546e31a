"""``kvfleet prices``: what models cost, and where that was read."""

from __future__ import annotations

import attrs
import click

from kvfleet.cli import render
from kvfleet.cli.options import json_option, reports
from kvfleet.telemetry.pricelist import ModelCostInfo, find, known_costs

__all__ = ["prices"]


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@json_option
@click.pass_context
@reports
def prices(ctx: click.Context, models: tuple[str, ...], *, as_json: bool) -> None:
    """Show what models cost, in US dollars for a million tokens, by the built-in list.

    Names are found as the router finds them: exact and dated names, never part of one. Without MODEL the whole list is
    shown. Exit status 1 if a model is not on it.
    """
    wanted = {name: find(name) for name in models} if models else dict(known_costs())
    if as_json:
        render.echo_json({name: None if info is None else attrs.asdict(info) for name, info in wanted.items()})
    else:
        headers = ["model", "priced as", "input", "cached", "output", "long input", "read", "source"]
        rows = [_row(name, info) for name, info in wanted.items()]
        render.echo(render.table(headers, rows, columns=render.width()))
    if None in wanted.values():
        ctx.exit(1)


def _row(name: str, info: ModelCostInfo | None) -> list[str]:
    if info is None:
        return [name, "-", "-", "-", "-", "-", "-", "unknown"]
    figures = (
        info.input_cost_per_1k,
        info.cached_input_cost_per_1k,
        info.output_cost_per_1k,
        info.long_input_cost_per_1k,
    )
    shown = ["-" if price is None else f"{price * 1000:.6g}" for price in figures]
    if info.long_context_from_tokens is not None:
        shown[-1] += f" beyond {info.long_context_from_tokens}"
    return [name, info.model_id, *shown, info.last_updated, info.source]
