"""Scores with units, rankings, and the weighted score of seven dimensions."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import add, itemgetter
from typing import Any, overload

import attrs

from kvfleet.adapters.base import EndpointHealth
from kvfleet.config.schema import ModelConfig, ScoringWeights

__all__ = [
    "NO_COLUMNS",
    "Column",
    "ModelScore",
    "Ranking",
    "ScoringContext",
    "ScoringEngine",
    "Unit",
    "rank",
    "utilities",
]


NO_COLUMNS: frozenset[str] = frozenset()
"""What a strategy `reads` that looks at no column."""


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
    """One number for each candidate, in the candidates' order; None where it is not known.

    `terms` are what the numbers were made from, or what else is to be weighed with them, by name and in the same order.
    """

    unit: Unit
    values: Sequence[float | None]
    terms: Mapping[str, Sequence[float]] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True, slots=False)
class ScoringContext:
    """What a strategy may know of the request and the candidates.

    Attributes:
        data_class, tenant_id, tags, region: Of the request.
        metadata: More of the request; ``prompt_text`` for strategies that read it.
        required_capabilities: Names of what the request needs (``tools``, ``vision``, …).
        cache_affinity_scores: By candidate id, or by model name: 0..1.
        endpoint_health: By endpoint.
        columns: What the scorers of the pipeline gave, by name; each aligned with the candidates.
        affinity: By candidate id: tokens of the prompt that are expected in its KV cache.
        prompt_tokens: About how many tokens the prompt has; 0 if nobody looked.
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
    affinity: Mapping[str, float] = attrs.field(factory=dict)
    prompt_tokens: float = 0.0
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
    capacity_score: float = 0.0
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
        details: More numbers for the trace, by name, in `unit`: what another choice would have cost, say.
    """

    __slots__ = ("details", "mode", "models", "terms", "totals", "unit")

    def __init__(
        self,
        models: Sequence[ModelConfig],
        totals: Sequence[float],
        *,
        unit: Unit = Unit.UTILITY,
        terms: Mapping[str, Sequence[float]] | None = None,
        mode: str = "exploit",
        details: Mapping[str, float] | None = None,
    ) -> None:
        self.details = details or {}
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
        known: dict[str, Any] = {f"{d}_score": terms[d] for d in DIMENSIONS if d in terms}
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
    seed: int = 0,
) -> Ranking:
    """Sort candidates by their totals, best first; equals keep their order.

    Args:
        models: The candidates.
        totals: One number for each, in `unit`.
        unit: Says which end is best.
        terms: Parts of the totals, each in the order of `models`.
        mode: See `Ranking`.
        seed: Lets equally good replicas of the best model take turns; 0 leaves them in their order.
    """
    order = sorted(range(len(models)), key=totals.__getitem__, reverse=not unit.less_is_better)
    if seed and len(order) > 1 and totals[order[0]] == totals[order[1]]:
        take_turns(order, seed, totals, [model.name for model in models])
    return arranged(models, order, totals, unit=unit, terms=terms, mode=mode)


def arranged(
    models: Sequence[ModelConfig],
    order: Sequence[int],
    totals: Sequence[float],
    *,
    unit: Unit = Unit.UTILITY,
    terms: Mapping[str, Sequence[float]] | None = None,
    mode: str = "exploit",
    details: Mapping[str, float] | None = None,
) -> Ranking:
    """Candidates in an order that is already known: indices into `models`, best first."""
    if len(order) < 2:
        return Ranking(models, totals, unit=unit, terms=terms, mode=mode, details=details)
    pick = itemgetter(*order)  # in C: a fifth of the time of a comprehension
    picked = {name: pick(values) for name, values in terms.items()} if terms else {}
    return Ranking(pick(models), pick(totals), unit=unit, terms=picked, mode=mode, details=details)


def take_turns(order: list[int], seed: int, *keys: Sequence[Any]) -> None:
    """Rotate, in place, the head of an order: those whose keys are all equal to the first one's."""
    count = len(order)
    for key in keys:
        best = key[order[0]]
        count = next((at for at in range(1, count) if key[order[at]] != best), count)
    turn = seed % count
    order[:count] = order[turn:count] + order[:turn]


DIMENSIONS = ("cost", "latency", "quality", "cache_affinity", "hardware_load", "compliance", "capacity")


_TOKENS_THAT_COUNT = 128.0


