"""Read a few figures out of a Prometheus page.

An engine's page has 57 to 85 KB and is read every second for every replica. A full parser takes 12 to 19 ms for it
(prometheus-client); looking for the wanted names alone takes 0.15 ms. Format: Prometheus text exposition, 0.0.4.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import attrs

__all__ = ["Rate", "Reader", "Sample", "Samples", "totals", "whole_of"]

_MOST_DIGITS = 12
_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
_MOST = 1e12
"""No engine counts more, nothing less than nothing, and NaN is neither: a decision must not compute with it."""
_NOT_TOTALS = (b"_bucket", b"_created")


@attrs.frozen
class Sample:
    """One line of the page: the labels as they stand there, and the value."""

    raw_labels: str
    value: float

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels by name."""
        return dict(_LABEL.findall(self.raw_labels))


@attrs.frozen
class Samples:
    """The wanted lines of one page, by name."""

    by_name: Mapping[str, tuple[Sample, ...]]

    def total(self, *names: str) -> float | None:
        """The sum over all engines and labels, of the first of these names that is there; None if none is."""
        values = self._values(names)
        return sum(values) if values else None

    def mean(self, *names: str) -> float | None:
        """The same, but the mean."""
        values = self._values(names)
        return sum(values) / len(values) if values else None

    def count(self, *names: str) -> int | None:
        """The same sum, as a whole number."""
        total = self.total(*names)
        return None if total is None else round(total)

    def only(self, label: str, value: str) -> Samples:
        """The lines whose label has that value, and those that have no such label."""
        return Samples(
            {
                name: tuple(sample for sample in samples if sample.labels.get(label, value) == value)
                for name, samples in self.by_name.items()
            }
        )

    def first(self, name: str) -> Sample | None:
        """The first line of that name."""
        found = self.by_name.get(name)
        return found[0] if found else None

    def all(self, name: str) -> tuple[Sample, ...]:
        """Every line of that name."""
        return self.by_name.get(name, ())

    def _values(self, names: Iterable[str]) -> list[float]:
        for name in names:
            found = self.by_name.get(name)
            if found:
                return [sample.value for sample in found if 0 <= sample.value <= _MOST]
        return []


class Reader:
    r"""Finds the lines of some metrics.

    >>> page = b'# TYPE up gauge\nup{engine="0"} 1.0\nup{engine="1"} 2.0\nupper 7\n'
    >>> Reader(["up"]).read(page).total("up")
    3.0

    Args:
        names: The wanted metrics, as they stand on the page (counters with their ``_total``).
        only: Labels that a line must have if it has them at all; for ranks that all report the same thing.
    """

    def __init__(self, names: Iterable[str], *, only: Mapping[str, str] | None = None) -> None:
        # The leading line feed lets the search skip from line to line; an anchor (^) would make it four times slower.
        alternatives = "|".join(re.escape(name) for name in names)
        self._pattern = re.compile(rf"\n({alternatives})(\{{.*\}})? (\S+)".encode())
        self._not = tuple(
            re.compile(rf'\b{re.escape(name)}="(?!{re.escape(value)}")') for name, value in (only or {}).items()
        )

    def read(self, page: bytes) -> Samples:
        """The lines found; values that are no numbers are left out."""
        found: dict[str, list[Sample]] = {}
        for name, labels, value in self._pattern.findall(b"\n" + page):
            sample = _sample(labels, value)
            if sample is not None and not any(unwanted.search(sample.raw_labels) for unwanted in self._not):
                found.setdefault(name.decode(), []).append(sample)
        return Samples({name: tuple(samples) for name, samples in found.items()})


def _sample(labels: bytes, value: bytes) -> Sample | None:
    try:
        return Sample(labels.decode("utf-8", "replace"), float(value))
    except ValueError:
        return None


def totals(page: bytes, prefix: str) -> dict[str, float]:
    """Every metric whose name begins with the prefix, summed over its labels; no buckets and no creation times."""
    pattern = re.compile(rf"\n({re.escape(prefix)}[A-Za-z0-9_:]*)(?:\{{.*\}})? (\S+)".encode())
    found: dict[str, float] = {}
    for name, value in pattern.findall(b"\n" + page):
        sample = None if name.endswith(_NOT_TOTALS) else _sample(b"", value)
        if sample is not None and 0 <= sample.value <= _MOST:
            found[name.decode()] = found.get(name.decode(), 0.0) + sample.value
    return found


def whole_of(text: str | None) -> int | None:
    """A label's whole number; None for what is none, or too large to be one of blocks or tokens.

    >>> whole_of("16"), whole_of("None"), whole_of("9" * 400)
    (16, None, None)
    """
    return int(text) if text is not None and len(text) <= _MOST_DIGITS and text.isdecimal() else None


@attrs.define
class Rate:
    """How fast a counter grows, from one reading to the next.

    >>> rate = Rate()
    >>> rate.update(100.0, at_s=1.0), rate.update(160.0, at_s=3.0)
    (None, 30.0)
    """

    min_s: float = 0.2
    _last: tuple[float, float] | None = attrs.field(init=False, default=None)
    _rate: float | None = attrs.field(init=False, default=None)

    def update(self, total: float | None, at_s: float) -> float | None:
        """Per second since the last reading; None at the first, and after the counter began anew."""
        if total is None:
            return None
        if self._last is None or total < self._last[0]:
            self._last, self._rate = (total, at_s), None
        elif at_s - self._last[1] >= self.min_s:
            self._rate = (total - self._last[0]) / (at_s - self._last[1])
            self._last = (total, at_s)
        return self._rate
