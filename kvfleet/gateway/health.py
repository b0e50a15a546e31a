"""How the gateway and its fleet are, for people and for load balancers. Nobody is probed to answer.

============  =====================================================================  ==========================
path          200                                                                    503
============  =====================================================================  ==========================
``/livez``    always: the process runs its event loop                                never; no answer: restart it
``/readyz``   send requests here                                                     starting, stopping, or no
                                                                                     replica may be used
``/health``   ``ok``: every replica may be used; ``degraded``: some may not, and     ``unavailable``: none may be
              requests are still answered                                            used
============  =====================================================================  ==========================

A degraded gateway answers 200, since a load balancer that took it out would turn a lost replica into a lost fleet.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any

from kvfleet.gateway.replicas import ReplicaNames
from kvfleet.turns import Steps

__all__ = ["Phase", "fleet_report", "is_usable", "is_usable_fleet", "with_others"]

_SHOWN = (
    "healthy", "reason", "breaker", "in_flight", "running", "waiting", "kv_usage", "prefix_hit_rate", "expected_ttfb_s",
    "rate_limit_left", "rate_limited_for_s", "share", "panic",
    "cache_mode", "cache_why",
)  # fmt: skip


class Phase(enum.StrEnum):
    """Where the gateway is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"


def is_usable(replica: Mapping[str, Any]) -> bool:
    """True if a request may go to this replica."""
    return bool(replica["healthy"]) and bool(replica.get("enabled", True))


def is_usable_fleet(state: Mapping[str, Any]) -> bool:
    """True if a request may go anywhere."""
    return any(is_usable(replica) for replica in state["replicas"])


def fleet_report(state: Mapping[str, Any], names: ReplicaNames, phase: Phase) -> Steps[tuple[int, dict[str, Any]]]:
    """The HTTP status and the body of ``/health``.

    Args:
        state: What `Router.state` says.
        names: Names for the replicas; their addresses are not shown.
        phase: The gateway's own.
    """
    replicas = state["replicas"]
    usable = sum(map(is_usable, replicas))
    status = "ok" if usable == len(replicas) else "degraded" if usable else "unavailable"
    models: dict[str, dict[str, int]] = {}
    endpoints: dict[str, dict[str, Any]] = {}
    for replica in replicas:
        counted = models.setdefault(replica["model"], {"replicas": 0, "usable": 0})
        counted["replicas"] += 1
        counted["usable"] += is_usable(replica)
        name = names.by_id[f"{replica['model']}@{replica['endpoint']}"]
        shown = {key: replica[key] for key in _SHOWN if replica.get(key) not in (None, "")}
        endpoints[names.hide(name)] = names.hide_in(shown)
        yield
    body: dict[str, Any] = {
        "status": status,
        "phase": phase.value,
        "fleet": state["fleet"],
        "strategy": state["strategy"],
        "pipeline": state["pipeline"],
        "models": models,
    }
    return (200 if usable else 503), {**names.hide_in(body), "endpoints": endpoints}


def with_others(state: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The state of a router with what other workers have in flight at its replicas."""
    if not others:
        return state

    def added(replica: Mapping[str, Any]) -> dict[str, Any]:
        name = f"{replica['model']}@{replica['endpoint']}"
        more = sum(other["in_flight"].get(name, 0) for other in others)
        return {**replica, "in_flight": (replica.get("in_flight") or 0) + more}

    return {**state, "replicas": [added(replica) for replica in state["replicas"]]}
