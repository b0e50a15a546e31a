"""What is in flight where, what the engines say of themselves, and what both mean for the next request, in seconds.

A call to a replica is a *reservation*: the prompt tokens it has yet to compute, until its first byte; the memory it
holds, until its end. It is released exactly once, however the call ends, and by a lease if nobody says so. What the
engines report is added where it is news: requests of others, the KV cache in use. A report grows old and then says
nothing; an engine that says nothing is not full.

How long the queue of a replica lasts is the sum of the prompts in it, each at the replica's learned pace
(`kvfleet.telemetry.paces`), counted from its last first byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import sub
from types import MappingProxyType
from typing import Protocol

import attrs

from kvfleet.adapters.base import EngineLoad
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.schema import ModelConfig
from kvfleet.telemetry.congestion import Congestion
from kvfleet.telemetry.pace import Rates
from kvfleet.telemetry.paces import MOMENT_S, Paces, mixed
from kvfleet.telemetry.reservations import NO_WORK, BusyPeriod, ReplicaLoad, Reservation, Work
from kvfleet.telemetry.waits import NOTHING, Waits, delayed_s_of, own_queue_s, queue_s_of, returned_s

__all__ = ["FleetLoad", "HasLoad"]

_MOST_REPLICAS = 16_384
_KNEE = 8.0
"""Requests in flight at which half of a replica's capacity counts as used."""
_MOST_TABLES = 256
_MOST_TOGETHER = 8
"""Prompts after which a busy period is learned from although it goes on …"""
_AT_ONCE = 64
"""… or so many, if the answers to all of them seem to begin in one moment."""
_APART = 0.3
"""Share of a decode step by which first bytes of different steps are apart, at least."""


class HasLoad(Protocol):
    """The part of a pipeline's services that a strategy which reads the load needs."""

    @property
    def load(self) -> FleetLoad:
        """The fleet's load."""


@attrs.frozen(eq=False)
class _Table:
    """Some replicas, in an order that is asked for again and again, and their rates as of a time."""

    models: Sequence[ModelConfig]
    epoch: int
    lessons: int
    made_s: float
    known: list[ReplicaLoad]
    rates: list[Rates]
    steps: list[float]
    each: list[float]
    are_alike: bool
    sizes: Mapping[str, int]


