"""What each replica holds by what was routed there."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.cache.routed_index import RoutedIndex
from tests.cache.test_prefix_index import PROMPTS


@given(PROMPTS, st.integers(1, 10))
def test_a_replica_forgets_the_least_recently_used(prompts: list[tuple[int, list[int]]], capacity: int) -> None:
    """As an engine would: against a model with one ordered dictionary, the end of a prompt before its beginning."""
    index = RoutedIndex(capacity=capacity)
    index.register(["r"])
    model: OrderedDict[int, None] = OrderedDict()
    for now_s, (_, blocks) in enumerate(prompts):
        chain = list(dict.fromkeys(blocks))
        index.record("r", chain, float(now_s), 1e9)
        for block in reversed(chain[:capacity]):
            model.pop(block, None)
            model[block] = None
        while len(model) > capacity:
            model.popitem(last=False)
        assert len(index) == len(model)
        assert all(index.known.holds("r", block) for block in model)


def test_old_visits_are_compacted() -> None:
    """A prompt that comes again and again does not grow the index."""
    index = RoutedIndex(capacity=1000)
    index.register(["r"])
    for now_s in range(5000):
        index.record("r", range(1, 20), float(now_s), 1e9)
    assert len(index) == 19
    assert index._held["r"].queued < 2000


def test_what_is_taken_back_was_never_there_and_what_was_stays() -> None:
    """A failed attempt leaves what earlier requests left."""
    index = RoutedIndex()
    index.register(["a", "b"])
    index.record("a", [1, 2], 0.0, 100.0)
    visit = index.record("a", [1, 2, 3], 1.0, 100.0)
    assert visit is not None
    assert index.depths([1, 2, 3], 2.0) == {"a": 3}
    index.retract("a", visit)
    assert index.depths([1, 2, 3], 2.0) == {"a": 2}
    index.retract("gone", visit)


def test_a_lease_ends_and_a_confirmation_makes_it_last() -> None:
    """Speculation is short, knowledge is long."""
    index = RoutedIndex()
    index.register(["a", "b"])
    one, two = index.record("a", [1], 0.0, 5.0), index.record("b", [1], 0.0, 5.0)
    assert one is not None
    assert two is not None
    index.confirm(one, 100.0)
    assert index.depths([1], 4.0) == {"a": 1, "b": 1}
    assert index.depths([1], 10.0) == {"a": 1}
    assert index.depths([1], 101.0) == {}


def test_every_replica_has_its_part_of_the_budget() -> None:
    """However many blocks come, and whatever the engines say of their size."""
    index = RoutedIndex(max_entries=100)
    index.register(["a", "b"])
    index.resize("a", 10_000)
    draw = random.Random(1)
    for now_s in range(200):
        for replica in ("a", "b"):
            index.record(replica, [draw.getrandbits(64) for _ in range(7)], float(now_s), 1e9)
    assert index.state() == {"entries": 100, "max_entries": 100}


def test_a_restart_clears_one_replica() -> None:
    """And a replica that is no longer there is forgotten."""
    index = RoutedIndex()
    index.register(["a", "b"])
    index.record("a", [1, 2], 0.0, 10.0)
    index.record("b", [1, 2], 0.0, 10.0)
    index.clear("a")
    assert index.depths([1, 2], 1.0) == {"b": 2}
    index.register(["a"])
    assert index.depths([1, 2], 1.0) == {}
    assert index.record("b", [1], 1.0, 10.0) is None


@pytest.mark.parametrize("blocks", [[], [7]])
def test_a_prompt_larger_than_the_cache_is_cut(blocks: list[int]) -> None:
    """Its beginning is what stays."""
    index = RoutedIndex(capacity=3)
    index.register(["a"])
    index.record("a", [*blocks, 1, 2, 3, 4], 0.0, 10.0)
    assert len(index) == 3
    assert index.depths([*blocks, 1, 2, 3, 4], 1.0) == {"a": 3}