def utilities(column: Column) -> Sequence[float]:
    """A column as utilities 0..1, 1 best, normalised over the candidates.

    Costs (seconds, dollars) lose what they exceed the least by, as a share of the greatest: so prices of 1, 10 and 50
    differ plainly, and times of 200 and 201 ms hardly. Tokens are divided by the greatest, or by 128 if that is more:
    two cached tokens save nothing that is worth a queue. Utilities stay as they are.
    What is not known is 0 beside what is, and 0.5 if nothing is.
    """
    values = column.values
    unit = column.unit
    if None in values:
        return _utilities_of_some(unit, values)
    if unit is Unit.UTILITY or not values:
        return values  # type: ignore[return-value]  # there is no None in it
    high = max(values)  # type: ignore[type-var]
    if not high:
        return [0.0 if unit is Unit.TOKENS else 1.0] * len(values)
    if unit is Unit.TOKENS:
        scale = max(high, _TOKENS_THAT_COUNT)
        return [v / scale for v in values]  # type: ignore[operator]
    low = min(values)  # type: ignore[type-var]
    return [1 - (v - low) / high for v in values]  # type: ignore[operator]


def _utilities_of_some(unit: Unit, values: Sequence[float | None]) -> list[float]:
    known = [v for v in values if v is not None]
    if unit is Unit.UTILITY or not known:
        return [0.5 if v is None else v for v in values]
    found = iter(utilities(Column(unit, known)))
    return [0.0 if v is None else next(found) for v in values]


@attrs.define
class ScoringEngine:
    """The weighted sum of seven dimensions, each a utility 0..1."""

    weights: ScoringWeights = attrs.field(factory=ScoringWeights)
    _used: tuple[tuple[str, float], ...] = attrs.field(init=False, default=(), repr=False, eq=False)
    _used_of: ScoringWeights | None = attrs.field(init=False, default=None, repr=False, eq=False)

    def score_candidates(self, candidates: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:
        """Rank candidates by the weighted sum.

        A dimension is taken from the context's column of its name, or from what the models declare.

        Args:
            candidates: The models; may be empty.
            context: The request; a neutral one if None.
        """
        context = context or _NEUTRAL
        terms, totals = self.totals(candidates, context)
        return rank(candidates, totals, terms=terms, seed=context.seed)

    def totals(
        self, candidates: Sequence[ModelConfig], context: ScoringContext
    ) -> tuple[dict[str, Sequence[float]], Sequence[float]]:
        """The utilities of each dimension that counts, by name, and the weighted sums; in the candidates' order."""
        if self._used_of is not self.weights:
            self._used = tuple([(d, w) for d in DIMENSIONS if (w := getattr(self.weights, d))])
            self._used_of = self.weights
        columns = context.columns
        terms = {d: utilities(columns[d] if d in columns else declared(d, candidates, context)) for d, _ in self._used}
        return terms, _weighted_sums([w for _, w in self._used], list(terms.values()), len(candidates))

    def update_weights(self, **weights: float) -> None:
        """Change some weights; the rest stay."""
        self.weights = attrs.evolve(self.weights, **weights)


def _weighted_sums(weights: Sequence[float], columns: Sequence[Sequence[float]], count: int) -> list[float]:
    """For each candidate the sum of its values times their weights; three columns a pass, for speed."""
    totals: list[float] | None = None
    for i in range(0, len(columns), 3):
        some, w = columns[i : i + 3], weights[i : i + 3]
        if len(some) == 3:
            w0, w1, w2 = w
            part = [w0 * a + w1 * b + w2 * c for a, b, c in zip(*some, strict=True)]
        elif len(some) == 2:
            w0, w1 = w
            part = [w0 * a + w1 * b for a, b in zip(*some, strict=True)]
        else:
            (w0,) = w
            part = [w0 * a for a in some[0]]
        totals = part if totals is None else list(map(add, totals, part))
    return [0.0] * count if totals is None else totals


_NEUTRAL = ScoringContext()


def declared(dimension: str, models: Sequence[ModelConfig], context: ScoringContext) -> Column:
    """The column of one dimension as the models declare it, for a context without one."""
    return Column(*_DECLARED[dimension](models, context))


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


def _capacity(models: Sequence[ModelConfig], _: ScoringContext) -> tuple[Unit, list[float | None]]:
    return Unit.UTILITY, [1.0] * len(models)


_DECLARED = {
    "cost": _cost,
    "latency": _latency,
    "quality": _quality,
    "cache_affinity": _affinity,
    "hardware_load": _load,
    "compliance": _compliance,
    "capacity": _capacity,
}


def by_model(models: Iterable[ModelConfig]) -> dict[str, list[ModelConfig]]:
    """Group replicas by their model's name, in order of appearance."""
    groups: dict[str, list[ModelConfig]] = {}
    for model in models:
        groups.setdefault(model.name, []).append(model)
    return groups
