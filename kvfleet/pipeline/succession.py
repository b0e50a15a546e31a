"""How a pipeline takes the place of another one: what was learned stays with whoever goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping

import anyio
import attrs

from kvfleet.pipeline.stage import BoundStage, Pipeline
from kvfleet.turns import Steps

__all__ = ["Turn", "inherit", "inherit_ahead"]

log = logging.getLogger(__name__)


@attrs.define(eq=False)
class Turn:
    """Whose turn it is to ask a fleet's engines and listen to them: never two routers' at once."""

    _may_begin: asyncio.Event = attrs.field(init=False, factory=asyncio.Event, repr=False)
    _is_over: asyncio.Event = attrs.field(init=False, factory=asyncio.Event, repr=False)
    _scope: anyio.CancelScope | None = attrs.field(init=False, default=None, repr=False)

    def begin(self) -> None:
        """It is this one's turn."""
        self._may_begin.set()

    async def take(self, watch: Callable[[], Awaitable[None]]) -> None:
        """Watch while it is this one's turn, which comes once."""
        self._scope = anyio.CancelScope()  # which needs a running event loop, unlike the rest of a router
        try:
            with self._scope:
                await self._may_begin.wait()
                await watch()
        finally:
            self._is_over.set()

    async def end(self) -> None:
        """It is no more; comes back when nobody watches. A turn that was never taken is over at once."""
        if self._scope is not None:
            self._scope.cancel()
            await self._is_over.wait()


def inherit(pipeline: Pipeline, before: Pipeline) -> Mapping[int, BoundStage]:
    """Hand the state of a pipeline's components on to the same ones of another pipeline.

    The same is who stands under the same kind and name, is made by the same class, and has an ``inherit``. One that
    fails at it begins anew, and the log says so.

    Returns:
        By the identity of a component before: who goes on in its place, and is told the outcomes of requests that the
        pipeline before still serves.
    """
    return {id(same.component): stage for same, stage in _same(pipeline, before) if _hand_on(same, stage)}


def inherit_ahead(pipeline: Pipeline, before: Pipeline) -> Steps[None]:
    """Let components with an ``inherit_ahead`` find out, while those of before go on, how they will go on there."""
    for same, stage in _same(pipeline, before):
        look = getattr(stage.component, "inherit_ahead", None)
        if callable(look):
            try:
                yield from look(same.component)
            except Exception as error:  # noqa: BLE001 - the plugin border: what it did not find out it does later
                log.warning("stage cannot look ahead stage=%s error=%s", stage.key, type(error).__name__)


def _same(pipeline: Pipeline, before: Pipeline) -> Iterator[tuple[BoundStage, BoundStage]]:
    """Who stood there before, and who goes on in its place."""
    known = {stage.key: stage for stage in _all(before)}
    for stage in _all(pipeline):
        same = known.get(stage.key)
        if same is not None and type(same.component) is type(stage.component):
            yield same, stage


def _all(pipeline: Pipeline) -> Iterator[BoundStage]:
    """Every stage once, those of other strategies included, however many names they have."""
    stages = (*pipeline.all_stages, *pipeline.strategies.values())
    yield from {id(stage.component): stage for stage in stages}.values()


def _hand_on(before: BoundStage, now: BoundStage) -> bool:
    take_over = getattr(now.component, "inherit", None)
    if not callable(take_over):
        return False
    try:
        take_over(before.component)
    except Exception as error:  # noqa: BLE001 - the plugin border: a reload must not stop half way
        log.warning("stage begins anew stage=%s error=%s", now.key, type(error).__name__)
        return False
    return True
