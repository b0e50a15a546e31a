"""How good an answer was, told to the strategies that learn from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from kvfleet.errors import RouteError
from kvfleet.telemetry.metrics import MetricsExporter

__all__ = ["Ratings"]


@attrs.frozen
class Ratings:
    """Finds who remembers an answer.

    Attributes:
        components: Those of the pipeline; strategies that learn have a ``feedback``.
        metrics: Where ratings are counted.
    """

    components: Sequence[Any]
    metrics: MetricsExporter

    def feedback(self, request_id: str, score: float) -> str:
        """Take what somebody says of an answer; gives the model that gave it.

        Raises:
            RouteError: 404 if no strategy that learns remembers the request.
            ValueError: if the score is not between 0 and 1.
        """
        model = self._learn(request_id, score)
        if model is not None:
            self.metrics.count("kvfleet_feedback_total", model)
            return model
        raise RouteError(
            "no strategy that learns remembers an answer to this request: it is unknown, too long ago, not answered "
            "yet, or another strategy decided it",
            status=404,
            code="unknown_request",
        )

    def rate(self, request_id: str, score: float) -> str | None:
        """Take a judge's word for it, unless somebody has rated the answer already; see `Services.rate`."""
        return self._learn(request_id, score, is_first=True)

    def _learn(self, request_id: str, score: float, *, is_first: bool = False) -> str | None:
        for component in self.components:
            learn, is_rated = getattr(component, "feedback", None), getattr(component, "is_rated", None)
            if not callable(learn) or (is_first and callable(is_rated) and is_rated(request_id)):
                continue
            model: str | None = learn(request_id, score)
            if model is not None:
                return model
        return None
