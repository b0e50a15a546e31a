"""The rate limits of providers: what their answers tell, what we sent, and whom to leave alone for now.

Limits are looked up by endpoint, model and account. An empty model means the whole account: what is recorded for it
holds for every model of that endpoint and account, and their requests count for it too. An account is whatever tells
one credential from another on one endpoint; it never holds the credential.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attrs

from kvfleet.adapters.faults import retry_after_s
from kvfleet.adapters.limit_headers import quotas_of
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.fields import number
from kvfleet.telemetry.limited import Hold, Limited, Wait

__all__ = ["LimitKey", "RateLimitState", "RateLimitTracker"]

_MOST_ENTRIES = 16_384
_NEVER = float("inf")

LimitKey = tuple[str, str, str]
"""Endpoint, model (the backend's own name; empty for the whole account), account (empty for the only one)."""


@attrs.frozen(kw_only=True)
class RateLimitState:
    """What is known of one backend's limits at one moment; what is not known is None.

    Attributes:
        endpoint, model_id: Whose.
        requests_last_minute, tokens_last_minute: What we sent there.
        requests_limit, requests_left, tokens_limit, tokens_left: The tightest limit of each kind.
        capacity: Share of the tightest limit that is left, 0..1; 1 if nothing is known.
        is_throttled: True if it is to be left alone while others can serve.
        is_closed: True if a call would be refused.
        wait_s: Seconds until that ends; 0 if it may be used.
        reason: Why; empty if it may be used.
        refused: Answers so far that asked to wait.
    """

    endpoint: str
    model_id: str = ""
    requests_last_minute: int = 0
    tokens_last_minute: int = 0
    requests_limit: float | None = None
    requests_left: float | None = None
    tokens_limit: float | None = None
    tokens_left: float | None = None
    capacity: float = 1.0
    is_throttled: bool = False
    is_closed: bool = False
    wait_s: float = 0.0
    reason: str = ""
    refused: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, as dashboards show it; what is not known, or says nothing, is left out."""
        found = attrs.asdict(self, filter=lambda a, _: a.name not in ("endpoint", "model_id"))
        return {
            "capacity": round(found.pop("capacity"), 4),
            "throttled": found.pop("is_throttled"),
            "closed": found.pop("is_closed"),
            **{name: round(v, 1) if isinstance(v, float) else v for name, v in found.items() if v or v == 0.0},
        }


@attrs.define
class RateLimitTracker:
    """Knows which backends are near their rate limits, and for how long.

    What it goes by: limits and remaining counts from answers' headers (see `kvfleet.adapters.limit_headers`), which
    count until their reset; refusals (429); and our own count of the last minute against configured limits. Where
    nothing is known nobody is throttled.

    Args:
        default_rpm: Requests a minute that a backend allows, if nothing else is configured for it; 0 for no such limit.
        default_tpm: The same of tokens.
        throttle_threshold: Share of a limit from which on a backend is left to others.
        cooldown_seconds: How long one that refused without saying for how long is left alone; twice as long each
            further time, until it answers.
        clock: The time.

    >>> tracker = RateLimitTracker(default_rpm=60)
    >>> tracker.record_429("http://api:8000", "llama-3-8b", retry_after=30)
    >>> tracker.should_throttle("http://api:8000", "llama-3-8b"), tracker.should_throttle("http://api:8000", "other")
    (True, False)
    """

    default_rpm: int = number(0, ge=0, unit="requests", doc="Requests a minute; 0 for no limit.")
    default_tpm: int = number(0, ge=0, unit="tokens", doc="Tokens a minute; 0 for no limit.")
    throttle_threshold: float = number(0.85, gt=0, le=1, doc="Share of a limit from which on it is left to others.")
    cooldown_seconds: float = number(10, gt=0, unit="s", doc="How long one that refused is left alone.")
    clock: Clock = attrs.field(factory=SystemClock, kw_only=True)
    _entries: dict[LimitKey, Limited] = attrs.field(init=False, factory=dict, repr=False)
    _configured: dict[LimitKey, tuple[int, int]] = attrs.field(init=False, factory=dict, repr=False)
    _holds: dict[LimitKey, Hold] = attrs.field(init=False, factory=dict, repr=False)
    _shown: Mapping[LimitKey, Hold] = attrs.field(init=False, repr=False)
    _recheck_s: float = attrs.field(init=False, default=_NEVER, repr=False)
    _has_accounts: bool = attrs.field(init=False, default=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._shown = MappingProxyType(self._holds)

    # The documented methods

    def record_request(self, endpoint: str, model_id: str = "", tokens_used: int = 0) -> None:
        """A request was sent; one that used tokens was answered too, which ends a cooldown."""
        for key, entry in self.chain((endpoint, model_id, "")):
            entry.count(self.clock.now_s(), tokens_used)
            if tokens_used:
                entry.succeed()
            self.changed(key, entry)

    def record_rate_limit_headers(self, endpoint: str, model_id: str, headers: Mapping[str, str]) -> None:
        """An answer came with these headers; `Retry-After` among them counts too."""
        lower = {name.lower(): value for name, value in headers.items()}
        key = (endpoint, model_id, "")
        entry, now_s = self.of(key), self.clock.now_s()
        entry.learn(quotas_of(lower, self.clock.time_ns() / 1e9), now_s)
        if wait_s := retry_after_s(lower):
            entry.pause(now_s, wait_s)
        self.changed(key, entry)

    def record_429(self, endpoint: str, model_id: str = "", retry_after: float = 0.0) -> None:
        """A request was refused; `retry_after` are the seconds it asked to wait, 0 if it did not say."""
        key = (endpoint, model_id, "")
        entry = self.of(key)
        entry.refuse(self.clock.now_s(), retry_after, self.cooldown_seconds)
        self.changed(key, entry)

    def should_throttle(self, endpoint: str, model_id: str = "") -> bool:
        """True if it is to be left alone while others can serve; never for what nothing is known of."""
        return self.hold((endpoint, model_id, ""), self.clock.now_s()) is not None

    def get_capacity_score(self, endpoint: str, model_id: str = "") -> float:
        """Which share of its tightest limit is left, 0..1; 1 if nothing is known."""
        return self.capacity((endpoint, model_id, ""), self.clock.now_s())

    def get_state(self, endpoint: str, model_id: str = "") -> RateLimitState:
        """What is known of it."""
        return self.state((endpoint, model_id, ""))

    def get_all_states(self) -> dict[str, RateLimitState]:
        """What is known of all, by ``model@endpoint``, and by the endpoint alone for an account."""
        return {_name_of(key): self.state(key) for key in self._entries}

    def summary(self) -> dict[str, dict[str, Any]]:
        """The same as plain data, for `DashboardState.update_rate_limits`."""
        return {name: state.to_dict() for name, state in self.get_all_states().items()}

    # By key

    def configure(self, key: LimitKey, *, rpm: int = 0, tpm: int = 0) -> None:
        """A backend allows so many requests and tokens a minute, whatever the defaults say; 0 takes the default."""
        rpm, tpm = rpm or self.default_rpm, tpm or self.default_tpm
        self._configured[key] = (rpm, tpm)
        if (entry := self._entries.get(key)) is not None:
            entry.rpm, entry.tpm = rpm, tpm
            self.changed(key, entry)

    def take_options(self, other: RateLimitTracker) -> None:
        """Have the options of another tracker from now on, and keep what is known."""
        self.default_rpm, self.default_tpm = other.default_rpm, other.default_tpm
        self.cooldown_seconds = other.cooldown_seconds
        self._configured = {}
        for entry in self._entries.values():
            entry.rpm, entry.tpm = self.default_rpm, self.default_tpm
        self.throttle_at(other.throttle_threshold)

    def throttle_at(self, threshold: float) -> None:
        """Leave backends to others from this share of a limit on."""
        self.throttle_threshold = threshold
        for key, entry in self._entries.items():
            self.changed(key, entry)

    def of(self, key: LimitKey) -> Limited:
        """Its limits, to be told what happens; `changed` is to be called after that."""
        entry = self._entries.pop(key, None)
        if entry is None:
            if len(self._entries) >= _MOST_ENTRIES:
                oldest = next(iter(self._entries))
                del self._entries[oldest]
                self._holds.pop(oldest, None)
            rpm, tpm = self._configured.get(key) or (self.default_rpm, self.default_tpm)
            entry = Limited(rpm=rpm, tpm=tpm)
            self._has_accounts = self._has_accounts or not key[1]
        self._entries[key] = entry  # last, as the one used last
        return entry

    def chain(self, key: LimitKey) -> list[tuple[LimitKey, Limited]]:
        """Its own limits, and those of its account if anything was ever recorded for that."""
        own, account = self.of(key), self._account_of(key)
        return [(key, own)] if account is None else [(key, own), account]

    def changed(self, key: LimitKey, entry: Limited) -> None:
        """Something happened there: see whether it is held."""
        if not entry.is_known and key not in self._holds:
            return
        now_s = self.clock.now_s()
        hold = entry.hold(now_s, self.throttle_threshold)
        if hold is None:
            self._holds.pop(key, None)
        else:
            self._holds[key] = hold
            self._recheck_s = min(self._recheck_s, hold.ends_s(now_s))

    def wait(self, key: LimitKey) -> Wait | None:
        """What it asked for when it refused; None if it never did."""
        entry = self._entries.get(key)
        return None if entry is None or not entry.has_waited else entry.wait

    def hear(self, key: LimitKey, wait: Wait) -> None:
        """Leave it alone as another worker was asked to."""
        entry = self.of(key)
        if entry.hear(wait):
            self.changed(key, entry)

    def holds(self, now_s: float) -> Mapping[LimitKey, Hold]:
        """Whom to leave alone now. Kept until something changes or ends, so that asking costs nothing: a live view."""
        if now_s >= self._recheck_s:
            self._recheck_s = _NEVER
            for key in tuple(self._holds):
                hold = self._entries[key].hold(now_s, self.throttle_threshold)
                if hold is None:
                    del self._holds[key]
                else:
                    self._holds[key] = hold
                    self._recheck_s = min(self._recheck_s, hold.ends_s(now_s))
        return self._shown

    def hold(self, key: LimitKey, now_s: float) -> Hold | None:
        """Why it is to be left alone now, itself or its whole account; None if it need not."""
        holds = self.holds(now_s)
        own, shared = holds.get(key), holds.get((key[0], "", key[2])) if key[1] and self._has_accounts else None
        if own is None or shared is None:
            return own or shared
        return max(own, shared, key=lambda hold: (hold.closed_until_s, hold.until_s))

    def capacity(self, key: LimitKey, now_s: float) -> float:
        """Which share of its tightest limit is left, its account's included."""
        own, account = self._entries.get(key), self._account_of(key)
        left = 1.0 if own is None else own.capacity(now_s)
        return left if account is None else min(left, account[1].capacity(now_s))

    def state(self, key: LimitKey) -> RateLimitState:
        """What is known of it."""
        now_s, (endpoint, model_id, _) = self.clock.now_s(), key
        hold, entry = self.hold(key, now_s), self._entries.get(key)
        if entry is not None:
            entry.forget(now_s)
        known = {} if entry is None else _figures(entry, now_s)
        return RateLimitState(
            endpoint=endpoint,
            model_id=model_id,
            capacity=self.capacity(key, now_s),
            is_throttled=hold is not None,
            is_closed=hold is not None and hold.is_closed(now_s),
            wait_s=0.0 if hold is None else hold.wait_s(now_s),
            reason="" if hold is None else hold.reason(now_s),
            **known,
        )

    def is_known(self, key: LimitKey) -> bool:
        """True if anything is known now that could hold it."""
        own, account = self._entries.get(key), self._account_of(key)
        entries = [entry for entry in (own, account[1] if account else None) if entry is not None]
        for entry in entries:
            entry.forget(self.clock.now_s())
        return any(entry.is_known for entry in entries)

    def _account_of(self, key: LimitKey) -> tuple[LimitKey, Limited] | None:
        """The limits of a model's whole account, if anything was ever recorded for that."""
        if not self._has_accounts or not key[1]:
            return None
        shared = (key[0], "", key[2])
        entry = self._entries.get(shared)
        return None if entry is None else (shared, entry)


def _name_of(key: LimitKey) -> str:
    """``model@endpoint``, or the endpoint alone for a whole account; further accounts of an endpoint are numbered."""
    endpoint, model_id, account = key
    name = f"{model_id}@{endpoint}" if model_id else endpoint
    return f"{name} ({account})" if account else name


def _figures(entry: Limited, now_s: float) -> dict[str, Any]:
    found: dict[str, Any] = {
        "requests_last_minute": entry.minute.requests,
        "tokens_last_minute": entry.minute.tokens,
        "refused": entry.refused,
    }
    for kind, configured, used in (
        ("requests", entry.rpm, entry.minute.requests),
        ("tokens", entry.tpm, entry.minute.tokens),
    ):
        quotas = [q for q in entry.quotas.values() if q.told.counts_tokens == (kind == "tokens")]
        left = [(q.limit, q.left(now_s)) for q in quotas]
        left += [(float(configured), float(max(configured - used, 0)))] if configured else []
        if left:
            tightest = min(left, key=lambda pair: pair[1] / pair[0] if pair[0] else pair[1])
            found[f"{kind}_limit"], found[f"{kind}_left"] = tightest
    return found
