"""What the names in a request mean: who may answer, by which strategy."""

from __future__ import annotations

import uuid
from typing import Any

import attrs

from kvfleet.adapters.call import Operation
from kvfleet.config.findings import did_you_mean
from kvfleet.config.schema import AUTO_MODEL, FleetConfig, ModelConfig
from kvfleet.errors import BadRequestError, ModelNotFoundError
from kvfleet.pipeline.stage import BoundStage, Pipeline
from kvfleet.plugin.contract import RouteRequest
from kvfleet.registry.models import ModelRegistry

__all__ = ["Names"]

_MOST_CANDIDATE_SETS = 1024


@attrs.define
class Names:
    """The names of a fleet: models, aliases, strategies."""

    config: FleetConfig
    registry: ModelRegistry
    pipeline: Pipeline
    _known: frozenset[str] = attrs.field(init=False)
    _of_tenants: dict[str, str] = attrs.field(init=False)
    _sets: dict[tuple[Operation, frozenset[str]], tuple[ModelConfig, ...]] = attrs.field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        """Collect the names that may be asked for."""
        self._known = frozenset({AUTO_MODEL, *self.config.aliases, *(model.name for model in self.config.models)})
        self._of_tenants = {name: one.strategy for name, one in self.config.tenants.items() if one.strategy}

    def resolve(self, request: RouteRequest) -> RouteRequest:
        """The request with an identifier, its model's name resolved to the models it may mean, and its strategy.

        A strategy is the request's own, else its alias's, else its tenant's.

        Raises:
            ModelNotFoundError: if nobody is called that.
            BadRequestError: if the list of allowed models names a stranger.
        """
        changes: dict[str, Any] = {}
        if not request.request_id:
            changes["request_id"] = uuid.uuid4().hex
        if request.models is not None:
            changes["allowlist"] = request.models
        if request.models is not None and (unknown := request.models - self._known):
            raise BadRequestError(
                f"unknown model {min(unknown)!r} in the list of allowed models", code="model_not_found"
            )
        if request.model != AUTO_MODEL:
            changes |= self._model(request)
        if self._of_tenants and not request.strategy and request.tenant in self._of_tenants:
            changes.setdefault("strategy", self._of_tenants[request.tenant])
        return request.changed(**changes) if changes else request

    def _model(self, request: RouteRequest) -> dict[str, Any]:
        name = request.model
        if name not in self._known:
            remedy = did_you_mean(name, self._known)
            raise ModelNotFoundError(f"no model is called {name!r}; {remedy}", param="model")
        alias = self.config.aliases.get(name)
        wanted = frozenset({name}) if alias is None else frozenset(alias.models) or None
        changes: dict[str, Any] = {}
        if wanted is not None:
            changes["models"] = wanted if request.models is None else wanted & request.models
        if alias is not None and alias.strategy and not request.strategy:
            changes["strategy"] = alias.strategy
        return changes

    def candidates(self, request: RouteRequest) -> tuple[ModelConfig, ...]:
        """The replicas a resolved request begins with."""
        everyone = self.registry.replicas_for(request.operation)
        if request.models is None:
            return everyone
        key = (request.operation, request.models)
        found = self._sets.get(key)
        if found is None:
            found = tuple(model for model in everyone if model.name in request.models)
            if len(self._sets) < _MOST_CANDIDATE_SETS:
                self._sets[key] = found
        return found

    def strategy(self, name: str) -> BoundStage:
        """The strategy of that name; the pipeline's own for none.

        Raises:
            BadRequestError: for an unknown one, listing those there are.
        """
        if not name:
            return self.pipeline.select
        found = self.pipeline.strategies.get(name)
        if found is None:
            known = ", ".join(sorted(self.pipeline.strategies))
            raise BadRequestError(f"unknown strategy {name!r}; known: {known}", code="unknown_strategy")
        return found
