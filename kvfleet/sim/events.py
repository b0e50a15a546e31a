"""What happens in a simulated engine: its requests, and the events that tell of them. Times are in seconds."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import attrs

__all__ = [
    "Cleared",
    "Decoded",
    "Event",
    "Finished",
    "FirstToken",
    "Job",
    "Preempted",
    "Removed",
    "Stage",
    "Started",
    "Stored",
]


class Stage(enum.StrEnum):
    """Where a request is in the engine."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@attrs.define(eq=False)
class Job:
    """One request.

    Attributes:
        blocks: Hashes of the prompt's full blocks, each of which stands for all up to its end; or none at all, for a
            prompt that is neither looked up nor remembered.
        prompt_tokens: Tokens of the prompt.
        output_tokens: Tokens the answer will have; 0 if the prompt is only read (embeddings).
        answer_blocks: Hashes of the blocks that fill while the answer grows, as the next turn's prompt will have them.
        key: Whatever the caller wants to find in the events.
        stage: See `Stage`.
        cached_tokens: Prompt tokens found in the cache when it was first admitted.
        arrived_s: When it was submitted.
        hashes: `blocks` and `answer_blocks` together.
    """

    blocks: Sequence[int]
    prompt_tokens: int
    output_tokens: int
    answer_blocks: Sequence[int] = ()
    key: Any = None
    stage: Stage = attrs.field(init=False, default=Stage.WAITING)
    cached_tokens: int = attrs.field(init=False, default=0)
    arrived_s: float = attrs.field(init=False, default=0.0)
    hashes: tuple[int, ...] = attrs.field(init=False, repr=False)
    # The engine's own: blocks held and how many of them are shared; tokens computed and generated, and the step they
    # were counted at, for a decoding request gets one token in each step; `order` tells its turns of decoding apart.
    held: int = attrs.field(init=False, default=0, repr=False)
    shared: int = attrs.field(init=False, default=0, repr=False)
    computed: int = attrs.field(init=False, default=0, repr=False)
    generated: int = attrs.field(init=False, default=0, repr=False)
    since_step: int = attrs.field(init=False, default=0, repr=False)
    order: int = attrs.field(init=False, default=0, repr=False)
    is_resumed: bool = attrs.field(init=False, default=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.hashes = (*self.blocks, *self.answer_blocks)

    @property
    def target(self) -> int:
        """Tokens to compute before the next one can be sampled: after a preemption, the answer so far as well."""
        return self.prompt_tokens + self.generated

    @property
    def will_share(self) -> bool:
        """True if it has yet to fill a block that others may find."""
        return self.shared < len(self.hashes)


@attrs.frozen
class Started:
    """A request was admitted for the first time, and so much of its prompt was cached."""

    at_s: float
    job: Job
    cached_tokens: int


@attrs.frozen
class FirstToken:
    """A request's prefill is over."""

    at_s: float
    job: Job


@attrs.frozen
class Decoded:
    """Each of these requests got so many more tokens, the last of them at `at_s`."""

    at_s: float
    jobs: tuple[Job, ...]
    tokens: int


@attrs.frozen
class Finished:
    """A request has its last token, and holds nothing any more."""

    at_s: float
    job: Job


@attrs.frozen
class Preempted:
    """A request gave its blocks up for others' tokens, and waits at the head of the queue."""

    at_s: float
    job: Job


@attrs.frozen
class Stored:
    """Blocks of a request became shareable: `job.hashes[first:last]`, in one group of layers."""

    at_s: float
    job: Job
    first: int
    last: int
    group: int = 0

    @property
    def blocks(self) -> tuple[int, ...]:
        """Their hashes."""
        return self.job.hashes[self.first : self.last]

    @property
    def parent(self) -> int | None:
        """The hash of the block before them."""
        return self.job.hashes[self.first - 1] if self.first else None


@attrs.frozen
class Removed:
    """Blocks were forgotten, in one group of layers."""

    at_s: float
    blocks: tuple[int, ...]
    group: int = 0


@attrs.frozen
class Cleared:
    """All blocks were forgotten."""

    at_s: float


Event = Started | FirstToken | Decoded | Finished | Preempted | Stored | Removed | Cleared
