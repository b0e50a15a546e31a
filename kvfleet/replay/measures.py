"""What a replay comes to: times, cached tokens, balance, cost and goodput of one pipeline, and how two differ."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import attrs

from kvfleet.replay.slo import SLO

__all__ = ["FIGURES", "Difference", "Figure", "ReplicaFigures", "Served", "differences", "figures", "quantile"]

_BLOCKS = 50
_DRAWS = 1000


@attrs.define(kw_only=True)
class Served:
    """How one request of the trace fared.

    Attributes:
        number: Its place in the trace.
        at_s: When it was sent, in seconds from the trace's beginning.
        least_ttft_s: The least time to its first token that any router could give it.
        replica: Who answered; empty if nobody did.
        prompt_tokens, output_tokens, cached_tokens: As the engine counted them.
        first_s, end_s: When its answer began and ended, on the same clock; None if it never began.
        attempts: Backend calls made for it.
        error: The code of what went wrong; empty for a whole answer.
        cost_usd: What it cost; None if a price is unknown.
    """

    number: int
    at_s: float
    least_ttft_s: float = 0.0
    replica: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    first_s: float | None = None
    end_s: float = 0.0
    attempts: int = 0
    error: str = ""
    cost_usd: float | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds until its answer began; only of a request that was answered."""
        return math.inf if self.first_s is None else self.first_s - self.at_s

    @property
    def e2e_s(self) -> float:
        """Seconds until its answer ended."""
        return self.end_s - self.at_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds for each token of the answer after its first; None for an answer of one token."""
        if self.first_s is None or self.output_tokens < 2:
            return None
        return (self.end_s - self.first_s) / (self.output_tokens - 1)

    @property
    def is_whole(self) -> bool:
        """True if it got a whole answer."""
        return not self.error


@attrs.frozen
class Figure:
    """One figure of a replay.

    Attributes:
        name: As ``--expect`` calls it.
        unit: ``s``, ``share``, ``usd``, ``1/s``, ``count``, or empty for a bare number.
        doc: What it is.
        is_better_low: True if less is better.
    """

    name: str
    unit: str
    doc: str
    is_better_low: bool = True

    @property
    def is_count(self) -> bool:
        """True for a whole number."""
        return self.unit == "count"


_TIMES = {
    "ttft": "Time to the first token, from when the request was sent: waiting for admission and retries included",
    "tpot": "Time for each token of an answer after its first",
    "e2e": "Time to the end of the answer",
}
_STATISTICS = {
    "mean": "mean",
    "p50": "median",
    "p90": "90th percentile",
    "p99": "99th percentile",
    "max": "longest",
}
FIGURES: Mapping[str, Figure] = {
    one.name: one
    for one in (
        *(
            Figure(f"{time}_{name}", "s", f"{doc}; {word}.")
            for time, doc in _TIMES.items()
            for name, word in _STATISTICS.items()
        ),
        *(
            Figure(
                f"least_ttft_{name}",
                "s",
                "What no router could be below: the time to the first token of the fleet's fastest engine, idle, that "
                f"holds all that was asked before; {word}.",
            )
            for name, word in _STATISTICS.items()
        ),
        Figure("cached_share", "share", "Share of the prompts' tokens that the engines had cached.", False),
        Figure(
            "imbalance",
            "",
            "Requests at the busiest replica over the mean of all replicas, averaged over time: 1 is even, the number "
            "of replicas is all on one.",
        ),
        Figure(
            "goodput", "share", "Share of all requests that met the SLO; without one, that got a whole answer.", False
        ),
        Figure("goodput_rps", "1/s", "Requests a second that met it.", False),
        Figure("cost_usd", "usd", "What all answers cost, by the prices of the models; unknown if one is."),
        Figure("requests", "count", "Requests sent.", False),
        Figure("failed", "count", "Requests without a whole answer."),
        Figure("failed_share", "share", "Share of the requests without a whole answer."),
        Figure("retries", "count", "Backend calls beyond one for each request."),
        Figure("preemptions", "count", "Times an engine put a running request back, for want of KV memory."),
        Figure(
            "output_tokens_per_s", "1/s", "Answer tokens a second, from the first request to the last answer.", False
        ),
        Figure("duration_s", "s", "From the first request to the end of the last answer."),
    )
}
"""Every figure by name; what ``--expect`` may speak of."""


@attrs.frozen(kw_only=True)
class ReplicaFigures:
    """One replica's part of a replay.

    Attributes:
        in_flight_mean, in_flight_most: Requests there at once, averaged over time and at most.
        cached_share: Share of its prompts' tokens it had cached.
        ttft_mean, ttft_p99: In seconds; None if it answered nothing.
    """

    replica: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    cached_share: float
    ttft_mean: float | None
    ttft_p99: float | None
    in_flight_mean: float
    in_flight_most: int
    preemptions: int = 0


def quantile(values: Sequence[float], share: float) -> float:
    """A quantile of values in order, interpolated as numpy does by default.

    >>> quantile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.5
    """
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def figures(served: Sequence[Served], replicas: Sequence[str], slo: SLO, preemptions: int = 0) -> dict[str, float]:
    """The figures of a replay, by their names in `FIGURES`; what cannot be known is absent.

    Args:
        served: How every request fared.
        replicas: Every replica there was, those that got nothing included.
        slo: What a good answer is.
        preemptions: Of all engines.
    """
    whole = [one for one in served if one.is_whole]
    end_s = max((one.end_s for one in served), default=0.0)
    duration_s = end_s - min((one.at_s for one in served), default=0.0)
    found: dict[str, float] = {}
    for name in _TIMES:
        found.update(_statistics(name, [t for t in map(attrgetter(f"{name}_s"), whole) if t is not None]))
    found.update(_statistics("least_ttft", [one.least_ttft_s for one in whole]))
    good = sum(1 for one in whole if slo.is_met(one.ttft_s, one.tpot_s, one.e2e_s))
    found |= {
        "requests": len(served),
        "failed": len(served) - len(whole),
        "retries": sum(max(one.attempts - 1, 0) for one in served),
        "preemptions": preemptions,
        "duration_s": duration_s,
    }
    if served:
        found |= {"goodput": good / len(served), "failed_share": 1 - len(whole) / len(served)}
    if duration_s > 0:
        found["goodput_rps"] = good / duration_s
        found["output_tokens_per_s"] = sum(one.output_tokens for one in whole) / duration_s
    if prompt := sum(one.prompt_tokens for one in whole):
        found["cached_share"] = sum(one.cached_tokens for one in whole) / prompt
    if whole and all(one.cost_usd is not None for one in whole):
        found["cost_usd"] = math.fsum(one.cost_usd or 0.0 for one in whole)
    if (evenness := imbalance(served, replicas)) is not None:
        found["imbalance"] = evenness
    return {name: found[name] for name in FIGURES if name in found}


def _statistics(name: str, values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    values.sort()
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    found = {f"{name}_{word}": quantile(values, share) for word, share in shares.items()}
    return {f"{name}_mean": math.fsum(values) / len(values), **found}


def in_flight(served: Iterable[Served], replicas: Sequence[str]) -> Iterable[tuple[float, float, list[int]]]:
    """Requests at each replica over time: from when, to when, and how many at each; the list is one, and changes."""
    place = {replica: i for i, replica in enumerate(replicas)}
    changes = []
    for one in served:
        if one.replica in place and one.end_s > one.at_s:
            changes += [(one.at_s, 1, place[one.replica]), (one.end_s, -1, place[one.replica])]
    changes.sort()
    counts = [0] * len(replicas)
    last_s = 0.0
    for at_s, step, i in changes:
        if at_s > last_s:
            yield last_s, at_s, counts
        counts[i] += step
        last_s = at_s


def imbalance(served: Iterable[Served], replicas: Sequence[str]) -> float | None:
    """The time integral of the greatest number of requests at a replica, over that of the mean; None without any."""
    most = every = 0.0
    for start_s, end_s, counts in in_flight(served, replicas):
        most += max(counts) * (end_s - start_s)
        every += sum(counts) * (end_s - start_s)
    return most * len(replicas) / every if every else None


def by_replica(
    served: Sequence[Served], replicas: Sequence[str], preemptions: Mapping[str, int]
) -> tuple[ReplicaFigures, ...]:
    """Each replica's part, in the order given."""
    area, peak = [0.0] * len(replicas), [0] * len(replicas)
    for start_s, end_s, counts in in_flight(served, replicas):
        for i, count in enumerate(counts):
            area[i] += count * (end_s - start_s)
            peak[i] = max(peak[i], count)
    groups: dict[str, list[Served]] = {replica: [] for replica in replicas}
    for one in served:
        if one.is_whole and one.replica in groups:
            groups[one.replica].append(one)
    duration_s = max((one.end_s for one in served), default=0.0)
    return tuple(
        _replica(replica, groups[replica], area[i] / duration_s if duration_s else 0.0, peak[i], preemptions)
        for i, replica in enumerate(replicas)
    )


