"""The requests that decode in a simulated engine, each of which gets one token in every step.

Because they are all in step, nothing is counted for each of them but the step it joined at: how many tokens it has,
when it needs its next block and when it ends follow from the number of steps.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator, Mapping, Sequence

import attrs

from kvfleet.sim.events import Job, Stage

__all__ = ["Decoding"]


@attrs.define(eq=False)
class Decoding:
    """Who decodes, and for whom something is due at which step.

    Attributes:
        block_tokens: Tokens of a block.
        jobs: The requests, in the order they joined.
        step: Steps over since the engine's start.
        context: Tokens computed of all of them.
    """

    block_tokens: int
    jobs: dict[Job, None] = attrs.field(init=False, factory=dict, repr=False)
    step: int = attrs.field(init=False, default=0)
    context: int = attrs.field(init=False, default=0)
    # By the step, modulo the block size, at which they need their next block.
    _phases: tuple[dict[Job, None], ...] = attrs.field(init=False, repr=False)
    _ends: list[tuple[int, int, Job]] = attrs.field(init=False, factory=list, repr=False)  # (step, order, job)
    _joined: int = attrs.field(init=False, default=0, repr=False)

    def __attrs_post_init__(self) -> None:
        self._phases = tuple({} for _ in range(self.block_tokens))

    def join(self, job: Job) -> None:
        """A request decodes from now on."""
        self.jobs[job] = None
        job.stage = Stage.DECODE
        job.since_step = self.step
        self._phases[(self.step - job.computed) % self.block_tokens][job] = None
        self.context += job.computed
        self._joined += 1
        job.order = self._joined
        heapq.heappush(self._ends, (self.step + job.output_tokens - job.generated, job.order, job))

    def leave(self, job: Job) -> None:
        """A request decodes no more; its tokens are counted."""
        steps = self.step - job.since_step
        del self.jobs[job]
        del self._phases[(job.since_step - job.computed) % self.block_tokens][job]
        job.computed += steps
        job.generated += steps
        self.context -= job.computed

    def needy(self) -> Mapping[Job, None]:
        """Those that need a block for the step that begins."""
        return self._phases[self.step % self.block_tokens]

    def filling(self, steps: int = 1) -> Mapping[Job, None]:
        """Those that fill a block with the step that begins, or a later one, and need the next one after it."""
        return self._phases[(self.step + steps) % self.block_tokens]

    def grow(self, first: int, steps: int) -> int:
        """Give them the blocks they need in some steps, which begin; how many that are."""
        size, found = self.block_tokens, 0
        for job in self.jobs:
            soon = (job.since_step - job.computed - first) % size  # steps until it needs the next one
            if soon < steps:
                blocks = 1 + (steps - 1 - soon) // size
                job.held += blocks
                found += blocks
        return found

    def finished(self) -> Iterator[Job]:
        """Those that have their last token, the first to end first; each must leave before the next is asked for."""
        ends = self._ends
        while ends and ends[0][0] <= self.step:
            _, order, job = heapq.heappop(ends)
            if job.stage is Stage.DECODE and job.order == order:
                yield job

    def steps_to_end(self) -> int:
        """Steps until the next of them ends; there must be one."""
        ends = self._ends
        while ends[0][2].order != ends[0][1] or ends[0][2].stage is not Stage.DECODE:
            heapq.heappop(ends)
        return ends[0][0] - self.step

    def steps_alike(self, most: int, room: int, *, is_short: bool) -> int:
        """Steps until one of them ends, or blocks run short, or one that waits for blocks may find one shared.

        Args:
            most: Not more than so many.
            room: Blocks there are.
            is_short: True if somebody waits for blocks.
        """
        steps = min(self.steps_to_end(), most)
        if not is_short and len(self.jobs) * -(-steps // self.block_tokens) <= room:
            return steps
        for step in range(1, steps):
            room -= len(self.filling(step))
            if room < 0 or (is_short and any(job.will_share for job in self.filling(step + 1))):
                return step
        return steps

    def sparse_phases(self) -> Sequence[int]:
        """When they need blocks, in order, if that is seldom enough for jumping from one to the next."""
        size = self.block_tokens
        if not self.jobs or 4 * len(self.jobs) > size:
            return ()
        return sorted({(job.since_step - job.computed) % size for job in self.jobs})

    def quiet_steps(self, phases: Sequence[int]) -> int:
        """Steps from now on in which none of them takes a block or fills one, by its `sparse_phases`."""
        if not phases:
            return 0
        size = self.block_tokens
        now = self.step % size
        place = bisect.bisect_left(phases, now)
        due = phases[place] - now if place < len(phases) else phases[0] + size - now
        return max(due - 1, 0)  # a block is full one step before the next one is needed
