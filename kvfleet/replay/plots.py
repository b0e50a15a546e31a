"""Plots as inline SVG: curves over a linear or a logarithmic axis, and what many rows did over time as shades."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from html import escape

import attrs

__all__ = ["Axis", "Curve", "curves", "shades"]

_WIDE, _HIGH = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 10, 34
_MOST_POINTS = 400


@attrs.frozen
class Curve:
    """A line: its name, its colour's number, and its points in order."""

    name: str
    colour: int
    points: Sequence[tuple[float, float]]


@attrs.frozen
class Axis:
    """An axis.

    Attributes:
        title: What it shows, with its unit.
        low, high: Its ends; on a logarithmic axis both are above 0.
        is_log: True for a logarithmic one.
        label: How a value is written.
    """

    title: str
    low: float
    high: float
    is_log: bool = False
    label: Callable[[float], str] = "{:g}".format

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        if self.is_log:
            low, high = math.log10(self.low), math.log10(self.high)
            value = math.log10(max(value, self.low))
        else:
            low, high = self.low, self.high
        return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.0

    def ticks(self) -> list[float]:
        """Round values to mark."""
        return _log_ticks(self.low, self.high) if self.is_log else _ticks(self.low, self.high)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About so many round values between two.

    >>> _ticks(0.0, 3537.0)
    [0.0, 1000.0, 2000.0, 3000.0]
    """
    if high <= low:
        return [low]
    rough = (high - low) / about
    scale = 10 ** math.floor(math.log10(rough))
    step = next(scale * nice for nice in (1, 2, 5, 10) if scale * nice >= rough)
    first, last = math.ceil(low / step), math.floor(high / step + 1e-9)
    return [round(float(place * step), 12) for place in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and what lies between them where they are few.

    >>> _log_ticks(0.05, 20.0)
    [0.1, 1.0, 10.0]
    """
    powers = [
        10.0**power for power in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    ]
    if len(powers) >= 3:
        return powers
    start = math.floor(math.log10(low))
    found = [nice * 10.0**power for power in range(start, start + 4) for nice in (1, 2, 5)]
    return [round(value, 12) for value in found if low <= value <= high]


def curves(lines: Sequence[Curve], x: Axis, y: Axis, title: str) -> str:
    """A plot of lines."""
    wide, high = _WIDE - _LEFT - _RIGHT, _HIGH - _TOP - _BOTTOM

    def at(point: tuple[float, float]) -> str:
        return f"{_LEFT + x.share(point[0]) * wide:.1f},{_TOP + (1 - y.share(point[1])) * high:.1f}"

    drawn = [
        f'<polyline class="curve" style="stroke:var(--c{line.colour})" '
        f'points="{" ".join(map(at, _thinned(line.points)))}">'
        f"<title>{escape(line.name)}</title></polyline>"
        for line in lines
        if line.points
    ]
    return _svg([*_frame(x, y), *drawn], title, _HIGH)


def shades(rows: Sequence[tuple[str, Sequence[float]]], x: Axis, most: float, title: str) -> str:
    """Rows of cells over time, the darker the greater; `most` is the darkest."""
    step = max(min(18.0, 320 / max(len(rows), 1)), 3.0)
    left = _LEFT + 40
    wide, high = _WIDE - left - _RIGHT, step * len(rows)
    parts = []
    labels = _short_names([name for name, _ in rows])
    for place, (name, values) in enumerate(rows):
        top = _TOP + place * step
        if step >= 10:
            parts.append(
                f'<text x="{left - 6}" y="{top + step / 2 + 4:.1f}" text-anchor="end">{escape(labels[place])}</text>'
            )
        cell = wide / max(len(values), 1)
        parts += [
            f'<rect class="cell" x="{left + i * cell:.1f}" y="{top:.1f}" width="{cell:.2f}" height="{step - 1:.1f}" '
            f'opacity="{(value / most) ** 0.6:.2f}"><title>{escape(name)}: {value:.1f}</title></rect>'
            for i, value in enumerate(values)
            if most and value > 0.005 * most
        ]
    base = _TOP + high
    for tick in x.ticks():
        px = left + x.share(tick) * wide
        parts.append(f'<line class="grid" x1="{px:.1f}" x2="{px:.1f}" y1="{base:.1f}" y2="{base + 4:.1f}"/>')
        parts.append(f'<text x="{px:.1f}" y="{base + 16:.1f}" text-anchor="middle">{escape(x.label(tick))}</text>')
    parts.append(_x_title(x.title, base + 30))
    return _svg(parts, title, base + 36)


def _frame(x: Axis, y: Axis) -> list[str]:
    wide, high = _WIDE - _LEFT - _RIGHT, _HIGH - _TOP - _BOTTOM
    parts = []
    for tick in x.ticks():
        px = _LEFT + x.share(tick) * wide
        parts.append(f'<line class="grid" x1="{px:.1f}" x2="{px:.1f}" y1="{_TOP}" y2="{_TOP + high}"/>')
        parts.append(f'<text x="{px:.1f}" y="{_TOP + high + 15}" text-anchor="middle">{escape(x.label(tick))}</text>')
    for tick in y.ticks():
        py = _TOP + (1 - y.share(tick)) * high
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + wide}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{escape(y.label(tick))}</text>')
    parts.append(_x_title(x.title, _HIGH - 4))
    return parts


def _x_title(text: str, y: float) -> str:
    return f'<text x="{_WIDE - _RIGHT}" y="{y:.1f}" text-anchor="end">{escape(text)}</text>'


def _svg(parts: Sequence[str], title: str, high: float) -> str:
    return f'<svg viewBox="0 0 {_WIDE} {high:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _short_names(names: Sequence[str], most: int = 15) -> list[str]:
    """Names without what all of them begin and end with, up to a separator, and cut if they are still long.

    >>> _short_names(["m@http://gpu-1.internal:8000", "m@http://gpu-12.internal:8000"])
    ['gpu-1', 'gpu-12']
    """
    first = _shared(names)
    last = _shared([name[first:][::-1] for name in names])
    kept = [name[first : len(name) - last] for name in names]
    return [name if len(name) <= most else "…" + name[-most + 1 :] for name in kept]


def _shared(names: Sequence[str]) -> int:
    """How many characters all names have in common at their beginning, up to the last separator among them."""
    if len(set(names)) < 2:
        return 0
    common = itertools.takewhile(lambda signs: len(set(signs)) == 1, zip(*names, strict=False))
    return max((place + 1 for place, signs in enumerate(common) if signs[0] in "@/.:"), default=0)


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most so many points, the last among them."""
    if len(points) <= _MOST_POINTS:
        return points
    step = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(place * step)] for place in range(_MOST_POINTS)]
