"""A mock engine whose model has sliding windows: what its events claim is what it finds."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("msgspec")

import msgspec

from kvfleet.adapters.mock_answer import MockText
from kvfleet.cache.block_chain import token_hashes
from kvfleet.cache.engine_blocks import EngineBlocks
from kvfleet.cache.kv_events import BlockRemoved, BlockStored, decode
from kvfleet.cache.prefix_index import PrefixIndex
from kvfleet.cache.tokens import packed
from kvfleet.mock.kv_publisher import wire_events
from kvfleet.sim.engine import Engine
from kvfleet.sim.events import Event, Job
from kvfleet.sim.spec import EngineSpec
from kvfleet.sim.tokens import block_hashes, count_tokens, token_ids

BLOCK = 4


class Scene:
    """An engine, and an index that hears its events as they are on the wire."""

    def __init__(self, **options: Any) -> None:
        self.engine = Engine(EngineSpec(block_tokens=BLOCK, **options))
        self.index = PrefixIndex()
        self.blocks = EngineBlocks(self.index, "a", BLOCK)
        self.groups: set[tuple[int, str, int]] = set()

    def claim(self, prompt: bytes) -> int:
        """Tokens of a prompt that the engine is claimed to have."""
        hashes = token_hashes(packed(token_ids(prompt)), BLOCK)
        found = self.index.match(hashes, (count_tokens(prompt) - 1) // BLOCK).get("a")
        return found.blocks * BLOCK if found else 0

    def ask(self, prompt: bytes, answer: bytes) -> int:
        """Have a prompt answered: the tokens of it that were cached."""
        hashes, full = block_hashes(prompt + answer, BLOCK), count_tokens(prompt) // BLOCK
        job = Job(
            hashes[:full],
            count_tokens(prompt),
            max(count_tokens(answer), 1),
            hashes[full:],
            key=MockText(prompt + answer),
        )
        now_s = self.engine._clock
        self.engine.submit(job, now_s)
        while (then_s := self.engine.next_s()) is not None:
            self._hear(self.engine.advance(then_s))
        return job.cached_tokens

    def _hear(self, events: list[Event]) -> None:
        window = self.engine.spec.window_tokens
        payload = msgspec.msgpack.encode([0.0, list(wire_events(events, BLOCK, window)), 0])
        for event in decode(payload).events:
            if isinstance(event, BlockStored):
                self.groups.add((event.group, event.kind, event.window))
                self.blocks.stored(event)
            elif isinstance(event, BlockRemoved):
                self.blocks.removed(event)
            else:
                self.blocks.clear()
        self.blocks.settle()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    cache=st.integers(12, 40),
    window=st.integers(2, 40),
    window_cache=st.integers(1, 24),
)
def test_every_claim_is_what_the_engine_finds(seed: int, cache: int, window: int, window_cache: int) -> None:
    """Conversations that grow and part, in caches too small for them; each group forgets by itself."""
    rng = random.Random(seed)
    scene = Scene(cache_blocks=cache, window_tokens=window, window_cache_blocks=window_cache)
    talks = [b"system: be kind. "] * 4
    for _ in range(40):
        at = rng.randrange(len(talks))
        prompt = (talks[at] + b"%d " % rng.randrange(9) * rng.randrange(1, 12))[: (cache - 3) * BLOCK * 4]
        answer = b"yes " * rng.randrange(1, 8)
        claim = scene.claim(prompt)
        assert scene.ask(prompt, answer) == claim
        talks[at] = rng.choice([prompt + answer, prompt[: len(prompt) // 2], talks[at]])
    assert not scene.blocks.flaw
    assert (scene.blocks.counts.orphans, scene.blocks.counts.strangers) == (0, 0)
    assert scene.groups == {(0, "full_attention", 0), (1, "sliding_window", window)}


def test_full_attention_alone_would_claim_too_much() -> None:
    """A prompt whose window was forgotten is computed again, though all its blocks of full attention are there."""
    scene = Scene(cache_blocks=100, window_tokens=2 * BLOCK + 1, window_cache_blocks=4)
    first, second = b"a" * 16 * 6, b"b" * 16 * 6
    scene.ask(first, b"x")
    assert scene.ask(first + b"more", b"x") == 6 * BLOCK
    scene.ask(second, b"x")
    assert scene.engine._blocks.pool.match(block_hashes(first, BLOCK)) == 6
    assert (scene.claim(first + b"more"), scene.ask(first + b"more", b"x")) == (0, 0)


def test_a_cache_that_is_emptied() -> None:
    """Forgets both groups."""
    scene = Scene(cache_blocks=100, window_tokens=9, window_cache_blocks=10)
    scene.ask(b"a" * 160, b"x")
    assert scene.engine.clear_cache(99.0)
    assert scene.ask(b"a" * 160, b"x") == 0
