"""Replays side by side: their figures, how they differ, and the same as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from kvfleet.replay.driver import ReplayResult
from kvfleet.replay.expect import Verdict
from kvfleet.replay.measures import Difference, ReplicaFigures, by_replica, differences, figures
from kvfleet.replay.slo import SLO

__all__ = ["Comparison", "Standing"]


@attrs.frozen(kw_only=True)
class Standing:
    """One pipeline's part of a comparison.

    Attributes:
        result: Its replay.
        figures: By the names in `kvfleet.replay.measures.FIGURES`.
        replicas: Each replica's part.
        errors: How often each error came, by its code.
        against_first: How it differs from the first pipeline; empty for that one.
    """

    result: ReplayResult
    figures: Mapping[str, float]
    replicas: tuple[ReplicaFigures, ...]
    errors: Mapping[str, int]
    against_first: tuple[Difference, ...] = ()

    @property
    def label(self) -> str:
        """What it is called."""
        return self.result.label

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "pipeline": self.label,
            "figures": dict(self.figures),
            "errors": dict(self.errors),
            "left_out": list(self.result.left_out),
            "replicas": [attrs.asdict(one) for one in self.replicas],
            "against_first": [one.to_dict() for one in self.against_first],
        }


@attrs.frozen(kw_only=True)
class Comparison:
    """Several pipelines over one trace."""

    standings: tuple[Standing, ...]
    slo: SLO
    speed: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, results: Sequence[ReplayResult], slo: SLO, *, speed: float = 1.0, seed: int = 0) -> Comparison:
        """Work the figures out."""
        first = results[0]
        return cls(
            standings=tuple(_standing(one, None if one is first else first, slo, seed) for one in results),
            slo=slo,
            speed=speed,
            seed=seed,
        )

    @property
    def figures(self) -> Mapping[str, Mapping[str, float]]:
        """By pipeline."""
        return {one.label: one.figures for one in self.standings}

    def to_dict(self, verdicts: Sequence[Verdict] = ()) -> dict[str, Any]:
        """As plain data, with what was expected."""
        trace = self.standings[0].result.trace
        return {
            "trace": {
                "name": trace.name,
                "requests": len(trace.requests),
                "duration_s": trace.duration_s,
                "block_tokens": trace.block_tokens,
                "prompt_tokens": sum(one.prompt_tokens for one in trace.requests),
                "output_tokens": sum(one.output_tokens for one in trace.requests),
                "shared_share": trace.shared_share,
            },
            "speed": self.speed,
            "seed": self.seed,
            "loop": "closed" if self.standings[0].result.is_closed_loop else "open",
            "slo": str(self.slo),
            "pipelines": [one.to_dict() for one in self.standings],
            "expectations": [one.to_dict() for one in verdicts],
        }


def _standing(result: ReplayResult, first: ReplayResult | None, slo: SLO, seed: int) -> Standing:
    errors: dict[str, int] = {}
    for one in result.served:
        if one.error:
            errors[one.error] = errors.get(one.error, 0) + 1
    found = figures(result.served, result.replicas, slo, sum(result.preemptions.values()))
    return Standing(
        result=result,
        figures={name: value for name, value in found.items() if math.isfinite(value)},
        replicas=by_replica(result.served, result.replicas, result.preemptions),
        errors=dict(sorted(errors.items())),
        against_first=() if first is None else differences(first.served, result.served, seed),
    )
