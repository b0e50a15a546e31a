"""An embedding model of the fleet as the maker of vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import orjson

from kvfleet.adapters.call import Call, Limits, Operation
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import RoutingContext
from kvfleet.registry.models import serves
from kvfleet.router.vectors import Vector

__all__ = ["FleetEmbedder"]

_LONGEST_S = 60.0
_BATCH = 64
_HEALTH = "filter.health"


@attrs.define
class FleetEmbedder:
    """Asks a model's ``/v1/embeddings``, one healthy replica of it at a time.

    Only private models are asked, so that no third party sees a prompt on this way, and only for requests that every
    filter of the pipeline lets them have.
    """

    name: str
    replicas: tuple[ModelConfig, ...]
    services: Services = attrs.field(repr=False)
    _waiting: int = attrs.field(init=False, default=0)

    @classmethod
    def of(cls, model: str, services: Services) -> FleetEmbedder:
        """That of a model by its name.

        Raises:
            ValueError: for a model that makes no embeddings, or is not private.
        """
        replicas = tuple(one for one in services.models if one.enabled and one.name == model)
        if not replicas or not all(serves(one, Operation.EMBEDDING) for one in replicas):
            raise ValueError(
                f"the model {model!r} makes no embeddings; set its capabilities: {{model_type: embedding}}"
            )
        if not all(one.is_private for one in replicas):
            raise ValueError(f"the model {model!r} is not private, and would see every prompt; name one that is")
        return cls(model, replicas, services)

    def may_see(self, ctx: RoutingContext) -> bool:
        """True if no filter keeps a replica from the request; who is down now may see it all the same."""
        asked = attrs.evolve(ctx.request, operation=Operation.EMBEDDING, body={"input": ""})
        drops = self.services.excluded(attrs.evolve(ctx, request=asked), self.replicas)
        return all(by == _HEALTH for by, _ in drops)

    @property
    def waiting(self) -> int:
        """Calls under way."""
        return self._waiting

    async def make(self, texts: Sequence[str]) -> Sequence[Vector]:
        """Ask for the vectors.

        Raises:
            BackendError: if there are none.
        """
        self._waiting += 1
        try:
            return [
                vector for at in range(0, len(texts), _BATCH) for vector in await self._ask(texts[at : at + _BATCH])
            ]
        finally:
            self._waiting -= 1

    async def _ask(self, texts: Sequence[str]) -> Sequence[Vector]:
        health, load = self.services.health, self.services.load
        usable = [one for one in self.replicas if health.is_healthy(one.endpoint)] or list(self.replicas)
        replica = min(usable, key=lambda one: load.in_flight(one.id))
        adapter = self.services.adapters[replica.id]
        body = {"model": replica.get_model_id(), "input": list(texts), "encoding_format": "float"}
        limits = Limits(first_byte_s=_LONGEST_S, idle_s=_LONGEST_S)
        reply = await adapter.send(Call(operation=Operation.EMBEDDING, body=body, limits=limits))
        try:
            rows = sorted(orjson.loads(reply.body)["data"], key=lambda row: row.get("index", 0))
            return [_unit([float(value) for value in row["embedding"]]) for row in rows]
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise BackendError(Fault.PROTOCOL, "the backend's answer holds no embeddings") from error

    async def aclose(self) -> None:
        """Nothing is held."""


def _unit(vector: list[float]) -> Vector:
    length = math.sqrt(sum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]
