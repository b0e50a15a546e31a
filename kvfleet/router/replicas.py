"""Models first, then replicas: how strategies that reason by model order a model's replicas."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

import attrs

from kvfleet.config.schema import ModelConfig
from kvfleet.router.scoring import Column, ScoringContext, declared, take_turns

__all__ = ["Replicas", "column_of"]

_NEVER = float("inf")


def column_of(dimension: str, models: Sequence[ModelConfig], context: ScoringContext) -> Column:
    """The pipeline's column of a dimension, or one made from what the models declare."""
    given = context.columns.get(dimension)
    return declared(dimension, models, context) if given is None else given


@attrs.frozen
class Replicas:
    """The candidates as models with replicas, the soonest replica of each model first.

    The time is the column `latency`. Equal times are told apart by the cached part of the prompt, and replicas that
    are equal in both take turns by the context's seed.

    Attributes:
        groups: The indices of each model's replicas, by its name in order of appearance.
    """

    groups: dict[str, list[int]]
    seed: int
    _keys: tuple[Sequence[float], ...]

    @classmethod
    def of(cls, models: Sequence[ModelConfig], context: ScoringContext, only: Container[str] | None = None) -> Replicas:
        """Group the candidates; with `only`, those of some models."""
        order: Iterable[int] = range(len(models))
        if only is not None:
            order = [i for i in order if models[i].name in only]
        groups: dict[str, list[int]] = {}
        for i in order:
            groups.setdefault(models[i].name, []).append(i)
        if len(groups) == len(models):
            return cls(groups, context.seed, ())
        # To the millisecond: less is noise, and the cached part of the prompt tells more.
        seconds = [_NEVER if s is None else round(s, 3) for s in column_of("latency", models, context).values]
        cached = [c or 0.0 for c in column_of("cache_affinity", models, context).values]
        # Two stable sorts by a float each: half the time of one by tuples.
        if any(cached):
            order = sorted(order, key=cached.__getitem__, reverse=True)
        sorted_groups: dict[str, list[int]] = {name: [] for name in groups}
        for i in sorted(order, key=seconds.__getitem__):
            sorted_groups[models[i].name].append(i)
        return cls(sorted_groups, context.seed, (seconds, cached))

    def order(self, names: Sequence[str]) -> list[int]:
        """The indices of all replicas, model by model as `names` has them."""
        if not names:
            return []
        head = list(self.groups[names[0]])
        if len(head) > 1:
            take_turns(head, self.seed, *self._keys)
        return [*head, *(i for name in names[1:] for i in self.groups[name])]
