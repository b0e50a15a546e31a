"""Calls beside the requests' own: who may be asked, and a crew that makes them, bounded and cancelled at close."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Generic, TypeVar

import attrs

from kvfleet.adapters.call import Operation
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import NoCandidatesError
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Drop, RoutingContext

__all__ = ["Crew", "judging_replica", "permitted"]

log = logging.getLogger(__name__)

T = TypeVar("T")


def permitted(
    ctx: RoutingContext, models: Sequence[ModelConfig], services: Services
) -> tuple[list[ModelConfig], list[tuple[str, Drop]]]:
    """One replica of each model that may see the request, the least busy; and the drops, each with its stage's name.

    Every filter of the pipeline must let a replica pass, and so must the caller's own list of allowed models. What is
    left of a rate limit is for the requests themselves.
    """
    allowed = ctx.request.allowlist
    asked, drops = list(models), []
    if allowed is not None:
        reason = "not on the request's list of allowed models"
        asked = [model for model in models if model.name in allowed]
        drops = [("request", Drop(model, reason)) for model in models if model.name not in allowed]
    drops += services.excluded(ctx, asked)
    gone = {drop.candidate.id for _, drop in drops}
    now_s = services.clock.now_s()
    held = services.limits.held([model for model in asked if model.id not in gone], now_s)
    drops += [("rate limits", Drop(model, hold.reason(now_s), hold.rule)) for model, hold in held]
    gone |= {model.id for model, _ in held}
    return _least_busy([model for model in asked if model.id not in gone], services), drops


def judging_replica(name: str, ctx: RoutingContext, services: Services) -> ModelConfig:
    """A replica of a model that is to judge an answer to this request.

    Raises:
        NoCandidatesError: if it may not see the request, is not there, or the request is no chat.
    """
    if ctx.request.operation is not Operation.CHAT:
        raise NoCandidatesError("only chats can be judged by a model")
    replicas = [model for model in services.models if model.enabled and model.name == name]
    chosen, drops = permitted(ctx, replicas, services)
    if not chosen:
        why = f"{drops[0][1].reason} [{drops[0][0]}]" if drops else "it is not there"
        raise NoCandidatesError(f"{name} may not see the request: {why}")
    return chosen[0]


def _least_busy(models: Iterable[ModelConfig], services: Services) -> list[ModelConfig]:
    best: dict[str, ModelConfig] = {}
    load = services.load
    for model in models:
        known = best.get(model.name)
        if known is None or load.in_flight(model.id) < load.in_flight(known.id):
            best[model.name] = model
    return list(best.values())


@attrs.define(eq=False)
class Crew(Generic[T]):
    """Does jobs, so many at once; others wait, and beyond that none is taken.

    Args:
        do: Does one job; what it raises is logged by its type and ends that job alone.
        name: Of the tasks, and in the log.
        most_at_once, most_waiting: The bounds.
    """

    do: Callable[[T], Awaitable[None]]
    name: str
    most_at_once: int
    most_waiting: int
    _queue: deque[T] = attrs.field(init=False, factory=deque, repr=False)
    _workers: set[asyncio.Task[None]] = attrs.field(init=False, factory=set, repr=False)

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._queue)

    @property
    def at_work(self) -> int:
        """Jobs under way."""
        return len(self._workers)

    def has_room_for(self, number: int) -> bool:
        """True if so many jobs more can be taken."""
        return self.waiting + number <= self.most_waiting + max(self.most_at_once - self.at_work, 0)

    def take(self, jobs: Iterable[T]) -> None:
        """Begin jobs, or let them wait; returns at once."""
        self._queue.extend(jobs)
        while self._queue and self.at_work < self.most_at_once:
            worker = asyncio.create_task(self._work(self._queue.popleft()), name=self.name)
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)

    async def _work(self, job: T) -> None:
        """Do this job, and then others as long as there are any."""
        while True:
            try:
                await self.do(job)
            except Exception as error:  # noqa: BLE001 - a judge or a disk that fails must not end the others' work
                log.warning("%s failed error=%s", self.name, type(error).__name__)
            if not self._queue:
                return
            job = self._queue.popleft()

    async def settled(self) -> None:
        """Wait until nothing is under way."""
        while self._workers:
            await asyncio.wait(set(self._workers))

    async def aclose(self) -> None:
        """Cancel what is under way and forget what waits; twice is safe."""
        self._queue.clear()
        workers = list(self._workers)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