@attrs.define
class FleetLoad:
    """The load of every replica.

    Args:
        clock: Read when a call begins, when an answer begins or ends, and when an engine reports.
        remember_s: Age after which a learned pace is forgotten, so that a replica that was slow once is tried again.
        stale_s: Age after which an engine's report no longer counts.
        lease_s: Longest life of a reservation that nobody releases.
    """

    clock: Clock = attrs.field(factory=SystemClock)
    remember_s: float = 300.0
    stale_s: float = 15.0
    lease_s: float = 3600.0
    expired: int = attrs.field(init=False, default=0)
    _replicas: dict[str, ReplicaLoad] = attrs.field(init=False, factory=dict, repr=False)
    _engines: dict[str, tuple[EngineLoad, float]] = attrs.field(init=False, factory=dict, repr=False)
    _at: dict[str, list[str]] = attrs.field(init=False, factory=dict, repr=False)
    _paces: Paces = attrs.field(init=False, factory=Paces, repr=False)
    _congestion: dict[str, Congestion] = attrs.field(init=False, factory=dict, repr=False)
    _swept_s: float = attrs.field(init=False, default=0.0, repr=False)
    _epoch: int = attrs.field(init=False, default=0, repr=False)
    _tables: dict[int, _Table] = attrs.field(init=False, factory=dict, repr=False)

    def register(self, replicas: Iterable[ModelConfig]) -> None:
        """Know these replicas, and forget all others; what was learned of those that stay is kept."""
        before, self._replicas, self._at = self._replicas, {}, {}
        self._know(replicas, before)
        names = {known.model for known in self._replicas.values()}
        self._paces.keep(names)
        self._congestion = {name: known for name, known in self._congestion.items() if name in names}
        self._engines = {endpoint: said for endpoint, said in self._engines.items() if endpoint in self._at}

    def also(self, replicas: Iterable[ModelConfig]) -> None:
        """Know these replicas beside those known before, as while a changed fleet is built next to one that serves."""
        self._know(replicas, self._replicas)

    def _know(self, replicas: Iterable[ModelConfig], before: Mapping[str, ReplicaLoad]) -> None:
        for model in replicas:
            known = before.get(model.id) or ReplicaLoad()
            known.model, known.endpoint = model.name, model.endpoint
            known.declared_s, known.step_tokens = model.latency_p50_ms / 1000, model.step_tokens
            self._replicas[model.id] = known
            there = self._at.setdefault(model.endpoint, [])
            if model.id not in there:
                there.append(model.id)
        self._tables.clear()

    # Our own requests

    def started(self, replica_id: str, work: Work = NO_WORK) -> Reservation:
        """A call to the replica begins; what is given back is to be `finished`."""
        known, now_s = self._of(replica_id), self.clock.now_s()
        queue = known.prefilling
        one = Reservation(replica_id, work, now_s, now_s + self.lease_s)
        rates = self._paces.rates(known)
        under_way_s = 0.0
        if queue:
            one.was_idle = False
            one.ahead_s = own_queue_s(known, now_s)
        else:
            under_way_s = rates.under_way_s(known.decoding)
            known.busy = BusyPeriod(now_s, was_idle=True, decoding=known.decoding)
        if known.busy is not None and not work.is_stream:
            known.busy.is_clean = False
        known.started += 1
        known.open[id(one)] = queue[id(one)] = one
        uncached = work.uncached_tokens
        known.queued_tokens += uncached
        one.held = uncached + self._paces.answer_of(known, work)
        known.held_tokens += one.held
        service_s = rates.service_s(work.prompt_tokens, work.cached_tokens) + rates.step_each_s * known.decoding
        if len(queue) > 1:
            known.behind_s += service_s
        known.free_s = max(known.free_s, now_s + under_way_s) + service_s
        congestion = self._congestion.get(known.model) or self._congestion.setdefault(known.model, Congestion(now_s))
        congestion.add(service_s, now_s)
        return one

    def first_byte(self, one: Reservation, ttfb_s: float) -> None:
        """Its stream began, `ttfb_s` seconds after the call."""
        known = self._of(one.replica_id)
        if one.is_over or one.first_s is not None:
            return
        now_s = self.clock.now_s()
        one.first_s, one.others = now_s, known.decoding
        before_s, known.last_first_s = known.last_first_s, now_s
        self._prefilled(known, one, now_s)
        known.ttfb_s = mixed(known.ttfb_s, ttfb_s)
        known.measured_s = now_s
        if one.was_idle:
            self._paces.note_idle(known, ttfb_s)
        service_s = ttfb_s if one.was_idle else min(now_s - max(before_s, one.started_s), ttfb_s)
        known.computed_s += service_s
        one.computed_s = known.computed_s
        if known.busy is not None:
            self._note_prompt(known, known.busy, one, before_s, ttfb_s)

    def _note_prompt(
        self, known: ReplicaLoad, busy: BusyPeriod, one: Reservation, before_s: float, ttfb_s: float
    ) -> None:
        """One more prompt of a busy period is computed, the one before it at `before_s`.

        The period is over if none is left, and parted if it is long: between two steps of the engine's, never amid
        prompts of one step, of which some would seem to have taken the time of all and the others none.
        """
        now_s, count = self.clock.now_s(), busy.prompts.count
        if count >= _MOST_TOGETHER and (
            count >= _AT_ONCE or now_s - before_s > _APART * self._paces.rates(known).step_s
        ):
            self._paces.learn_prompts(known, busy, before_s, before_s - busy.since_s)
            busy = known.busy = BusyPeriod(before_s, was_idle=False, decoding=known.decoding)
        busy.prompts.add(one.work.prompt_tokens, one.work.cached_tokens, one.others)
        if not known.prefilling:
            known.busy = None
            is_alone = busy.prompts.count == 1 and one.was_idle
            self._paces.learn_prompts(known, busy, now_s, ttfb_s if is_alone else now_s - busy.since_s)

    def answered(self, one: Reservation, duration_s: float, answer_tokens: int | None = None) -> None:
        """Its answer came in one piece, `duration_s` seconds after the call."""
        known = self._of(one.replica_id)
        known.whole_s = mixed(known.whole_s, duration_s)
        known.measured_s = now_s = self.clock.now_s()
        self._paces.learn_whole(known, one, duration_s, answer_tokens, now_s)

    def finished(self, one: Reservation, duration_s: float, ok: bool, completion_tokens: int | None = None) -> None:
        """The call ended, `duration_s` seconds after it began; twice is harmless."""
        if one.is_over:
            return
        known, now_s = self._of(one.replica_id), self.clock.now_s()
        self._release(known, one, now_s)
        if not ok:
            known.failed += 1
            return
        known.duration_s = mixed(known.duration_s, duration_s)
        known.uncached_tokens = mixed(known.uncached_tokens, one.work.uncached_tokens)
        if not completion_tokens or duration_s <= 0:
            return
        known.tokens_per_second = mixed(known.tokens_per_second, completion_tokens / duration_s)
        self._paces.learn_answer(known, one, completion_tokens, now_s)

    # The engines' own account

    def report(self, endpoint: str, load: EngineLoad, now_s: float) -> None:
        """Take in what the engine at `endpoint` said at `now_s`."""
        if endpoint not in self._engines and len(self._engines) >= _MOST_REPLICAS:
            del self._engines[next(iter(self._engines))]
        self._engines[endpoint] = (load, now_s)
        for replica_id in self._at.get(endpoint, ()):
            known = self._replicas[replica_id]
            known.reported = load
            known.reported_in_flight, known.reported_queue = len(known.open), len(known.prefilling)
            capacity_tokens = load.capacity_tokens
            if capacity_tokens:
                known.capacity_tokens = capacity_tokens

    def engine(self, endpoint: str) -> EngineLoad | None:
        """What the engine last said, however old; None if it never did."""
        said = self._engines.get(endpoint)
        return None if said is None else said[0]

    def age_s(self, endpoint: str, now_s: float | None = None) -> float | None:
        """Seconds since the engine last spoke; None if it never did."""
        said = self._engines.get(endpoint)
        return None if said is None else (self.clock.now_s() if now_s is None else now_s) - said[1]

    # Readings

    def in_flight(self, replica_id: str) -> int:
        """Our own requests at the replica."""
        known = self._replicas.get(replica_id)
        return 0 if known is None else len(known.open)

    def pending(self, replica_id: str) -> int:
        """Requests at the replica, ours and, where its engine counts them, others'."""
        known = self._replicas.get(replica_id)
        return 0 if known is None else known.pending

    def expected_ttfb_s(self, replica_id: str) -> float | None:
        """The usual time to the first byte, of streams or else of whole answers; None before the first of either."""
        known = self._replicas.get(replica_id)
        if known is None:
            return None
        return known.whole_s if known.ttfb_s is None else known.ttfb_s

    def of(self, replica_id: str) -> ReplicaLoad | None:
        """All that is known of one replica."""
        return self._replicas.get(replica_id)

    def rates(self, replica_id: str) -> Rates | None:
        """A replica's pace as it is taken to be now; None for a stranger."""
        known = self._replicas.get(replica_id)
        return None if known is None else self._paces.rates(known)

    def waits(
        self,
        models: Sequence[ModelConfig],
        prompt: float,
        cached: Sequence[float],
        now_s: float,
        returns: Mapping[float, float] = NOTHING,
    ) -> Waits:
        """What each replica would make a request wait.

        Args:
            models: The replicas.
            prompt: Tokens of the prompt.
            cached: Those of them that each replica is expected to have in its cache.
            now_s: The time.
            returns: For numbers of its first tokens, in ascending order: how often they will be asked for where they
                are computed now.
        """
        self._sweep(now_s)
        table = self._tables.get(id(models))
        if table is None or table.models is not models or not self._is_fresh(table, now_s):
            table = self._tabulate(models, now_s)
        # Column by column: a loop over rows takes twice as long, and a large fleet is mostly idle and knows nothing.
        rates, around = table.rates, prompt * prompt / 2
        if table.are_alike:
            r = rates[0]
            alone_s = [r.latency_s + r.prompt_s + r.token_s * prompt + r.pair_s * around] * len(rates)
        else:
            alone_s = [r.latency_s + r.prompt_s + r.token_s * prompt + r.pair_s * around for r in rates]
        nothing = [0.0] * len(rates)
        saved_s, queue_s, decoding, usage = nothing, [*nothing], [*nothing], [*nothing]
        pending, answers, delayed_s = [*nothing], [*nothing], [*nothing]
        if any(cached):
            saved_s = [*nothing]
            for i, tokens in enumerate(cached):
                if tokens:
                    saved = min(tokens, prompt)
                    saved_s[i] = less_s = rates[i].token_s * saved + rates[i].pair_s * saved * saved / 2
                    alone_s[i] -= less_s
        returns_s = returned_s(rates, cached, returns) if returns else nothing
        steps, each = [*table.steps], table.each
        for i, one in enumerate(table.known):
            if one.open or one.reported is not None:
                decoding[i] = others = float(len(one.open) - len(one.prefilling))
                busy_s = each[i] * others
                queue_s[i] = queue_s_of(one, prompt, now_s)
                alone_s[i] += busy_s
                if one.prefilling:
                    delayed_s[i] = delayed_s_of(one, rates[i], alone_s[i], now_s)
                elif others:
                    queue_s[i] += rates[i].under_way_s(others)
                steps[i] += busy_s
                usage[i] = one.kv_usage or 0.0
                pending[i] = one.pending
                answers[i] = self._paces.usual_answer(one)
        later_s = self._later_s(table, list(map(sub, alone_s, returns_s)) if returns else alone_s, now_s)
        return Waits(
            queue_s, alone_s, saved_s, returns_s, later_s, steps, each, decoding, delayed_s, usage, pending, answers
        )

    def _later_s(self, table: _Table, prompt_s: Sequence[float], now_s: float) -> list[float]:
        """What those to come wait for a prompt that takes so long, less what they will find computed."""
        found = self._congestion
        later = {name: found[name].later(count, now_s) for name, count in table.sizes.items() if name in found}
        return [later.get(one.model, 0.0) * s for one, s in zip(table.known, prompt_s, strict=True)]

    def _is_fresh(self, table: _Table, now_s: float) -> bool:
        """False once a replica came or went, or what was learned since has had its moment to settle."""
        if table.epoch != self._epoch:
            return False
        return table.lessons == self._paces.lessons or 0 <= now_s - table.made_s < MOMENT_S

    def _tabulate(self, models: Sequence[ModelConfig], now_s: float) -> _Table:
        """The rates of some replicas, which change much more seldom than they are asked for."""
        known = [self._replicas.get(model.id) or _stranger(model) for model in models]
        rates = [self._paces.rates(one).sure for one in known]
        are_alike = bool(rates) and all(one is rates[0] or one == rates[0] for one in rates)
        steps, each = [r.step_s for r in rates], [r.step_each_s for r in rates]
        sizes = Counter(one.model for one in known)
        table = _Table(models, self._epoch, self._paces.lessons, now_s, known, rates, steps, each, are_alike, sizes)
        if len(self._tables) >= _MOST_TABLES:
            self._tables.clear()
        self._tables[id(models)] = table
        return table

    def free(self, now_s: float, models: Sequence[ModelConfig]) -> list[float | None]:
        """The free capacity of each replica, 1 idle to 0 full; None for a stranger."""
        self._sweep(now_s)
        known = [self._replicas.get(model.id) for model in models]
        return [None if one is None else 1.0 if not one.open and one.reported is None else _free(one) for one in known]

    def snapshot(self) -> Mapping[str, Mapping[str, float]]:
        """By replica: the figures a person may want to see; what is not known is absent."""
        return MappingProxyType(
            {
                replica_id: _figures(known, self._paces.rates(known), self._paces.speed(known))
                for replica_id, known in self._replicas.items()
            }
        )

    # How

    def _of(self, replica_id: str) -> ReplicaLoad:
        known = self._replicas.get(replica_id)
        if known is None:
            if len(self._replicas) >= _MOST_REPLICAS:
                del self._replicas[next(iter(self._replicas))]
            known = self._replicas[replica_id] = ReplicaLoad()
            self._epoch += 1
        return known

    def _prefilled(self, known: ReplicaLoad, one: Reservation, now_s: float) -> None:
        """The prompt of a reservation is computed, or will never be."""
        queue = known.prefilling
        if queue.pop(id(one), None) is None:
            return
        known.queued_tokens = max(known.queued_tokens - one.work.uncached_tokens, 0.0)
        rates, total_s, head_s = self._paces.rates(known), 0.0, 0.0
        beside_s = rates.step_each_s * known.decoding
        for key, other in tuple(queue.items()):
            service_s = rates.service_s(other.work.prompt_tokens, other.work.cached_tokens) + beside_s
            if not other.work.is_stream and other.started_s + other.ahead_s + service_s < now_s:
                del queue[key]  # nobody will tell, so it is taken to be so
                known.queued_tokens = max(known.queued_tokens - other.work.uncached_tokens, 0.0)
                continue
            head_s = head_s or service_s
            total_s += service_s
        if not queue:
            known.queued_tokens = 0.0
        known.free_s, known.behind_s = now_s + total_s, max(total_s - head_s, 0.0)

    def _release(self, known: ReplicaLoad, one: Reservation, now_s: float) -> None:
        one.is_over = True
        if known.open.pop(id(one), None) is None:
            return
        if one.first_s is None and known.busy is not None:
            known.busy.is_clean = False
        self._prefilled(known, one, now_s)
        known.held_tokens = max(known.held_tokens - one.held, 0.0) if known.open else 0.0

    def _sweep(self, now_s: float) -> None:
        """Let go of what is too old, once a second at most."""
        if now_s - self._swept_s < 1.0:
            return
        self._swept_s = now_s
        for known in self._replicas.values():
            said = self._engines.get(known.endpoint)
            if known.reported is not None and (said is None or now_s - said[1] > self.stale_s):
                known.reported = None
            if not known.open:
                if known.speed.seen and now_s - known.measured_s > self.remember_s:
                    self._paces.forget(known)
                    known.ttfb_s = known.whole_s = None
                    self._epoch += 1
                continue
            while known.open and (oldest := next(iter(known.open.values()))).until_s < now_s:
                self.expired += 1
                self._release(known, oldest, now_s)


