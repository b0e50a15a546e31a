"""A kvfleet strategy: send the request to the replica with the fewest requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from kvfleet.config.fields import number
from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.spec import hookimpl
from kvfleet.router.scoring import Ranking, ScoringContext, rank
from kvfleet.telemetry.load import FleetLoad

__all__ = ["LeastBusy", "kvfleet_components"]


@attrs.define
class LeastBusy:
    """Choose the replica with the fewest requests, those in its queue counting more than those it works on.

    A replica scores ``1 / (1 + requests)``, so an idle one has 1. Equals keep the order of the file.
    """

    queue_weight: float = number(2.0, ge=1, doc="How many running requests one queued request counts as.")
    _load: FleetLoad = attrs.field(init=False, factory=FleetLoad, repr=False)

    def provision(self, services: Services) -> None:
        """Take the fleet's load, which the router keeps up to date."""
        self._load = services.load

    def select(self, models: Sequence[ModelConfig], context: ScoringContext | None = None) -> Ranking:  # noqa: ARG002
        """Rank the candidates; the trace shows their requests as the term ``requests``."""
        requests = [self._requests(model) for model in models]
        return rank(models, [1 / (1 + count) for count in requests], terms={"requests": requests})

    def _requests(self, model: ModelConfig) -> float:
        pending = self._load.pending(model.id)
        said = self._load.engine(model.endpoint)
        queued = min((said.waiting or 0) if said else 0, pending)
        return pending + queued * (self.queue_weight - 1)


@hookimpl
def kvfleet_components() -> Iterator[Component]:
    """What this distribution brings."""
    yield Component(Kind.SELECT, "least_busy", LeastBusy)
