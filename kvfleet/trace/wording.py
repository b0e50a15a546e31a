"""How traces put things: short names for replicas, quantities with their units, times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from kvfleet.money import money
from kvfleet.trace.records import endpoint_of, model_of

__all__ = ["duration", "labels", "plural", "quantity"]


def labels(replicas: Iterable[str]) -> Mapping[str, str]:
    """A short name for each replica: its model's, with the endpoint if the model has several replicas here.

    >>> labels(["a@http://x:1", "b@http://x:1", "b@http://y:1"])
    {'a@http://x:1': 'a', 'b@http://x:1': 'b@x:1', 'b@http://y:1': 'b@y:1'}
    """
    ids = tuple(dict.fromkeys(replicas))
    of_model: dict[str, list[str]] = {}
    for replica in ids:
        of_model.setdefault(model_of(replica), []).append(replica)
    return {replica: _label(replica, of_model[model_of(replica)]) for replica in ids}


def _label(replica: str, siblings: list[str]) -> str:
    if len(siblings) == 1:
        return model_of(replica)
    places = [endpoint_of(one).partition("://")[2] for one in siblings]
    place = endpoint_of(replica).partition("://")[2]
    # Two endpoints may differ in their scheme alone.
    return f"{model_of(replica)}@{place}" if places.count(place) == 1 else replica


def quantity(value: float, unit: str) -> str:
    """A score as people read it, with its unit; a utility stands bare.

    >>> quantity(0.75, "utility"), quantity(0.0412, "s"), quantity(0.00021, "usd"), quantity(1024, "tokens")
    ('0.750', '41.2 ms', '$0.00021', '1,024 tokens')
    """
    if not math.isfinite(value):
        return f"{value} {unit}".strip()
    if unit == "s":
        return duration(value * 1000)
    if unit == "usd":
        return money(value)
    if unit == "tokens":
        return f"{value:,.0f} tokens"
    return f"{value:.3f}"


def duration(ms: float) -> str:
    """Milliseconds as people read them.

    >>> duration(0.0381), duration(0.92), duration(41.2), duration(412), duration(10_000), duration(0)
    ('0.04 ms', '0.92 ms', '41.2 ms', '412 ms', '10.0 s', '0 ms')
    """
    size = abs(ms)
    if size >= 10_000:
        return f"{ms / 1000:,.1f} s"
    if size >= 1000:
        return f"{ms / 1000:.2f} s"
    if size >= 100:
        return f"{ms:.0f} ms"
    if size >= 1:
        return f"{ms:.1f} ms"
    return f"{ms:.2f} ms" if size >= 0.005 else "0 ms" if size == 0 else "<0.01 ms"


def plural(number: int, word: str) -> str:
    """A number with its word.

    >>> plural(1, "candidate"), plural(3, "candidate")
    ('1 candidate', '3 candidates')
    """
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"