def _stranger(model: ModelConfig) -> ReplicaLoad:
    """What is known of a model that is not of the fleet, as in a test."""
    return ReplicaLoad(model=model.name, declared_s=model.latency_p50_ms / 1000)


def _free(known: ReplicaLoad) -> float:
    free = _KNEE / (_KNEE + known.pending)
    usage = known.kv_usage
    return free if usage is None else min(free, max(1.0 - usage, 0.0))


def _figures(known: ReplicaLoad, rates: Rates, speed: float) -> dict[str, float]:
    said = known.reported
    found: dict[str, float | None] = {
        "in_flight": known.in_flight,
        "pending": known.pending,
        "started": known.started,
        "failed": known.failed,
        "queued_tokens": known.queued_tokens,
        "held_tokens": known.held_tokens,
        "ttfb_s": known.ttfb_s,
        "whole_s": known.whole_s,
        "duration_s": known.duration_s,
        "tokens_per_second": known.tokens_per_second,
        "prefill_tokens_per_s": 1 / rates.token_s if rates.token_s and not rates.is_guess else None,
        "speed": speed if known.speed.seen else None,
        "step_s": rates.step_s if known.step.seen else None,
        "error_s": known.speed.error_s if known.speed.seen else None,
        "engine_running": said.running if said else None,
        "engine_waiting": said.waiting if said else None,
        "engine_kv_usage": said.kv_usage if said else None,
    }
    return {key: value for key, value in found.items() if value is not None}
