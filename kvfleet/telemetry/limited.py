"""What is known of one backend's rate limits, and whether it is to be left alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import attrs

from kvfleet.adapters.limit_headers import ToldQuota
from kvfleet.telemetry.minute import Minute
from kvfleet.telemetry.quota import BELIEVED_S, Quota

__all__ = ["Hold", "Limited", "Wait"]

_MOST_QUOTAS = 8
_MOST_DOUBLINGS = 8
_LONGEST_COOLDOWN_S = 300.0
_QUIET_S = 60.0
_ROUNDING = 1e-9
_FRESH_S = 0.05
_TICK_S = 1e-6
_NEVER = float("-inf")
_COOLDOWN, _REQUESTS, _TOKENS = "cooldown", "requests", "tokens"


@attrs.frozen
class Hold:
    """Why a backend is to be left alone, and until when, by the monotonic clock.

    Attributes:
        rule: ``cooldown`` after a refusal, ``requests`` or ``tokens``.
        what: The same in words; no figure of the account's.
        until_s: When it ends.
        closed_until_s: Until then a call would be refused: the backend said so, or a configured limit is used up. One
            that is held but not closed may still serve if nobody else can.
    """

    rule: str
    what: str
    until_s: float
    closed_until_s: float = 0.0

    def is_closed(self, now_s: float) -> bool:
        """True while a call would be refused."""
        return now_s < self.closed_until_s

    def ends_s(self, now_s: float) -> float:
        """When a call may succeed; if one may now, when it is held no more."""
        return self.closed_until_s if self.is_closed(now_s) else self.until_s

    def wait_s(self, now_s: float) -> float:
        """Seconds until then."""
        return max(self.ends_s(now_s) - now_s, 0.0)

    def reason(self, now_s: float) -> str:
        """Why, and for how long."""
        left_s = self.wait_s(now_s)
        return f"{self.what}, for another {left_s:.{0 if left_s >= 10 else 1}f} s"


@attrs.frozen
class Wait:
    """What a backend asked for when it refused, as one of several workers heard it.

    Attributes:
        changed_s: When it was heard, or ended, by the monotonic clock.
        told_until_s, cooldown_until_s: Until when a call would be refused, and until when it is left alone.
        cooldown_s, in_a_row: How long that is, and the how manieth time in a row.
    """

    changed_s: float
    told_until_s: float
    cooldown_until_s: float
    cooldown_s: float
    in_a_row: int


@attrs.define(eq=False)
class Limited:
    """The rate limits of one backend: configured ones against our own count, and those its answers tell of.

    Attributes:
        rpm, tpm: Requests and tokens that it allows in any minute, as configured; 0 if nobody said.
        minute: What we sent within the last minute.
        quotas: What its answers told, by name.
        started: Requests so far, and `in_flight` those without an answer yet.
        refused: Answers so far that asked to wait.
    """

    rpm: int = 0
    tpm: int = 0
    minute: Minute = attrs.field(factory=Minute)
    quotas: dict[str, Quota] = attrs.field(factory=dict)
    started: int = 0
    in_flight: int = 0
    refused: int = 0
    _told_until_s: float = attrs.field(init=False, default=0.0)
    _cooldown_until_s: float = attrs.field(init=False, default=0.0)
    _cooldown_s: float = attrs.field(init=False, default=0.0)
    _in_a_row: int = attrs.field(init=False, default=0)
    _started_before: int = attrs.field(init=False, default=0)
    _waited_s: float = attrs.field(init=False, default=_NEVER)
    _capacity: float = attrs.field(init=False, default=1.0)
    _reckoned_s: float = attrs.field(init=False, default=_NEVER)

    @property
    def is_known(self) -> bool:
        """True if anything is known that could hold it."""
        return bool(self.quotas or self.rpm or self.tpm or self._cooldown_until_s)

    # What happened

    def count(self, now_s: float, tokens: int = 0) -> int:
        """A request is sent; its number."""
        self.minute.trim(now_s)
        self.minute.add(now_s, 1, tokens)
        self.started += 1
        self._reckoned_s = _NEVER
        if self.quotas:
            for quota in self.quotas.values():
                if not quota.told.counts_tokens:
                    quota.unseen += 1
        return self.started

    def spend(self, now_s: float, tokens: int) -> None:
        """An answer turned out to cost so many tokens."""
        self._reckoned_s = _NEVER
        self.minute.trim(now_s)
        self.minute.add(now_s, 0, tokens)

    def learn(self, told: Iterable[ToldQuota], now_s: float, number: int | None = None) -> None:
        """An answer tells limits; `number` is that of its request, after which others may have been sent."""
        self._reckoned_s = _NEVER
        unseen = 0 if number is None else min(self.in_flight, self.started - number)
        for one in told:
            configured = self.tpm if one.counts_tokens else self.rpm
            self.quotas.pop(one.name, None)
            self.quotas[one.name] = Quota(
                one, now_s, one.limit or configured or None, 0 if one.counts_tokens else unseen
            )
        while len(self.quotas) > _MOST_QUOTAS:
            del self.quotas[next(iter(self.quotas))]

    def refuse(self, now_s: float, told_s: float, cooldown_s: float) -> None:
        """It refused a request for its rate limit, and asked to wait `told_s` seconds, or did not say (0).

        Refusals in one cooldown are of one burst and count once; each further cooldown, if the last one ended not long
        ago, is twice as long as the one before.
        """
        self.refused += 1
        if now_s >= self._cooldown_until_s:
            is_repeated = self._in_a_row and now_s - self._cooldown_until_s <= max(_QUIET_S, self._cooldown_s)
            self._in_a_row = min(self._in_a_row + 1, _MOST_DOUBLINGS) if is_repeated else 1
        base_s = min(told_s, BELIEVED_S) or cooldown_s
        self._cooldown_s = min(base_s * 2 ** (self._in_a_row - 1), max(base_s, _LONGEST_COOLDOWN_S))
        self._wait(now_s, min(told_s, BELIEVED_S), self._cooldown_s)

    def pause(self, now_s: float, told_s: float) -> None:
        """It asked to wait for another cause than its rate limit, as a 503 with `Retry-After` does."""
        self.refused += 1
        self._wait(now_s, min(told_s, BELIEVED_S), 0.0)

    @property
    def has_waited(self) -> bool:
        """True if it ever asked to wait."""
        return self._waited_s > _NEVER

    @property
    def wait(self) -> Wait:
        """What it asked for last."""
        return Wait(self._waited_s, self._told_until_s, self._cooldown_until_s, self._cooldown_s, self._in_a_row)

    def hear(self, wait: Wait) -> bool:
        """Wait as another worker was asked to; False if what is known here is as new."""
        if wait.changed_s <= self._waited_s:
            return False
        self._waited_s, self._told_until_s, self._cooldown_until_s = (
            wait.changed_s,
            wait.told_until_s,
            wait.cooldown_until_s,
        )
        self._cooldown_s, self._in_a_row = wait.cooldown_s, wait.in_a_row
        self._started_before, self._reckoned_s = self.started, _NEVER
        return True

    def _wait(self, now_s: float, told_s: float, cooldown_s: float) -> None:
        self._waited_s = max(now_s, self._waited_s + _TICK_S)
        self._started_before, self._reckoned_s = self.started, _NEVER
        self._told_until_s = max(self._told_until_s, now_s + told_s)
        self._cooldown_until_s = max(self._cooldown_until_s, now_s + cooldown_s, self._told_until_s)

    def succeed(self, number: int | None = None, now_s: float = _NEVER) -> None:
        """It answered: a cooldown is over, unless the request had been sent before the refusal."""
        if self._cooldown_until_s and (number is None or number > self._started_before):
            self._waited_s = max(now_s, self._waited_s + _TICK_S)
            self._told_until_s = self._cooldown_until_s = self._cooldown_s = 0.0
            self._reckoned_s = _NEVER
            self._in_a_row = 0

    # What follows

    def capacity(self, now_s: float) -> float:
        """Which share of its tightest limit is left, 0..1: 1 if nothing is known, 0 in a cooldown and if none is left.

        Kept for a moment, since every candidate of every request may be asked for it.
        """
        if not 0 <= now_s - self._reckoned_s < _FRESH_S:
            self._capacity, self._reckoned_s = self._reckon(now_s), now_s
        return self._capacity

    def _reckon(self, now_s: float) -> float:
        if now_s < self._cooldown_until_s:
            return 0.0
        least = 1.0
        if self.rpm or self.tpm:
            self.minute.trim(now_s)
            least = 1.0 - max([share for _, share, _ in self._counted()])
        for quota in self.quotas.values():
            if now_s < quota.ends_s:
                left, limit = quota.left(now_s), quota.limit
                if left < 1:
                    return 0.0
                if limit is not None:
                    least = min(least, left / limit)
        return least

    def hold(self, now_s: float, threshold: float) -> Hold | None:
        """Why it is to be left alone now; None if it need not.

        Args:
            now_s: The monotonic clock.
            threshold: Share of a limit from which on it is left to others.
        """
        if self.capacity(now_s) > 1.0 - threshold + 2 * _ROUNDING:
            return None
        self.forget(now_s)
        causes = [*self._paused(now_s), *self._told(now_s, threshold), *self._counting(now_s, threshold)]
        if not causes:
            return None
        worst = max(causes, key=lambda cause: (cause.closed_until_s, cause.until_s))
        closed_s, until_s = worst.closed_until_s, max(cause.until_s for cause in causes)
        return worst if until_s == worst.until_s else Hold(worst.rule, worst.what, until_s, closed_s)

    def forget(self, now_s: float) -> None:
        """Let go of what is over."""
        self.minute.trim(now_s)
        for name in [name for name, quota in self.quotas.items() if now_s >= quota.ends_s]:
            del self.quotas[name]

    def _paused(self, now_s: float) -> Iterator[Hold]:
        if now_s < self._told_until_s:
            yield Hold(_COOLDOWN, "it asked to wait", self._cooldown_until_s, self._told_until_s)
        elif now_s < self._cooldown_until_s:
            yield Hold(_COOLDOWN, "held back after it refused for its rate limit", self._cooldown_until_s)

    def _told(self, now_s: float, threshold: float) -> Iterator[Hold]:
        for quota in self.quotas.values():
            rule = _TOKENS if quota.told.counts_tokens else _REQUESTS
            used = quota.used(now_s)
            if quota.left(now_s) < 1:
                until_s = quota.when_left(1.0)
                yield _used_up(rule, until_s, closed_until_s=until_s if quota.told.reset_s is not None else 0.0)
            if used is not None and quota.limit is not None and used >= threshold - _ROUNDING:
                yield _near(rule, used, quota.when_left((1.0 - threshold) * quota.limit))

    def _counting(self, now_s: float, threshold: float) -> Iterator[Hold]:
        """By our own count against the configured limits."""
        for rule, share, (count, limit) in self._counted():
            if share < threshold - _ROUNDING:
                continue
            many = {rule: math.floor(count - threshold * limit + _ROUNDING) + 1}
            yield _near(rule, share, now_s + self.minute.wait_s(now_s, **many))
            if count >= limit:
                until_s = now_s + self.minute.wait_s(now_s, **{rule: count - limit + 1})
                yield _used_up(rule, until_s, closed_until_s=until_s)

    def _counted(self) -> Iterator[tuple[str, float, tuple[int, int]]]:
        """What is counted, its share of the limit, count and limit."""
        for rule, count, limit in (
            (_REQUESTS, self.minute.requests, self.rpm),
            (_TOKENS, self.minute.tokens, self.tpm),
        ):
            if limit:
                yield rule, min(count / limit, 1.0), (count, limit)


def _near(rule: str, used: float, until_s: float) -> Hold:
    return Hold(rule, f"held back at {used:.0%} of its limit of {rule}", until_s)


def _used_up(rule: str, until_s: float, *, closed_until_s: float) -> Hold:
    return Hold(rule, f"its limit of {rule} is used up", until_s, closed_until_s)
