"""What an engine's cache holds, by its events."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.cache.block_chain import BlockCounts, token_hashes
from kvfleet.cache.engine_blocks import EngineBlocks
from kvfleet.cache.kv_events import BlockStored
from tests.cache.made import Noted, held, removed, stored, words

PROMPT = range(100, 116)


@pytest.fixture
def index() -> Noted:
    """An index."""
    return Noted()


@pytest.fixture
def blocks(index: Noted) -> EngineBlocks:
    """The blocks of a cache."""
    return EngineBlocks(index=index, holder="a", block_tokens=4)


class TestPrompts:
    """The chain over token ids."""

    @given(st.lists(st.integers(0, 2**32 - 1), max_size=80), st.integers(1, 9), st.integers(0, 80))
    def test_prompts_that_begin_alike_share_blocks_up_to_there(self, tokens: list[int], size: int, at: int) -> None:
        """And no block beyond the first difference."""
        other = [*tokens[:at], *(token ^ 1 for token in tokens[at:])]
        one, two = token_hashes(words(tokens), size), token_hashes(words(other), size)
        alike = sum(itertools.takewhile(bool, (x == y for x, y in zip(one, two, strict=True))))
        assert alike == min(at, len(tokens)) // size
        assert len(set(one) & set(two)) == alike
        assert len(one) == len(tokens) // size

    def test_a_salt_keeps_prompts_apart(self) -> None:
        """From the first block on."""
        plain, salted = token_hashes(words(PROMPT), 4), token_hashes(words(PROMPT), 4, "team")
        assert not set(plain) & set(salted)


class TestBlocks:
    """Stored, and removed."""

    def test_what_is_stored_is_claimed(self, blocks: EngineBlocks, index: Noted) -> None:
        """Block by block, whatever the engine calls them."""
        blocks.stored(stored([1, 2], PROMPT[:8]))
        blocks.stored(stored([3], PROMPT[8:12], parent=2))
        assert held(index, PROMPT) == 12
        assert held(index, [*PROMPT[:8], 7, 7, 7, 7]) == 8
        assert held(index, PROMPT, salt="team") == 0
        assert (len(blocks), blocks.copies, blocks.engine_block_tokens) == (3, 3, 4)

    def test_what_is_removed_is_not(self, blocks: EngineBlocks, index: Noted) -> None:
        """A block amid a prompt ends the match there, and those after it come back with it."""
        blocks.stored(stored([1, 2, 3], PROMPT[:12]))
        blocks.removed(removed(2))
        assert held(index, PROMPT) == 4
        blocks.stored(stored([2], PROMPT[4:8], parent=1))
        assert held(index, PROMPT) == 12

    def test_copies_are_counted(self, blocks: EngineBlocks, index: Noted) -> None:
        """An engine (vLLM) may keep a block twice, and tells of both."""
        blocks.stored(stored([1], PROMPT[:4]))
        blocks.stored(stored([1], PROMPT[:4]))
        blocks.removed(removed(1))
        assert (held(index, PROMPT), blocks.copies) == (4, 1)
        blocks.removed(removed(1))
        assert (held(index, PROMPT), len(blocks)) == (0, 0)

    def test_what_is_told_again_is_no_copy(self, blocks: EngineBlocks, index: Noted) -> None:
        """A report of what a prompt found (vLLM's ``kv_cache_report_mode: full``), however often, and what it lacked."""
        blocks.stored(stored([1, 2], PROMPT[:8]))
        for _ in range(3):
            blocks.stored(stored([1, 2], PROMPT[:8]))
        assert (blocks.copies, blocks.counts.stored) == (2, 2)
        blocks.stored(stored([1, 2, 3], PROMPT[:12]))
        assert (held(index, PROMPT), blocks.copies) == (12, 3)
        blocks.stored(stored([3], PROMPT[8:12], parent=2))  # the prompt's last block, computed once more
        blocks.removed(removed(3))
        assert held(index, PROMPT) == 12
        blocks.removed(removed(3, 2, 1))
        assert (held(index, PROMPT), len(blocks), blocks.counts.strangers) == (0, 0, 0)

    def test_one_block_is_told_again_by_who_tells_again(self, blocks: EngineBlocks, index: Noted) -> None:
        """Else it is a prompt of one block, whose last token is always computed: kept twice."""
        blocks.stored(stored([1, 2], PROMPT[:8]))
        blocks.stored(stored([1], PROMPT[:4]))
        assert blocks.copies == 3
        blocks.stored(stored([1, 2], PROMPT[:8]))
        blocks.stored(stored([1], PROMPT[:4]))
        assert blocks.copies == 3

    def test_a_hybrid_engine_may_compute_anew_what_it_has(self, index: Noted) -> None:
        """Its other layers lack it: then it keeps a block of full attention twice."""
        blocks = EngineBlocks(index=index, holder="a", block_tokens=4)
        for _ in range(2):
            for group, kind in enumerate(("full_attention", "sliding_window")):
                more = {"group": group, "kind": kind, "window": 5 * group}
                blocks.stored(stored([1, 2], PROMPT[:8], **more))
            blocks.settle()
        blocks.removed(removed(2, 1))
        assert held(index, PROMPT) == 8

    def test_orphans_are_counted(self, blocks: EngineBlocks, index: Noted) -> None:
        """A block after one that is not known has no place; neither have its children."""
        blocks.stored(stored([2], PROMPT[4:8], parent=1))
        blocks.stored(stored([3], PROMPT[8:12], parent=2))
        blocks.removed(removed(2))
        assert blocks.counts == BlockCounts(orphans=2, strangers=1)
        assert not index.claims

    def test_what_keeps_prompts_apart(self, blocks: EngineBlocks, index: Noted) -> None:
        """A salt is part of the chain; a picture's hash too, and no text matches it."""
        blocks.stored(stored([1], PROMPT[:4], salt="team"))
        assert (held(index, PROMPT), held(index, PROMPT, salt="team")) == (0, 4)
        blocks.stored(stored([5, 6], PROMPT[:8], extras=(b"", b"picture")))
        assert held(index, PROMPT) == 4

    def test_adapters(self, index: Noted) -> None:
        """Blocks of another adapter are not this model's."""
        base = EngineBlocks(index=index, holder="a", block_tokens=4)
        tuned = EngineBlocks(index=index, holder="t", block_tokens=4, lora="tune")
        for blocks in (base, tuned):
            blocks.stored(stored([1], PROMPT[:4], lora="tune"))
        assert (base.counts.foreign, tuned.counts.stored) == (1, 1)
        assert set(index.claims) == {("t", "gpu")}

    def test_only_dense_spans(self, blocks: EngineBlocks, index: Noted) -> None:
        """Tokens that are not those of all the blocks cannot be told apart."""
        blocks.stored(stored([1, 2], PROMPT[:7]))
        assert (blocks.counts.sparse, index.claims) == (2, {})

    def test_clearing(self, blocks: EngineBlocks, index: Noted) -> None:
        """Leaves nothing."""
        blocks.stored(stored([1, 2], PROMPT[:8]))
        blocks.clear()
        assert (len(blocks), index.claims) == (0, {})

    def test_it_is_bounded(self, index: Noted) -> None:
        """What is beyond the bound is not claimed, and counted."""
        blocks = EngineBlocks(index=index, holder="a", block_tokens=4, max_blocks=3)
        blocks.stored(stored([1, 2, 3, 4], PROMPT))
        assert (held(index, PROMPT), len(blocks), blocks.counts.refused) == (12, 3, 1)
        blocks.removed(removed(4, 3))
        blocks.stored(stored([3], PROMPT[8:12], parent=2))
        assert held(index, PROMPT) == 12


class TestTiersAndGroups:
    """More than one place for a block."""

    def test_tiers(self, blocks: EngineBlocks, index: Noted) -> None:
        """A block may be in several, and leaves each by itself."""
        blocks.stored(stored([1, 2], PROMPT[:8]))
        blocks.stored(stored([1], PROMPT[:4], tier="cpu"))
        blocks.removed(removed(1, 2))
        assert (held(index, PROMPT), held(index, PROMPT, tier="cpu"), len(blocks)) == (0, 4, 1)
        blocks.stored(stored([1], PROMPT[:4]))
        blocks.removed(removed(1, tier="cpu"))
        assert (held(index, PROMPT), held(index, PROMPT, tier="cpu")) == (4, 0)

    def test_a_copy_without_tokens(self, blocks: EngineBlocks, index: Noted) -> None:
        """Of what it copied to the CPU, vLLM tells only the hashes."""
        blocks.stored(stored([1, 2], PROMPT[:8]))
        blocks.stored(stored([1, 2, 9], (), tier="cpu"))
        assert (held(index, PROMPT, tier="cpu"), blocks.counts.sparse) == (8, 1)

    def test_every_group_must_have_it(self, blocks: EngineBlocks, index: Noted) -> None:
        """A block that one group of layers has lost must be computed again."""
        blocks.stored(stored([1, 2], PROMPT[:8], group=0))
        assert held(index, PROMPT) == 8
        blocks.stored(stored([1], PROMPT[:4], group=1))
        assert held(index, PROMPT) == 4
        blocks.stored(stored([2], PROMPT[4:8], group=1, parent=1))
        assert held(index, PROMPT) == 8
        blocks.removed(removed(1, group=0))
        assert held(index, PROMPT) == 0
        blocks.removed(removed(1, group=1))
        blocks.stored(stored([1], PROMPT[:4], group=1))
        blocks.stored(stored([1], PROMPT[:4], group=0))
        assert held(index, PROMPT) == 8


class TestSizes:
    """Blocks of the engine's of another size than ours."""

    @pytest.mark.parametrize("size", [4, 8, 16])
    def test_larger_ones(self, index: Noted, size: int) -> None:
        """Two that begin alike share the blocks of ours they begin with, until neither is there."""
        blocks = EngineBlocks(index=index, holder="a", block_tokens=4)
        other = [*PROMPT[: size - 1], 7]
        blocks.stored(stored([1], PROMPT[:size], size=size))
        blocks.stored(stored([2], other, size=size))
        assert held(index, PROMPT) == size
        blocks.removed(removed(1))
        assert (held(index, PROMPT), held(index, other)) == (size - 4, size)
        blocks.removed(removed(2))
        assert held(index, other) == 0

    @pytest.mark.parametrize("size", [1, 2])
    def test_smaller_ones(self, blocks: EngineBlocks, index: Noted, size: int) -> None:
        """One of ours is claimed once it is whole, and no longer once its end is gone."""
        names = list(range(1, 16 // size + 1))
        blocks.stored(stored(names, PROMPT, size=size))
        assert held(index, PROMPT) == 16
        blocks.removed(removed(names[-1]))
        assert held(index, PROMPT) == 12
        branch = stored([99], [7] * size, parent=names[-2], size=size)
        blocks.stored(branch)
        assert held(index, [*PROMPT[: 16 - size], *[7] * size]) == 16
        for name in reversed([*names[:-1], 99]):
            blocks.removed(removed(name))
        assert (index.claims[("a", "gpu")], len(blocks), blocks.is_torn) == (set(), 0, False)

    def test_a_torn_block_is_noticed(self, blocks: EngineBlocks) -> None:
        """If a part amid one of ours goes before its end, which no radix tree does."""
        blocks.stored(stored([1, 2, 3, 4], PROMPT[:4], size=1))
        blocks.removed(removed(2))
        assert blocks.is_torn
        blocks.clear()
        assert not blocks.is_torn

    def test_sizes_that_do_not_fit(self, blocks: EngineBlocks, index: Noted) -> None:
        """Are counted."""
        blocks.stored(stored([1], range(6), size=6))
        assert (blocks.counts.sparse, index.claims) == (1, {})


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 8]), st.integers(1, 60))
def test_the_index_is_what_the_engine_holds(seed: int, size: int, steps: int) -> None:
    """Whatever is stored, kept twice and removed, from the leaves up: no claim more and none less."""
    rng, index = random.Random(seed), Noted()
    blocks = EngineBlocks(index=index, holder="a", block_tokens=4)
    cache: dict[tuple[int, ...], int] = {}  # an engine's: prompts of whole blocks, and how often each is kept
    for _ in range(steps):
        if cache and rng.random() < 0.4:
            leaves = [p for p in cache if not any(len(q) > len(p) and q[: len(p)] == p for q in cache)]
            gone = rng.choice(leaves)
            blocks.removed(removed(hash(gone) & 2**64 - 1))
            cache[gone] -= 1
            if not cache[gone]:
                del cache[gone]
        else:
            _store(rng, cache, blocks, size)
    expected = {
        block
        for prompt in cache
        for block in token_hashes(words(prompt), 4)
        if all(prompt[:end] in cache for end in range(size, len(prompt), size))
    }
    assert index.claims.get(("a", "gpu"), set()) == expected
    assert blocks.copies == sum(cache.values())


def _store(rng: random.Random, cache: dict[tuple[int, ...], int], blocks: EngineBlocks, size: int) -> None:
    """A prompt arrives that begins like one that is there; what is missing of it is stored, or one block again."""
    start = rng.choice([(), *cache])
    prompt = (*start, *(rng.randrange(3) for _ in range(size * rng.randrange(1, 4))))
    parents = [prompt[:end] for end in range(size, len(prompt) + 1, size)]
    missing = [p for p in parents if p not in cache] or parents[-1:]
    before = missing[0][:-size]
    event = BlockStored(
        hashes=tuple(hash(p) & 2**64 - 1 for p in missing),
        parent=hash(before) & 2**64 - 1 if before else None,
        tokens=words(prompt[len(before) : len(missing[-1])]),
        block_tokens=size,
    )
    blocks.stored(event)
    for p in missing:
        cache[p] = cache.get(p, 0) + 1
