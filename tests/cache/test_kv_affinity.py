"""Sessions, rings and the affinity of endpoints."""

from __future__ import annotations

from collections import Counter

import pytest

from kvfleet.adapters.base import ChatMessage
from kvfleet.cache.fingerprints import PromptFingerprint, PromptFingerprinter
from kvfleet.cache.kv_affinity import ConsistentHashRing, KVAffinityScorer, SessionAffinityStore
from kvfleet.clock import FrozenClock

ENDPOINTS = ["http://gpu-1:8000", "http://gpu-2:8000"]
SYSTEM = ChatMessage("system", "You are a helpful coding assistant.")


def prompt(*texts: str) -> PromptFingerprint:
    """The fingerprint of a conversation under the page's system prompt."""
    return PromptFingerprinter(prefix_tokens=128).fingerprint([SYSTEM, *(ChatMessage("user", t) for t in texts)])


def scorer(clock: FrozenClock | None = None, **options: float) -> KVAffinityScorer:
    """The page's scorer, with two endpoints."""
    made = KVAffinityScorer(virtual_nodes=150, session_ttl=3600, clock=clock or FrozenClock(), **options)  # type: ignore[arg-type]
    made.register_endpoints("llama-8b", ENDPOINTS)
    return made


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_pages_example(endpoint: str) -> None:
    """The same prompt goes where it was answered, with an affinity of at least 0.5."""
    made = scorer()
    made.record_routing(prompt("Write a binary search in Python"), endpoint)
    best, affinity = made.best_endpoint(prompt("Write a binary search in Python"), "llama-8b", ENDPOINTS)
    assert best == endpoint
    assert affinity >= 0.5


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_another_question_under_the_same_system_prompt_goes_to_the_same_gpu(endpoint: str) -> None:
    """The page's comment holds: same system prompt, same GPU."""
    made = scorer()
    made.record_routing(prompt("Write a binary search in Python"), endpoint)
    best, affinity = made.best_endpoint(prompt("And what is a heap?"), "llama-8b", ENDPOINTS)
    assert best == endpoint
    assert affinity >= 0.3


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_second_turn_stays(endpoint: str) -> None:
    """A conversation is bound where it was last."""
    made = scorer()
    made.record_routing(prompt("Hello"), endpoint)
    assert made.best_endpoint(prompt("Hello", "And now?"), "llama-8b", ENDPOINTS)[0] == endpoint
    assert made.score_affinity(prompt("Hello", "And now?"), "llama-8b", ENDPOINTS)[endpoint] >= 0.8


def test_an_unknown_prompt_has_a_home_on_the_ring() -> None:
    """Two gateways that know nothing choose alike; different beginnings have different homes."""
    one, two = scorer(), scorer()
    homes = Counter()
    for i in range(200):
        unknown = PromptFingerprinter().fingerprint_text(f"prompt {i}")
        best, affinity = one.best_endpoint(unknown, "llama-8b", ENDPOINTS)
        assert two.best_endpoint(unknown, "llama-8b", ENDPOINTS)[0] == best
        assert affinity == pytest.approx(0.2)
        homes[best] += 1
    assert min(homes.values()) > 60


def test_health_can_outweigh_affinity() -> None:
    """A warm replica that is overloaded loses against one that is cold and free."""
    made = scorer()
    made.record_routing(prompt("Hello"), ENDPOINTS[0])
    health = {ENDPOINTS[0]: 0.1, ENDPOINTS[1]: 1.0}
    warm = made.score_affinity(prompt("New question"), "llama-8b", ENDPOINTS)[ENDPOINTS[0]]
    assert warm >= 0.3
    assert made.best_endpoint(prompt("New question"), "llama-8b", ENDPOINTS, health)[0] == ENDPOINTS[1]


