"""``kvfleet trace``: what a gateway decided, read from its spans alone."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from kvfleet.cli import render
from kvfleet.cli.options import json_option, reports
from kvfleet.errors import TraceError
from kvfleet.trace.diff import Change, diff
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.flow import Flow, Paint, printable
from kvfleet.trace.otlp import from_otlp, to_otlp
from kvfleet.trace.reader import LAST, TraceReader
from kvfleet.trace.render import headline
from kvfleet.trace.render import render as render_route
from kvfleet.trace.rows import TraceRow, default_path
from kvfleet.trace.spans import Trace
from kvfleet.trace.whynot import Verdict, why_not
from kvfleet.trace.wording import duration

__all__ = ["PAINT", "follow", "trace"]

PAINT = Paint(good=render.good, bad=render.bad, warn=render.warn, bold=render.bold, dim=render.dim)

_POLL_S = 0.5
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_F = TypeVar("_F", bound=Callable[..., Any])


def _since(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """A span of time back from now, or a date and time, in Unix nanoseconds; 0 for none."""
    if not value:
        return 0
    if match := re.fullmatch(r"(\d+)([smhd])", value):
        return time.time_ns() - int(match[1]) * _UNITS_S[match[2]] * 10**9
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is neither like 30m, 2h or 7d nor like 2026-05-28 or 2026-05-28T20:26", ctx, param
        ) from None
    return int((found if found.tzinfo else found.astimezone()).timestamp()) * 10**9


def _store_option(function: _F) -> _F:
    return click.option(
        "--store",
        type=click.Path(path_type=Path),
        help="The store; by default the one in your state directory, where `kvfleet run` keeps traces.",
    )(function)


@click.group()
def trace() -> None:
    """Look at what a gateway decided, and why.

    Where an identifier is asked for, its beginning will do, of a trace's or of a request's; `last` is the newest route;
    and the name of an OTLP JSON file stands for the route in it (`FILE:ID` if it holds several).
    """


@trace.command(name="list")
@click.option("-n", "--limit", type=click.IntRange(1), default=20, show_default=True, help="Show at most so many.")
@click.option("-m", "--model", default="", help="Only routes that chose this model, or that it answered.")
@click.option("--outcome", default="", help="Only those that ended so: answered, failed, no_candidates, …")
@click.option("-t", "--tenant", default="", help="Only this tenant's.")
@click.option("--status", type=int, help="Only those with this HTTP status.")
@click.option("--since", default="", callback=_since, help="Only those since: 30m, 2h, 7d, or a date and time.")
@_store_option
@json_option
@reports
def list_(
    *,
    limit: int,
    model: str,
    outcome: str,
    tenant: str,
    status: int | None,
    since: int,
    store: Path | None,
    as_json: bool,
) -> None:
    """List routes, the newest first."""
    with TraceReader(_place(store)) as reader:
        rows = reader.list(limit, model=model, outcome=outcome, tenant=tenant, status=status, since_ns=since)
    if as_json:
        render.echo_json([row.to_dict() for row in rows])
    elif rows:
        render.echo(render.table(_HEADS, [_cells(row) for row in rows], columns=render.width()))
    elif model or outcome or tenant or status is not None or since:
        render.echo("no such route; `kvfleet trace list` without options shows all", err=True)
    else:
        render.echo("no route yet; send a request to the gateway, and it is here a moment later", err=True)


@trace.command()
@click.argument("reference", default=LAST, metavar="[ID|FILE]")
@click.option("--all", "is_all", is_flag=True, help="Show every candidate of a ranking, not the best ones alone.")
@_store_option
@json_option
@reports
def show(*, reference: str, is_all: bool, store: Path | None, as_json: bool) -> None:
    """Show a route as a tree; the newest one if none is named.

    With --json it is the explanation, and the spans as OTLP JSON under `resourceSpans`: collectors take the same
    document, and so does `kvfleet trace show FILE`.
    """
    found = _find(reference, store)
    if as_json:
        routes = [Explanation(one).to_dict() | to_otlp([one]) for one in found]
        render.echo_json(routes[0] if len(routes) == 1 else routes)
        return
    most = 10**6 if is_all else 5
    trees = [render_route(Explanation(one), columns=render.width(), paint=PAINT, most=most) for one in found]
    render.echo("\n\n".join(trees))


@trace.command(name="why-not", short_help="Say why a model was not the one that answered.")
@click.argument("reference", metavar="ID|FILE")
@click.argument("model")
@_store_option
@json_option
@reports
def why_not_(*, reference: str, model: str, store: Path | None, as_json: bool) -> None:
    """Say why MODEL was not the one that answered, and what would have to change.

    MODEL is a model's name, or one replica as `kvfleet trace show` calls it.
    """
    explanation = Explanation(_find_one(reference, store))
    verdicts = why_not(explanation, model)
    if as_json:
        shown = [verdict.to_dict() for verdict in verdicts]
        render.echo_json({"trace_id": explanation.trace_id, "model": model, "verdicts": shown})
        return
    flow = Flow(render.width())
    for verdict in verdicts:
        _tell(flow, verdict)
    render.echo(flow.text())


@trace.command(name="diff")
@click.argument("before", metavar="ID|FILE")
@click.argument("after", metavar="ID|FILE")
@_store_option
@json_option
@reports
def diff_(*, before: str, after: str, store: Path | None, as_json: bool) -> None:
    """Show what differs between two routes."""
    one, other = (Explanation(_find_one(reference, store)) for reference in (before, after))
    changes = diff(one, other)
    if as_json:
        shown = [change.to_dict() for change in changes]
        render.echo_json({"before": one.trace_id, "after": other.trace_id, "changes": shown})
        return
    flow = Flow(render.width())
    flow.add("- ", headline(one, PAINT))
    flow.add("+ ", headline(other, PAINT))
    _tell_changes(flow, changes)
    render.echo(flow.text())


@trace.command(short_help="Follow routes as they end.")
@click.option("-n", "--limit", type=click.IntRange(0), default=10, show_default=True, help="Begin with so many.")
@click.option("--no-follow", is_flag=True, help="Do not wait for more.")
@_store_option
@json_option
@reports
def tail(*, limit: int, no_follow: bool, store: Path | None, as_json: bool) -> None:
    """Follow the routes of a running gateway as they end; stop with Ctrl-C. With --json, one document a line."""
    with TraceReader(_place(store)) as reader:
        for row in follow(reader, limit, sleep=None if no_follow else time.sleep):
            render.echo(json.dumps(row.to_dict(), ensure_ascii=False) if as_json else "  ".join(_padded(row)).rstrip())


def follow(reader: TraceReader, limit: int, *, sleep: Callable[[float], None] | None) -> Iterator[TraceRow]:
    """The last routes, the oldest first, and then every further one.

    Args:
        reader: The store.
        limit: Begin with so many.
        sleep: Waits between two looks; None ends after the first.
    """
    newest = reader.list(max(limit, 1))
    last = newest[0].id if newest else 0
    yield from reversed(newest[:limit])
    while sleep is not None:
        for row in reader.since(last):
            yield row
            last = row.id
        sleep(_POLL_S)


def _place(store: Path | None) -> Path:
    return store or default_path(os.environ)


def _find(reference: str, store: Path | None) -> Sequence[Trace]:
    """The routes that a reference names: one of the store's, or those of a file."""
    path, _, within = reference.rpartition(":")
    if Path(reference).is_file():
        return from_otlp(Path(reference).read_bytes())
    if path and Path(path).is_file():
        found = [one for one in from_otlp(Path(path).read_bytes()) if _is_called(one, within)]
        if not found:
            raise TraceError(f"no route in {path} begins with {within!r}; `kvfleet trace show {path}` shows all")
        return found
    if reference.endswith((".json", ".jsonl")) or os.sep in reference:
        raise TraceError(f"{reference}: no such file")
    with TraceReader(_place(store)) as reader:
        return [reader.get(reference)]


