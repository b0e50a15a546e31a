"""Names for replicas that say nothing of where they run, and the removal of addresses from what leaves the gateway."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import attrs

from kvfleet.config.schema import ModelConfig

__all__ = ["ReplicaNames"]

# `scheme://host…`, `host:port` (either may follow `model@`), the pair as Python writes it, as in "('gpu-1', 8000)",
# and a bare IPv4 address.
_ADDRESS = re.compile(
    r"(?P<model>[^\s\"'@]+@)?"
    r"(?P<place>[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>(),;\]}]+"
    r"|(?:\[[0-9A-Fa-f:]+\]|[A-Za-z0-9_.-]+):\d{1,5}(?!\d))"
    r"|[\"'](?P<host>[A-Za-z0-9_.:-]+)[\"'], ?(?P<port>\d{1,5})(?!\d)"
    r"|(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])"
)


@attrs.frozen
class ReplicaNames:
    """Opaque names such as ``llama-3-8b#2``: the model, and its replica counted from 1 in the fleet's order.

    Attributes:
        by_id: The name of each replica by its id.
    """

    by_id: Mapping[str, str]
    _encoded: Mapping[str, tuple[bytes, bytes]] = attrs.field(repr=False, alias="encoded")
    _by_place: Mapping[str, str] = attrs.field(repr=False, alias="by_place")

    @classmethod
    def of(cls, models: Sequence[ModelConfig]) -> ReplicaNames:
        """Name the replicas of a fleet."""
        counts: dict[str, int] = {}
        by_id: dict[str, str] = {}
        encoded: dict[str, tuple[bytes, bytes]] = {}
        by_place: dict[str, str] = {}
        for model in models:
            counts[model.name] = counts.get(model.name, 0) + 1
            name = f"{model.name}#{counts[model.name]}"
            by_id[model.id] = name
            encoded[model.id] = (model.name.encode(), name.encode())
            for place in _places(model.endpoint):
                by_place[f"{model.name}@{place}"] = name
                by_place.setdefault(place, name)
        return cls(by_id, encoded, by_place)

    def header_values(self, replica: ModelConfig) -> tuple[bytes, bytes]:
        """The names of a replica's model and of the replica itself, as header values."""
        found = self._encoded.get(replica.id)
        return found if found is not None else (replica.name.encode(), replica.name.encode())

    def hide(self, text: str) -> str:
        """The text with every address of a backend replaced by a replica's name; other addresses stay.

        >>> names = ReplicaNames.of([ModelConfig(name="m", endpoint="http://gpu-1:8000/v1")])
        >>> names.hide("connect to gpu-1:8000 failed; see https://docs.example/errors")
        'connect to m#1 failed; see https://docs.example/errors'
        """
        if ":" not in text and "." not in text and "'" not in text and '"' not in text:
            return text  # as most keys and names are; no address is written without one of these
        return _ADDRESS.sub(self._name_of, text)

    def _name_of(self, match: re.Match[str]) -> str:
        model, place = match["model"] or "", match["place"] or match[0]
        if match["host"]:
            place = f"{match['host']}:{match['port']}"
        for known in (match[0], model + _netloc(place), place, _netloc(place)):
            if known in self._by_place:
                return self._by_place[known]
        return match[0]

    def hide_in(self, value: Any) -> Any:
        """JSON data with every text in it hidden, keys included."""
        if isinstance(value, str):
            return self.hide(value)
        if value is None or isinstance(value, int | float):
            return value
        if type(value) is dict or isinstance(value, Mapping):  # to ask for an abstract class costs 0.5 µs
            return {self.hide(str(key)): self.hide_in(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide_in(item) for item in value]
        return value


def _netloc(address: str) -> str:
    return urlsplit(address).netloc if "://" in address else address


def _places(endpoint: str) -> tuple[str, ...]:
    """The texts that would give an endpoint away, beside its replica's id."""
    if not endpoint:
        return ()
    parts = urlsplit(endpoint)
    is_ipv4 = re.fullmatch(r"\d{1,3}(?:\.\d{1,3}){3}", parts.hostname or "") is not None
    return (endpoint, parts.netloc, *((parts.hostname or "",) if is_ipv4 else ()))
