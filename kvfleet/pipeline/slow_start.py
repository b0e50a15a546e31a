"""A replica that has come back gets its usual share bit by bit, whatever the strategy."""

from __future__ import annotations

import random
from collections.abc import Sequence

import attrs

from kvfleet.config.schema import ModelConfig
from kvfleet.pipeline.stage import BoundStage
from kvfleet.plugin.contract import Kind, Strategy
from kvfleet.router.scoring import ModelScore, Ranking, ScoringContext
from kvfleet.telemetry.health import HealthManager

__all__ = ["SlowStart", "with_slow_start"]


@attrs.frozen
class SlowStart:
    """A strategy, and what becomes of its ranking while replicas come back.

    A replica that is to get a quarter of its share stays where it was ranked in a quarter of the decisions. In the
    others it stands behind the replicas of its own model, where it still is a way out if they fail. So no strategy has
    to know of it, and no other model gains by it. The ranking's mode says so where it changes who is first.
    """

    strategy: Strategy
    health: HealthManager

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Sequence[ModelScore]:
        """The strategy's ranking, as it is if nobody has come back."""
        ranked = self.strategy.select(models, context)
        if not self.health.is_any_returning or context is None:
            return ranked
        return self._eased(Ranking.of(models, ranked), context)

    def _eased(self, ranking: Ranking, context: ScoringContext) -> Ranking:
        shares = [self.health.share(model.endpoint, context.now_s) for model in ranking.models]
        draw = random.Random(context.seed).random  # noqa: S311 - shares, not secrets
        held = [share < 1 and draw() >= share for share in shares]
        if not any(held):
            return ranking
        order = _behind_their_peers(ranking.models, held)
        is_another = order[0] != 0
        return Ranking(
            [ranking.models[i] for i in order],
            [ranking.totals[i] for i in order],
            unit=ranking.unit,
            terms={name: [values[i] for i in order] for name, values in ranking.terms.items()},
            mode="slow_start" if is_another else ranking.mode,
            details=ranking.details,
        )


def _behind_their_peers(models: Sequence[ModelConfig], held: Sequence[bool]) -> list[int]:
    """The places of some models, those held back behind the last of their own name; all others keep their order."""
    last = {model.name: i for i, model in enumerate(models)}
    behind: dict[int, list[int]] = {}
    order: list[int] = []
    for i, model in enumerate(models):
        if held[i]:
            behind.setdefault(last[model.name], []).append(i)
        else:
            order.append(i)
        order += behind.pop(i, ())
    return order


def with_slow_start(stage: BoundStage, health: HealthManager) -> BoundStage:
    """A strategy's stage that eases replicas in; any other as it is."""
    if stage.kind is not Kind.SELECT:
        return stage
    return attrs.evolve(stage, run=SlowStart(stage.component, health).select)