def test_little_affinity_counts_as_none() -> None:
    """Below the minimum, health alone decides."""
    made = scorer(min_affinity_score=0.9)
    made.record_routing(prompt("Hello"), ENDPOINTS[0])
    health = {ENDPOINTS[0]: 0.9, ENDPOINTS[1]: 1.0}
    assert made.best_endpoint(prompt("Other"), "llama-8b", ENDPOINTS, health)[0] == ENDPOINTS[1]


def test_what_was_learned_ages() -> None:
    """After its time, a binding is gone."""
    clock = FrozenClock()
    made = scorer(clock)
    made.record_routing(prompt("Hello"), ENDPOINTS[0])
    clock.advance(3601)
    assert max(made.score_affinity(prompt("Hello"), "llama-8b", ENDPOINTS).values()) == pytest.approx(0.2)


def test_only_endpoints_that_may_be_used_are_chosen() -> None:
    """A filtered endpoint is never the best; without any, that is an error."""
    made = scorer()
    made.record_routing(prompt("Hello"), ENDPOINTS[0])
    assert made.best_endpoint(prompt("Hello"), "llama-8b", ENDPOINTS[1:])[0] == ENDPOINTS[1]
    with pytest.raises(ValueError, match="'llama-8b' has no endpoint"):
        made.best_endpoint(prompt("Hello"), "llama-8b", [])


def test_everything_is_bounded() -> None:
    """Sessions and beginnings stay within the bound, and the figures say so."""
    made = scorer(max_entries=50)
    for i in range(500):
        made.record_routing(prompt(f"question {i}"), ENDPOINTS[0])
    assert made.get_cache_stats() == {"active_sessions": 50, "prefix_cache_entries": 50, "hash_ring_nodes": 2}


def test_a_session_is_bound_and_bound_again() -> None:
    """The last endpoint counts; after its time, none does."""
    clock = FrozenClock()
    store = SessionAffinityStore(ttl_seconds=10, clock=clock)
    assert store.get("s") is None
    store.set("s", "a")
    clock.advance(6)
    store.set("s", "b")
    clock.advance(6)
    assert store.get("s") == "b"
    clock.advance(5)
    assert store.get("s") is None
    assert (store.clear_expired(), len(store)) == (1, 0)


def test_clearing_leaves_what_is_still_good() -> None:
    """Only expired sessions go."""
    clock = FrozenClock()
    store = SessionAffinityStore(ttl_seconds=10, clock=clock)
    store.set("old", "a")
    clock.advance(6)
    store.set("new", "a")
    clock.advance(6)
    assert (store.clear_expired(), store.get("new")) == (1, "a")


def test_a_ring_shares_the_keys_evenly() -> None:
    """With 150 points each, every one of five nodes has a fifth of the keys, more or less."""
    ring = ConsistentHashRing.of([f"n{i}" for i in range(5)])
    shares = Counter(ring.get_node(f"key {i}") for i in range(10_000))
    assert len(shares) == 5
    assert all(1500 < count < 2500 for count in shares.values())


def test_only_the_keys_of_a_node_that_leaves_move() -> None:
    """That is what a consistent hash is for; coming back, the node gets its own keys again."""
    ring = ConsistentHashRing.of(["a", "b", "c"])
    keys = [f"key {i}" for i in range(1000)]
    before = {key: ring.get_node(key) for key in keys}
    ring.remove_node("b")
    ring.remove_node("b")
    after = {key: ring.get_node(key) for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != "b")
    assert set(after.values()) == {"a", "c"}
    ring.add_node("b")
    ring.add_node("b")
    assert {key: ring.get_node(key) for key in keys} == before
    assert (ring.nodes, len(ring)) == ({"a", "b", "c"}, 3)


def test_a_ring_can_be_asked_for_some_nodes_only() -> None:
    """The next allowed node on the ring takes the key; without any, there is none."""
    ring = ConsistentHashRing.of(["a", "b", "c"])
    for i in range(50):
        assert ring.get_node(i << 56, {"c"}) == "c"
    assert ring.get_node("key", ()) is None
    assert ConsistentHashRing().get_node("key") is None
