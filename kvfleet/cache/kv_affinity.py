"""Affinity of prompts to endpoints: sessions, shared beginnings, and a consistent hash for what nobody has seen."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping, Sequence

import attrs
import xxhash

from kvfleet.cache.fingerprints import PromptFingerprint
from kvfleet.cache.mark_index import MarkIndex
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.fields import number

__all__ = ["ConsistentHashRing", "KVAffinityScorer", "SessionAffinityStore"]


@attrs.define
class ConsistentHashRing:
    """Gives each key a node, so that a node that comes or goes moves only its own share of the keys.

    Karger et al., *Consistent Hashing and Random Trees*, STOC 1997.

    Args:
        virtual_nodes: Points of each node on the ring; more of them share the keys more evenly.

    >>> ring = ConsistentHashRing()
    >>> ring.add_node("a")
    >>> ring.get_node("any key")
    'a'
    """

    virtual_nodes: int = number(150, ge=1, doc="Points of each node on the ring.")
    _nodes: set[str] = attrs.field(init=False, factory=set)
    _points: list[int] = attrs.field(init=False, factory=list, repr=False)
    _owners: dict[int, str] = attrs.field(init=False, factory=dict, repr=False)

    @classmethod
    def of(cls, nodes: Iterable[str], virtual_nodes: int = 150) -> ConsistentHashRing:
        """A ring of these nodes."""
        ring = cls(virtual_nodes)
        for node in nodes:
            ring._place(node)
        ring._points = sorted(ring._owners)
        return ring

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def nodes(self) -> frozenset[str]:
        """The nodes."""
        return frozenset(self._nodes)

    def add_node(self, node: str) -> None:
        """Add a node; nothing happens if it is there."""
        if node not in self._nodes:
            self._place(node)
            self._points = sorted(self._owners)

    def remove_node(self, node: str) -> None:
        """Take a node out; nothing happens if it is not there."""
        if node in self._nodes:
            self._nodes.discard(node)
            self._owners = {point: owner for point, owner in self._owners.items() if owner != node}
            self._points = sorted(self._owners)

    def get_node(self, key: str | int, allowed: Container[str] | None = None) -> str | None:
        """The key's node, or the next one on the ring that is allowed; None if there is none.

        Args:
            key: A text, or a hash that is one already.
            allowed: The nodes that may be given; all if None.
        """
        points = self._points
        point = xxhash.xxh3_64_intdigest(key.encode()) if isinstance(key, str) else key
        start = bisect.bisect_left(points, point)
        for at in range(len(points)):
            owner = self._owners[points[(start + at) % len(points)]]
            if allowed is None or owner in allowed:
                return owner
        return None

    def _place(self, node: str) -> None:
        self._nodes.add(node)
        for number_ in range(self.virtual_nodes):
            self._owners[xxhash.xxh3_64_intdigest(f"{node}#{number_}".encode())] = node


@attrs.define
class SessionAffinityStore:
    """Which endpoint each session is bound to.

    Args:
        ttl_seconds: How long a binding holds after it was last set, in seconds.
        max_sessions: Most bindings; the oldest go first.
        clock: For their age.
    """

    ttl_seconds: float = number(3600, gt=0, unit="s", doc="How long a binding holds.")
    max_sessions: int = number(100_000, ge=1, doc="Most bindings.")
    clock: Clock = attrs.field(factory=SystemClock)
    _bound: OrderedDict[str, tuple[str, float]] = attrs.field(init=False, factory=OrderedDict, repr=False)

    def __len__(self) -> int:
        return len(self._bound)

    def get(self, session: str) -> str | None:
        """The session's endpoint; None if it has none, or its binding is too old."""
        bound = self._bound.get(session)
        if bound is None or bound[1] < self.clock.now_s():
            return None
        return bound[0]

    def set(self, session: str, endpoint: str) -> None:
        """Bind a session."""
        self._bound.pop(session, None)
        if len(self._bound) >= self.max_sessions:
            self._bound.popitem(last=False)
        self._bound[session] = (endpoint, self.clock.now_s() + self.ttl_seconds)

    def clear_expired(self) -> int:
        """Forget the bindings that are too old; how many those were."""
        now_s, count = self.clock.now_s(), 0
        while self._bound and next(iter(self._bound.values()))[1] < now_s:
            self._bound.popitem(last=False)
            count += 1
        return count


