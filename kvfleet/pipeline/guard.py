"""The pipeline's filters, asked about models that are no candidates of the route."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import attrs

from kvfleet.config.schema import ModelConfig
from kvfleet.pipeline.stage import BoundStage
from kvfleet.plugin.contract import Drop, RoutingContext

__all__ = ["Guard"]

log = logging.getLogger(__name__)


@attrs.frozen
class Guard:
    """Says whom the filters exclude, for stages that call models beside the route: they obey what the route obeys.

    A filter that fails excludes everybody, unless the pipeline may go on without it. A filter whose component has
    ``only_live = True`` speaks of live answers alone, and is not asked.
    """

    stages: tuple[BoundStage, ...]

    def __call__(self, ctx: RoutingContext, models: Sequence[ModelConfig]) -> Sequence[tuple[str, Drop]]:
        """Each drop with its stage's name; whoever is not among them may be called."""
        found: list[tuple[str, Drop]] = []
        for stage in self.stages:
            if not models:
                break
            if getattr(stage.component, "only_live", False):
                continue
            drops = self._drops(stage, attrs.evolve(ctx, candidates=tuple(models)))
            gone = {drop.candidate.id for drop in drops}
            models = [model for model in models if model.id not in gone]
            found += [(stage.key, drop) for drop in drops]
        return found

    def _drops(self, stage: BoundStage, ctx: RoutingContext) -> list[Drop]:
        try:
            return list(stage.run(ctx))
        except Exception as error:  # noqa: BLE001 - the plugin border
            log.warning("filter failed stage=%s error=%s", stage.key, type(error).__name__)
            return [] if stage.skips else [Drop(model, "the filter failed") for model in ctx.candidates]
