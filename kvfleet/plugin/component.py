"""A component as it is registered, and what it is given when it is built."""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from kvfleet.adapters.base import InferenceAdapter
from kvfleet.cache.knowledge import CacheKnowledge
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import ComponentError
from kvfleet.plugin.contract import Answer, Attempt, Drop, Fact, Kind, Outcome, RoutingContext
from kvfleet.policy.shared_minutes import SharedMinute
from kvfleet.router.embedding import Embeddings
from kvfleet.router.scoring import Ranking
from kvfleet.telemetry.fleet_limits import FleetLimits
from kvfleet.telemetry.health import HealthManager
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.metrics import MetricsExporter
from kvfleet.trace.spans import Span

__all__ = ["Component", "Services", "Stability"]

_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Stability(enum.StrEnum):
    """How much a component's options may still change."""

    ALPHA = "alpha"
    BETA = "beta"
    STABLE = "stable"
    DEPRECATED = "deprecated"


@attrs.frozen
class Component:
    """One thing a plugin brings.

    Attributes:
        kind: What it is.
        name: lower_snake_case; YAML writes ``<kind>.<name>`` (an adapter's and an action's name stand alone).
        cls: An attrs class: its init fields are its options.
        needs: Facts that an earlier stage must give.
        gives: Facts it gives, all of them, each time.
        must_hold: True if it must never be skipped when it fails (policy).
        stability: See `Stability`.
        aliases: Other names that mean the same.
        distribution: Who brought it; filled in by the manager.
    """

    kind: Kind
    name: str
    cls: type[Any]
    needs: tuple[Fact[Any], ...] = ()
    gives: tuple[Fact[Any], ...] = ()
    must_hold: bool = False
    stability: Stability = Stability.BETA
    aliases: tuple[str, ...] = ()
    distribution: str = ""

    def __attrs_post_init__(self) -> None:
        """Check what can be checked without running anything.

        Raises:
            ComponentError: for a bad name, a class that is not an attrs class, or one without its kind's verb.
        """
        for name in (self.name, *self.aliases):
            if not _NAME.fullmatch(name):
                raise ComponentError(f"component name {name!r} must be lower_snake_case")
        if not attrs.has(self.cls):
            raise ComponentError(
                f"{self.key}: {self.cls.__qualname__} must be an attrs class; its fields are its options"
            )
        if self.kind.verb and not callable(getattr(self.cls, self.kind.verb, None)):
            raise ComponentError(f"{self.key}: {self.cls.__qualname__} has no method {self.kind.verb}()")

    @property
    def key(self) -> str:
        """The name as YAML has it: ``filter.health``, and bare for an adapter or an action's own place."""
        return f"{self.kind}.{self.name}"

    @property
    def summary(self) -> str:
        """The first line of the class's docstring."""
        return (inspect.getdoc(self.cls) or "").partition("\n")[0]


def _no_lookup(kind: Kind, name: str) -> Component:
    raise ComponentError(f"no {kind} component is called {name!r}")


def _everybody(ctx: RoutingContext, models: Sequence[ModelConfig]) -> Sequence[tuple[str, Drop]]:  # noqa: ARG001
    return [("", Drop(model, "no pipeline could be asked")) for model in models]


@attrs.define(kw_only=True)
class Services:
    """What a component may use, given to its ``provision(services)`` once, before any request.

    Attributes:
        clock: The time.
        models: Every replica of the fleet.
        health: Which endpoints may be used.
        load: What is in flight where, what the engines say, and measured times.
        limits: The backends' rate limits, and whom to leave alone for now.
        caches: What engines themselves tell of their KV caches.
        metrics: Counters and histograms.
        find: Looks up another component by kind and name, for stages that use actions.
        adapters: By replica id; filled before the components are opened.
        execute: The pipeline's execute stage; a stage that calls models beside the route calls them through it, so that
            what it does to requests and answers (redaction) is done to these too.
        excluded: Who, of any models, the pipeline's filters keep from a request: each drop with its stage's name. It
            is for stages that call models beside the route, which must obey what the route obeys.
        rate: Tells the strategies that learn how good an answer was, 0 to 1, by its request's identifier; gives the
            model that answered, or None if nobody remembers it, or somebody has rated it already.
        annotate: Adds a span to the record of a route that has ended, wherever that is kept or exported.
        limit_usd: The most that this one request may cost, by the stages that limit it; None for no limit.
        most_usd: From what one answer of each candidate's model may cost, the most a route may: that of the dearest,
            unless the execute stage may pay for several.
        embeddings: Makes vectors of texts, once a stage before has brought an embedder; None without one.
        fleet: Its name.
        state_dir: Where components keep what outlives the process; None to keep nothing.
        minutes: Gives the last minute of an account, by its name, as all workers have it; None if there is one worker.
        news: Has the same component in the gateway's other workers ``hear`` something; None where there are none.
    """

    clock: Clock = attrs.field(factory=SystemClock)
    models: tuple[ModelConfig, ...] = ()
    health: HealthManager = attrs.field(factory=HealthManager)
    load: FleetLoad = attrs.field(factory=FleetLoad)
    limits: FleetLimits = attrs.field(factory=FleetLimits)
    caches: CacheKnowledge = attrs.field(factory=CacheKnowledge)
    metrics: MetricsExporter = attrs.field(factory=MetricsExporter)
    find: Callable[[Kind, str], Component] = _no_lookup
    adapters: Mapping[str, InferenceAdapter] = attrs.field(factory=dict)
    execute: Callable[[RoutingContext, Ranking, Attempt], Awaitable[Answer]] | None = None
    excluded: Callable[[RoutingContext, Sequence[ModelConfig]], Sequence[tuple[str, Drop]]] = _everybody
    rate: Callable[[str, float], str | None] = lambda _, __: None
    annotate: Callable[[Outcome, Span], None] = lambda _, __: None
    limit_usd: Callable[[RoutingContext], float | None] = lambda _: None
    most_usd: Callable[[Mapping[str, float]], float] | None = None
    embeddings: Embeddings | None = None
    fleet: str = "default"
    state_dir: Path | None = None
    news: Callable[[Any, bytes], None] | None = None
    minutes: Callable[[str], SharedMinute] | None = None

    def let_go(self) -> None:
        """Know nothing more of the pipeline, which has ended: who has these services is a part of it."""
        for field in attrs.fields(Services):
            if not isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]  # a class, in spite of its stub
                setattr(self, field.name, field.default)
        self.adapters = {}