@attrs.define
class KVAffinityScorer:
    """Which endpoint of a model has most of a prompt in its KV cache, as far as one can know from where requests went.

    An endpoint's affinity is 0.5 if the conversation was there last, 0.3 if the prompt's beginning (its system
    messages, or a fixed number of tokens) was there, and 0.2 if the consistent hash of that beginning falls on it.

    Args:
        virtual_nodes: Points of each endpoint on the hash ring.
        session_ttl: How long what was learned is believed, in seconds.
        min_affinity_score: Affinity below this counts as none.
        max_entries: Most sessions, and most beginnings, that are remembered.
        clock: For their age.
    """

    virtual_nodes: int = number(150, ge=1, doc="Points of each endpoint on the hash ring.")
    session_ttl: float = number(3600, gt=0, unit="s", doc="How long what was learned is believed.")
    min_affinity_score: float = number(0.3, ge=0, le=1, doc="Affinity below this counts as none.")
    max_entries: int = number(50_000, ge=1, doc="Most sessions, and most beginnings, that are remembered.")
    clock: Clock = attrs.field(factory=SystemClock)
    _sessions: SessionAffinityStore = attrs.field(init=False, repr=False)
    _prefixes: MarkIndex = attrs.field(init=False, repr=False)
    _rings: dict[str, ConsistentHashRing] = attrs.field(init=False, factory=dict, repr=False)

    @_sessions.default
    def _make_sessions(self) -> SessionAffinityStore:
        return SessionAffinityStore(self.session_ttl, self.max_entries, self.clock)

    @_prefixes.default
    def _make_prefixes(self) -> MarkIndex:
        return MarkIndex(self.session_ttl, self.max_entries)

    def register_endpoints(self, model: str, endpoints: Sequence[str]) -> None:
        """Put a model's endpoints on its ring, instead of any there before."""
        self._rings[model] = ConsistentHashRing.of(endpoints, self.virtual_nodes)

    def record_routing(self, fingerprint: PromptFingerprint, endpoint: str) -> None:
        """The prompt was answered by `endpoint`."""
        self._sessions.set(fingerprint.session_key, endpoint)
        self._prefixes.record(fingerprint.marks, endpoint, self.clock.now_s())

    def score_affinity(self, fingerprint: PromptFingerprint, model: str, endpoints: Sequence[str]) -> dict[str, float]:
        """The affinity of each endpoint, 0..1."""
        home = self._home(fingerprint, model, endpoints)
        session = self._sessions.get(fingerprint.session_key)
        held = self._prefixes.lookup(fingerprint.marks, self.clock.now_s())
        return {e: 0.5 * (e == session) + 0.3 * (held.get(e, 0) > 0) + 0.2 * (e == home) for e in endpoints}

    def best_endpoint(
        self,
        fingerprint: PromptFingerprint,
        model: str,
        endpoints: Sequence[str],
        health_scores: Mapping[str, float] | None = None,
    ) -> tuple[str, float]:
        """The endpoint to prefer, and its affinity.

        Args:
            fingerprint: The prompt's.
            model: The model.
            endpoints: Its endpoints that may be used; the first is preferred among equals.
            health_scores: 0..1 by endpoint, 1 best; if given, they count 0.4 and the affinity 0.6.

        Raises:
            ValueError: if there are no endpoints.
        """
        if not endpoints:
            raise ValueError(f"model {model!r} has no endpoint to choose from")
        affinity = self.score_affinity(fingerprint, model, endpoints)
        health = health_scores or {}

        def worth(endpoint: str) -> float:
            known = affinity[endpoint] if affinity[endpoint] >= self.min_affinity_score else 0.0
            return 0.6 * known + 0.4 * health.get(endpoint, 1.0)

        # The ring's word alone is below the usual minimum; it still tells equals apart.
        best = max(endpoints, key=lambda e: (worth(e), affinity[e]))
        return best, affinity[best]

    def get_cache_stats(self) -> dict[str, int]:
        """How much is remembered."""
        return {
            "active_sessions": len(self._sessions),
            "prefix_cache_entries": len(self._prefixes),
            "hash_ring_nodes": sum(len(ring) for ring in self._rings.values()),
        }

    def _home(self, fingerprint: PromptFingerprint, model: str, endpoints: Sequence[str]) -> str | None:
        ring = self._rings.get(model)
        return None if ring is None else ring.get_node(fingerprint.beginning, endpoints)
