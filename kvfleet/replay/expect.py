"""Expectations of a replay's figures, as CI states them: ``ttft_p99 < 5s``, ``a.ttft_mean < 0.9 * b.ttft_mean``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.config.findings import Finding, did_you_mean
from kvfleet.errors import ConfigError
from kvfleet.money import money
from kvfleet.replay.measures import FIGURES, Figure
from kvfleet.replay.slo import UNITS, seconds

__all__ = ["Expectation", "Verdict", "parse_expectation", "shown"]

_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_NUMBER = r"\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+"
_TOKEN = re.compile(
    rf"\s*(?:(?P<compare><=|>=|<|>)|(?P<times>\*)|(?P<number>{_NUMBER})(?:\s*(?P<unit>%|/s|[a-z]+))?"
    r"|(?P<name>[A-Za-z_][\w:@/+.-]*))",
    re.IGNORECASE,
)


@attrs.frozen
class Side:
    """One side of a comparison: a number, or a figure of a pipeline times a factor.

    Attributes:
        factor: The number, or what the figure is multiplied by.
        figure: The figure's name; empty for a number.
        label: Whose figure; empty for every pipeline's own.
    """

    factor: float
    figure: str = ""
    label: str = ""

    def value(self, figures: Mapping[str, Mapping[str, float]], own: str) -> float | None:
        """Its value for one pipeline; None if the figure is not known."""
        if not self.figure:
            return self.factor
        found = figures[self.label or own].get(self.figure)
        return None if found is None else self.factor * found


@attrs.frozen
class Verdict:
    """Whether an expectation held for one pipeline.

    Attributes:
        label: The pipeline; empty if the expectation names its own.
        left, right: The values compared; None for a figure that is not known, which fails.
    """

    expectation: Expectation
    label: str
    left: float | None
    right: float | None

    @property
    def holds(self) -> bool:
        """True if it is as expected."""
        if self.left is None or self.right is None:
            return False
        return _COMPARISONS[self.expectation.comparison](self.left, self.right)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        plain = {"expected": self.expectation.text, "left": self.left, "right": self.right, "holds": self.holds}
        return {"pipeline": self.label, **plain} if self.label else plain


@attrs.frozen
class Expectation:
    """A comparison that must hold."""

    text: str
    left: Side
    comparison: str
    right: Side

    @property
    def figure(self) -> Figure:
        """What is compared."""
        return FIGURES[self.left.figure or self.right.figure]

    def check(self, figures: Mapping[str, Mapping[str, float]]) -> tuple[Verdict, ...]:
        """The verdicts: one for each pipeline, or a single one if every figure says whose it is."""
        is_open = any(side.figure and not side.label for side in (self.left, self.right))
        labels = tuple(figures) if is_open else ("",)
        return tuple(
            Verdict(self, label, self.left.value(figures, label), self.right.value(figures, label)) for label in labels
        )


def parse_expectation(text: str, labels: Sequence[str]) -> Expectation:
    """Read an expectation.

    >>> parse_expectation("ttft_p99 < 5s", ["a"]).right
    Side(factor=5.0, figure='', label='')
    >>> parse_expectation("a.ttft_mean < 0.9 * b.ttft_mean", ["a", "b"]).right
    Side(factor=0.9, figure='ttft_mean', label='b')

    Args:
        text: What is expected.
        labels: The pipelines that are replayed.

    Raises:
        ConfigError: with the column of what cannot be read, and the names there are.
    """
    return _Parser(text, labels).parse()


@attrs.define
class _Parser:
    text: str
    labels: Sequence[str]
    _at: int = 0

    def parse(self) -> Expectation:
        left, left_at, left_unit = self._side()
        compare = self._next("compare", "a comparison: <, <=, > or >=")
        right, right_at, right_unit = self._side()
        if self.text[self._at :].strip():
            raise self._wrong(self._at_token(), "expected nothing more", "give --expect again for another one")
        if not left.figure and not right.figure:
            raise self._wrong(0, "compares two numbers", f"figures are {', '.join(FIGURES)}")
        left = self._in_unit(left, left_unit, left_at, right)
        right = self._in_unit(right, right_unit, right_at, left)
        self._check_units(left, right, right_at)
        return Expectation(self.text.strip(), left, compare["compare"], right)

    def _side(self) -> tuple[Side, int, str]:
        """A side, where it begins, and the unit of a bare number."""
        at = self._at_token()
        token = self._token()
        if token is not None and token["number"] is not None:
            factor, unit = float(token["number"]), token["unit"] or ""
            after = self._peek()
            if after is None or after["times"] is None:
                return Side(factor), at, unit
            if unit:
                raise self._wrong(token.start("unit"), "a factor has no unit")
            self._token()
            return attrs.evolve(self._figure(), factor=factor), at, ""
        if token is not None and token["name"] is not None:
            return self._named(token), at, ""
        raise self._wrong(at, "expected a figure or a number", f"figures are {', '.join(FIGURES)}")

    def _figure(self) -> Side:
        return self._named(self._next("name", "a figure"))

    def _named(self, token: re.Match[str]) -> Side:
        label, _, name = token["name"].rpartition(".")
        if name not in FIGURES:
            at = token.end("name") - len(name)
            raise self._wrong(at, f"there is no figure {name!r}", did_you_mean(name, tuple(FIGURES)))
        if label and label not in self.labels:
            raise self._wrong(
                token.start("name"), f"no pipeline is called {label!r}", did_you_mean(label, tuple(self.labels))
            )
        return Side(1.0, name, label)

    def _in_unit(self, side: Side, unit: str, at: int, other: Side) -> Side:
        """A number in the unit of the figure it is compared with."""
        if side.figure:
            return side
        kind = FIGURES[other.figure].unit
        known = {"s": UNITS, "share": {"%": 0.01, "": 1.0}, "usd": {"usd": 1.0, "": 1.0}, "1/s": {"/s": 1.0, "": 1.0}}
        scales = known.get(kind, {"": 1.0})
        if unit not in scales:
            what = f"{other.figure} has no unit {unit!r}" if unit else f"{other.figure} is a time and needs a unit"
            raise self._wrong(at, what, f"units are {', '.join(u or 'none' for u in scales)}")
        return attrs.evolve(side, factor=side.factor * scales[unit])

    def _check_units(self, left: Side, right: Side, at: int) -> None:
        if left.figure and right.figure and FIGURES[left.figure].unit != FIGURES[right.figure].unit:
            raise self._wrong(at, f"{right.figure} cannot be compared with {left.figure}", "their units differ")

    # Tokens

    def _next(self, kind: str, what: str) -> re.Match[str]:
        at = self._at_token()
        token = self._token()
        if token is None or token[kind] is None:
            raise self._wrong(at, f"expected {what}")
        return token

    def _token(self) -> re.Match[str] | None:
        token = self._peek()
        if token is not None:
            self._at = token.end()
        return token

    def _peek(self) -> re.Match[str] | None:
        return _TOKEN.match(self.text, self._at)

    def _at_token(self) -> int:
        rest = self.text[self._at :]
        return self._at + len(rest) - len(rest.lstrip())

    def _wrong(self, at: int, message: str, remedy: str = "") -> ConfigError:
        return ConfigError([Finding(message, remedy, file="--expect", line=1, column=at + 1, code="expect")])


def shown(value: float | None, figure: Figure) -> str:
    """A figure's value as people read it; a dash for what is not known."""
    if value is None:
        return "-"
    if figure.unit == "s":
        return seconds(value)
    if figure.unit == "share":
        return f"{value:.1%}"
    if figure.unit == "usd":
        return money(value)
    return f"{value:,.0f}" if figure.is_count or value >= 100 else f"{value:.3g}"
