"""The engine model: batch, queue, prefix cache, timing; no clock, no event loop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.mock_engine import BlockCache, EngineLimits, Job, MockEngine, Stage, block_hashes, count_tokens
from kvfleet.errors import BackendError, Fault

BLOCK = 16 * 4  # bytes


def engine(**limits: float) -> MockEngine:
    """An engine with these limits."""
    return MockEngine(EngineLimits(**limits))  # type: ignore[arg-type]


def run(engine: MockEngine, prompt: bytes, answer: bytes = b"") -> Job:
    """Answer one request to its end."""
    job = engine.submit(prompt, output_tokens=count_tokens(answer))
    engine.prefilled(job)
    engine.release(job, prompt + answer)
    return job


class TestPrefixCache:
    def test_a_repeated_prompt_is_cached_but_for_its_last_block(self) -> None:
        """The same prompt again is found in the cache, except the block with the token whose logits are needed."""
        one = engine()
        assert run(one, b"x" * BLOCK * 10).cached_tokens == 0
        assert run(one, b"x" * BLOCK * 10).cached_tokens == 9 * 16

    def test_a_longer_conversation_finds_the_prompt_and_the_answer(self) -> None:
        """The next turn has the whole of the last one in the cache, its answer included."""
        one = engine()
        first, answer = b"a" * BLOCK * 4, b"b" * BLOCK * 2
        run(one, first, answer)
        assert run(one, first + answer + b"c" * BLOCK).cached_tokens == 6 * 16

    def test_a_different_beginning_shares_nothing(self) -> None:
        """Blocks are chained: an equal block behind a different one is not the same block."""
        one = engine()
        run(one, b"a" * BLOCK + b"same" * 16)
        assert run(one, b"b" * BLOCK + b"same" * 16 + b"end").cached_tokens == 0

    def test_prefill_takes_the_uncached_tokens_only(self) -> None:
        """Seconds of prefill are uncached tokens by the rate."""
        one = engine(prefill_tokens_per_s=160.0)
        run(one, b"x" * BLOCK * 10)
        job = one.submit(b"x" * BLOCK * 20, output_tokens=1)
        assert (job.cached_tokens, one.prefill_s(job)) == (160, 1.0)

    def test_the_least_recently_used_prefix_goes_first(self) -> None:
        """A cache of four blocks forgets the older of two prompts, from its end."""
        one = engine(cache_blocks=4)
        run(one, b"a" * BLOCK * 2)
        run(one, b"b" * BLOCK * 2)
        run(one, b"c" * BLOCK)  # evicts the second block of the first prompt
        assert run(one, b"a" * BLOCK * 2 + b"z").cached_tokens == 16
        run(one, b"d" * BLOCK * 4)
        assert run(one, b"a" * BLOCK * 2 + b"z").cached_tokens == 0

    def test_a_cancelled_prefill_leaves_nothing_behind(self) -> None:
        """Blocks that were never computed are not found later; those that were there before still are."""
        one = engine()
        run(one, b"a" * BLOCK * 2)
        job = one.submit(b"a" * BLOCK * 2 + b"b" * BLOCK * 2, output_tokens=1)
        one.release(job)
        assert run(one, b"a" * BLOCK * 2 + b"b" * BLOCK * 2 + b"c").cached_tokens == 2 * 16

    def test_the_hit_rate_counts_tokens(self) -> None:
        """The running totals of looked-up and found tokens are those of all prompts."""
        one = engine()
        run(one, b"x" * BLOCK * 4)
        run(one, b"x" * BLOCK * 4)
        load = one.load()
        assert (load.prefix_queries_tokens, load.prefix_hits_tokens) == (128.0, 48.0)

    @given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.booleans()), max_size=40))
    def test_the_cache_never_outgrows_its_capacity_and_forgets_no_debt(
        self, steps: list[tuple[int, int, bool]]
    ) -> None:
        """Whatever is acquired and released, in any order: size within capacity, and nothing held at the end."""
        cache = BlockCache(8)
        held: list[tuple[tuple[int, ...], int]] = []
        for family, length, is_release in steps:
            if is_release and held:
                blocks, private = held.pop(0)
                cache.release(blocks, private, keep=len(blocks))
            else:
                blocks = tuple(range(family * 100, family * 100 + length))
                if cache.acquire(blocks, 1):
                    held.append((blocks, 1))
            assert cache.size <= cache.capacity
        for blocks, private in held:
            cache.release(blocks, private, keep=len(blocks))
        assert cache.held == 0


class TestBatch:
    def test_prefills_run_one_after_the_other_in_order(self) -> None:
        """The second request's turn comes when the first one's prefill is over, not when its answer is."""
        one = engine()
        turns: list[str] = []
        first = one.submit(b"a" * 100, 5, lambda: turns.append("first"))
        second = one.submit(b"b" * 100, 5, lambda: turns.append("second"))
        assert (first.stage, second.stage) == (Stage.PREFILL, Stage.WAITING)
        one.prefilled(first)
        assert (first.stage, second.stage, turns) == (Stage.DECODE, Stage.PREFILL, ["first", "second"])

    def test_a_full_batch_makes_the_next_wait(self) -> None:
        """With a batch of one, the second starts when the first is released."""
        one = engine(max_batch=1)
        first, second = one.submit(b"a" * 100, 5), one.submit(b"b" * 100, 5)
        one.prefilled(first)
        assert second.stage is Stage.WAITING
        one.release(first)
        assert second.stage is Stage.PREFILL

    @pytest.mark.parametrize("stage", [Stage.WAITING, Stage.PREFILL, Stage.DECODE])
    def test_cancelling_frees_the_place_at_once(self, stage: Stage) -> None:
        """Wherever a request is cancelled, the engine is as free as before, and twice does no harm."""
        one = engine()
        blocker = one.submit(b"z" * 100, 5) if stage is Stage.WAITING else None
        job = one.submit(b"a" * 100, 5)
        if stage is Stage.DECODE:
            one.prefilled(job)
        assert job.stage is stage
        one.release(job)
        one.release(job)
        if blocker:
            one.release(blocker)
        load = one.load()
        assert (load.running, load.waiting, load.kv_usage) == (0, 0, 0.0)

    def test_steps_grow_with_the_batch(self) -> None:
        """Each further decoding request makes the step a tenth longer."""
        one = engine(decode_ms_per_token=10.0, decode_slowdown=0.1)
        jobs = [one.submit(b"x%d" % i, 5) for i in range(3)]
        for job in jobs:
            one.prefilled(job)
        assert one.step_s() == pytest.approx(0.012)

    def test_a_request_waits_for_room_in_the_cache(self) -> None:
        """A prompt whose blocks do not fit beside the running ones waits in the queue until they do."""
        one = engine(cache_blocks=8)
        first = one.submit(b"a" * BLOCK * 5, 16)
        one.prefilled(first)
        second = one.submit(b"b" * BLOCK * 5, 16)
        assert (second.stage, one.load().waiting, one.load().kv_usage) == (Stage.WAITING, 1, 6 / 8)
        one.release(first)
        assert second.stage is Stage.PREFILL

    def test_cancelling_the_one_that_does_not_fit_lets_the_next_in(self) -> None:
        """The queue is first come first served, and does not stay blocked when its head leaves."""
        one = engine(cache_blocks=8)
        first = one.submit(b"a" * BLOCK * 5, 16)
        one.prefilled(first)
        big, small = one.submit(b"b" * BLOCK * 5, 16), one.submit(b"c" * 8, 1)
        assert small.stage is Stage.WAITING
        one.release(big)
        assert small.stage is Stage.PREFILL


class TestRefusals:
    def test_a_prompt_beyond_the_context_is_refused(self) -> None:
        """Prompt plus answer beyond the context window is the caller's fault, with the numbers in the message."""
        with pytest.raises(BackendError, match="context is 100 tokens; 90 of prompt and 20 of answer") as caught:
            engine(context_tokens=100).submit(b"x" * 360, 20)
        assert (caught.value.kind, caught.value.status) == (Fault.CONTEXT_LENGTH, 400)

    def test_a_full_queue_refuses(self) -> None:
        """With no room to wait, a request is refused as overloaded."""
        one = engine(max_queue=1)
        one.submit(b"a", 1)
        one.submit(b"b", 1)
        with pytest.raises(BackendError) as caught:
            one.submit(b"c", 1)
        assert (caught.value.kind, caught.value.status) == (Fault.OVERLOADED, 503)


@given(st.binary(max_size=600), st.binary(max_size=600), st.integers(1, 8))
def test_block_hashes_agree_exactly_as_far_as_the_texts_do(one: bytes, two: bytes, block_tokens: int) -> None:
    """Two texts share as many leading hashes as they share whole leading blocks."""
    size = block_tokens * 4
    same = 0
    while one[same * size : (same + 1) * size] == two[same * size : (same + 1) * size] != b"" and (
        len(one) >= (same + 1) * size <= len(two)
    ):
        same += 1
    hashes, others = block_hashes(one, block_tokens), block_hashes(two, block_tokens)
    shared = next((i for i, (a, b) in enumerate(zip(hashes, others, strict=False)) if a != b), None)
    assert (min(len(hashes), len(others)) if shared is None else shared) == same
