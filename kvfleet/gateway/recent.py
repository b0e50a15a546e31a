"""The last decisions: a bounded ring of finished traces, read only when somebody looks."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from typing import Any

import attrs

from kvfleet.trace import names
from kvfleet.trace.attributes import is_attempt, text
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.spans import Trace
from kvfleet.turns import Steps, at_once

__all__ = ["RecentRoutes", "detail_of", "row_of"]

_CONTENT = (names.PROMPT, names.ANSWER)
_MOST_CONTENT = 8_000
_FEW_REPLICAS = 40
_MOST_YOUNG = 2_000
"""Replicas that decisions were made among, until the garbage collector is sent to look at what is new. A decision among
200 has a dozen tuples of 200 values each, which it looks at once and then never again. That is 0.15 ms for each such
decision; left to itself, which does not know how large a tuple is, it takes 25 ms (`benchmarks/loop_lag.py`)."""

Hide = Callable[[Any], Any]


@attrs.define
class _Kept:
    number: int
    trace: Trace
    row: dict[str, Any] | None = None


@attrs.define
class RecentRoutes:
    """A `TraceSink` that keeps the newest traces; each costs one append, and is read when a dashboard asks.

    Routes are numbered, since several of them may belong to one trace of a caller.

    Attributes:
        size: Most traces kept.
        mark: What their numbers begin with, where several workers number theirs.
        replicas: How many the fleet has.
        modes: By replica: how its cache was known when it was last expected to hold a part of a prompt. From the
            decisions that were looked at.
    """

    size: int = 200
    mark: str = ""
    replicas: int = 0
    modes: dict[str, str] = attrs.field(init=False, factory=dict)
    _kept: deque[_Kept] = attrs.field(init=False, repr=False)
    _count: int = attrs.field(init=False, default=0)
    _young: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        self._kept = deque(maxlen=self.size)

    def __len__(self) -> int:
        return len(self._kept)

    def write(self, trace: Trace) -> None:
        """Keep a trace; with `telemetry.capture_content`, no more than the beginning of what it captured."""
        self._count += 1
        if _CONTENT[0] not in trace.route.attributes and _CONTENT[1] not in trace.route.attributes:
            self._kept.append(_Kept(self._count, trace))
        else:
            self._kept.append(_Kept(self._count, _shortened(trace)))
        if self.replicas > _FEW_REPLICAS:
            self._young += self.replicas
            if self._young > _MOST_YOUNG:
                self._young = 0
                gc.collect(0)

    def rows(self, most: int) -> list[dict[str, Any]]:
        """The newest routes, newest first, one line each; addresses are still in them."""
        return at_once(self.row_steps(most))

    def row_steps(self, most: int) -> Steps[list[dict[str, Any]]]:
        """The same, row by row."""
        newest = [kept for kept, _ in zip(reversed(tuple(self._kept)), range(most), strict=False)]
        rows = []
        for kept in reversed(newest):
            rows.append(self._row(kept))
            yield
        return rows[::-1]

    def _row(self, kept: _Kept) -> dict[str, Any]:
        if kept.row is None:
            explanation = Explanation(_without_scores(kept.trace))
            kept.row = {"id": f"{self.mark}{kept.number}", **row_of(explanation)}
            for stage in explanation.stages:
                if stage.kind == "affinity":
                    self.modes.update((r, m) for r, m in zip(stage.scored, stage.modes, strict=False) if m != "none")
        return kept.row

    def find(self, name: str) -> Trace | None:
        """The newest trace with this number or trace identifier; None if it is not kept any more."""
        return next(
            (k.trace for k in reversed(tuple(self._kept)) if name in (f"{self.mark}{k.number}", k.trace.trace_id)), None
        )


def _without_scores(trace: Trace) -> Trace:
    """The spans a line is made of: a large fleet's drops and scores would cost ten times the rest to read."""
    needed = [span for span in trace.stages if is_attempt(span) or span.attributes.get(names.STAGE_KIND) == "affinity"]
    return attrs.evolve(trace, spans=[trace.route, *needed])


def _shortened(trace: Trace) -> Trace:
    route = trace.route
    short = {key: str(route.attributes[key])[:_MOST_CONTENT] for key in _CONTENT if key in route.attributes}
    return attrs.evolve(trace, spans=[attrs.evolve(route, attributes={**route.attributes, **short}), *trace.stages])


def row_of(explanation: Explanation) -> dict[str, Any]:
    """One line about a route, without anything that was asked or answered."""
    route = explanation.trace.route.attributes
    usage, ttfb_s = explanation.usage, explanation.ttfb_s
    return {
        "trace_id": explanation.trace_id,
        "request_id": explanation.request_id,
        "timestamp": explanation.timestamp.isoformat(timespec="milliseconds"),
        "operation": text(route, names.OPERATION),
        "tenant": text(route, names.TENANT),
        "model_requested": text(route, names.MODEL_REQUESTED),
        "selected_model": explanation.selected_model,
        "served_by": explanation.served_replica,
        "strategy": explanation.strategy,
        "outcome": explanation.outcome,
        "error": explanation.error_code,
        "latency_ms": explanation.total_latency_ms,
        "ttfb_ms": None if ttfb_s is None else ttfb_s * 1000,
        "attempts": len(explanation.attempts),
        "fallback": explanation.fallback_triggered,
        "cache_hit": explanation.outcome == "cached" or explanation.cache_hit,
        "tokens": None if usage is None else usage.total_tokens,
        "cost_usd": explanation.cost_usd,
    }


def detail_of(trace: Trace, hide: Hide) -> dict[str, Any]:
    """Everything a trace tells: the explanation, and the content if it was captured.

    Args:
        trace: Of a finished route.
        hide: Replaces addresses of backends in JSON data.
    """
    found: dict[str, Any] = hide(Explanation(trace).to_dict())
    route = trace.route.attributes
    if any(key in route for key in _CONTENT):
        found["content"] = {key.rpartition(".")[2]: str(route[key]) for key in _CONTENT if key in route}
    return found
