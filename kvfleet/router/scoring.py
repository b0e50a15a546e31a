"""Scores with units, rankings, and the weighted score of six dimensions."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import attrs

from kvfleet.adapters.base import EndpointHealth
from kvfleet.config.schema import ModelConfig, ScoringWeights

__all__ = ["Column", "ModelScore", "Ranking", "ScoringContext", "ScoringEngine", "Unit", "rank", "utilities"]


class Unit(enum.StrEnum):
    """What a column's numbers mean. In seconds and dollars less is better; in utility (0..1) and tokens more is."""

    SECONDS = "s"
    USD = "usd"
    UTILITY = "utility"
    TOKENS = "tokens"

    @property
    def less_is_better(self) -> bool:
        """True for costs."""
        return self in (Unit.SECONDS, Unit.USD)


@attrs.frozen
class Column:
    """One number for each candidate, in the candidates' order; None where it is not known."""

    unit: Unit
    values: Sequence[float | None]


@attrs.frozen(kw_only=True)
class ScoringContext:
    """What a strategy may know of the request and the candidates.

    Attributes:
        data_class, tenant_id, tags, region: Of the request.
        metadata: More of the request; ``prompt_text`` for strategies that read it.
        required_capabilities: Names of what the request needs (``tools``, ``vision``, …).
        cache_affinity_scores: By candidate id, or by model name: 0..1.
        endpoint_health: By endpoint.
        columns: What the scorers of the pipeline gave, by name; each aligned with the candidates.
        session: The conversation's key; empty if it has none.
        now_s: The monotonic clock at the start of the route, in seconds.
        seed: Makes every random choice of this decision repeatable.
        dry_run: True while simulating: a strategy then moves no state of its own.
    """

    data_class: str = "internal"
    tenant_id: str = ""
    region: str = ""
    tags: Mapping[str, str] = attrs.field(factory=dict)
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    required_capabilities: tuple[str, ...] = ()
    cache_affinity_scores: Mapping[str, float] = attrs.field(factory=dict)
    endpoint_health: Mapping[str, EndpointHealth] = attrs.field(factory=dict)
    columns: Mapping[str, Column] = attrs.field(factory=dict)
    session: str = ""
    now_s: float = 0.0
    seed: int = 0
    dry_run: bool = False

    def random(self) -> random.Random:
        """A generator seeded for this decision."""
        return random.Random(self.seed)  # noqa: S311 - load balancing, not cryptography


@attrs.define
class ModelScore:
    """One candidate's place in a ranking. Scores of dimensions are utilities, 0..1, where they were computed."""

    model_name: str
    endpoint: str
    total_score: float
    selected: bool = False
    id: str = ""
    cost_score: float = 0.0
    latency_score: float = 0.0
    quality_score: float = 0.0
    cache_affinity_score: float = 0.0
    hardware_load_score: float = 0.0
    compliance_score: float = 0.0
    rejected_reason: str = ""
    signals: Mapping[str, float] = attrs.field(factory=dict)


class Ranking(Sequence[ModelScore]):
    """The candidates from best to worst.

    Reads as a list of `ModelScore`, which are made only when somebody looks: the engine reads `models` and `totals`.

    Attributes:
        models: The candidates, best first.
        totals: Their scores, in the same order.
        unit: The unit of `totals`; in seconds and dollars the least is first.
        terms: The parts of the totals, by name, each in the order of `models`.
        mode: How the first was chosen: ``exploit``, ``explore``, or a strategy's own word.
    """

    __slots__ = ("mode", "models", "terms", "totals", "unit")

    def __init__(
        self,
        models: Sequence[ModelConfig],
        totals: Sequence[float],
        *,
        unit: Unit = Unit.UTILITY,
        terms: Mapping[str, Sequence[float]] | None = None,
        mode: str = "exploit",
    ) -> None:
        self.models = tuple(models)
        self.totals = tuple(totals)
        self.unit = unit
        self.terms = terms or {}
        self.mode = mode

    def __len__(self) -> int:
        return len(self.models)

    @overload
    def __getitem__(self, index: int) -> ModelScore: ...
    @overload
    def __getitem__(self, index: slice) -> list[ModelScore]: ...
    def __getitem__(self, index: int | slice) -> ModelScore | list[ModelScore]:
        if isinstance(index, slice):
            return [self._score(i) for i in range(*index.indices(len(self.models)))]
        return self._score(range(len(self.models))[index])

    def __iter__(self) -> Iterator[ModelScore]:
        return (self._score(i) for i in range(len(self.models)))

    def __repr__(self) -> str:
        pairs = ", ".join(f"{m.id}={t:.4g}" for m, t in zip(self.models, self.totals, strict=True))
        return f"Ranking({pairs})"

    def _score(self, index: int) -> ModelScore:
        model = self.models[index]
        terms = {name: values[index] for name, values in self.terms.items()}
        known = {f"{d}_score": terms[d] for d in DIMENSIONS if d in terms}
        return ModelScore(model.name, model.endpoint, self.totals[index], index == 0, model.id, signals=terms, **known)

    @classmethod
    def of(cls, models: Sequence[ModelConfig], scores: Sequence[ModelScore]) -> Ranking:
        """Read what a strategy returned: a `Ranking` as it is, a list of `ModelScore` by its candidates' ids.

        Raises:
            ValueError: if a score names a stranger.
        """
        if isinstance(scores, Ranking):
            return scores
        by_id = {m.id: m for m in models}
        by_place = {(m.name, m.endpoint): m for m in models}
        found = []
        for score in scores:
            model = by_id.get(score.id) or by_place.get((score.model_name, score.endpoint))
            if model is None:
                raise ValueError(f"a ranking names {score.id or score.model_name!r}, which is not a candidate")
            found.append(model)
        return cls(found, [s.total_score for s in scores])


