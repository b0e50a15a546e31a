"""What one of several workers may have of a limit that is the whole gateway's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.config.overload import QueueOptions
from kvfleet.config.schema import FleetConfig, KeyConfig, ModelConfig, StageConfig

__all__ = ["part_of"]

_COUNTED = {
    "admit.concurrency": frozenset({"max_concurrent", "max_per_tenant", "keys"}),
    "admit.queue": frozenset({"max_in_flight", "max_queue"}),
}
"""The options of stages that are counted by each worker."""
_USUAL = {"admit.queue": {"max_queue": attrs.fields(QueueOptions).max_queue.default}}
"""Limits that a stage has if its options are written and these are not."""


def part_of(config: FleetConfig, workers: int, number: int) -> FleetConfig:
    """A fleet as one of so many workers serves it: with an equal part of each limit that it counts by itself.

    These are connections, requests in flight, those that wait, and what providers allow in a minute. What does not come
    out even goes to the first of them, so that together they let in what the file says, and no more; but of what is no
    limit if 0 each has one at least.

    Args:
        config: The fleet.
        workers: How many there are.
        number: Which of them it is, from 0.

    >>> [part_of(FleetConfig(models=(ModelConfig(name="m", rpm=100),)), 3, n).models[0].rpm for n in range(3)]
    [34, 33, 33]
    """
    if workers == 1:
        return config
    part = _Part(workers, number)
    gateway, limits, overload = config.gateway, config.rate_limits, config.overload
    return attrs.evolve(
        config,
        models=tuple(part.model(one) for one in config.models),
        rate_limits=attrs.evolve(
            limits, default_rpm=part.of(limits.default_rpm), default_tpm=part.of(limits.default_tpm)
        ),
        gateway=attrs.evolve(
            gateway,
            max_concurrent=part.of(gateway.max_concurrent),
            keys={name: part.key(one) for name, one in gateway.keys.items()},
            limits=attrs.evolve(gateway.limits, max_connections=part.of(gateway.limits.max_connections)),
        ),
        overload=attrs.evolve(
            overload,
            max_in_flight=part.of(overload.max_in_flight),
            max_queue=part.exactly(overload.max_queue),
        ),
        pipeline=tuple(part.stage(one) for one in config.pipeline),
    )


@attrs.frozen
class _Part:
    """One worker's part of whatever it is."""

    workers: int
    number: int

    def exactly(self, limit: int) -> int:
        """Of a limit of which a worker may have nothing."""
        return limit // self.workers + (self.number < limit % self.workers)

    def of(self, limit: int) -> int:
        """Of a limit of which 0 is none."""
        return max(self.exactly(limit), 1) if limit else 0

    def model(self, model: ModelConfig) -> ModelConfig:
        if not model.rpm and not model.tpm:
            return model
        rpm, tpm = (None if limit is None else self.of(limit) for limit in (model.rpm, model.tpm))
        return attrs.evolve(model, rpm=rpm, tpm=tpm)

    def key(self, key: KeyConfig) -> KeyConfig:
        return attrs.evolve(key, max_concurrent=self.of(key.max_concurrent))

    def stage(self, stage: StageConfig) -> StageConfig:
        counted = _COUNTED.get(stage.use, frozenset())
        written = {**_USUAL.get(stage.use, {}), **stage.options} if stage.options else stage.options
        options = {name: self._option(name, one) if name in counted else one for name, one in written.items()}
        return attrs.evolve(stage, options=options) if counted else stage

    def _option(self, name: str, value: Any) -> Any:
        """A limit, or limits by name; what is neither is left to whoever checks it."""
        if isinstance(value, Mapping):
            return {key: self._option(key, one) for key, one in value.items()}
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        return self.exactly(value) if name == "max_queue" else self.of(value)
