"""What the cache of a hybrid model holds, by its events, and how much of a prompt that is good for."""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.cache.block_chain import token_hashes
from kvfleet.cache.engine_blocks import EngineBlocks
from kvfleet.cache.kv_events import BlockStored, Event, decode
from kvfleet.cache.prefix_index import PrefixIndex
from tests.cache.hybrid_engine import HybridEngine, Layers
from tests.cache.made import removed, stored, words

OURS = 4
CHUNK = 16
PROMPT = tuple(range(100, 140))
SAMPLES = Path(__file__).parent / "samples"


def sliding(block_tokens: int = 4) -> st.SearchStrategy[Layers]:
    """Layers with a window of any size."""
    return st.integers(1, 24).map(lambda window: Layers("sliding_window", block_tokens, window))


@st.composite
def models(draw: st.DrawFn) -> list[Layers]:
    """Groups of layers as vLLM makes them, in any order."""
    if draw(st.integers(0, 7)) == 0:
        return [draw(sliding(draw(st.sampled_from([4, 8]))))]
    size = draw(st.sampled_from([4, 8]))
    groups = [Layers("full_attention", size)] * draw(st.integers(1, 2))
    if draw(st.integers(0, 3)) == 0:  # vLLM has these with blocks of one size only
        groups += [Layers("chunked_local_attention", size, CHUNK)] * draw(st.integers(1, 2))
        return draw(st.permutations(groups))
    for _ in range(draw(st.integers(0, 2))):
        groups += [draw(sliding(draw(st.sampled_from([4, 8, 12]))))] * draw(st.integers(1, 2))
    if draw(st.booleans()):
        groups.append(Layers("mamba", size * draw(st.integers(1, 2))))
    return draw(st.permutations(groups))


def apply(blocks: EngineBlocks, events: list[Event]) -> None:
    """Take in one batch."""
    for event in events:
        if isinstance(event, BlockStored):
            blocks.stored(event)
        else:
            blocks.removed(event)  # type: ignore[arg-type]
    blocks.settle()


