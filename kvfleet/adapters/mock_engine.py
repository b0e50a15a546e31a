"""A model of an inference engine: a batch, a queue, and a KV cache of hashed prefix blocks.

It has no clock and waits for nothing. It says how long a step takes and in which order requests get their turn; whoever
drives it (`kvfleet.adapters.mock.MockAdapter`, a simulation, a test) lets that time pass. What is modelled is what a
router can notice: continuous batching with one prefill at a time, first come first served; prefill time proportional to
the prompt tokens that are not cached; decode steps that grow longer as the batch grows; blocks shared between requests
with the same beginning, kept after use and evicted least recently used first (as vLLM's automatic prefix caching does,
https://docs.vllm.ai/en/latest/design/prefix_caching.html). Preemption and chunked prefill are not modelled.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Callable

import attrs
import xxhash

from kvfleet.adapters.base import EngineLoad
from kvfleet.errors import BackendError, Fault

__all__ = ["TOKEN_BYTES", "BlockCache", "EngineLimits", "Job", "MockEngine", "Stage", "block_hashes", "count_tokens"]

TOKEN_BYTES = 4
"""A token of a prompt is four bytes of UTF-8: close to what real tokenizers give for English, and free to count."""


def count_tokens(text: bytes) -> int:
    """Tokens in a rendered prompt.

    >>> count_tokens(b"Hello, world")
    3
    """
    return -(-len(text) // TOKEN_BYTES)


def block_hashes(text: bytes, block_tokens: int) -> tuple[int, ...]:
    """Chained hashes of the full blocks of a rendered prompt: two texts share a hash if they agree up to its end.

    >>> one, two = block_hashes(b"a" * 8, 1), block_hashes(b"a" * 4 + b"b" * 4, 1)
    >>> one[0] == two[0], one[1] == two[1]
    (True, False)
    """
    size = block_tokens * TOKEN_BYTES
    found = []
    last = 0
    for start in range(0, len(text) - size + 1, size):
        last = xxhash.xxh3_64_intdigest(text[start : start + size], seed=last)
        found.append(last)
    return tuple(found)


@attrs.frozen(kw_only=True)
class EngineLimits:
    """Size and pace of an engine.

    Attributes:
        prefill_tokens_per_s: Uncached prompt tokens read in a second.
        decode_ms_per_token: Milliseconds of a decode step with one request in the batch.
        decode_slowdown: How much longer the step gets with each further request, as a share of its length.
        max_batch: Requests in the batch.
        max_queue: Requests that may wait; one more is refused.
        cache_blocks: Blocks of the KV cache.
        block_tokens: Tokens in a block.
        context_tokens: Longest prompt plus answer.
    """

    prefill_tokens_per_s: float = 8000.0
    decode_ms_per_token: float = 8.0
    decode_slowdown: float = 0.05
    max_batch: int = 8
    max_queue: int = 256
    cache_blocks: int = 2048
    block_tokens: int = 16
    context_tokens: int = 8192


@attrs.define
class BlockCache:
    """KV blocks: those that running requests hold, and free ones that still know a prefix, evicted oldest first."""

    capacity: int
    _held: dict[int, int] = attrs.field(init=False, factory=dict)
    _free: OrderedDict[int, None] = attrs.field(init=False, factory=OrderedDict)
    _private: int = attrs.field(init=False, default=0)

    @property
    def held(self) -> int:
        """Blocks that running requests hold."""
        return len(self._held) + self._private

    @property
    def size(self) -> int:
        """Blocks with something in them."""
        return self.held + len(self._free)

    def match(self, blocks: tuple[int, ...]) -> int:
        """How many leading blocks are there."""
        for index, block in enumerate(blocks):
            if block not in self._held and block not in self._free:
                return index
        return len(blocks)

    def acquire(self, blocks: tuple[int, ...], private: int) -> bool:
        """Hold shareable blocks and room for `private` others; False, and nothing changed, if they do not fit."""
        fresh = sum(block not in self._held for block in blocks)
        if self.held + fresh + private > self.capacity:
            return False
        for block in blocks:
            self._held[block] = self._held.get(block, 0) + 1
            self._free.pop(block, None)
        self._private += private
        self._evict()
        return True

    def release(self, blocks: tuple[int, ...], private: int, *, keep: int, learned: tuple[int, ...] = ()) -> None:
        """Let go of what `acquire` held; `keep` leading blocks, and `learned` ones, stay known until evicted.

        The end of a prompt is freed before its beginning, so that it is evicted before it.
        """
        self._private -= private
        for block in reversed(learned):
            if block not in self._held:
                self._remember(block)
        for index in range(len(blocks) - 1, -1, -1):
            block = blocks[index]
            self._held[block] -= 1
            if not self._held[block]:
                del self._held[block]
                if index < keep:
                    self._remember(block)
        self._evict()

    def _remember(self, block: int) -> None:
        self._free[block] = None
        self._free.move_to_end(block)

    def _evict(self) -> None:
        while self._free and self.size > self.capacity:
            self._free.popitem(last=False)


class Stage(enum.StrEnum):
    """Where a request is in the engine."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@attrs.define(eq=False)