def _find_one(reference: str, store: Path | None) -> Trace:
    found = _find(reference, store)
    if len(found) > 1:
        shown = ", ".join(one.route.span_id for one in found[:5])
        raise TraceError(f"{reference} holds {len(found)} routes; name one as FILE:ID, for instance {shown}")
    return found[0]


def _is_called(one: Trace, beginning: str) -> bool:
    known = (one.trace_id, one.route.span_id, Explanation(one).request_id)
    return bool(beginning) and any(name.startswith(beginning) for name in known)


_HEADS = ("when", "trace", "tenant", "model", "took", "first byte", "tokens", "tries", "outcome")


def _cells(row: TraceRow) -> list[str]:
    when = datetime.fromtimestamp(row.start_ns // 10**9, UTC).astimezone()
    is_fine = row.outcome in ("answered", "cached", "simulated")
    told = row.outcome + (f" {row.error}" if row.error not in ("", row.outcome) else "")
    tokens = "" if row.prompt_tokens is None else f"{row.prompt_tokens:,}/{row.completion_tokens or 0:,}"
    return [
        f"{when:%m-%d %H:%M:%S}",
        row.trace_id[:8],
        printable(row.tenant) or "-",
        printable(row.served_by or row.selected) or "-",
        duration(row.duration_ms),
        "-" if row.ttfb_s is None else duration(row.ttfb_s * 1000),
        tokens or "-",
        str(row.attempts),
        render.good(told) if is_fine else render.bad(printable(told)),
    ]


def _padded(row: TraceRow) -> list[str]:
    """The same below each other, where the width of what is to come is not known."""
    return [cell + " " * (wide - len(click.unstyle(cell))) for cell, wide in zip(_cells(row), _WIDTHS, strict=True)]


_WIDTHS = (14, 8, 10, 24, 8, 8, 12, 2, 0)


def _tell(flow: Flow, verdict: Verdict) -> None:
    is_fine = verdict.verdict in ("served", "selected")
    mark = ("✓", PAINT.good) if is_fine else ("✗", PAINT.bad)
    flow.add("", [mark, (verdict.text, str)], then="   ")
    if verdict.remedy:
        flow.add("   ", [(verdict.remedy, PAINT.dim)])


def _tell_changes(flow: Flow, changes: Sequence[Change]) -> None:
    wide = max((len(change.what) for change in changes), default=0)
    part = ""
    for change in changes:
        if change.part != part:
            part = change.part
            flow.add("", [(part, PAINT.bold)])
        before, after = change.before or "nothing", change.after or "nothing"
        pieces = [(before, PAINT.bad), (f"→ {after}", PAINT.good)]
        flow.add(f"  {printable(change.what).ljust(wide)}  ", pieces, then=" " * min(wide + 4, 24))
    if not changes:
        flow.add("", [("nothing differs but the times of the stages", str)])
