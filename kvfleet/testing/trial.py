"""A component on trial: fresh instances, contexts to try it on, and the breaches found."""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import attrs

from kvfleet.errors import RouteError
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Fact, Kind, RoutingContext
from kvfleet.plugin.manager import ComponentTable
from kvfleet.testing.samples import facts_for, sample_context, sample_models, sample_requests, sample_services

__all__ = ["FAILED", "Breaches", "Trial"]

FAILED: Any = object()
"""Stands for the result of what gave none."""


@attrs.frozen(kw_only=True)
class Trial:
    """One component under trial.

    Attributes:
        kind: What it is.
        make: Makes and wires a fresh instance.
        component: Its registration, if that is known.
        facts: Facts the author gave.
        table: The installed components.
    """

    kind: Kind
    make: Callable[[Services], Any]
    component: Component | None
    facts: Mapping[Fact[Any], Any]
    table: ComponentTable

    def fresh(self) -> Any:
        """A fresh, wired instance."""
        return self.make(sample_services(table=self.table))

    @property
    def needs(self) -> tuple[Fact[Any], ...]:
        """The facts to give it: those it declares, or all there are if its registration is not known."""
        if self.component is not None:
            return self.declared
        return tuple(fact for one in self.table.of_kind(Kind.CLASSIFY) for fact in one.gives)

    @property
    def declared(self) -> tuple[Fact[Any], ...]:
        """The facts it declares to need: in its registration, and with the options it has here."""
        own = getattr(self.fresh(), "required_facts", None)
        registered = self.component.needs if self.component is not None else ()
        return (*registered, *(own() if callable(own) else ()))

    async def contexts(self, *, dry_run: bool = False) -> list[RoutingContext]:
        """Every kind of request before all candidates, and one request before a single one."""
        models = sample_models()
        pairs = [(request, models) for request in sample_requests()]
        pairs.append((pairs[0][0], models[:1]))
        found = []
        for request, candidates in pairs:
            context = sample_context(request, candidates, facts=self.facts, dry_run=dry_run)
            facts = await facts_for(self.needs, context, self.table)
            found.append(attrs.evolve(context, facts=facts))
        return found

    async def missing(self) -> list[str]:
        """Breaches for the facts it needs and nobody gives."""
        context = (await self.contexts())[0]
        return [
            f"it needs the fact {fact.name!r}, which no installed classifier gives; pass check_component facts={{…: …}}"
            for fact in self.declared
            if fact not in context.facts
        ]


@attrs.define
class Breaches:
    """Breaches, each once, in the order they were found; and how many tries went through, or refused the request."""

    found: dict[str, None] = attrs.field(init=False, factory=dict)
    went: int = attrs.field(init=False, default=0)
    refused: int = attrs.field(init=False, default=0)

    def add(self, *breaches: str) -> None:
        """Add some."""
        self.found.update(dict.fromkeys(breaches))

    def trying(self, what: str, ctx: RoutingContext, work: Callable[..., Any], *args: Any) -> Any:
        """The result of `work`; `FAILED` if it refuses the request with a RouteError, or (with a breach) fails."""
        before = _snapshot(ctx)
        try:
            result = work(*args)
        except RouteError:
            self.refused += 1
            return FAILED
        except Exception as error:  # noqa: BLE001 - whatever a component raises is the breach
            self.add(f"{what} fails for {_words(ctx)}: {type(error).__name__}: {error}")
            return FAILED
        self._compare(what, before, ctx)
        self.went += 1
        return result

    async def awaiting(self, what: str, ctx: RoutingContext, work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """The same for a verb that may wait."""
        before = _snapshot(ctx)
        try:
            result = await work(*args)
        except RouteError:
            self.refused += 1
            return FAILED
        except Exception as error:  # noqa: BLE001 - whatever a component raises is the breach
            self.add(f"{what} fails for {_words(ctx)}: {type(error).__name__}: {error}")
            return FAILED
        self._compare(what, before, ctx)
        self.went += 1
        return result

    def _compare(self, what: str, before: Mapping[str, Any], ctx: RoutingContext) -> None:
        after = _snapshot(ctx)
        self.add(*(f"{what} changes its input: {name}" for name in before if before[name] != after[name]))

    def all(self) -> list[str]:
        """All of them; refusing every request is one too, since then nothing else could be seen."""
        if self.refused and not self.went:
            self.add("it refuses every sample request; give check_component options with which it lets one through")
        return list(self.found)


def _snapshot(ctx: RoutingContext) -> dict[str, Any]:
    return {
        "the request's body": copy.deepcopy(ctx.request.body),
        "the candidates": [model.id for model in ctx.candidates],
        "the facts": {fact.name: id(value) for fact, value in ctx.facts.items()},
        "the affinity": dict(ctx.affinity),
        "the columns": {name: (column.unit, tuple(column.values)) for name, column in ctx.columns.items()},
    }


def _words(ctx: RoutingContext) -> str:
    count = len(ctx.candidates)
    return f"a request for {ctx.request.operation.value} with {count} candidate{'s' if count > 1 else ''}"