class Job:
    """One request in the engine.

    Attributes:
        blocks: Hashes of the prompt's full blocks.
        prompt_tokens: Tokens of the prompt.
        output_tokens: Tokens the answer will have, for which room is reserved.
        on_turn: Called once, when its prefill begins.
        cached_tokens: Prompt tokens found in the cache; known when its prefill begins.
        matched_blocks: Leading blocks that were in the cache already, so that a cancelled prefill leaves them there.
        stage: See `Stage`.
    """

    blocks: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    on_turn: Callable[[], None] = attrs.field(repr=False)
    cached_tokens: int = 0
    stage: Stage = Stage.WAITING
    matched_blocks: int = 0

    def private_blocks(self, block_tokens: int) -> int:
        """Blocks nobody else can share: the prompt's last, partial one, and the answer's."""
        total = -(-(self.prompt_tokens + self.output_tokens) // block_tokens)
        return max(0, total - len(self.blocks))


@attrs.define
class MockEngine:
    """One engine: its batch, its queue and its cache.

    `submit` a job, let `prefill_s` pass once it has its turn, say `prefilled`, let `step_s` pass for each token, and
    `release` it. Releasing it earlier cancels it and gives its place to the next at once.

    >>> engine = MockEngine(EngineLimits(prefill_tokens_per_s=100.0, max_batch=1, block_tokens=10))
    >>> prompt = b"x" * 800
    >>> first = engine.submit(prompt, output_tokens=5)
    >>> engine.prefill_s(first)
    2.0
    >>> second = engine.submit(prompt, output_tokens=5)
    >>> second.stage
    <Stage.WAITING: 'waiting'>
    >>> engine.prefilled(first)
    >>> engine.release(first)
    >>> second.cached_tokens, engine.prefill_s(second)
    (190, 0.1)
    """

    limits: EngineLimits = attrs.field(factory=EngineLimits)
    _cache: BlockCache = attrs.field(init=False, repr=False)
    _waiting: deque[Job] = attrs.field(init=False, factory=deque, repr=False)
    _prefilling: Job | None = attrs.field(init=False, default=None, repr=False)
    _decoding: set[Job] = attrs.field(init=False, factory=set, repr=False)
    _queries_tokens: int = attrs.field(init=False, default=0)
    _hits_tokens: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        self._cache = BlockCache(self.limits.cache_blocks)

    def submit(self, prompt: bytes, output_tokens: int, on_turn: Callable[[], None] = lambda: None) -> Job:
        """Take a request into the queue; its turn may come before this returns.

        Raises:
            BackendError: `Fault.CONTEXT_LENGTH` if it can never fit, `Fault.OVERLOADED` if the queue is full.
        """
        limits = self.limits
        job = Job(block_hashes(prompt, limits.block_tokens), count_tokens(prompt), output_tokens, on_turn)
        total = job.prompt_tokens + output_tokens
        room = min(limits.context_tokens, limits.cache_blocks * limits.block_tokens)
        if total > room:
            raise BackendError(
                Fault.CONTEXT_LENGTH,
                f"this model's context is {room} tokens; {job.prompt_tokens} of prompt and {output_tokens} of answer"
                " are more",
                status=400,
            )
        self._waiting.append(job)
        self._next()
        if len(self._waiting) > limits.max_queue:
            self._waiting.pop()
            job.stage = Stage.DONE
            raise BackendError(Fault.OVERLOADED, "the engine's queue is full", status=503, retry_after_s=1.0)
        return job

    def prefill_s(self, job: Job) -> float:
        """Seconds the prefill of a job takes: its uncached prompt tokens at the engine's pace."""
        return (job.prompt_tokens - job.cached_tokens) / self.limits.prefill_tokens_per_s

    def prefilled(self, job: Job) -> None:
        """The prefill of a job is over: it decodes from now on, and the next one's prefill begins."""
        if job is self._prefilling:
            self._prefilling = None
            job.stage = Stage.DECODE
            self._decoding.add(job)
            self._next()

    def step_s(self) -> float:
        """Seconds one decode step takes with the batch as it is."""
        others = max(0, len(self._decoding) - 1)
        return self.limits.decode_ms_per_token / 1000 * (1 + self.limits.decode_slowdown * others)

    def release(self, job: Job, whole: bytes = b"") -> None:
        """A job is over, finished or cancelled; safe twice.

        Args:
            job: The job.
            whole: Prompt and answer together, if it finished: their blocks stay in the cache for the next turn.
        """
        if job.stage is Stage.DONE:
            return
        stage, job.stage = job.stage, Stage.DONE
        if stage is Stage.WAITING:
            self._waiting.remove(job)
            self._next()  # it may have been the one that did not fit
            return
        if job is self._prefilling:
            self._prefilling = None
        self._decoding.discard(job)
        keep = len(job.blocks) if stage is Stage.DECODE else job.matched_blocks
        learned = block_hashes(whole, self.limits.block_tokens)[len(job.blocks) :]
        self._cache.release(job.blocks, job.private_blocks(self.limits.block_tokens), keep=keep, learned=learned)
        self._next()

    def load(self) -> EngineLoad:
        """The engine's own account of itself."""
        decoding = len(self._decoding)
        return EngineLoad(
            running=decoding + (self._prefilling is not None),
            waiting=len(self._waiting),
            kv_usage=self._cache.held / self._cache.capacity,
            cache_blocks=self._cache.capacity,
            block_tokens=self.limits.block_tokens,
            prefix_queries_tokens=float(self._queries_tokens),
            prefix_hits_tokens=float(self._hits_tokens),
            tokens_per_second=decoding / self.step_s() if decoding and self.step_s() else 0.0,
        )

    def _next(self) -> None:
        """Give the first in the queue its turn, if no prefill runs, the batch has a place and the cache has room."""
        if self._prefilling is not None or not self._waiting or len(self._decoding) >= self.limits.max_batch:
            return
        job = self._waiting[0]
        matched = self._cache.match(job.blocks)
        if not self._cache.acquire(job.blocks, job.private_blocks(self.limits.block_tokens)):
            return
        self._waiting.popleft()
        self._prefilling, job.stage, job.matched_blocks = job, Stage.PREFILL, matched
        # The last prompt token is always computed, for its logits start the answer: a whole hit loses its last block.
        usable = min(matched, max(0, job.prompt_tokens - 1) // self.limits.block_tokens)
        job.cached_tokens = usable * self.limits.block_tokens
        self._queries_tokens += job.prompt_tokens
        self._hits_tokens += job.cached_tokens
        job.on_turn()
