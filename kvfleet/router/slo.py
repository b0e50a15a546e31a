"""The cheapest model that meets what a tenant was promised: a latency, a quality, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from kvfleet.config.fields import mapping, number
from kvfleet.config.schema import ModelConfig
from kvfleet.router.replicas import column_of
from kvfleet.router.scoring import Ranking, ScoringContext, arranged, take_turns, utilities

__all__ = ["SLOStrategy", "ServiceTarget"]

_NEUTRAL = ScoringContext()


@attrs.frozen(kw_only=True)
class ServiceTarget:
    """What was promised; what is absent was not."""

    max_latency_ms: float | None = number(None, gt=0, unit="ms", doc="Longest expected time to an answer.")
    min_quality: float | None = number(None, ge=0, le=1, doc="Least quality of the model.")

    def shortfall(self, latency_s: float | None, quality: float | None) -> float:
        """How far a candidate is from the target: 0 if it meets it, the parts missing added up otherwise.

        What is unknown is missing altogether.
        """
        missing = 0.0
        if self.max_latency_ms is not None:
            missing += 1.0 if latency_s is None else max(0.0, latency_s * 1000 / self.max_latency_ms - 1)
        if self.min_quality:
            missing += 1.0 if quality is None else max(0.0, 1 - quality / self.min_quality)
        return missing


@attrs.define
class SLOStrategy:
    """Choose the cheapest candidate that meets the tenant's targets; if none does, the one that comes closest.

    Times are those the pipeline expects now (`score.latency`: measured, with the queue), or else the declared ones; so
    a cheap model that becomes slow hands over to a dearer one, and takes back when it has recovered.
    """

    max_latency_ms: float | None = number(None, gt=0, unit="ms", doc="Longest expected time, for every other tenant.")
    min_quality: float | None = number(None, ge=0, le=1, doc="Least quality, for every other tenant.")
    tenants: Mapping[str, ServiceTarget] = mapping(
        doc="Targets by tenant, instead of those above.", example={"premium": {"max_latency_ms": 800}}
    )
    _usual: ServiceTarget = attrs.field(init=False, repr=False, eq=False)

    @_usual.default
    def _make_usual(self) -> ServiceTarget:
        return ServiceTarget(max_latency_ms=self.max_latency_ms, min_quality=self.min_quality)

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank those that meet the target by their price, then the others by what they lack."""
        context = context or _NEUTRAL
        target = self.tenants.get(context.tenant_id, self._usual)
        price, times, quality = (column_of(name, models, context) for name in ("cost", "latency", "quality"))
        lacks = [target.shortfall(s, q) for s, q in zip(times.values, quality.values, strict=True)]
        cheap = utilities(price)
        unknown = [float(value is None) for value in price.values]
        soon = utilities(times)
        keys = [(lack, u, -c, -s) for lack, u, c, s in zip(lacks, unknown, cheap, soon, strict=True)]
        order = sorted(range(len(models)), key=keys.__getitem__)
        if order:
            take_turns(order, context.seed, keys)
        totals = [0.5 + 0.5 * c if not lack else 0.5 / (1 + lack) for lack, c in zip(lacks, cheap, strict=True)]
        terms = {"cost": cheap, "meets_target": [float(not lack) for lack in lacks]}
        mode = "meets the target" if order and not lacks[order[0]] else "closest to the target"
        return arranged(models, order, totals, terms=terms, mode=mode)
