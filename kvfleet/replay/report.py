"""A comparison as one HTML file that needs nothing else: tables, plots in SVG, light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files

from kvfleet.replay.expect import Verdict, shown
from kvfleet.replay.measures import FIGURES, Difference, Figure, Served, in_flight, quantile
from kvfleet.replay.plots import Axis, Curve, curves, shades
from kvfleet.replay.results import Comparison, Standing
from kvfleet.replay.slo import seconds

__all__ = ["html_report"]

_BINS = 60
_COLOURS = 8


def html_report(comparison: Comparison, verdicts: Sequence[Verdict] = ()) -> str:
    """The page."""
    trace = comparison.standings[0].result.trace
    title = f"Replay of {trace.name}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_facts(comparison))}</p>',
        _verdict_table(verdicts),
        "<h2>Figures</h2>",
        _figure_table(comparison.standings),
        _difference_table(comparison.standings),
        "<h2>Plots</h2>",
        _keys(comparison.standings),
        f'<div class="plots">{"".join(_plots(comparison))}</div>',
        *(_replica_table(one) for one in comparison.standings),
        _notes(comparison),
    ]
    css = files("kvfleet.replay").joinpath("assets", "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{css}</style></head>\n<body>\n{chr(10).join(filter(None, body))}\n"
        "</body></html>\n"
    )


def _facts(comparison: Comparison) -> str:
    trace = comparison.standings[0].result.trace
    prompts = sum(one.prompt_tokens for one in trace.requests)
    answers = sum(one.output_tokens for one in trace.requests)
    parts = [
        f"{len(trace.requests):,} requests over {trace.duration_s:,.0f} s",
        f"at {comparison.speed:g} times their speed" if comparison.speed != 1 else "",
        "closed loop" if comparison.standings[0].result.is_closed_loop else "open loop",
        f"{prompts:,} prompt tokens, {trace.shared_share:.1%} of them in an earlier prompt or answer",
        f"{answers:,} answer tokens",
        f"SLO {comparison.slo}",
        f"seed {comparison.seed}",
    ]
    return " · ".join(filter(None, parts))


# Tables


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are HTML already."""
    top = "".join(cell if cell.startswith("<th") else f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{text}</td>' if kind else f"<td>{text}</td>"


def _key(place: int) -> str:
    return f'<span class="key" style="background:var(--c{place % _COLOURS})"></span>'


def _figure_table(standings: Sequence[Standing]) -> str:
    head = ["", *(_key(i) + escape(one.label) for i, one in enumerate(standings))]
    rows = []
    for name, figure in FIGURES.items():
        values = [one.figures.get(name) for one in standings]
        if all(value is None for value in values):
            continue
        best = _best(values, figure)
        cells = [_cell(escape(shown(value, figure)), "best" if value == best else "") for value in values]
        rows.append([f'<td title="{escape(figure.doc)}">{name}</td>', *cells])
    return _table(head, rows)


def _best(values: Sequence[float | None], figure: Figure) -> float | None:
    """The best of several values that differ; None if there is no such thing."""
    known = [value for value in values if value is not None]
    if len(known) < 2 or min(known) == max(known) or figure.name in ("requests", "duration_s", "output_tokens_per_s"):
        return None
    return min(known) if figure.is_better_low else max(known)


def _difference_table(standings: Sequence[Standing]) -> str:
    others = [one for one in standings if one.against_first]
    if not others:
        return ""
    head = ["", *(escape(difference.figure) for difference in others[0].against_first)]
    rows = [
        [_cell(escape(f"{one.label} less {standings[0].label}")), *map(_difference_cell, one.against_first)]
        for one in others
    ]
    note = (
        '<p class="soft">In brackets: the middle 95 % of what resampling stretches of the trace gives, over the '
        "requests that both answered.</p>"
    )
    return f"<h2>Against {escape(standings[0].label)}</h2>{note}{_table(head, rows)}"


def _difference_cell(one: Difference) -> str:
    figure = FIGURES[one.figure]
    text = f"{_signed(one.value, figure)} [{_signed(one.low, figure)}, {_signed(one.high, figure)}]"
    if one.low <= 0 <= one.high:
        return _cell(escape(text))
    return _cell(escape(text), "good" if (one.value < 0) is figure.is_better_low else "bad")


def _signed(value: float, figure: Figure) -> str:
    sign = "-" if value < 0 else "+"
    return sign + (f"{abs(value) * 100:.1f} pp" if figure.unit == "share" else shown(abs(value), figure))


def _verdict_table(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    rows = [
        [
            _cell("holds" if one.holds else "fails", f"text {'good' if one.holds else 'bad'}"),
            _cell(escape(one.expectation.text), "text"),
            _cell(escape(one.label), "text"),
            _cell(escape(shown(one.left, one.expectation.figure))),
            _cell(escape(shown(one.right, one.expectation.figure))),
        ]
        for one in verdicts
    ]
    head = ["", *(f'<th class="text">{word}</th>' for word in ("expected", "pipeline")), "left side", "right side"]
    return f"<h2>Expectations</h2>{_table(head, rows)}"


def _replica_table(standing: Standing) -> str:
    head = (
        "replica", "requests", "prompt tokens", "answer tokens", "cached", "TTFT mean", "TTFT p99",
        "in flight, mean", "at most", "preemptions",
    )  # fmt: skip
    rows = [
        [
            _cell(escape(one.replica)),
            *map(
                _cell,
                (
                    f"{one.requests:,}",
                    f"{one.prompt_tokens:,}",
                    f"{one.output_tokens:,}",
                    f"{one.cached_share:.1%}",
                    "-" if one.ttft_mean is None else seconds(one.ttft_mean),
                    "-" if one.ttft_p99 is None else seconds(one.ttft_p99),
                    f"{one.in_flight_mean:.1f}",
                    f"{one.in_flight_most:,}",
                    f"{one.preemptions:,}",
                ),
            ),
        ]
        for one in standing.replicas
    ]
    return f"<h2>Replicas of {escape(standing.label)}</h2>{_table(head, rows)}"


# Plots


def _keys(standings: Sequence[Standing]) -> str:
    return (
        '<div class="keys">'
        + "".join(f"<span>{_key(i)}{escape(one.label)}</span>" for i, one in enumerate(standings))
        + "</div>"
    )


def _plots(comparison: Comparison) -> Iterable[str]:
    standings = comparison.standings
    end_s = max((one.at_s for standing in standings for one in standing.result.served), default=0.0) or 1.0
    time = Axis("seconds since the first request", 0.0, end_s, label="{:,.0f}".format)
    yield _figure("Time to first token: share of the answers that began within it", _distribution(standings))
    yield _figure(
        "Time to first token over time, median of the requests sent then",
        _over_time(standings, time, _median_ttft, "s"),
    )
    yield _figure("Cached share of the prompts' tokens over time", _over_time(standings, time, _cached_share, "share"))
    rows = [(_load_rows(one, end_s)) for one in standings]
    most = max((value for found in rows for _, values in found for value in values), default=0.0)
    for standing, found in zip(standings, rows, strict=True):
        title = f"Requests at each replica of {standing.label} over time; the strongest shade is {most:.0f}"
        yield _figure(title, shades(found, time, most, title))


def _figure(title: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _distribution(standings: Sequence[Standing]) -> str:
    lines, low, high = [], math.inf, 0.0
    for place, standing in enumerate(standings):
        times = sorted(one.ttft_s for one in standing.result.served if one.is_whole)
        if not times:
            continue
        low, high = min(low, max(times[0], 1e-4)), max(high, times[-1])
        # Many steps at the top end, where the percentiles of interest lie.
        shares = [i / 200 for i in range(200)] + [0.995 + i / 20000 for i in range(101)]
        lines.append(Curve(standing.label, place % _COLOURS, [(quantile(times, share), share) for share in shares]))
    x = Axis("seconds", low if lines else 0.1, max(high, 1e-3) if lines else 1.0, is_log=True, label="{:g}".format)
    return curves(lines, x, Axis("share", 0.0, 1.0, label="{:.0%}".format), "distribution of the time to first token")


def _over_time(
    standings: Sequence[Standing], time: Axis, measure: Callable[[Sequence[Served]], float], unit: str
) -> str:
    lines = []
    for place, standing in enumerate(standings):
        bins: list[list[Served]] = [[] for _ in range(_BINS)]
        for one in standing.result.served:
            if one.is_whole:
                bins[min(int(one.at_s / time.high * _BINS), _BINS - 1)].append(one)
        points = [((i + 0.5) / _BINS * time.high, measure(found)) for i, found in enumerate(bins) if found]
        lines.append(Curve(standing.label, place % _COLOURS, points))
    highest = max((y for line in lines for _, y in line.points), default=1.0)
    y = (
        Axis("share", 0.0, min(highest * 1.1, 1.0) or 1.0, label="{:.0%}".format)
        if unit == "share"
        else Axis("seconds", 0.0, highest * 1.05 or 1.0, label="{:g} s".format)
    )
    return curves(lines, time, y, "over time")


def _median_ttft(found: Sequence[Served]) -> float:
    return quantile(sorted(one.ttft_s for one in found), 0.5)


def _cached_share(found: Sequence[Served]) -> float:
    prompt = sum(one.prompt_tokens for one in found)
    return sum(one.cached_tokens for one in found) / prompt if prompt else 0.0


def _load_rows(standing: Standing, end_s: float) -> list[tuple[str, list[float]]]:
    """Mean requests at each replica in each stretch of time."""
    replicas, wide = standing.result.replicas, end_s / _BINS
    area = [[0.0] * _BINS for _ in replicas]
    for start_s, stop_s, counts in in_flight(standing.result.served, replicas):
        first, last = int(start_s / wide), min(int(stop_s / wide), _BINS - 1)
        for i in range(first, last + 1):
            part_s = min(stop_s, (i + 1) * wide) - max(start_s, i * wide)
            for place, count in enumerate(counts):
                if count:
                    area[place][i] += count * part_s / wide
    return [(replica, values) for replica, values in zip(replicas, area, strict=True)]


def _notes(comparison: Comparison) -> str:
    left_out = sorted({key for one in comparison.standings for key in one.result.left_out})
    notes = ""
    if left_out:
        notes += f"<p class='soft'>Left out, because a trace has no text: {escape(', '.join(left_out))}.</p>"
    for one in comparison.standings:
        if one.errors:
            told = ", ".join(f"{count:,} {code}" for code, count in one.errors.items())
            notes += f"<p class='soft'>Without a whole answer from {escape(one.label)}: {escape(told)}.</p>"
    meanings = "".join(f"<dt>{name}</dt><dd>{escape(figure.doc)}</dd>" for name, figure in FIGURES.items())
    return f"<h2>What the figures mean</h2>{notes}<dl>{meanings}</dl>"