def _replica(
    replica: str, served: Sequence[Served], in_flight_mean: float, in_flight_most: int, preemptions: Mapping[str, int]
) -> ReplicaFigures:
    prompt = sum(one.prompt_tokens for one in served)
    times = sorted(one.ttft_s for one in served)
    return ReplicaFigures(
        replica=replica,
        requests=len(served),
        prompt_tokens=prompt,
        output_tokens=sum(one.output_tokens for one in served),
        cached_share=sum(one.cached_tokens for one in served) / prompt if prompt else 0.0,
        ttft_mean=math.fsum(times) / len(times) if times else None,
        ttft_p99=quantile(times, 0.99) if times else None,
        in_flight_mean=in_flight_mean,
        in_flight_most=in_flight_most,
        preemptions=preemptions.get(replica, 0),
    )


@attrs.frozen(kw_only=True)
class Difference:
    """How a figure of one pipeline differs from that of another, over the same requests.

    Attributes:
        figure: ``ttft_mean``, ``e2e_mean`` or ``cached_share``.
        value: The other's figure less the first's.
        low, high: The middle 95 % of what resampling the trace gives: without 0 between them, the difference is
            unlikely to be this trace's chance.
    """

    figure: str
    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return attrs.asdict(self)


def differences(one: Sequence[Served], other: Sequence[Served], seed: int = 0) -> tuple[Difference, ...]:
    """Paired differences over the requests that both answered.

    Requests that follow each other share their queues, so they are not drawn one by one: the trace is cut into 50
    stretches, and whole stretches are drawn (the block bootstrap of Künsch, Annals of Statistics 17(3), 1989).
    """
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a.is_whole and b.is_whole]
    if not pairs:
        return ()
    columns = {
        "ttft_mean": [(b.ttft_s - a.ttft_s, 1.0) for a, b in pairs],
        "e2e_mean": [(b.e2e_s - a.e2e_s, 1.0) for a, b in pairs],
        "cached_share": [(float(b.cached_tokens - a.cached_tokens), float(a.prompt_tokens)) for a, b in pairs],
    }
    return tuple(_difference(name, column, seed) for name, column in columns.items())


def _difference(name: str, column: Sequence[tuple[float, float]], seed: int) -> Difference:
    size = max(math.ceil(len(column) / _BLOCKS), 1)
    sums = [
        (math.fsum(v for v, _ in part), math.fsum(w for _, w in part))
        for part in (column[i : i + size] for i in range(0, len(column), size))
    ]
    draw = random.Random(seed)  # noqa: S311 - resampling, not secrets
    means = sorted(_ratio(draw.choices(sums, k=len(sums))) for _ in range(_DRAWS))
    return Difference(figure=name, value=_ratio(sums), low=quantile(means, 0.025), high=quantile(means, 0.975))


def _ratio(parts: Iterable[tuple[float, float]]) -> float:
    value, weight = map(math.fsum, zip(*parts, strict=True))
    return value / weight if weight else 0.0
