"""The rate limits of a fleet's replicas: fed by every attempt, read by stages, metrics and people.

Replicas share limits where their provider does. The key is the endpoint, the credential (`api_key` and
`custom_headers`) and the provider's own name of the model, so that one model under two names of the fleet is one, and
the same model under two keys is two. A model that says `shared_rate_limit` leaves out its name: all such models of one
endpoint and credential are one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.adapters.limit_headers import quotas_of
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError, Fault
from kvfleet.telemetry.limited import Hold, Limited, Wait
from kvfleet.telemetry.rate_limits import LimitKey, RateLimitState, RateLimitTracker

__all__ = ["FleetLimits", "LimitTicket"]


@attrs.define(eq=False)
class LimitTicket:
    """One call, from its start to its end; whoever makes it tells what comes of it."""

    _tracker: RateLimitTracker
    _key: LimitKey
    _entries: Sequence[tuple[LimitKey, Limited]]
    _number: int
    _is_answered: bool = attrs.field(init=False, default=False)

    def heard(self, headers: Mapping[str, str]) -> float | None:
        """It was accepted, with these headers; the share of the tightest limit that is left, None if none is known."""
        tracker, (_, entry) = self._tracker, self._entries[0]
        now_s = tracker.clock.now_s()
        self._land()
        entry.succeed(self._number, now_s)
        if told := quotas_of(headers, tracker.clock.time_ns() / 1e9):
            entry.learn(told, now_s, self._number)
        tracker.changed(self._key, entry)
        return entry.capacity(now_s) if entry.is_known else None

    def ended(self, error: BackendError | None, tokens: int = 0) -> None:
        """It ended, after so many tokens of prompt and answer, or with an error."""
        tracker = self._tracker
        now_s = tracker.clock.now_s()
        self._land()
        if error is not None:
            self._refused(error, now_s)
        if tokens:
            for key, entry in self._entries:
                entry.spend(now_s, tokens)
                tracker.changed(key, entry)

    def _refused(self, error: BackendError, now_s: float) -> None:
        tracker, (_, entry) = self._tracker, self._entries[0]
        if told := quotas_of(error.headers, tracker.clock.time_ns() / 1e9):
            entry.learn(told, now_s, self._number)
        if error.kind is Fault.RATE_LIMITED:
            entry.refuse(now_s, error.retry_after_s or 0.0, tracker.cooldown_seconds)
        elif error.kind is Fault.OVERLOADED and error.retry_after_s:
            entry.pause(now_s, error.retry_after_s)
        tracker.changed(self._key, entry)

    def _land(self) -> None:
        if not self._is_answered:
            self._is_answered = True
            for _, entry in self._entries:
                entry.in_flight -= 1


@attrs.define
class FleetLimits:
    """The limits of every replica of a fleet.

    Args:
        tracker: What is known; by default nothing.
    """

    tracker: RateLimitTracker = attrs.field(factory=RateLimitTracker)
    _replicas: tuple[ModelConfig, ...] = attrs.field(init=False, default=(), repr=False)
    _keys: dict[str, LimitKey] = attrs.field(init=False, factory=dict, repr=False)
    _accounts: dict[str, list[Any]] = attrs.field(init=False, factory=dict, repr=False)

    def register(self, replicas: Iterable[ModelConfig]) -> None:
        """Know these replicas and what is configured of their limits; what was learned stays."""
        self._replicas, self._keys = tuple(replicas), {}
        limits: dict[LimitKey, tuple[int, int]] = {}
        accounts = self._accounts
        for model in self._replicas:
            endpoint = model.endpoint.rstrip("/").removesuffix("/v1")
            account = _number_of(accounts.setdefault(endpoint, []), (model.api_key, dict(model.custom_headers)))
            key = (endpoint, "" if model.shared_rate_limit else model.get_model_id(), account)
            self._keys[model.id] = key
            rpm, tpm = limits.get(key, (0, 0))
            limits[key] = (_least(rpm, model.rpm or 0), _least(tpm, model.tpm or 0))
        for key, (rpm, tpm) in limits.items():
            self.tracker.configure(key, rpm=rpm, tpm=tpm)

    def inherit(self, before: FleetLimits) -> None:
        """Go on with what another one learned, whose calls in flight still tell of it."""
        before.tracker.take_options(self.tracker)
        self.tracker, self._accounts = before.tracker, before._accounts
        self.register(self._replicas)

    def key(self, replica_id: str) -> LimitKey:
        """Under which the tracker knows the replica's limits."""
        return self._keys.get(replica_id) or ("", replica_id, "")

    # What happens

    def begin(self, replica_id: str) -> LimitTicket:
        """A call to the replica begins."""
        tracker, key = self.tracker, self.key(replica_id)
        now_s = tracker.clock.now_s()
        entries = tracker.chain(key)
        number = 0
        for one, entry in reversed(entries):  # its own last, whose number counts
            number = entry.count(now_s)
            entry.in_flight += 1
            tracker.changed(one, entry)
        return LimitTicket(tracker, key, entries, number)

    def waits(self, since_s: float) -> dict[str, Wait]:
        """What backends asked for that refused, or did no more since then, each by one of its replicas."""
        found: dict[LimitKey, tuple[str, Wait]] = {}
        for replica, key in self._keys.items():
            wait = None if key in found else self.tracker.wait(key)
            if wait is not None and max(wait.changed_s, wait.cooldown_until_s) >= since_s:
                found[key] = replica, wait
        return dict(found.values())

    def hear(self, replica_id: str, wait: Wait) -> None:
        """Leave a replica's backend alone as another worker was asked to."""
        if (key := self._keys.get(replica_id)) is not None:
            self.tracker.hear(key, wait)

    # What follows

    def hold(self, replica_id: str, now_s: float) -> Hold | None:
        """Why the replica is to be left alone now; None if it need not."""
        return self.tracker.hold(self.key(replica_id), now_s)

    def held(self, replicas: Iterable[ModelConfig], now_s: float) -> list[tuple[ModelConfig, Hold]]:
        """Those of the replicas that are to be left alone now."""
        holds = self.tracker.holds(now_s)
        if not holds:
            return []
        keys, hold_of = self._keys, self.tracker.hold
        found = [(model, keys.get(model.id) or self.key(model.id)) for model in replicas]
        if all(key[1] for key in holds):  # nobody's whole account is held: one look-up is enough
            return [(model, hold) for model, key in found if (hold := holds.get(key)) is not None]
        return [(model, hold) for model, key in found if (hold := hold_of(key, now_s)) is not None]

    def capacity(self, replica_id: str, now_s: float) -> float:
        """Which share of the replica's tightest limit is left, 0..1; 1 if nothing is known."""
        return self.tracker.capacity(self.key(replica_id), now_s)

    def state(self, replica_id: str) -> RateLimitState | None:
        """What is known of the replica's limits; None if nothing ever was."""
        key = self.key(replica_id)
        return self.tracker.state(key) if self.tracker.is_known(key) else None

    def summary(self) -> dict[str, dict[str, Any]]:
        """By replica, what is known of its limits, as plain data; replicas of which nothing is known are left out."""
        states = {replica_id: self.state(replica_id) for replica_id in self._keys}
        return {replica_id: state.to_dict() for replica_id, state in states.items() if state is not None}


def _number_of(known: list[Any], credential: Any) -> str:
    """A word for a credential that says nothing of it; empty for the first one of an endpoint."""
    if credential not in known:
        known.append(credential)
    place = known.index(credential)
    return f"account {place + 1}" if place else ""


def _least(one: int, other: int) -> int:
    """The smaller of two limits, of which 0 is none."""
    return min(one, other) if one and other else one or other
