"""What a fleet file says of its replicas' health: when one is left alone, and how it comes back."""

from __future__ import annotations

import attrs

from kvfleet.config.fields import flag, number, section

__all__ = ["HealthConfig", "OutlierConfig"]


@attrs.frozen(kw_only=True)
class OutlierConfig:
    """Leaving alone a replica that answers worse than its model's others. The names are those of Envoy."""

    enabled: bool = flag(True, doc="Compare the replicas of a model with each other.")
    interval_seconds: float = number(10, gt=0, unit="s", doc="Time between two comparisons.")
    base_ejection_seconds: float = number(
        30,
        gt=0,
        unit="s",
        doc="How long a replica is left alone that fell short; twice that the second time, and so on.",
    )
    max_ejection_seconds: float = number(300, gt=0, unit="s", doc="Longest time that it is left alone.")
    success_rate_minimum_hosts: int = number(2, ge=2, unit="replicas", doc="Fewer are not compared.")
    success_rate_request_volume: int = number(
        20, ge=1, unit="calls", doc="Fewer calls since the last comparison that counted are no measurement."
    )
    success_rate_stdev_factor: float = number(
        1.9,
        gt=0,
        doc="By how many standard errors its share of failed calls must be above that of the others; and by a tenth.",
    )
    latency_factor: float | None = number(
        10.0,
        gt=1,
        doc="How many times as long as the median of the others, for the same work, it must take; no limit if null.",
    )


@attrs.frozen(kw_only=True)
class HealthConfig:
    """When a replica is left alone, and how it comes back."""

    failure_threshold: int = number(3, ge=1, doc="Failed calls, or failed checks, in a row that open a breaker.")
    recovery_timeout_seconds: float = number(60, gt=0, unit="s", doc="Time until an open breaker lets one request try.")
    max_ejection_percent: float = number(
        50,
        ge=0,
        le=100,
        unit="%",
        doc="Most of a model's replicas that are left alone for how they answer, but always one. One that cannot be "
        "reached, or fails its checks, is left alone in any case.",
    )
    panic_threshold_percent: float = number(
        0,
        ge=0,
        le=100,
        unit="%",
        doc="If fewer of a model's replicas may be called, all are: what few are left would drown. Never if 0.",
    )
    slow_start_seconds: float = number(
        10, ge=0, unit="s", doc="Time in which the share of a replica that has come back grows to the usual one."
    )
    outlier_detection: OutlierConfig = section(OutlierConfig, doc="Comparing replicas with each other.")
