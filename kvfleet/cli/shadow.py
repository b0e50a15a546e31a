"""``kvfleet shadow``: what a gateway that mirrors requests has found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click

from kvfleet.cli import render
from kvfleet.cli.options import json_option, reports
from kvfleet.eval.shadow_store import FILE_NAME, ShadowRow, ShadowStore, ShadowSummary, summarise
from kvfleet.money import money
from kvfleet.trace.rows import default_path
from kvfleet.trace.wording import duration

__all__ = ["measure", "shadow", "share"]

_MOST = 10_000


@click.command()
@click.option("-n", "--list", "listed", type=click.IntRange(0), default=0, help="Show so many single comparisons too.")
@click.option("-m", "--model", default="", help="Only this shadow model.")
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="The file of comparisons; the one in the user's state directory if not given.",
)
@json_option
@reports
def shadow(*, listed: int, model: str, store: Path | None, as_json: bool) -> None:
    """Show how shadow models did beside the models that answered.

    A gateway whose file has a `shadow:` section mirrors requests and keeps the comparisons. Times are medians, the rest
    are means, over the mirrored requests that the shadow model answered.
    """
    place = store or default_path(os.environ).parent / FILE_NAME
    kept = ShadowStore(place)
    try:
        rows = [row for row in kept.last(_MOST) if model in ("", row.shadow)]
    finally:
        kept.close()
    summaries = summarise(rows)
    if as_json:
        shown = {"summaries": [one.to_dict() for one in summaries], "comparisons": [r.to_dict() for r in rows[:listed]]}
        render.echo_json(shown)
        return
    if not rows:
        render.echo("no comparisons yet" + (f" of {model}" if model else ""))
        return
    render.echo(_table(summaries))
    if listed:
        render.echo("\n" + _list(rows[:listed]))


def measure(value: float | None) -> str:
    """Milliseconds, as people read them."""
    return "-" if value is None else duration(value)


def share(value: float | None) -> str:
    """A share."""
    return "-" if value is None else f"{value:.2f}"


def _pair(one: str, other: str) -> str:
    return "-" if one == other == "-" else f"{one} → {other}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _table(summaries: Sequence[ShadowSummary]) -> str:
    heads = ("answered by", "shadow", "requests", "failed", "time", "cost", "tokens", "alike", "judged")
    rows = [
        (
            one.primary,
            render.bold(one.shadow),
            str(one.requests),
            render.bad(str(one.failed)) if one.failed else "0",
            _pair(measure(one.primary_ms), measure(one.shadow_ms)),
            _pair(money(one.primary_usd), money(one.shadow_usd)),
            _pair(_count(one.primary_tokens), _count(one.shadow_tokens)),
            share(one.similarity),
            share(one.judgement),
        )
        for one in summaries
    ]
    return render.table(heads, rows, columns=render.width())


def _list(rows: Sequence[ShadowRow]) -> str:
    heads = ("when", "trace", "answered by", "shadow", "time", "alike", "outcome")
    return render.table(heads, [_line(row) for row in rows], columns=render.width())


def _line(row: ShadowRow) -> tuple[str, ...]:
    when = datetime.fromtimestamp(row.at_s, UTC).astimezone()
    times = _pair(measure(row.primary_ms), measure(row.shadow_ms))
    ended = row.error or "answered"
    return (f"{when:%m-%d %H:%M:%S}", row.trace_id[:8], row.primary, row.shadow, times, share(row.similarity), ended)
