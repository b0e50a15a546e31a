"""``kvfleet prices``: what models cost, and where that was read."""

from __future__ import annotations

import attrs
import click

from kvfleet.cli import render
from kvfleet.cli.options import json_option, reports
from kvfleet.money import money
from kvfleet.telemetry.pricelist import ModelCostInfo, find, known_costs

__all__ = ["prices"]


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@json_option
@click.pass_context
@reports
def prices(ctx: click.Context, models: tuple[str, ...], *, as_json: bool) -> None:
    """Show what models cost for a million tokens, by the built-in list; batch prices as prompt / answer.

    Names are found as the router finds them: exact and dated names, never part of one. Without MODEL the whole list is
    shown. Exit status 1 if a model is not on it.
    """
    wanted = {name: find(name) for name in models} if models else dict(known_costs())
    if as_json:
        render.echo_json({name: None if info is None else attrs.asdict(info) for name, info in wanted.items()})
    else:
        headers = ["model", "priced as", "input", "cached", "output", "batch", "long input", "read", "source"]
        rows = [_row(name, info) for name, info in wanted.items()]
        render.echo(render.table(headers, rows, columns=render.width()))
    if None in wanted.values():
        ctx.exit(1)


def _row(name: str, info: ModelCostInfo | None) -> list[str]:
    if info is None:
        return [name, *["-"] * 7, "unknown"]
    figures = (info.input_cost_per_1k, info.cached_input_cost_per_1k, info.output_cost_per_1k)
    shown = [_for_a_million(price) for price in figures]
    batch = [_for_a_million(price) for price in (info.batch_input_cost_per_1k, info.batch_output_cost_per_1k)]
    shown.append("-" if batch == ["-", "-"] else " / ".join(batch))
    beyond = info.long_context_from_tokens
    shown.append(_for_a_million(info.long_input_cost_per_1k) + ("" if beyond is None else f" beyond {beyond}"))
    return [name, info.model_id, *shown, info.last_updated, info.source]


def _for_a_million(per_1k: float | None) -> str:
    return money(None if per_1k is None else per_1k * 1000)
