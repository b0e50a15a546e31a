"""How long clients may stall, and the look at all of them once a second that costs nothing on the hot path.

The defaults are those that HAProxy's and Envoy's guides give for servers at the edge.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from kvfleet.config.limits import ClientLimits
from kvfleet.gateway.connection import ClientConnection
from kvfleet.turns import Steps, at_once

__all__ = ["Patience", "sweep", "sweep_steps"]

_AT_ONCE = 256


@attrs.frozen(kw_only=True)
class Patience:
    """How long a client may take, in seconds.

    Attributes:
        head_s: To send a request's head, from the connection's beginning or the head's first byte.
        body_s: Between two pieces of a request's body.
        read_s: Between two readings of an answer, once what it has not read fills the buffers.
        idle_s: Between two requests. Longer than the pools of usual clients and load balancers keep an idle connection
            (httpx 5 s, AWS 60 s), so that it is they who close it, and never the gateway under a request that is just
            being sent.
        close_s: To close its half of a connection, once it was told why it is closed.
    """

    head_s: float = 10.0
    body_s: float = 30.0
    read_s: float = 120.0
    idle_s: float = 75.0
    close_s: float = 2.0

    @classmethod
    def of(cls, limits: ClientLimits) -> Patience:
        """As configured."""
        return cls(
            head_s=limits.header_timeout_seconds,
            body_s=limits.body_timeout_seconds,
            read_s=limits.read_timeout_seconds,
            idle_s=limits.idle_timeout_seconds,
        )


def sweep(connections: Iterable[ClientConnection], now_s: float, patience: Patience) -> int:
    """Close the connections of clients that have stalled; how many.

    Args:
        connections: The server's open connections.
        now_s: The event loop's time.
        patience: How long they had.
    """
    return at_once(sweep_steps(connections, now_s, patience))


def sweep_steps(connections: Iterable[ClientConnection], now_s: float, patience: Patience) -> Steps[int]:
    """The same in steps of some connections: to look at ten thousand takes 10 ms."""
    closed = 0
    for number, connection in enumerate(tuple(connections)):
        closed += _close_if_stalled(connection, now_s, patience)
        if number % _AT_ONCE == 0:
            yield
    return closed


def _close_if_stalled(one: ClientConnection, now_s: float, patience: Patience) -> bool:
    if _is_late(one.closing_since, now_s, patience.close_s) and not one.unsent_bytes:
        one.abort()
        return True
    if _is_late(one.idle_since, now_s, patience.idle_s):
        one.stop()
        return True
    if _is_late(one.in_head_since, now_s, patience.head_s) and not one.is_answering:
        one.refuse(408, "the request's head did not come in time")
        return True
    is_body_late = _is_late(one.in_body_since, now_s, patience.body_s) and not one.is_read_paused
    if is_body_late or _reads_nothing(one, now_s, patience):
        one.abort()
        return True
    return False


def _is_late(since_s: float | None, now_s: float, limit_s: float) -> bool:
    return since_s is not None and now_s - since_s > limit_s


def _reads_nothing(one: ClientConnection, now_s: float, patience: Patience) -> bool:
    """True if a client has read nothing for too long of an answer that does not fit into the buffers."""
    if not one.is_write_paused and one.closing_since is None:
        one.stalled = None
        return False
    waiting = one.unsent_bytes
    if one.stalled is None or one.stalled[0] != waiting:
        one.stalled = (waiting, now_s)
        return False
    return now_s - one.stalled[1] > patience.read_s
