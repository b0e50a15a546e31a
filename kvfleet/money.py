"""Money as people read it."""

from __future__ import annotations

import math

__all__ = ["money"]

_LEAST_USD = 1e-9
"""A nanodollar, in which budgets count."""


def money(usd: float | None) -> str:
    """US dollars as people read them: cents from a dollar on, three figures below it, and never an exponent.

    What is not known is a dash.

    >>> money(0), money(2.14e-05), money(0.5), money(1234.5), money(3e-12), money(None)
    ('$0.00', '$0.0000214', '$0.50', '$1,234.50', '<$0.000000001', '-')
    """
    if usd is None:
        return "-"
    size = abs(usd)
    if not math.isfinite(size):
        return f"{usd} USD"
    sign = "-" if usd < 0 else ""
    if size == 0 or size >= 0.9995:
        return f"{sign}${size:,.2f}"
    if size < _LEAST_USD:
        return f"{sign}<${_LEAST_USD:.9f}"
    figures = f"{size:.{2 - math.floor(math.log10(size))}f}".rstrip("0")
    return f"{sign}${figures.ljust(4, '0')}"
