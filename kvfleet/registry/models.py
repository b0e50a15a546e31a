"""The models of a fleet, and the replicas they run on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs

from kvfleet.adapters.call import Operation
from kvfleet.config.schema import DEFAULT_ENDPOINTS, ModelConfig
from kvfleet.telemetry.cost import with_known_prices

__all__ = ["ModelRegistry", "replicas_of"]

_SERVES = {
    "chat": frozenset({Operation.CHAT, Operation.COMPLETION}),
    "completion": frozenset({Operation.COMPLETION}),
    "embedding": frozenset({Operation.EMBEDDING}),
    "rerank": frozenset({Operation.RERANK}),
}
"""What each type of model serves. Engines that chat also complete plain text; a completion model has no template."""


def serves(model: ModelConfig, operation: Operation) -> bool:
    """True if a model of this type answers such calls."""
    return operation in _SERVES.get(model.capabilities.model_type, ())


def replicas_of(model: ModelConfig) -> tuple[ModelConfig, ...]:
    """A model as its replicas: one `ModelConfig` for each endpoint, or rank behind one, with the prices that hold.

    A model without an endpoint is where its provider is; if that is nowhere in particular, its replica gets one of the
    form ``provider://name``. A self-hosted engine without a price costs nothing; others get the built-in list's, and
    what it does not know stays unknown (`kvfleet.telemetry.cost`).

    >>> [r.id for r in replicas_of(ModelConfig(name="m", endpoint="http://a:1", replicas=("http://b:1",)))]
    ['m@http://a:1', 'm@http://b:1']
    """
    priced = attrs.evolve(with_known_prices(model), replicas=(), data_parallel_ranks=1)
    endpoints = model.all_endpoints() or (DEFAULT_ENDPOINTS.get(model.provider) or f"{model.provider}://{model.name}",)
    return tuple(attrs.evolve(priced, endpoint=endpoint) for endpoint in endpoints)


@attrs.define
class ModelRegistry:
    """The models of a fleet by name, in the order they came.

    `replicas` and `replicas_for` are computed once and kept until a model changes.
    """

    _models: dict[str, ModelConfig] = attrs.field(init=False, factory=dict, repr=False)
    _replicas: tuple[ModelConfig, ...] | None = attrs.field(init=False, default=None, repr=False)
    _serving: dict[Operation, tuple[ModelConfig, ...]] = attrs.field(init=False, factory=dict, repr=False)

    @classmethod
    def from_configs(cls, models: Iterable[ModelConfig]) -> ModelRegistry:
        """A registry of these models.

        Raises:
            ValueError: if two have one name.
        """
        registry = cls()
        for model in models:
            registry.register(model)
        return registry

    # Changing

    def register(self, model: ModelConfig) -> None:
        """Add a model.

        Raises:
            ValueError: if its name is taken.
        """
        if model.name in self._models:
            raise ValueError(f"model {model.name!r} is already registered")
        self._put(model)

    def unregister(self, name: str) -> None:
        """Take a model out.

        Raises:
            KeyError: if there is none of that name.
        """
        self.get(name)
        del self._models[name]
        self._changed()

    def update(self, name: str, /, **fields: Any) -> ModelConfig:
        """Change some fields of a model; the model as it is then.

        Raises:
            KeyError: if there is none of that name.
            TypeError: for a field models do not have.
            ValueError: if its new name is taken.
        """
        old = self.get(name)
        model = attrs.evolve(old, **fields)
        if model.name != name and model.name in self._models:
            raise ValueError(f"model {model.name!r} is already registered")
        # Rebuilt, so that a renamed model keeps its place.
        self._models = {m.name: m for m in (model if m is old else m for m in self._models.values())}
        self._changed()
        return model

    def enable(self, name: str) -> None:
        """Let a model take part in routes.

        Raises:
            KeyError: if there is none of that name.
        """
        self.update(name, enabled=True)

    def disable(self, name: str) -> None:
        """Keep a model out of every route.

        Raises:
            KeyError: if there is none of that name.
        """
        self.update(name, enabled=False)

    # Reading

    def get(self, name: str) -> ModelConfig:
        """The model of that name.

        Raises:
            KeyError: if there is none.
        """
        try:
            return self._models[name]
        except KeyError:
            raise KeyError(f"no model is called {name!r}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._models

    def __iter__(self) -> Iterator[ModelConfig]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    @property
    def count(self) -> int:
        """How many models there are."""
        return len(self._models)

    @property
    def enabled_count(self) -> int:
        """How many of them are enabled."""
        return sum(model.enabled for model in self._models.values())

    @property
    def replicas(self) -> tuple[ModelConfig, ...]:
        """Every replica of every enabled model."""
        if self._replicas is None:
            self._replicas = tuple(r for m in self._models.values() if m.enabled for r in replicas_of(m))
        return self._replicas

    def replicas_for(self, operation: Operation) -> tuple[ModelConfig, ...]:
        """The replicas whose type of model answers such calls; chat models also complete plain text."""
        found = self._serving.get(operation)
        if found is None:
            found = self._serving[operation] = tuple(r for r in self.replicas if serves(r, operation))
        return found

    def list_models(
        self,
        *,
        enabled_only: bool = True,
        provider: str | None = None,
        tags: Mapping[str, str] | None = None,
        data_class: str | None = None,
        min_quality: float | None = None,
        max_cost: float | None = None,
        supports_tools: bool | None = None,
        supports_json_mode: bool | None = None,
        supports_streaming: bool | None = None,
        model_type: str | None = None,
    ) -> list[ModelConfig]:
        """The models that fit everything asked; what is None is not asked.

        Args:
            enabled_only: Leave out disabled ones.
            provider: The adapter's name.
            tags: All must match.
            data_class: They may see it.
            min_quality: Least quality, 0..1.
            max_cost: Highest price of 1,000 prompt tokens in US dollars; a price that is not known does not fit.
            supports_tools: They accept tools.
            supports_json_mode: They honour `response_format`.
            supports_streaming: They can stream.
            model_type: chat, completion, embedding or rerank.
        """
        able = {
            "supports_tools": supports_tools,
            "supports_json_mode": supports_json_mode,
            "supports_streaming": supports_streaming,
            "model_type": model_type,
        }
        asked = {name: value for name, value in able.items() if value is not None}
        return [
            model
            for model in self._models.values()
            if (model.enabled or not enabled_only)
            and provider in (None, model.provider)
            and all(model.tags.get(key) == value for key, value in (tags or {}).items())
            and (data_class is None or data_class in model.allowed_data_classes)
            and (min_quality is None or model.quality_score >= min_quality)
            and (max_cost is None or _costs_at_most(model, max_cost))
            and all(getattr(model.capabilities, name) == value for name, value in asked.items())
        ]

    def summary(self) -> dict[str, Any]:
        """Counts, providers with their number of models, and a line for each model."""
        return {
            "total": self.count,
            "enabled": self.enabled_count,
            "providers": dict(Counter(model.provider for model in self._models.values())),
            "models": [
                {
                    "name": model.name,
                    "provider": model.provider,
                    "endpoint": model.endpoint,
                    "enabled": model.enabled,
                    "quality": model.quality_score,
                    "cost_1k_input": model.cost_per_1k_input_tokens,
                }
                for model in self._models.values()
            ],
        }

    # How

    def _put(self, model: ModelConfig) -> None:
        self._models[model.name] = model
        self._changed()

    def _changed(self) -> None:
        self._replicas = None
        self._serving.clear()


def _costs_at_most(model: ModelConfig, most_usd: float) -> bool:
    price = model.cost_per_1k_input_tokens
    return model.is_self_hosted if price is None else price <= most_usd
