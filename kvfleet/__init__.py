"""A declarative, plugin-based router and OpenAI-compatible gateway for fleets of LLM engines.

The names here are loaded when first used, so that ``import kvfleet.policy.pii`` does not import an HTTP stack.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvfleet.config.loader import load_config, save_config
    from kvfleet.config.schema import FleetConfig, ModelConfig, RouteStrategy
    from kvfleet.registry.models import ModelRegistry
    from kvfleet.runtime import Router
    from kvfleet.sdk.async_client import AsyncFleetClient
    from kvfleet.sdk.sync_client import SyncFleetClient
    from kvfleet.trace.explanation import Explanation
    from kvfleet.trace.explanation import Explanation as RouteExplanation

    __version__: str

__all__ = [
    "AsyncFleetClient",
    "Explanation",
    "FleetConfig",
    "ModelConfig",
    "ModelRegistry",
    "RouteExplanation",
    "RouteStrategy",
    "Router",
    "SyncFleetClient",
    "__version__",
    "load_config",
    "save_config",
]

_HOMES = {
    "AsyncFleetClient": "kvfleet.sdk.async_client",
    "Explanation": "kvfleet.trace.explanation",
    "FleetConfig": "kvfleet.config.schema",
    "ModelConfig": "kvfleet.config.schema",
    "ModelRegistry": "kvfleet.registry.models",
    "RouteExplanation": "kvfleet.trace.explanation",
    "RouteStrategy": "kvfleet.config.schema",
    "Router": "kvfleet.runtime",
    "SyncFleetClient": "kvfleet.sdk.sync_client",
    "load_config": "kvfleet.config.loader",
    "save_config": "kvfleet.config.loader",
}

_NAMED = {"RouteExplanation": "Explanation"}
"""Names that are others at home: the earlier one of the explanation."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 - 20 ms that most users of the package never need

        return version("kvfleet")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'kvfleet' has no attribute {name!r}")
    return getattr(importlib.import_module(home), _NAMED.get(name, name))


def __dir__() -> list[str]:
    return sorted(__all__)
