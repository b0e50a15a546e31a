"""A model of an inference engine in virtual time: chunked prefill, continuous batching, prefix cache, preemption.

It has no clock and waits for nothing. Whoever drives it says what time it is; it says when the next thing happens and,
afterwards, what happened. The rules are those of vLLM's v1 scheduler (``vllm/v1/core/sched/scheduler.py`` of 0.32), as
far as a router can notice them:

- One queue, first come first served. A step computes one token for every decoding request and, with what is left of the
  token budget, chunks of prompts.
- A request is admitted when a place in the batch is free and all of its prompt's blocks fit into what nobody holds. The
  longest cached prefix is pinned, but the last token of a prompt is always computed.
- A block can be shared from the step that computes it on, so within that step too. Released blocks stay known until
  they are taken, least recently used first.
- A decode that finds no block preempts the request admitted last, which gives up all it holds, waits at the head of the
  queue, and computes again what is not cached by then.

Between two admissions nothing changes but the number of tokens, so a run of decode steps is one object with closed-form
times: a replay jumps over it. Those that decode are in step (`kvfleet.sim.decoding`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import attrs

from kvfleet.adapters.base import EngineLoad
from kvfleet.errors import BackendError, Fault
from kvfleet.sim.checks import check
from kvfleet.sim.decoding import Decoding
from kvfleet.sim.events import (
    Cleared,
    Decoded,
    Event,
    Finished,
    FirstToken,
    Job,
    Preempted,
    Stage,
    Started,
)
from kvfleet.sim.held import HeldBlocks
from kvfleet.sim.runs import Run
from kvfleet.sim.spec import EngineSpec

__all__ = ["Engine"]

_LONGEST_RUN = 1 << 30


@attrs.define(eq=False)
class Engine:
    """One engine. All times are seconds on the caller's clock, and never go back.

    >>> engine = Engine(EngineSpec(step_s=0.01, prefill_s_per_token=0.001, block_tokens=10))
    >>> engine.submit(Job(blocks=(1, 2), prompt_tokens=25, output_tokens=3), now_s=0.0)
    >>> engine.next_s()
    0.035
    >>> for event in engine.advance(1.0):
    ...     print(type(event).__name__, round(event.at_s, 3))
    Started 0.0
    Stored 0.035
    FirstToken 0.035
    Decoded 0.055
    Finished 0.055

    Args:
        spec: Size and pace.
        longest_run: Most decode steps taken as one; 1 for the plain loop, which gives the same times.
        tells_all: False if nobody asks for more than `FirstToken`, `Finished` and `Preempted`; the others are then not
            told, which is faster.
    """

    spec: EngineSpec = attrs.field(factory=EngineSpec)
    longest_run: int = attrs.field(default=_LONGEST_RUN, kw_only=True)
    _tells_all: bool = attrs.field(default=True, kw_only=True)
    preemptions: int = attrs.field(init=False, default=0)
    _blocks: HeldBlocks = attrs.field(init=False, repr=False)
    _clock: float = attrs.field(init=False, default=0.0)
    _waiting: deque[Job] = attrs.field(init=False, factory=deque, repr=False)
    _running: dict[Job, None] = attrs.field(init=False, factory=dict, repr=False)  # in the order of admission
    _prefilling: dict[Job, None] = attrs.field(init=False, factory=dict, repr=False)
    _decoding: Decoding = attrs.field(init=False, repr=False)
    _run: Run | None = attrs.field(init=False, default=None, repr=False)
    _is_short_of_blocks: bool = attrs.field(init=False, default=False)
    _events: list[Event] = attrs.field(init=False, factory=list, repr=False)
    _queries_tokens: int = attrs.field(init=False, default=0)
    _hits_tokens: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        self._blocks = HeldBlocks(self.spec, self._tells_all)
        self._decoding = Decoding(self.spec.block_tokens)

    @property
    def tells_all(self) -> bool:
        """True if everything is told."""
        return self._tells_all

    @tells_all.setter
    def tells_all(self, tells: bool) -> None:
        self._tells_all = self._blocks.tells = tells

    # -- the caller's side --------------------------------------------------------------------------------------------

    def submit(self, job: Job, now_s: float) -> None:
        """Take a request into the queue.

        Raises:
            BackendError: `Fault.CONTEXT_LENGTH` if it can never fit, `Fault.OVERLOADED` if the queue is full.
            ValueError: if its block hashes do not fit its prompt's length.
        """
        spec = self.spec
        check(job, spec)
        self._run_to(now_s)
        free_places = max(0, spec.max_running - len(self._running))
        if spec.max_waiting is not None and len(self._waiting) >= spec.max_waiting + free_places:
            job.stage = Stage.DONE
            raise BackendError(Fault.OVERLOADED, "the engine's queue is full", status=503, retry_after_s=1.0)
        if not self._waiting:  # behind others that cannot be admitted it changes nothing
            self._cut()
        job.arrived_s = now_s
        self._waiting.append(job)

    def set_speed(self, speed: float, now_s: float) -> None:
        """Go at another speed, from the next step on."""
        self._run_to(now_s)
        self._cut()
        self.spec = attrs.evolve(self.spec, speed=speed)

    def cancel(self, job: Job, now_s: float) -> None:
        """Drop a request wherever it is; safe if it is over. The step under way keeps its length."""
        self._run_to(now_s)
        if job.stage is Stage.DONE:
            return
        self._cut()
        if job.stage is Stage.WAITING:
            self._waiting.remove(job)
        else:
            self._leave(job)
        job.stage = Stage.DONE

    def next_s(self) -> float | None:
        """When the present run of steps ends, if nothing is submitted or cancelled before; None if it is idle.

        Asking decides what the next step computes. What a submission or a cancellation has let happen is told by
        `advance` even if there is nothing to wait for.
        """
        run = self._run or self._compose()
        return run.end_s(run.steps) if run else None

    def next_step_s(self) -> float | None:
        """When the present step ends, for a caller who wants each token at its time; None if it is idle."""
        run = self._run or self._compose()
        return run.end_s(run.ended + 1) if run else None

    def advance(self, now_s: float) -> list[Event]:
        """Everything that happened up to now and was not told before, in order."""
        self._run_to(now_s)
        events, self._events = self._events, []
        return events

    def clear_cache(self, now_s: float) -> bool:
        """Forget all blocks, as vLLM's ``/reset_prefix_cache``; False, and nothing happens, while any are held."""
        self._run_to(now_s)
        if not self._blocks.clear():
            return False
        self._events.append(Cleared(self._clock))
        return True

    @property
    def is_idle(self) -> bool:
        """True if it has nothing to do."""
        return not self._running and not self._waiting

    def load(self) -> EngineLoad:
        """The engine's own account of itself."""
        run, pool = self._run, self._blocks.pool
        return EngineLoad(
            running=len(self._running),
            waiting=len(self._waiting),
            kv_usage=pool.held / pool.capacity,
            cache_blocks=self.spec.all_blocks,
            block_tokens=self.spec.block_tokens,
            cache_tokens=self.spec.cache_blocks * self.spec.block_tokens if self.spec.window_tokens else None,
            prefix_queries_tokens=float(self._queries_tokens),
            prefix_hits_tokens=float(self._hits_tokens),
            tokens_per_second=len(self._decoding.jobs) / run.first_s if run else 0.0,
        )

    # -- time ---------------------------------------------------------------------------------------------------------

    def _run_to(self, now_s: float) -> None:
        """Let time pass. A step that would begin just now is not composed yet: others may come at the same moment."""
        while self._clock < now_s:
            run = self._run or self._compose()
            if run is None:
                self._clock = now_s
                return
            done = run.steps_by(now_s)
            if done > run.ended:
                self._end(run, done - run.ended)
                self._clock = run.end_s(run.ended)
            if run.ended == run.steps:
                self._run = None
                continue
            if run.begun == run.ended and self._clock < now_s:
                self._begin(run)
            return

    def _cut(self) -> None:
        """End the present run with the step under way."""
        run = self._run
        if run is not None:
            run.steps = run.begun
            if run.ended == run.steps:
                self._run = None

    def _begin(self, run: Run) -> None:
        """Give the decoding requests the blocks of a further step of a run, of which there are enough."""
        run.begun += 1
        needy = self._decoding.needy()
        if needy:
            self._blocks.take(len(needy))
            for job in needy:
                job.held += 1
        self._fill_answers()
        if run.reading is not None:
            self._compute(run.reading, run.chunk)

    def _begin_all(self, run: Run, last: int) -> bool:
        """Begin all further steps of a run up to the last of some at once, if what they come to is the same.

        Nothing is released between them: so blocks may be taken together, and shared after that, unless one that is
        shared is there already and gives its place back.
        """
        steps, decoding, blocks, reading = last - run.begun, self._decoding, self._blocks, run.reading
        if steps <= 0:
            return True
        first = decoding.step + run.begun - run.ended
        sharing = [job for job in decoding.jobs if job.will_share]
        new = [*sharing, reading] if reading is not None and reading.will_share else sharing
        if new and not blocks.are_new([job.hashes[job.shared] for job in new]):
            return False
        blocks.take(decoding.grow(first, steps))
        for job in sharing:
            blocks.share(job, (job.computed + first + steps - job.since_step) // self.spec.block_tokens)
        if reading is not None:
            self._compute(reading, steps * run.chunk)
        run.begun = last
        return True

    def _end_each(self, run: Run, last: int) -> None:
        """Let steps of a run be over one by one, as whoever is told of blocks wants it."""
        decoding = self._decoding
        phases = () if run.reading is not None else decoding.sparse_phases()  # each step of a prompt takes blocks
        while run.ended < last:
            if run.begun == run.ended:
                quiet = min(decoding.quiet_steps(phases), last - run.ended)
                if quiet:
                    run.ended = run.begun = run.ended + quiet
                    decoding.step += quiet
                    continue
                self._begin(run)
            run.ended += 1
            decoding.step += 1
            if self._blocks.is_noted:
                self._events.extend(self._blocks.told(run.end_s(run.ended)))

    def _end(self, run: Run, steps: int) -> None:
        """Let steps of a run be over: blocks, tokens, first tokens, ends."""
        decoding, last = self._decoding, run.ended + steps
        if self._blocks.tells or not self._begin_all(run, last):
            self._end_each(run, last)
        else:
            decoding.step += last - run.ended
            run.ended = last
        at_s = run.end_s(run.ended)
        if decoding.jobs:
            decoding.context += steps * len(decoding.jobs)
            if self._tells_all:
                self._events.append(Decoded(at_s, tuple(decoding.jobs), steps))
            for job in decoding.finished():
                self._close(job, at_s)
        for job in run.filled:
            if job.stage is Stage.PREFILL:  # not cancelled meanwhile
                self._sample_first(job, at_s)

    def _sample_first(self, job: Job, at_s: float) -> None:
        """A prefill is over: the request decodes from now on, if its answer has more than this token."""
        if not job.output_tokens:
            self._close(job, at_s)
            return
        if not job.generated:
            self._events.append(FirstToken(at_s, job))
        elif self._tells_all:
            self._events.append(Decoded(at_s, (job,), 1))
        job.generated += 1
        if job.generated >= job.output_tokens:
            self._close(job, at_s)
            return
        del self._prefilling[job]
        self._decoding.join(job)

    def _close(self, job: Job, at_s: float) -> None:
        self._leave(job)
        job.stage = Stage.DONE
        self._events.append(Finished(at_s, job))

    def _leave(self, job: Job) -> None:
        """Take a running request out of the batch, and release its blocks."""
        if job.stage is Stage.DECODE:
            self._decoding.leave(job)
        else:
            del self._prefilling[job]
        del self._running[job]
        self._blocks.release(job)

    # -- composing a step ---------------------------------------------------------------------------------------------

    def _compose(self) -> Run | None:
        """Decide what the next step computes, and for how long nothing else will change."""
        if not self._running and not self._waiting:
            return None
        preemptions = self.preemptions
        for job in tuple(self._decoding.needy()):
            if job.stage is Stage.DECODE:
                self._make_room(job, 1)
        self._fill_answers()
        budget = self.spec.token_budget - len(self._decoding.jobs)
        chunks = list(self._continued(budget)) if self._prefilling else []
        is_calm = self.preemptions == preemptions
        if is_calm:
            self._is_short_of_blocks = False
            if self._waiting:
                chunks.extend(self._admitted(budget - sum([tokens for _, tokens in chunks])))
        self._run = run = self._timed(chunks, self._steps_alike() if is_calm and not chunks else 1)
        if is_calm and len(chunks) == 1:
            self._go_on_reading(run, *chunks[0])
        return run

    def _steps_alike(self) -> int:
        return self._decoding.steps_alike(
            self.longest_run, self._blocks.pool.available, is_short=self._is_short_of_blocks
        )

    def _go_on_reading(self, run: Run, job: Job, chunk: int) -> None:
        """Let a prompt that takes all of the budget take it in further steps too, up to the one that has its end.

        Nobody else is admitted in those; they end before an answer does. Whoever is told of blocks hears of each step.
        """
        if self._tells_all:
            return
        spec, decoding = self.spec, self._decoding
        answers = len(decoding.jobs)
        steps = min((job.target - job.computed - 1) // chunk, self.longest_run - 1)
        if answers:
            steps = min(steps, decoding.steps_to_end() - 1)
        if steps <= 0 or chunk + answers < spec.token_budget:
            return
        size = spec.block_tokens
        if -(-steps * chunk // size) + 1 + answers * -(-(steps + 1) // size) > self._blocks.pool.available:
            return
        run.steps, run.reading, run.chunk = 1 + steps, job, chunk
        run.growth_s += chunk * chunk * spec.prefill_s_per_token_context / spec.speed

    def _timed(self, chunks: list[tuple[Job, int]], steps: int) -> Run:
        spec, decoding = self.spec, len(self._decoding.jobs)
        prefill, pairs = 0, 0.0
        for job, tokens in chunks:
            prefill += tokens
            pairs += tokens * (job.computed - (tokens + 1) / 2)
        return Run(
            start_s=self._clock,
            first_s=spec.step_time_s(prefill, pairs, decoding, self._decoding.context),
            growth_s=decoding * spec.decode_s_per_context_token / spec.speed,
            steps=steps,
            filled=[job for job, _ in chunks if job.computed == job.target] if chunks else (),
            begun=1,
        )

    def _continued(self, budget: int) -> Iterator[tuple[Job, int]]:
        """Chunks of the prefills under way."""
        for job in tuple(self._prefilling):
            if not budget or job.stage is not Stage.PREFILL:
                return
            tokens = min(job.target - job.computed, budget)
            if not self._compute(job, tokens):
                return
            budget -= tokens
            yield job, tokens

    def _admitted(self, budget: int) -> Iterator[tuple[Job, int]]:
        """First chunks of those whose turn has come."""
        spec, blocks = self.spec, self._blocks
        while budget and self._waiting and len(self._running) < spec.max_running:
            job = self._waiting[0]
            hits = blocks.hits(job)
            if not blocks.fits(job, hits):
                self._is_short_of_blocks = True
                return
            self._waiting.popleft()
            self._admit(job, hits)
            tokens = min(job.target - job.computed, budget)
            self._compute(job, tokens)
            budget -= tokens
            yield job, tokens

    def _admit(self, job: Job, hits: int) -> None:
        self._blocks.admit(job, hits)
        job.stage = Stage.PREFILL
        self._running[job] = self._prefilling[job] = None
        if not job.is_resumed:
            job.cached_tokens = job.computed
            self._queries_tokens += job.prompt_tokens
            self._hits_tokens += job.cached_tokens
            if self._tells_all:
                self._events.append(Started(self._clock, job, job.cached_tokens))

    def _compute(self, job: Job, tokens: int) -> bool:
        """Take the blocks of a chunk, and share those it fills; False if the request itself had to give way."""
        size = self.spec.block_tokens
        if not self._make_room(job, -(-(job.computed + tokens) // size) - job.held):
            return False
        job.computed += tokens
        self._blocks.share(job, job.computed // size)
        return True

    # -- blocks -------------------------------------------------------------------------------------------------------

    def _make_room(self, job: Job, blocks: int) -> bool:
        """Take blocks for a running request, preempting the last ones admitted if need be; False if it was the last."""
        while self._blocks.pool.available < blocks:
            victim = next(reversed(self._running))
            self._preempt(victim)
            if victim is job:
                return False
        self._blocks.take(blocks)
        job.held += blocks
        return True

    def _preempt(self, job: Job) -> None:
        self._leave(job)
        job.stage = Stage.WAITING
        job.is_resumed = True
        self._waiting.appendleft(job)
        self.preemptions += 1
        self._events.append(Preempted(self._clock, job))

    def _fill_answers(self) -> None:
        """Share the blocks that decoding requests fill in the step that begins."""
        size, step = self.spec.block_tokens, self._decoding.step
        for job in self._decoding.filling():
            if job.will_share:
                self._blocks.share(job, (job.computed + step - job.since_step + 1) // size)