def rank(
    models: Sequence[ModelConfig],
    totals: Sequence[float],
    *,
    unit: Unit = Unit.UTILITY,
    terms: Mapping[str, Sequence[float]] | None = None,
    mode: str = "exploit",
) -> Ranking:
    """Sort candidates by their totals, best first; equals keep their order.

    Args:
        models: The candidates.
        totals: One number for each, in `unit`.
        unit: Says which end is best.
        terms: Parts of the totals, each in the order of `models`.
        mode: See `Ranking`.
    """
    order = sorted(range(len(models)), key=totals.__getitem__, reverse=not unit.less_is_better)
    return Ranking(
        [models[i] for i in order],
        [totals[i] for i in order],
        unit=unit,
        terms={name: [values[i] for i in order] for name, values in (terms or {}).items()},
        mode=mode,
    )


DIMENSIONS = ("cost", "latency", "quality", "cache_affinity", "hardware_load", "compliance")


def utilities(column: Column) -> list[float]:
    """A column as utilities 0..1, 1 best, normalised over the candidates.

    Costs (seconds, dollars) are scaled from the least (1) to the greatest (0); tokens against the greatest; utilities
    stay as they are. What is not known counts as the worst that is known, and 0.5 if nothing is.
    """
    values = column.values
    if column.unit is Unit.UTILITY:
        return [0.5 if v is None else v for v in values]
    known = [v for v in values if v is not None]
    if not known:
        return [0.5] * len(values)
    low, high = min(known), max(known)
    if column.unit is Unit.TOKENS:
        return [(v or 0.0) / high if high else 0.0 for v in values]
    if high == low:
        return [1.0 if v is not None else 0.0 for v in values]
    return [(high - v) / (high - low) if v is not None else 0.0 for v in values]


@attrs.define
class ScoringEngine:
    """The weighted sum of six dimensions, each a utility 0..1."""

    weights: ScoringWeights = attrs.field(factory=ScoringWeights)

    def score_candidates(self, candidates: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank candidates by the weighted sum.

        A dimension is taken from the context's column of its name, or from what the models declare.

        Args:
            candidates: The models; may be empty.
            context: The request; a neutral one if None.
        """
        context = context or _NEUTRAL
        weights = self.weights
        used = [(d, w) for d in DIMENSIONS if (w := getattr(weights, d))]
        terms = {d: utilities(_column(d, candidates, context)) for d, _ in used}
        totals = [0.0] * len(candidates)
        for dimension, weight in used:
            totals = [total + weight * value for total, value in zip(totals, terms[dimension], strict=True)]
        return rank(candidates, totals, terms=terms)

    def update_weights(self, **weights: float) -> None:
        """Change some weights; the rest stay."""
        self.weights = attrs.evolve(self.weights, **weights)


_NEUTRAL = ScoringContext()


def _column(dimension: str, models: Sequence[ModelConfig], context: ScoringContext) -> Column:
    """The column of one dimension: the pipeline's, or one made from what the models declare."""
    given = context.columns.get(dimension)
    return given if given is not None else Column(*_DECLARED[dimension](models, context))


def _cost(models: Sequence[ModelConfig], _: ScoringContext) -> tuple[Unit, list[float | None]]:
    return Unit.USD, [m.cost_per_1k_input_tokens for m in models]


def _latency(models: Sequence[ModelConfig], _: ScoringContext) -> tuple[Unit, list[float | None]]:
    return Unit.SECONDS, [m.latency_p50_ms / 1000 for m in models]


def _quality(models: Sequence[ModelConfig], _: ScoringContext) -> tuple[Unit, list[float | None]]:
    return Unit.UTILITY, [m.quality_score for m in models]


def _affinity(models: Sequence[ModelConfig], context: ScoringContext) -> tuple[Unit, list[float | None]]:
    known = context.cache_affinity_scores
    return Unit.UTILITY, [known.get(m.id, known.get(m.name, 0.0)) for m in models]


def _load(models: Sequence[ModelConfig], context: ScoringContext) -> tuple[Unit, list[float | None]]:
    return Unit.UTILITY, [_free(context.endpoint_health.get(m.endpoint)) for m in models]


def _free(health: EndpointHealth | None) -> float:
    if health is None:
        return 0.5
    return 1 - health.load_score if health.healthy else 0.0


def _compliance(models: Sequence[ModelConfig], context: ScoringContext) -> tuple[Unit, list[float | None]]:
    return Unit.UTILITY, [float(context.data_class in m.allowed_data_classes) for m in models]


_DECLARED = {
    "cost": _cost,
    "latency": _latency,
    "quality": _quality,
    "cache_affinity": _affinity,
    "hardware_load": _load,
    "compliance": _compliance,
}


def by_model(models: Iterable[ModelConfig]) -> dict[str, list[ModelConfig]]:
    """Group replicas by their model's name, in order of appearance."""
    groups: dict[str, list[ModelConfig]] = {}
    for model in models:
        groups.setdefault(model.name, []).append(model)
    return groups
