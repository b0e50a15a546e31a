"""``GET /v1/models``: what a client may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvfleet.config.expand import strategy_of
from kvfleet.config.schema import AUTO_MODEL, AliasConfig, FleetConfig, ModelConfig

__all__ = ["catalogue"]


def catalogue(config: FleetConfig, created: int) -> Mapping[str, dict[str, Any]]:
    """Model objects by their ids: ``auto``, the aliases, and the enabled models, in this order.

    What a model can do stands under ``kvfleet``; where it runs is not said.

    Args:
        config: The fleet.
        created: Unix time in seconds, which OpenAI's clients require.
    """
    found = {AUTO_MODEL: _object(AUTO_MODEL, created, {"kind": "auto", "strategy": strategy_of(config)})}
    for name, alias in config.aliases.items():
        found[name] = _object(name, created, _alias_hints(alias))
    for model in config.models:
        if model.enabled:
            found[model.name] = _object(model.name, created, _model_hints(model))
    return found


def _object(name: str, created: int, hints: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "kvfleet", "kvfleet": hints}


def _alias_hints(alias: AliasConfig) -> dict[str, Any]:
    return {"kind": "alias", "strategy": alias.strategy or None, "models": list(alias.models) or None}


def _model_hints(model: ModelConfig) -> dict[str, Any]:
    can = model.capabilities
    return {
        "kind": "model",
        "type": can.model_type,
        "provider": model.provider,
        "replicas": max(1, len(model.all_endpoints())),
        "context_window": can.max_context_window,
        "supports": {
            "streaming": can.supports_streaming,
            "tools": can.supports_tools,
            "json_mode": can.supports_json_mode,
            "vision": can.supports_vision,
            "audio": can.supports_audio,
            "video": can.supports_video,
        },
        "quality": model.quality_score,
    }
