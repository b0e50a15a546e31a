"""A service level: the times that make an answer a good one."""

from __future__ import annotations

import re

import attrs

from kvfleet.config.findings import Finding, did_you_mean
from kvfleet.errors import ConfigError

__all__ = ["SLO", "UNITS", "parse_slo", "seconds"]

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
"""Units of time, in seconds."""

_TIMES = ("ttft", "tpot", "e2e")
_PART = re.compile(r"\s*(?P<name>\w+)\s*<=?\s*(?P<value>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[a-z]*)\s*")


@attrs.frozen(kw_only=True)
class SLO:
    """Longest times of a good answer, in seconds; None for no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def is_met(self, ttft_s: float, tpot_s: float | None, e2e_s: float) -> bool:
        """True if an answer with these times is good; one of a single token has no time between tokens."""
        return (
            (self.ttft_s is None or ttft_s <= self.ttft_s)
            and (self.tpot_s is None or tpot_s is None or tpot_s <= self.tpot_s)
            and (self.e2e_s is None or e2e_s <= self.e2e_s)
        )

    def __str__(self) -> str:
        limits = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2e": self.e2e_s}
        return ", ".join(f"{name} <= {seconds(limit)}" for name, limit in limits.items() if limit is not None)


def seconds(value: float) -> str:
    """A time as people write it.

    >>> seconds(0.05), seconds(2.0), seconds(90.5)
    ('50 ms', '2 s', '90.5 s')
    """
    return f"{value:.4g} s" if value >= 1 or not value else f"{value * 1000:.3g} ms"


def parse_slo(text: str) -> SLO:
    """Read a service level.

    >>> parse_slo("ttft < 2s, tpot < 50ms")
    SLO(ttft_s=2.0, tpot_s=0.05, e2e_s=None)

    Raises:
        ConfigError: with the column of what cannot be read.
    """
    found: dict[str, float] = {}
    at = 0
    while True:
        part = _PART.match(text, at)
        if part is None:
            raise _wrong(at, "cannot be read", "write it as 'ttft < 2s, tpot < 50ms'")
        name, unit = part["name"], part["unit"]
        if name not in _TIMES:
            raise _wrong(part.start("name"), f"there is no {name!r}", did_you_mean(name, _TIMES))
        if unit not in UNITS:
            raise _wrong(part.start("unit"), f"{unit!r} is no unit of time" if unit else "needs a unit", _known_units())
        found[f"{name}_s"] = float(part["value"]) * UNITS[unit]
        at = part.end()
        if at == len(text):
            return SLO(**found)
        if text[at] != ",":
            raise _wrong(at, f"expected a comma, not {text[at]!r}")
        at += 1


def _known_units() -> str:
    return f"units are {', '.join(UNITS)}"


def _wrong(at: int, message: str, remedy: str = "") -> ConfigError:
    return ConfigError([Finding(message, remedy, file="--slo", line=1, column=at + 1, code="slo")])
