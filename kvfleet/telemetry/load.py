"""What is in flight where, what the engines say of themselves, and how long answers take to begin.

The estimate here is simple on purpose: a learned time to the first byte, scaled by how busy the replica is now against
how busy it was when that time was learned. Times of whole answers, whose first byte is their last, are learned apart
and used only while a model has streamed nothing: between the two lies the length of an answer, and a replica must not
look slow for having been asked for a long one. A replica that was not measured yet is taken to be like its model's
others, and a model without any measurement to be as much faster or slower than declared as the fleet is. So measured
and declared times can be compared, and nobody is shunned for a careless declaration. Every reading is a dictionary
lookup; the work is done when a fact arrives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import attrs

from kvfleet.adapters.base import EngineLoad
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.schema import ModelConfig

__all__ = ["FleetLoad", "ReplicaLoad"]

_MOST_REPLICAS = 16_384
_WEIGHT_OF_NEW = 0.2
_KNEE = 8.0
"""Requests in flight at which the expected time doubles, until measurements at that load say otherwise."""
_DEFAULT_S = 0.5
_CROWDED = 0.8
"""Share of the KV cache in use beyond which an engine begins to hold requests back, or to compute them twice."""
_MOST_CROWDED = 10.0
_STEP = 0.1
"""Share by which a learned time must move before it is applied to those that were not measured themselves."""


@attrs.define
class ReplicaLoad:
    """What is known of one replica.

    Attributes:
        model: The name of its model.
        endpoint: Where it runs.
        declared_s: Its configured time to an answer, used until there is a measurement.
        in_flight: Our own requests there.
        started, failed: Our own requests so far.
        ttfb_s: Learned time to the first byte of a stream; None before the first one.
        whole_s: Learned time to a whole answer, whose first byte is its last; None before the first one.
        busy: Requests there when these times were learned, averaged alike.
        measured_s: When it was last measured.
        duration_s: Learned time to the last byte.
        tokens_per_second: Learned speed of one answer.
        reported: What its engine last said, and `reported_in_flight` what we had there then.
    """

    model: str = ""
    endpoint: str = ""
    declared_s: float = _DEFAULT_S
    in_flight: int = 0
    started: int = 0
    failed: int = 0
    ttfb_s: float | None = None
    whole_s: float | None = None
    busy: float = 0.0
    measured_s: float = 0.0
    duration_s: float | None = None
    tokens_per_second: float | None = None
    reported: EngineLoad | None = None
    reported_in_flight: int = 0

    @property
    def pending(self) -> int:
        """Requests there, ours and others': the engine's own count, moved on by what we did since."""
        if self.reported is None:
            return self.in_flight
        counted = (self.reported.running or 0) + (self.reported.waiting or 0)
        return max(self.in_flight, counted + self.in_flight - self.reported_in_flight)


@attrs.define
class _Model:
    """Times learned of a model, over all its replicas; `alike_s` is what those not measured yet are taken to need."""

    ttfb_s: float | None = None
    whole_s: float | None = None
    alike_s: float | None = None

    def learn(self, seconds: float, *, is_stream: bool) -> bool:
        """Take in a time; True if that changes what the others are taken to need by much."""
        if is_stream:
            self.ttfb_s = _mix(self.ttfb_s, seconds)
        else:
            self.whole_s = _mix(self.whole_s, seconds)
        alike_s = self.whole_s if self.ttfb_s is None else self.ttfb_s
        # A step at a time, because each touches every replica that was not measured yet.
        if alike_s is None or (self.alike_s is not None and not _is_step(self.alike_s, alike_s)):
            return False
        self.alike_s = alike_s
        return True


@attrs.define
class FleetLoad:
    """The load of every replica.

    Args:
        clock: Read when an answer begins or an engine reports.
        remember_s: Age after which a learned time is forgotten, so that a replica that was slow once is tried again.
        stale_s: Age after which an engine's report no longer counts.
    """

    clock: Clock = attrs.field(factory=SystemClock)
    remember_s: float = 300.0
    stale_s: float = 15.0
    _replicas: dict[str, ReplicaLoad] = attrs.field(init=False, factory=dict, repr=False)
    _engines: dict[str, tuple[EngineLoad, float]] = attrs.field(init=False, factory=dict, repr=False)
    _at: dict[str, list[str]] = attrs.field(init=False, factory=dict, repr=False)
    _models: dict[str, _Model] = attrs.field(init=False, factory=dict, repr=False)
    _unmeasured: dict[str, ReplicaLoad] = attrs.field(init=False, factory=dict, repr=False)
    _has_streamed: bool = attrs.field(init=False, default=False, repr=False)
    _pace: float | None = attrs.field(init=False, default=None, repr=False)
    _pace_used: float = attrs.field(init=False, default=1.0, repr=False)
    _times: dict[str, float] = attrs.field(init=False, factory=dict, repr=False)
    _free: dict[str, float] = attrs.field(init=False, factory=dict, repr=False)
    _swept_s: float = attrs.field(init=False, default=0.0, repr=False)

    def register(self, replicas: Iterable[ModelConfig]) -> None:
        """Know these replicas, and forget all others; what was learned of those that stay is kept."""
        before, self._replicas = self._replicas, {}
        self._at, self._times, self._free, self._unmeasured = {}, {}, {}, {}
        for model in replicas:
            known = before.get(model.id) or ReplicaLoad()
            known.model, known.endpoint = model.name, model.endpoint
            known.declared_s = model.latency_p50_ms / 1000
            self._replicas[model.id] = known
            self._at.setdefault(model.endpoint, []).append(model.id)
            self._refresh(model.id, known)
        names = {known.model for known in self._replicas.values()}
        self._models = {name: learned for name, learned in self._models.items() if name in names}
        self._engines = {endpoint: said for endpoint, said in self._engines.items() if endpoint in self._at}

    # Our own requests

    def started(self, replica_id: str) -> None:
        """A call to the replica begins."""
        known = self._of(replica_id)
        known.in_flight += 1
        known.started += 1
        self._refresh(replica_id, known)

    def first_byte(self, replica_id: str, ttfb_s: float) -> None:
        """Its stream began, `ttfb_s` seconds after the call."""
        known = self._of(replica_id)
        self._was_busy(known)
        known.ttfb_s = _mix(known.ttfb_s, ttfb_s)
        self._refresh(replica_id, known)
        if known.model:
            self._learn_of_model(known, ttfb_s, is_stream=True)

    def answered(self, replica_id: str, duration_s: float) -> None:
        """Its answer came in one piece, `duration_s` seconds after the call."""
        known = self._of(replica_id)
        self._was_busy(known)
        known.whole_s = _mix(known.whole_s, duration_s)
        self._refresh(replica_id, known)
        if known.model:
            self._learn_of_model(known, duration_s, is_stream=False)

    def finished(self, replica_id: str, duration_s: float, ok: bool, completion_tokens: int | None = None) -> None:
        """The call ended, `duration_s` seconds after it began."""
        known = self._of(replica_id)
        known.in_flight = max(known.in_flight - 1, 0)
        if ok:
            known.duration_s = _mix(known.duration_s, duration_s)
            if completion_tokens and duration_s > 0:
                known.tokens_per_second = _mix(known.tokens_per_second, completion_tokens / duration_s)
        else:
            known.failed += 1
        self._refresh(replica_id, known)

    # The engines' own account

    def report(self, endpoint: str, load: EngineLoad, now_s: float) -> None:
        """Take in what the engine at `endpoint` said at `now_s`."""
        if endpoint not in self._engines and len(self._engines) >= _MOST_REPLICAS:
            del self._engines[next(iter(self._engines))]
        self._engines[endpoint] = (load, now_s)
        for replica_id in self._at.get(endpoint, ()):
            known = self._replicas[replica_id]
            known.reported, known.reported_in_flight = load, known.in_flight
            self._refresh(replica_id, known)

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
        return 0 if known is None else known.in_flight

    def pending(self, replica_id: str) -> int:
        """Requests at the replica, ours and, where its engine counts them, others'."""
        known = self._replicas.get(replica_id)
        return 0 if known is None else known.pending

    def expected_ttfb_s(self, replica_id: str) -> float | None:
        """The learned time to the first byte, of streams or else of whole answers; None before the first of either."""
        known = self._replicas.get(replica_id)
        if known is None:
            return None
        return known.whole_s if known.ttfb_s is None else known.ttfb_s

    def of(self, replica_id: str) -> ReplicaLoad | None:
        """All that is known of one replica."""
        return self._replicas.get(replica_id)

    def times(self, now_s: float) -> Mapping[str, float]:
        """By replica: the expected seconds to a first byte under its present load, learned or as declared.

        A live view: read it at once.
        """
        self._sweep(now_s)
        return self._times

    def free(self, now_s: float) -> Mapping[str, float]:
        """By replica: its free capacity, 1 idle to 0 full. A live view: read it at once."""
        self._sweep(now_s)
        return self._free

    def snapshot(self) -> Mapping[str, Mapping[str, float]]:
        """By replica: the figures a person may want to see; what is not known is absent."""
        return MappingProxyType({replica_id: _figures(known) for replica_id, known in self._replicas.items()})

    # How

    def _of(self, replica_id: str) -> ReplicaLoad:
        known = self._replicas.get(replica_id)
        if known is None:
            if len(self._replicas) >= _MOST_REPLICAS:
                oldest = next(iter(self._replicas))
                for table in (self._replicas, self._times, self._free, self._unmeasured):
                    table.pop(oldest, None)
            known = self._replicas[replica_id] = ReplicaLoad()
        return known

    def _was_busy(self, known: ReplicaLoad) -> None:
        """Note under which load a time was measured, and when."""
        others = max(known.pending - 1, 0)
        is_first = known.ttfb_s is None and known.whole_s is None
        known.busy = _mix(None if is_first else known.busy, others)
        known.measured_s = self.clock.now_s()

    def _learn_of_model(self, known: ReplicaLoad, seconds: float, *, is_stream: bool) -> None:
        """Let those that were not measured yet profit: the model's other replicas, and, by pace, everybody else."""
        model = self._models.setdefault(known.model, _Model())
        is_first_stream = is_stream and model.ttfb_s is None
        has_moved = model.learn(seconds, is_stream=is_stream)
        pace_has_moved = self._learn_pace(seconds / known.declared_s, is_stream=is_stream)
        if not has_moved and not pace_has_moved:
            return
        others = self._replicas if is_first_stream else self._unmeasured
        for replica_id, other in tuple(others.items()):
            if pace_has_moved or other.model == known.model:
                self._refresh(replica_id, other)

    def _learn_pace(self, pace: float, *, is_stream: bool) -> bool:
        """Note how a time compares with its declaration; True if that changes the fleet's pace by much."""
        if is_stream and not self._has_streamed:
            self._has_streamed, self._pace = True, None
        if is_stream or not self._has_streamed:
            self._pace = _mix(self._pace, pace)
        if self._pace is None or not _is_step(self._pace_used, self._pace):
            return False
        self._pace_used = self._pace
        return True

    def _base_s(self, replica_id: str, known: ReplicaLoad) -> float:
        """The time to begin with: what is known of this replica's streams, its model's, or of whole answers alike."""
        model = self._models.get(known.model, _UNKNOWN)
        own_s = known.ttfb_s if known.ttfb_s is not None or model.ttfb_s is not None else known.whole_s
        if own_s is not None:
            self._unmeasured.pop(replica_id, None)
            return own_s * _KNEE / (_KNEE + known.busy)
        self._unmeasured[replica_id] = known
        return known.declared_s * self._pace_used if model.alike_s is None else model.alike_s

    def _refresh(self, replica_id: str, known: ReplicaLoad) -> None:
        pending = known.pending
        seconds = self._base_s(replica_id, known) * (1 + pending / _KNEE)
        free = _KNEE / (_KNEE + pending)
        if known.reported is not None and known.reported.kv_usage is not None:
            seconds *= _crowding(known.reported.kv_usage)
            free = min(free, max(1.0 - known.reported.kv_usage, 0.0))
        self._times[replica_id] = seconds
        self._free[replica_id] = free

    def _sweep(self, now_s: float) -> None:
        """Let go of what is too old, once a second at most."""
        if now_s - self._swept_s < 1.0:
            return
        self._swept_s = now_s
        for replica_id, known in self._replicas.items():
            said = self._engines.get(known.endpoint)
            is_silent = known.reported is not None and (said is None or now_s - said[1] > self.stale_s)
            is_known = known.ttfb_s is not None or known.whole_s is not None
            is_past = is_known and not known.in_flight and now_s - known.measured_s > self.remember_s
            if is_silent:
                known.reported = None
            if is_past:
                known.ttfb_s = known.whole_s = None
            if is_silent or is_past:
                self._refresh(replica_id, known)