def claimed(index: PrefixIndex, prompt: tuple[int, ...], holder: str = "a", size: int = OURS) -> int:
    """Tokens of a prompt that the index says can be gone on from, in whole blocks of the engine's."""
    most = len(prompt) - 1
    found = index.match(token_hashes(words(prompt), OURS), most // OURS).get(holder)
    return min(found.blocks * OURS, most) // size * size if found else 0


def life(engine: HybridEngine, seed: int, steps: int) -> list[list[Event]]:
    """Prompts that begin alike come, and blocks go; by batches. The first prompt is so long that all groups tell of it."""
    rng, prompts = random.Random(seed), [tuple(range(2, 26))]
    batches = [engine.compute(prompts[0])]
    for _ in range(steps):
        if rng.random() < 0.5:
            base = rng.choice(prompts)
            prompt = (*base[: rng.randrange(len(base) + 1)], *(rng.randrange(2) for _ in range(rng.randrange(1, 40))))
            prompts.append(prompt[:90])
            batches.append(engine.compute(prompts[-1]))
        else:
            batches.append([event for _ in range(rng.randrange(1, 6)) for event in engine.lose(rng)])
    return batches


@settings(max_examples=150, deadline=None)
@given(models(), models(), st.integers(0, 2**32), st.integers(1, 40))
def test_the_index_claims_what_the_engine_finds(one: list[Layers], two: list[Layers], seed: int, steps: int) -> None:
    """No token more and none less, whatever its layers are, and whatever another engine in the index does.

    That is so once each group of layers has told of a block, as all do of the first prompt that fills one of each.
    """
    index, rng = PrefixIndex(), random.Random(seed)
    engines = {"a": HybridEngine(one), "b": HybridEngine(two)}
    blocks = {name: EngineBlocks(index, name, OURS, chunk_tokens=CHUNK) for name in engines}
    for name, engine in engines.items():
        for batch in life(engine, rng.randrange(2**32), steps):
            apply(blocks[name], batch)
    known = [prompt for engine in engines.values() for kept in engine.kept for prompt in kept]
    for _ in range(30):
        base = rng.choice(known or [()])
        prompt = (*base, *(rng.randrange(2) for _ in range(rng.randrange(1, 12))))
        for asked in (prompt, base or prompt):
            found = {n: claimed(index, asked, n, max(one.engine_block_tokens, 1)) for n, one in blocks.items()}
            assert found == {n: engine.hit(asked) for n, engine in engines.items()}
    assert {name: one.flaw for name, one in blocks.items()} == {"a": "", "b": ""}
    assert {name: one.copies for name, one in blocks.items()} == {
        name: sum(kept.total() for kept in engine.kept) for name, engine in engines.items()
    }


@settings(max_examples=60, deadline=None)
@given(models(), st.integers(0, 2**32), st.integers(1, 30), st.booleans())
def test_a_replay_tells_the_same(groups: list[Layers], seed: int, steps: int, is_cleared: bool) -> None:
    """Into an index that knows nothing, or after all that was known was given up."""
    live, again = PrefixIndex(), PrefixIndex()
    engine = HybridEngine(groups)
    batches = life(engine, seed, steps)
    blocks, others = (EngineBlocks(index, "a", OURS, chunk_tokens=CHUNK) for index in (live, again))
    for batch in batches:
        apply(blocks, batch)
        if is_cleared:
            apply(others, batch)
    others.clear()
    assert (len(again), len(others)) == (0, 0)
    for batch in batches:
        apply(others, batch)
    assert (len(again), len(others), others.copies) == (len(live), len(blocks), blocks.copies)
    for prompt in [prompt for kept in engine.kept for prompt in kept]:
        assert claimed(again, prompt) == claimed(live, prompt)


def recorded(name: str) -> list[list[Any]]:
    """A real engine's messages (``"m"``, number, payload) and answers (``"a"``, prompt, cached tokens), in their order."""
    found: list[list[Any]] = msgspec.msgpack.decode(zlib.decompress((SAMPLES / f"{name}.zlib").read_bytes()))
    return found


@pytest.mark.parametrize("name", ["vllm_0.32_windows", "vllm_0.32_states"])
@pytest.mark.parametrize("block_tokens", [16, 32])
def test_a_real_engine_finds_what_is_claimed(name: str, block_tokens: int) -> None:
    """A vLLM with a small cache: for each prompt just the tokens that its answer said were cached."""
    index = PrefixIndex()
    blocks = EngineBlocks(index, "a", block_tokens)
    told: list[tuple[int, int]] = []
    for what, one, two in recorded(name):
        if what == "m":
            apply(blocks, list(decode(two).events))
            continue
        hashes = token_hashes(words(one), block_tokens)
        found = index.match(hashes, (len(one) - 1) // block_tokens).get("a")
        told.append((found.blocks * block_tokens if found else 0, two))
    assert len(told) == 140
    assert sum(cached > 0 for _, cached in told) > 60
    assert [claim for claim, _ in told] == [cached for _, cached in told]
    assert (blocks.flaw, blocks.counts.orphans, blocks.counts.sparse) == ("", 0, 0)


def test_a_real_engine_that_tells_again() -> None:
    """A vLLM with 60 blocks, three of five requests with full reports: it is not taken to keep more than it has."""
    index = PrefixIndex()
    blocks = EngineBlocks(index, "a", 32)
    most = 0
    for what, one, two in recorded("vllm_0.32_reports"):
        if what == "m":
            apply(blocks, list(decode(two).events))
            most = max(most, blocks.copies)
            continue
        found = index.match(token_hashes(words(one), 32)).get("a")
        assert (min(found.blocks * 32, len(one) - 1) // 32 * 32 if found else 0) == two
    assert most <= 60
    assert (blocks.flaw, blocks.counts.orphans, blocks.counts.strangers) == ("", 0, 0)


class TestWindows:
    """A model with one group of full attention and one with a window of nine tokens: two blocks of four before the end."""

    @pytest.fixture
    def index(self) -> PrefixIndex:
        """An index."""
        return PrefixIndex()

    @pytest.fixture
    def blocks(self, index: PrefixIndex) -> EngineBlocks:
        """Ten blocks of a prompt, 1 to 10, in both groups."""
        blocks = EngineBlocks(index, "a", OURS)
        names = list(range(1, 11))
        apply(blocks, [stored(names, PROMPT, group=1, kind="sliding_window", window=9)])
        apply(blocks, [stored(names, PROMPT, kind="full_attention")])
        return blocks

    def test_a_hole_in_the_window_moves_the_end_before_it(self, blocks: EngineBlocks, index: PrefixIndex) -> None:
        """And what is gone before the window does not matter."""
        prompt = (*PROMPT, 7)
        assert claimed(index, prompt) == 40
        apply(blocks, [removed(*range(1, 9), group=1)])
        assert claimed(index, prompt) == 40
        apply(blocks, [removed(9, group=1)])
        assert claimed(index, prompt) == 0
        apply(blocks, [stored([1], PROMPT[:4], group=1, kind="sliding_window", window=9)])
        assert claimed(index, prompt) == 4
        assert (blocks.is_hybrid, blocks.flaw, blocks.engine_block_tokens) == (True, "", 4)

    def test_the_last_token_is_computed(self, blocks: EngineBlocks, index: PrefixIndex) -> None:
        """So of a prompt that is all there, the end is a block before, and its window must be there."""
        assert claimed(index, PROMPT) == 36
        apply(blocks, [removed(8, group=1)])
        assert (claimed(index, PROMPT), claimed(index, (*PROMPT, 7))) == (28, 40)

    def test_the_beginning_counts_for_full_attention(self, blocks: EngineBlocks, index: PrefixIndex) -> None:
        """Though the window is there."""
        apply(blocks, [removed(3)])
        assert claimed(index, (*PROMPT, 7)) == 8

    def test_other_tiers_do_not_count(self, blocks: EngineBlocks, index: PrefixIndex) -> None:
        """An engine that moves blocks elsewhere is known in part."""
        apply(blocks, [stored([1, 2], (), tier="cpu", kind="full_attention"), removed(1, 2)])
        assert claimed(index, (*PROMPT, 7)) == 0
        assert "moved off its device" in blocks.flaw

    def test_another_model_in_its_place(self, blocks: EngineBlocks, index: PrefixIndex) -> None:
        """After a restart nothing is known of its layers either."""
        blocks.clear()
        apply(blocks, [stored([1, 2], PROMPT[:8])])
        assert (claimed(index, PROMPT), blocks.is_hybrid, blocks.engine_block_tokens) == (8, False, 4)


@pytest.mark.parametrize(
    ("event", "flaw"),
    [
        ({"group": 1, "kind": "sliding_window"}, "how many (sliding window)"),
        ({"group": 1, "kind": "chunked_local_attention"}, "how many (chunked local attention)"),
        ({"group": 1, "kind": "unknown"}, "how many (unknown)"),
        ({"group": 1, "kind": "sliding_window", "window": 9, "size": 2}, "smaller than ours"),
        ({"group": 1, "kind": ""}, "does not say which of its layers"),
    ],
)
def test_what_events_do_not_say_is_a_flaw(event: dict[str, object], flaw: str) -> None:
    """Then what full attention holds is claimed, the most that can be there; and the reason is told."""
    index = PrefixIndex()
    blocks = EngineBlocks(index, "a", OURS)
    apply(blocks, [stored([1, 2], PROMPT[:8], kind="full_attention")])
    names = [5, 6, 7, 8] if event.get("size") == 2 else [1, 2]
    apply(blocks, [stored(names, PROMPT[:8], **event)])  # type: ignore[arg-type]
    assert flaw in blocks.flaw
    assert claimed(index, (*PROMPT[:8], 7)) == 8


def test_gaps_that_nobody_can_fill_are_a_flaw() -> None:
    """Of a window's blocks with gaps one must know which they are."""
    index = PrefixIndex()
    blocks = EngineBlocks(index, "a", OURS)
    gap = attrs.evolve(stored([4], PROMPT[:16], group=1, kind="mamba"))
    apply(blocks, [gap])
    assert (claimed(index, PROMPT), blocks.flaw) == (0, "it does not say which blocks of a window it keeps")
    blocks.clear()
    apply(blocks, [gap, stored([1, 2, 3, 4], PROMPT[:16], kind="full_attention")])
    assert (claimed(index, PROMPT), blocks.flaw) == (16, "")
