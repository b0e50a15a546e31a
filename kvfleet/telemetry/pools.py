"""Which endpoints serve the same model, and what is fair to the fleet when some of them are left alone."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType

import attrs

from kvfleet.config.schema import ModelConfig

__all__ = ["Pools"]


@attrs.define
class Pools:
    """The endpoints of each model.

    Args:
        max_ejection_percent: Most of a pool that may be left alone for how it answers, in percent; but always one.
        panic_threshold_percent: If a smaller share of a pool may be called, all of it may; never if 0.
    """

    max_ejection_percent: float = 100.0
    panic_threshold_percent: float = 0.0
    _of: dict[str, tuple[str, ...]] = attrs.field(init=False, factory=dict, repr=False)
    _with: dict[str, tuple[str, ...]] = attrs.field(init=False, factory=dict, repr=False)

    def register(self, models: Iterable[ModelConfig]) -> None:
        """Know these replicas, and no others."""
        of: dict[str, dict[str, None]] = {}
        held: dict[str, dict[str, None]] = {}
        for model in models:
            if model.enabled:
                of.setdefault(model.name, {})[model.endpoint] = None
                held.setdefault(model.endpoint, {})[model.name] = None
        self._of = {name: tuple(endpoints) for name, endpoints in of.items()}
        self._with = {endpoint: tuple(names) for endpoint, names in held.items()}

    @property
    def endpoints(self) -> Mapping[str, tuple[str, ...]]:
        """The endpoints of each model."""
        return MappingProxyType(self._of)

    def may_eject(self, endpoint: str, out: Container[str]) -> bool:
        """True if one more endpoint may be left alone for how it answers, beside those that are.

        >>> pools = Pools(max_ejection_percent=50)
        >>> pools.register(ModelConfig(name="m", endpoint=f"http://gpu-{i}") for i in range(3))
        >>> pools.may_eject("http://gpu-0", ()), pools.may_eject("http://gpu-1", ("http://gpu-0",))
        (True, False)
        """
        for name in self._with.get(endpoint, ()):
            pool = self._of[name]
            others = sum(one != endpoint and one in out for one in pool)
            if others and 100 * (others + 1) > self.max_ejection_percent * len(pool):
                return False
        return True

    def in_panic(self, out: Container[str]) -> Mapping[str, tuple[str, ...]]:
        """The models of which too few replicas may be called, each with its endpoints; a pool of one has no peers."""
        if not self.panic_threshold_percent:
            return {}
        return {
            name: pool
            for name, pool in self._of.items()
            if len(pool) > 1 and 100 * sum(one not in out for one in pool) < self.panic_threshold_percent * len(pool)
        }
