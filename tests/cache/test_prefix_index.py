"""Which replica holds which blocks, by what is told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvfleet.cache.prefix_index import GPU, Matched, PrefixIndex

PROMPTS = st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(1, 12), max_size=6)), max_size=40)


def longest(held: set[int], blocks: list[int]) -> int:
    """How many of the first blocks are held, one after the other: what the index must say."""
    return next((i for i, block in enumerate(blocks) if block not in held), len(blocks))


@given(PROMPTS, st.lists(st.integers(1, 12), max_size=6))
def test_a_match_is_contiguous_and_claims_nothing_that_was_removed(
    told: list[tuple[int, list[int]]], prompt: list[int]
) -> None:
    """Against a set for each replica, whatever is stored, removed and cleared in whatever order."""
    index, held = PrefixIndex(), {f"r{i}": set[int]() for i in range(3)}
    for what, blocks in told:
        replica = f"r{len(blocks) % 3}"
        if what < 2:
            index.store(replica, blocks)
            held[replica] |= set(blocks)
        elif what == 2:
            index.remove(replica, blocks)
            held[replica] -= set(blocks)
        elif len(blocks) > 4:
            index.clear(replica)
            held[replica].clear()
    expected = {name: n for name, blocks in held.items() if (n := longest(blocks, prompt))}
    assert index.depths(prompt) == expected
    assert {name: found.blocks for name, found in index.match(prompt).items()} == expected
    assert len(index) == sum(map(len, held.values())) == sum(index.count(name) for name in held)


def test_tiers_go_on_where_the_gpu_ends() -> None:
    """Blocks in other memory count, but not as blocks that need no loading; a hole in all of them ends the match."""
    index = PrefixIndex()
    index.store("a", [1, 2])
    index.store("a", [3, 4, 6], "cpu")
    index.store("b", [1], "cpu")
    assert index.match([1, 2, 3, 4, 5, 6]) == {"a": Matched(4, 2), "b": Matched(1, 0)}
    index.remove("a", [2], GPU)
    assert index.match([1, 2, 3]) == {"a": Matched(1, 1), "b": Matched(1, 0)}


def test_many_replicas_are_told_apart() -> None:
    """512 of them, each with a prefix of its own length."""
    index = PrefixIndex()
    for i in range(512):
        index.store(f"r{i}", range(1, i + 1))
    found = index.depths(list(range(1, 600)))
    assert found == {f"r{i}": i for i in range(1, 512)}


def test_a_replica_that_is_gone_leaves_its_place() -> None:
    """Its blocks are nobody's, not the newcomer's."""
    index = PrefixIndex()
    index.store("a", [1, 2])
    index.forget(["a", "stranger"])
    index.store("b", [9])
    assert index.depths([1, 2]) == {}
    assert len(index) == 1


def test_memory_is_bounded_and_what_does_not_fit_is_counted() -> None:
    """Nothing that is not held is claimed."""
    index = PrefixIndex(max_entries=5)
    index.store("a", [1, 2, 3])
    index.store("b", [1, 2, 3, 4])
    assert (len(index), index.refused) == (5, 2)
    assert index.depths([1, 2, 3, 4]) == {"a": 3, "b": 2}
