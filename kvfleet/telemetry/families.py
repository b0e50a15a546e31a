"""Counters and histograms as plain numbers, read by Prometheus when it asks.

prometheus_client's own take a lock and two calls for each step, which on the hot path adds up to more than the
counting; these cost a dictionary look-up (`benchmarks/gateway.py`). They are written by one thread, the event loop's.
Label sets are bounded: beyond the bound, everything new counts as ``other``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["MOST_LABELS", "Counters", "Histogram", "Histograms"]

MOST_LABELS = 4096

Labels = tuple[str, ...]


class Counters(Collector):
    """One counter, by its labels."""

    __slots__ = ("_doc", "_labels", "_name", "_values")

    def __init__(self, name: str, doc: str, labels: Labels) -> None:
        self._name, self._doc, self._labels = name, doc, labels
        self._values: dict[Labels, list[float]] = {} if labels else {(): [0.0]}

    def add(self, labels: Labels, by: float) -> None:
        """Raise the counter with these labels."""
        self.cell(labels)[0] += by

    def cell(self, labels: Labels) -> list[float]:
        """The counter with these labels, as a list of one number, for whoever raises it again and again."""
        found = self._values.get(labels)
        if found is None:
            if len(self._values) >= MOST_LABELS:
                labels = ("other",) * len(labels)
            found = self._values.setdefault(labels, [0.0])
        return found

    def describe(self) -> Iterator[Metric]:
        """The name, so that two collectors cannot both have it."""
        yield CounterMetricFamily(self._name, self._doc, labels=self._labels)

    def collect(self) -> Iterator[Metric]:
        """The family with its samples."""
        family = CounterMetricFamily(self._name, self._doc, labels=self._labels)
        for labels, (value,) in tuple(self._values.items()):
            family.add_metric(labels, value)
        yield family


class Histogram:
    """The values with one set of labels: how many fell between two bounds, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Take in a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Histograms(Collector):
    """One histogram, by its labels."""

    __slots__ = ("_bounds", "_doc", "_found", "_labels", "_name")

    def __init__(self, name: str, doc: str, labels: Labels, bounds: Sequence[float]) -> None:
        self._name, self._doc, self._labels, self._bounds = name, doc, labels, tuple(bounds)
        self._found: dict[Labels, Histogram] = {} if labels else {(): Histogram(self._bounds)}

    def add(self, labels: Labels, value: float) -> None:
        """Take in a value."""
        self.cell(labels).add(value)

    def cell(self, labels: Labels) -> Histogram:
        """The histogram with these labels, for whoever adds to it again and again."""
        found = self._found.get(labels)
        if found is None:
            if len(self._found) >= MOST_LABELS:
                labels = ("other",) * len(labels)
            found = self._found.setdefault(labels, Histogram(self._bounds))
        return found

    def describe(self) -> Iterator[Metric]:
        """The name, so that two collectors cannot both have it."""
        yield HistogramMetricFamily(self._name, self._doc, labels=self._labels)

    def collect(self) -> Iterator[Metric]:
        """The family with its samples; buckets add up, as Prometheus wants them."""
        family = HistogramMetricFamily(self._name, self._doc, labels=self._labels)
        bounds = [*map(str, self._bounds), "+Inf"]
        for labels, found in tuple(self._found.items()):
            family.add_metric(labels, list(zip(bounds, accumulate(found.counts), strict=True)), found.sum)
        yield family
