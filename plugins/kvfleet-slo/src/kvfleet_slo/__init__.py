"""Latency targets for kvfleet: a request says how long it can wait, and replicas that would be late are dropped.

Two stages and a fact of their own. `TargetClassifier` reads the target and gives the fact `LATENCY_TARGET`;
`TargetFilter` needs that fact, so a pipeline with the filter and without the classifier is refused when it is built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from kvfleet.config.fields import flag, number, text
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BadRequestError
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Drop, Fact, Kind, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.telemetry.load import FleetLoad

__all__ = ["LATENCY_TARGET", "LatencyTarget", "TargetClassifier", "TargetFilter", "kvfleet_components"]


@attrs.frozen
class LatencyTarget:
    """How long a request can wait for the first byte of its answer.

    Attributes:
        seconds: The time; None if the request does not mind.
        source: Who said so: ``tag``, ``header``, ``default`` or ``none``.
    """

    seconds: float | None = None
    source: str = "none"


def _describe(target: LatencyTarget) -> str:
    return "none" if target.seconds is None else f"{target.seconds * 1000:g} ms ({target.source})"


LATENCY_TARGET: Fact[LatencyTarget] = Fact("latency_target", _describe)
"""The fact: what `TargetClassifier` gives and `TargetFilter` needs."""


@attrs.define
class TargetClassifier:
    """Read how long the request can wait: from a tag, else from a header, else the default."""

    tag: str = text("latency_target_ms", doc="Tag of the request that names the target in milliseconds.")
    header: str = text("x-latency-target-ms", doc="Header that names it, if the tag is absent.")
    default_ms: float | None = number(None, gt=0, unit="ms", doc="Target of a request that names none; none if absent.")

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        """Give the target.

        Raises:
            BadRequestError: if the request names something that is not a time.
        """
        request = ctx.request
        for source, value in (
            ("tag", request.tags.get(self.tag)),
            ("header", request.condition_headers.get(self.header.lower())),
        ):
            if value:
                return {LATENCY_TARGET: LatencyTarget(_seconds(value, source), source)}
        if self.default_ms is not None:
            return {LATENCY_TARGET: LatencyTarget(self.default_ms / 1000, "default")}
        return {LATENCY_TARGET: LatencyTarget()}


def _seconds(value: str, source: str) -> float:
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise BadRequestError(f"the latency target in the request's {source} must be a positive number of milliseconds")
    return milliseconds / 1000


@attrs.define
class TargetFilter:
    """Drop replicas whose expected time to the first byte misses the request's target."""

    margin: float = number(1.0, gt=0, le=1, doc="Share of the target that the expected time may use.")
    keep_fastest: bool = flag(True, doc="If all would be late, keep the fastest one instead of refusing the request.")
    _load: FleetLoad = attrs.field(init=False, factory=FleetLoad, repr=False)

    def provision(self, services: Services) -> None:
        """Take the fleet's load, whose expected times are learned from every answer."""
        self._load = services.load

    def filter(self, ctx: RoutingContext) -> Iterator[Drop]:
        """The late ones."""
        target = ctx.fact(LATENCY_TARGET).seconds
        if target is None:
            return
        cached = [ctx.affinity.get(model.id, 0.0) for model in ctx.candidates]
        waits = self._load.waits(ctx.candidates, 0.0, cached, ctx.now_s)
        expected = [(q + p, model) for q, p, model in zip(waits.queue_s, waits.prompt_s, ctx.candidates, strict=True)]
        late = [(seconds, model) for seconds, model in expected if seconds > target * self.margin]
        all_late = late and len(late) == len(expected)
        spared = min(late, key=lambda pair: pair[0])[1] if all_late and self.keep_fastest else None
        for seconds, model in late:
            if model is not spared:
                yield _late(model, seconds, target)


def _late(model: ModelConfig, seconds: float, target: float) -> Drop:
    return Drop(model, f"expected in {seconds * 1000:.0f} ms, target {target * 1000:.0f} ms", "latency_target")


@hookimpl
def kvfleet_components() -> Iterator[Component]:
    """What this distribution brings."""
    yield Component(Kind.CLASSIFY, "slo", TargetClassifier, gives=(LATENCY_TARGET,))
    yield Component(Kind.FILTER, "slo", TargetFilter, needs=(LATENCY_TARGET,))
