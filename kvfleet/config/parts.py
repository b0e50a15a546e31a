"""What one of several workers may have of a limit that is the whole gateway's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.config.schema import FleetConfig, KeyConfig, ModelConfig, StageConfig

__all__ = ["part_of"]

_COUNTED = {
    "admit.concurrency": frozenset({"max_concurrent", "max_per_tenant", "keys"}),
    "admit.queue": frozenset({"max_in_flight", "max_queue"}),
}
"""The options of stages that are counted by each worker."""


def part_of(config: FleetConfig, workers: int) -> FleetConfig:
    """A fleet as one of so many workers serves it: with an equal part, rounded up, of each limit it counts by itself.

    These are requests in flight, and the requests and tokens that providers allow in a minute. Together the workers let
    in as many as the file says, and at most one more for each worker but one.

    >>> part_of(FleetConfig(models=(ModelConfig(name="m", rpm=100),)), 3).models[0].rpm
    34
    """
    if workers == 1:
        return config
    gateway, limits, overload = config.gateway, config.rate_limits, config.overload
    return attrs.evolve(
        config,
        models=tuple(_model(one, workers) for one in config.models),
        rate_limits=attrs.evolve(
            limits, default_rpm=_part(limits.default_rpm, workers), default_tpm=_part(limits.default_tpm, workers)
        ),
        gateway=attrs.evolve(
            gateway,
            max_concurrent=_part(gateway.max_concurrent, workers),
            keys={name: _key(one, workers) for name, one in gateway.keys.items()},
        ),
        overload=attrs.evolve(
            overload,
            max_in_flight=_part(overload.max_in_flight, workers),
            max_queue=_part(overload.max_queue, workers),
        ),
        pipeline=tuple(_stage(one, workers) for one in config.pipeline),
    )


def _part(limit: int, workers: int) -> int:
    return -(-limit // workers)


def _model(model: ModelConfig, workers: int) -> ModelConfig:
    if not model.rpm and not model.tpm:
        return model
    rpm, tpm = (None if limit is None else _part(limit, workers) for limit in (model.rpm, model.tpm))
    return attrs.evolve(model, rpm=rpm, tpm=tpm)


def _key(key: KeyConfig, workers: int) -> KeyConfig:
    return attrs.evolve(key, max_concurrent=_part(key.max_concurrent, workers))


def _stage(stage: StageConfig, workers: int) -> StageConfig:
    counted = _COUNTED.get(stage.use, frozenset())
    options = {name: _option(one, workers) if name in counted else one for name, one in stage.options.items()}
    return attrs.evolve(stage, options=options) if counted else stage


def _option(value: Any, workers: int) -> Any:
    """A limit, or limits by name; what is neither is left to whoever checks it."""
    if isinstance(value, Mapping):
        return {name: _option(one, workers) for name, one in value.items()}
    return _part(value, workers) if isinstance(value, int) and not isinstance(value, bool) else value
