"""The table of the gateway's routes: who may call what, and on which listener it stands."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Self

import attrs

from kvfleet.gateway.exchange import Exchange

__all__ = ["Access", "Handler", "Route", "Table"]

Handler = Callable[[Exchange], Awaitable[None]]

_NOTHING: Mapping[str, Route] = {}


class Access(enum.StrEnum):
    """Who may call a route."""

    OPEN = "open"  # anybody: it tells nothing but that the gateway is there
    KEY = "key"  # whoever has one of the gateway's keys, if it has any
    ADMIN = "admin"  # whoever has an admin's, because it tells of all tenants


@attrs.frozen
class Route:
    """One entry of the table.

    Attributes:
        method: GET (which also answers HEAD) or POST.
        path: As documented; a last part in braces stands for the rest of the path.
        access: Who may call it.
        handler: What answers.
        is_operators: True if it leaves the clients' listener where operators have one of their own.
    """

    method: str
    path: str
    access: Access
    handler: Handler
    is_operators: bool = attrs.field()

    @is_operators.default
    def _is_admins(self) -> bool:
        return self.access is Access.ADMIN


@attrs.frozen
class Table:
    """Routes by path."""

    _by_path: Mapping[str, Mapping[str, Route]] = attrs.field(alias="by_path", repr=False)
    _by_prefix: tuple[tuple[str, Mapping[str, Route]], ...] = attrs.field(alias="by_prefix", repr=False)

    @classmethod
    def of(cls, routes: Iterable[Route]) -> Self:
        """The table by path, and by prefix for those whose last part is a parameter."""
        by_path: dict[str, dict[str, Route]] = {}
        by_prefix: dict[str, dict[str, Route]] = {}
        for route in routes:
            fixed, brace, _ = route.path.partition("{")
            (by_prefix if brace else by_path).setdefault(fixed, {})[route.method] = route
        return cls(by_path, tuple(by_prefix.items()))

    def methods(self, path: str) -> Mapping[str, Route]:
        """What may be done with a path, by method."""
        found = self._by_path.get(path)
        if found is not None:
            return found
        return next((methods for prefix, methods in self._by_prefix if path.startswith(prefix)), _NOTHING)
