"""How far expectations of cached tokens come true: predicted against reported, by replica."""

from __future__ import annotations

import logging

import attrs

__all__ = ["Trust"]

log = logging.getLogger(__name__)

_WEIGHT_OF_NEW = 0.1
_ENOUGH = 10


@attrs.define
class Trust:
    """What one replica's engine reported of its cache, beside what was expected.

    An engine may have forgotten what was expected of it (another gateway's traffic, a smaller cache than it was taken
    to have, a restart), or hold more than was known. The first makes expectations worth less, which `share` says; both
    are errors.

    Args:
        least: A share below this raises the alarm, once there were ten reports.

    Attributes:
        share: The part of expectations that came true, 0..1; 1 before the first report.
        reports: How many there were.
        error_tokens: Mean difference between expected and reported, in tokens.
        bias_tokens: Mean of reported less expected: below zero where too much was expected.
        expected_tokens, reported_tokens: Totals.
        is_alarming: True while the share is below `least`.
    """

    least: float = 0.5
    share: float = 1.0
    reports: int = 0
    error_tokens: float = 0.0
    bias_tokens: float = 0.0
    expected_tokens: float = 0.0
    reported_tokens: float = 0.0
    is_alarming: bool = False

    def learn(self, replica: str, expected: float, reported: int, *, is_enough: bool = True) -> None:
        """Take in a report.

        Args:
            replica: Named in the log if the alarm goes off.
            expected: Tokens that were expected in the cache, before any discount.
            reported: Tokens that were.
            is_enough: False for an expectation too small to say anything of the share.
        """
        self.reports += 1
        weight = max(_WEIGHT_OF_NEW, 1 / (self.reports + 1))
        self.error_tokens += (abs(reported - expected) - self.error_tokens) * weight
        self.bias_tokens += (reported - expected - self.bias_tokens) * weight
        self.expected_tokens += expected
        self.reported_tokens += reported
        if is_enough:
            self.share += (min(reported / expected, 1.0) - self.share) * weight
        was_alarming = self.is_alarming
        self.is_alarming = self.reports >= _ENOUGH and self.share < self.least
        if self.is_alarming and not was_alarming:
            log.warning("cache expectations fail replica=%s share=%.2f reports=%d", replica, self.share, self.reports)
