"""How many retries a fleet can afford: a share of its requests, so that a failure is not answered with a storm.

As Envoy and Finagle do it, but counted over the last seconds instead of in a bucket: what may be retried follows the
traffic by itself. Two numbers for each model, and two for the fleet.
"""

from __future__ import annotations

import math

import attrs

from kvfleet.clock import Clock, SystemClock

__all__ = ["RetryBudget"]

WINDOW_S = 10.0
_STEP_S = 0.5  # the past is discounted this often; an exponential for every request would cost as much as the rest
_MOST_MODELS = 4096


@attrs.define
class _Account:
    """Requests and retries of late, those of `WINDOW_S` ago counting 1/e."""

    at_s: float
    requests: float = 0.0
    retries: float = 0.0

    def fade(self, now_s: float) -> None:
        passed_s = now_s - self.at_s
        if passed_s >= _STEP_S:
            kept = math.exp(-passed_s / WINDOW_S)
            self.requests *= kept
            self.retries *= kept
            self.at_s = now_s


@attrs.define
class RetryBudget:
    """Counts requests, and grants retries: to each model for its own requests, and to the fleet for all of them.

    A retry is any attempt after a request's first one, wherever it goes; it is on the account of the model that was
    asked first. Each account may spend `ratio` retries for a request, and besides `floor_per_s` a second, so that a
    fleet with little to do can still recover.

    Args:
        ratio: Retries for each request.
        floor_per_s: Retries a second that are granted in any case.
        clock: The time.

    >>> from kvfleet.clock import FrozenClock
    >>> budget = RetryBudget(0.5, 0.0, FrozenClock())
    >>> budget.asked("m")
    >>> budget.asked("m")
    >>> budget.take("m"), budget.take("m")
    ('', 'model')
    """

    ratio: float = 0.2
    floor_per_s: float = 3.0
    clock: Clock = attrs.field(factory=SystemClock)
    _fleet: _Account = attrs.field(init=False)
    _models: dict[str, _Account] = attrs.field(init=False, factory=dict)

    @_fleet.default
    def _open(self) -> _Account:
        return _Account(self.clock.now_s())

    def asked(self, model: str) -> None:
        """A request begins, with this model as its first."""
        now_s = self.clock.now_s()
        own, fleet = self._models.get(model) or self._of(model, now_s), self._fleet
        if now_s - own.at_s >= _STEP_S:
            own.fade(now_s)
        if now_s - fleet.at_s >= _STEP_S:
            fleet.fade(now_s)
        own.requests += 1.0
        fleet.requests += 1.0

    def take(self, model: str) -> str:
        """Spend one retry for a request of a model: empty if that is granted, else whose budget is used up.

        That is ``model`` or ``fleet``; nothing is spent then.
        """
        now_s = self.clock.now_s()
        own = self._of(model, now_s)
        for account, whose in ((own, "model"), (self._fleet, "fleet")):
            account.fade(now_s)
            if self._left(account) < 1.0:
                return whose
        own.retries += 1.0
        self._fleet.retries += 1.0
        return ""

    def left(self, model: str = "") -> float:
        """Retries that are left now to a model, or to the fleet."""
        now_s = self.clock.now_s()
        account = self._of(model, now_s) if model else self._fleet
        account.fade(now_s)
        return max(self._left(account), 0.0)

    def inherit(self, before: RetryBudget) -> None:
        """Go on counting where another one stopped, after a reload."""
        self._fleet, self._models = before._fleet, before._models

    def _left(self, account: _Account) -> float:
        return self.ratio * account.requests + self.floor_per_s * WINDOW_S - account.retries + 1e-9

    def _of(self, model: str, now_s: float) -> _Account:
        account = self._models.get(model)
        if account is None:
            if len(self._models) >= _MOST_MODELS:
                del self._models[next(iter(self._models))]
            account = self._models[model] = _Account(now_s)
        return account