def _is_step(used: float, learned: float) -> bool:
    return abs(learned - used) > _STEP * used


_UNKNOWN = _Model()


def _crowding(kv_usage: float) -> float:
    """By how much a filling KV cache lengthens the wait: 1 up to four fifths, then a barrier up to ten times."""
    room = (1.0 - kv_usage) / (1.0 - _CROWDED)
    return 1.0 if room >= 1.0 else 1.0 / max(room, 1 / _MOST_CROWDED)


def _mix(old: float | None, new: float) -> float:
    """The exponentially weighted mean, which the first value starts."""
    return new if old is None else old + _WEIGHT_OF_NEW * (new - old)


def _figures(known: ReplicaLoad) -> dict[str, float]:
    said = known.reported
    found: dict[str, float | None] = {
        "in_flight": known.in_flight,
        "pending": known.pending,
        "started": known.started,
        "failed": known.failed,
        "ttfb_s": known.ttfb_s,
        "whole_s": known.whole_s,
        "duration_s": known.duration_s,
        "tokens_per_second": known.tokens_per_second,
        "engine_running": said.running if said else None,
        "engine_waiting": said.waiting if said else None,
        "engine_kv_usage": said.kv_usage if said else None,
    }
    return {key: value for key, value in found.items() if value is not None}
