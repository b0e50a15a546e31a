"""The engine model: what it computes in a step, whom it admits and preempts, what it remembers, and when."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfleet.errors import BackendError, Fault
from kvfleet.sim.engine import Engine
from kvfleet.sim.events import (
    Cleared,
    Decoded,
    Event,
    Finished,
    FirstToken,
    Job,
    Preempted,
    Removed,
    Stage,
    Started,
    Stored,
)
from kvfleet.sim.spec import EngineSpec


def engine(*, longest_run: int | None = None, **options: Any) -> Engine:
    """An engine with blocks of ten tokens, of which a step takes a second."""
    given = {"step_s": 1.0, "prefill_s_per_token": 0.0, "block_tokens": 10, "cache_blocks": 100, **options}
    return Engine(EngineSpec(**given), **({} if longest_run is None else {"longest_run": longest_run}))


def job(prompt: int, output: int, *, family: int = 1, answers: int = 0, key: Any = None) -> Job:
    """A request whose prompt shares its blocks with all of the same family."""
    full = prompt // 10
    hashes = tuple(family * 1000 + index for index in range(full + answers))
    return Job(blocks=hashes[:full], prompt_tokens=prompt, output_tokens=output, answer_blocks=hashes[full:], key=key)


def run(engine: Engine) -> list[Event]:
    """Everything until it is idle."""
    found: list[Event] = []
    while (now_s := engine.next_s()) is not None:
        found += engine.advance(now_s)
    return found


def answer(engine: Engine, work: Job, now_s: float = 0.0) -> Job:
    """One request, to its end."""
    engine.submit(work, now_s)
    run(engine)
    return work


def times(events: list[Event], kind: type[Event]) -> list[float]:
    """When events of a kind happened."""
    return [event.at_s for event in events if isinstance(event, kind)]


class TestTime:
    def test_a_prompt_is_read_in_chunks_of_the_budget(self) -> None:
        """Twenty-five tokens at ten a step are three steps, and the first token comes with the last."""
        one = engine(token_budget=10, max_running=4)
        one.submit(job(25, 1), 0.0)
        assert times(run(one), FirstToken) == [3.0]

    def test_a_step_costs_what_the_spec_says(self) -> None:
        """Every term of the step's time is there, divided by the speed."""
        spec = {
            "step_s": 1.0,
            "prefill_s_per_token": 0.1,
            "prefill_s_per_token_context": 0.01,
            "decode_s_per_seq": 0.5,
            "decode_s_per_context_token": 0.001,
            "speed": 2.0,
        }
        one = engine(**spec)
        one.submit(job(30, 2), 0.0)
        prefill = (1.0 + 0.1 * 30 + 0.01 * (30 * 29 / 2)) / 2
        decode = (1.0 + 0.5 + 0.001 * 30) / 2
        assert times(run(one), Finished) == [pytest.approx(prefill + decode)]

    def test_decodes_go_on_while_another_prompt_is_read(self) -> None:
        """A long prompt takes what the decodes leave of the budget, and slows them but does not stop them."""
        one = engine(token_budget=10, max_running=4, step_s=0.1, prefill_s_per_token=0.1)
        one.submit(job(10, 100, family=1), 0.0)
        one.advance(1.25)
        one.submit(job(18, 1, family=2), 1.25)
        events = one.advance(3.35)
        assert times(events, FirstToken) == [pytest.approx(1.3 + 1.0 + 1.0)]  # two chunks of nine
        assert times(events, Decoded) == [pytest.approx(at_s) for at_s in (1.3, 2.3, 3.3)]

    def test_a_request_waits_for_the_end_of_the_step_under_way(self) -> None:
        """Whoever comes in the middle of a step starts at its end, even in a run of many."""
        one = engine()
        one.submit(job(10, 50, family=1), 0.0)
        one.advance(4.5)
        one.submit(job(10, 1, family=2), 4.5)
        events = one.advance(10.0)
        assert times(events, Started) == [5.0]
        assert times(events, FirstToken) == [6.0]

    def test_requests_of_the_same_moment_share_a_step(self) -> None:
        """Nothing is decided before time moves on, so two that come together start together."""
        one = engine()
        one.submit(job(10, 1, family=1), 0.0)
        assert one.advance(0.0) == []
        one.submit(job(10, 1, family=2), 0.0)
        assert times(run(one), FirstToken) == [1.0, 1.0]

    def test_a_quiet_run_is_one_event(self) -> None:
        """A thousand tokens with nothing else to decide are told at once."""
        one = engine(cache_blocks=200)
        one.submit(job(10, 1000), 0.0)
        events = [event for event in run(one) if isinstance(event, Decoded)]
        assert [(event.at_s, event.tokens) for event in events] == [(1000.0, 999)]

    def test_a_long_prompt_is_read_in_one_run_up_to_its_last_chunk(self) -> None:
        """If nobody wants to hear of its blocks; who comes meanwhile waits for the step under way, as ever."""
        one = engine(token_budget=10, max_running=4)
        one.tells_all = False
        long, later = job(45, 1), job(5, 1, family=2)
        one.submit(long, 0.0)
        assert (one.next_s(), one.advance(4.0), one.next_s()) == (4.0, [], 5.0)
        assert times(one.advance(5.0), FirstToken) == [5.0]
        one.submit(job(95, 1, family=3), 10.0)
        assert one.next_s() == 19.0
        one.submit(later, 11.5)
        assert (one.next_s(), one.advance(12.0), one.next_s()) == (12.0, [], 19.0)
        assert times(run(one), FirstToken) == [20.0, 20.0]

    def test_asking_in_between_gives_each_token_its_time(self) -> None:
        """Advancing by `next_step_s` tells of every step of the same run."""
        one = engine()
        one.submit(job(10, 4), 0.0)
        seen = []
        while (now_s := one.next_step_s()) is not None:
            seen += [(event.at_s, event.tokens) for event in one.advance(now_s) if isinstance(event, Decoded)]
        assert seen == [(2.0, 1), (3.0, 1), (4.0, 1)]

    def test_an_idle_engine_has_no_next(self) -> None:
        """With nothing to do there is nothing to wait for."""
        one = engine()
        assert (one.next_s(), one.next_step_s(), one.advance(5.0)) == (None, None, [])


class TestBatch:
    def test_a_full_batch_makes_the_next_wait(self) -> None:
        """With a batch of one, the second starts when the first has finished."""
        one = engine(max_running=1)
        one.submit(job(10, 5, family=1), 0.0)
        one.submit(job(10, 1, family=2), 0.0)
        assert one.load().waiting == 2
        assert times(run(one), Started) == [0.0, 5.0]

    def test_a_request_waits_until_all_of_its_prompt_fits(self) -> None:
        """A prompt larger than what is free is not begun, although its first chunk would fit."""
        one = engine(cache_blocks=8, token_budget=10, max_running=4)
        one.submit(job(45, 5, family=1), 0.0)
        one.submit(job(45, 1, family=2), 0.0)
        assert times(run(one), Started) == [0.0, 9.0]

    def test_a_decode_without_a_block_preempts_the_last_one_admitted(self) -> None:
        """The later of two growing answers gives way, and is computed again when there is room."""
        one = engine(cache_blocks=6)
        first, second = job(25, 15, family=1), job(25, 15, family=2)
        one.submit(first, 0.0)
        one.submit(second, 0.0)
        events = run(one)
        assert [event.job for event in events if isinstance(event, Preempted)] == [second]
        assert [event.job for event in events if isinstance(event, Finished)] == [first, second]
        assert len(times(events, FirstToken)) == 2
        assert one.preemptions == 1

    def test_every_token_is_told_once_through_a_preemption(self) -> None:
        """First token and decoded ones add up to the answer's length for each request."""
        one = engine(cache_blocks=6)
        jobs = [job(25, 15, family=1), job(25, 15, family=2)]
        for each in jobs:
            one.submit(each, 0.0)
        assert tokens_of(run(one)) == {jobs[0]: 15, jobs[1]: 15}

    def test_load_is_what_runs_and_waits(self) -> None:
        """Running, waiting, share of the cache held, and the pace."""
        one = engine(max_running=1, cache_blocks=10)
        one.submit(job(25, 5, family=1), 0.0)
        one.submit(job(25, 5, family=2), 0.0)
        one.advance(1.5)
        load = one.load()
        assert (load.running, load.waiting, load.kv_usage, load.tokens_per_second) == (1, 1, 0.3, 1.0)

    @pytest.mark.parametrize("now_s", [0.0, 0.5, 1.0, 3.5])
    def test_a_cancelled_request_leaves_nothing_behind(self, now_s: float) -> None:
        """Queued, in its prefill or decoding: its blocks and its place are free at once, and twice does no harm."""
        one = engine()
        work = job(25, 100)
        one.submit(work, 0.0)
        one.cancel(work, now_s)
        one.cancel(work, now_s)
        load = one.load()
        assert (load.running, load.waiting, load.kv_usage, work.stage) == (0, 0, 0.0, Stage.DONE)
        assert not [event for event in run(one) if isinstance(event, FirstToken | Finished) and event.at_s > now_s]

    def test_cancelling_the_one_that_does_not_fit_lets_the_next_in(self) -> None:
        """The queue does not stay blocked when its head leaves."""
        one = engine(cache_blocks=8)
        one.submit(job(45, 20, family=1), 0.0)
        big, small = job(45, 5, family=2), job(5, 1, family=3)
        one.submit(big, 0.0)
        one.submit(small, 0.0)
        one.advance(5.5)
        one.cancel(big, 5.5)
        events = one.advance(7.5)
        assert times(events, Started) == [6.0]


class TestPrefixCache:
    def test_the_last_token_is_always_computed(self) -> None:
        """The same prompt again is cached but for the block with the token whose logits are needed."""
        one = engine()
        assert [answer(one, job(100, 1)).cached_tokens for _ in range(2)] == [0, 90]
        assert answer(one, job(105, 1)).cached_tokens == 100

    def test_the_next_turn_finds_the_answer(self) -> None:
        """Blocks that filled while an answer grew are found, but for the last token, which nobody computed."""
        one = engine()
        answer(one, job(40, 21, answers=2))
        assert answer(one, job(75, 1)).cached_tokens == 60

    def test_siblings_in_one_step_share(self) -> None:
        """A prompt that is computed in a step is cached for those admitted after it in the same step."""
        one = engine()
        jobs = [job(45, 1) for _ in range(3)]
        for each in jobs:
            one.submit(each, 0.0)
        run(one)
        assert [each.cached_tokens for each in jobs] == [0, 40, 40]

    def test_a_prompt_without_hashes_is_never_cached(self) -> None:
        """No hashes, no lookup, no memory."""
        one = engine()
        assert [answer(one, Job((), 40, 1)).cached_tokens for _ in range(2)] == [0, 0]

    def test_a_cancelled_prefill_leaves_only_what_was_computed(self) -> None:
        """The chunks that ran are cached, the ones that did not are not."""
        one = engine(token_budget=20, max_running=4)
        work = job(60, 1)
        one.submit(work, 0.0)
        one.advance(1.5)  # in the second chunk
        one.cancel(work, 1.5)
        run(one)
        assert answer(one, job(60, 1), 5.0).cached_tokens == 40

    def test_stored_and_removed_tell_what_is_cached(self) -> None:
        """Whoever follows the events knows the cache: blocks with their parent, at the end of their step."""
        one = engine(cache_blocks=4)
        one.submit(job(25, 1, family=1), 0.0)
        (stored,) = [event for event in run(one) if isinstance(event, Stored)]
        assert (stored.at_s, stored.blocks, stored.parent) == (1.0, (1000, 1001), None)
        one.submit(job(25, 1, family=2), 5.0)
        told = [event for event in run(one) if isinstance(event, Stored | Removed)]
        assert told == [Removed(6.0, (1001,)), Stored(6.0, told[1].job, 0, 2)]  # type: ignore[union-attr]

    def test_clearing_needs_an_idle_engine(self) -> None:
        """The cache is cleared when nothing is held, and that is told."""
        one = engine()
        one.submit(job(25, 5), 0.0)
        one.advance(2.5)
        assert one.clear_cache(2.5) is False
        run(one)
        assert one.clear_cache(9.0) is True
        assert one.advance(9.0) == [Cleared(9.0)]
        assert answer(one, job(25, 1), 9.0).cached_tokens == 0


class TestRefusals:
    def test_a_prompt_beyond_the_context_is_refused(self) -> None:
        """Prompt plus answer beyond the context is the caller's fault, with the numbers in the message."""
        with pytest.raises(BackendError, match="context is 100 tokens; 90 of prompt and 20 of answer") as caught:
            engine(context_tokens=100).submit(job(90, 20), 0.0)
        assert (caught.value.kind, caught.value.status) == (Fault.CONTEXT_LENGTH, 400)

    def test_a_full_queue_refuses(self) -> None:
        """One more than the places and the queue hold is refused as overloaded."""
        one = engine(max_running=1, max_waiting=1)
        one.submit(job(10, 5, family=1), 0.0)
        one.submit(job(10, 5, family=2), 0.0)
        with pytest.raises(BackendError) as caught:
            one.submit(job(10, 5, family=3), 0.0)
        assert (caught.value.kind, caught.value.status) == (Fault.OVERLOADED, 503)

    def test_hashes_must_fit_the_prompt(self) -> None:
        """A hash for a block that is not full would be found by prompts that differ in it."""
        with pytest.raises(ValueError, match="25 tokens has 2 full blocks of 10, but 3 hashes"):
            engine().submit(Job((1, 2, 3), 25, 1), 0.0)

    def test_a_budget_below_the_batch_is_refused(self) -> None:
        """Every decode needs its token in each step."""
        with pytest.raises(ValueError, match="must be at least max_running"):
            EngineSpec(token_budget=8, max_running=16)


def tokens_of(events: list[Event]) -> dict[Job, int]:
    """Tokens told for each request."""
    found: dict[Job, int] = {}
    for event in events:
        if isinstance(event, FirstToken):
            found[event.job] = found.get(event.job, 0) + 1
        elif isinstance(event, Decoded):
            for each in event.jobs:
                found[each] = found.get(each, 0) + event.tokens
    return found


@attrs.frozen
class Arrival:
    """One request of a random history."""

    at_s: float
    family: int
    prompt: int
    output: int
    answers: int
    cancel_after_s: float | None

    def job(self, key: int) -> Job:
        """The request."""
        return job(self.prompt, self.output, family=self.family, answers=self.answers, key=key)


arrivals = st.lists(
    st.builds(
        Arrival,
        at_s=st.floats(0, 60, width=16),
        family=st.integers(1, 4),
        prompt=st.integers(1, 70),
        output=st.integers(0, 40),
        answers=st.integers(0, 4),
        cancel_after_s=st.none() | st.floats(0, 40, width=16),
    ),
    max_size=16,
)
specs = st.builds(
    EngineSpec,
    token_budget=st.integers(6, 40),
    max_running=st.integers(1, 6),
    cache_blocks=st.integers(11, 30),
    block_tokens=st.just(10),
    step_s=st.sampled_from([0.25, 1.0]),
    prefill_s_per_token=st.sampled_from([0.0, 0.125]),
    prefill_s_per_token_context=st.sampled_from([0.0, 0.0078125]),
    decode_s_per_seq=st.sampled_from([0.0, 0.125]),
    decode_s_per_context_token=st.sampled_from([0.0, 0.0078125]),
)
# Powers of two: sums are exact, so a moment that is a step's end in one run is one in the other as well.


def history(
    spec: EngineSpec, arrivals: list[Arrival], *, longest_run: int, often: bool = False, tells_all: bool = True
) -> list[Event]:
    """All events of a history; `often` asks the engine at every step on the way."""
    one = Engine(spec, longest_run=longest_run, tells_all=tells_all)
    jobs = [arrival.job(index) for index, arrival in enumerate(arrivals)]
    acts = [(each.at_s, 0, index) for index, each in enumerate(arrivals)]
    acts += [
        (each.at_s + each.cancel_after_s, 1, index)
        for index, each in enumerate(arrivals)
        if each.cancel_after_s is not None
    ]
    found: list[Event] = []
    for at_s, is_cancel, index in sorted(acts):
        while often and one._clock < at_s and (step_s := one.next_step_s()) is not None and step_s < at_s:
            found += one.advance(step_s)
            check(one)
        if is_cancel:
            one.cancel(jobs[index], at_s)
        else:
            one.submit(jobs[index], at_s)
        check(one)
    while (now_s := one.next_step_s() if often else one.next_s()) is not None:
        found += one.advance(now_s)
        check(one)
    assert one.load().kv_usage == 0.0
    return found + one.advance(one._clock)


def check(one: Engine) -> None:
    """What holds at every moment: the requests hold exactly the blocks that are held, and no more than there are."""
    pool = one._blocks.pool
    running = list(one._running)
    shared = {block for each in running for block in each.hashes[: each.shared]}
    assert pool.held == len(shared) + sum(each.held - each.shared for each in running) <= pool.capacity
    assert pool.match(sorted(shared)) == len(shared)
    assert pool.held + pool.cached <= pool.capacity
    assert len(running) <= one.spec.max_running
    for each in running:
        steps = one._decoding.step - each.since_step if each.stage is Stage.DECODE else 0
        begun = 1 if one._run and one._run.begun > one._run.ended and each.stage is Stage.DECODE else 0
        assert each.held == -(-(each.computed + steps + begun) // one.spec.block_tokens)


def told(events: list[Event]) -> list[tuple[Any, ...]]:
    """The events as plain values, tokens of decodes left out: a run tells them at other moments."""
    found: list[tuple[Any, ...]] = []
    for event in events:
        match event:
            case Removed(at_s, blocks):
                found += [("removed", at_s, block) for block in blocks]
            case Stored(at_s):
                found.append(("stored", at_s, event.blocks, event.parent))
            case Cleared() | Decoded():
                pass
            case _:
                found.append((type(event).__name__, event.at_s, event.job.key, event.job.cached_tokens))
    return found


@settings(deadline=None)
@given(specs, arrivals)
def test_jumping_over_steps_changes_nothing(spec: EngineSpec, arrivals: list[Arrival]) -> None:
    """Runs of steps, single steps, and runs that are asked at every step: the same things at the same times."""
    plain = history(spec, arrivals, longest_run=1)
    jumped = history(spec, arrivals, longest_run=1 << 30)
    asked = history(spec, arrivals, longest_run=1 << 30, often=True)
    assert told(jumped) == told(plain) == told(asked)
    by_key = [{each.key: count for each, count in tokens_of(events).items()} for events in (plain, jumped, asked)]
    assert by_key[0] == by_key[1] == by_key[2]


@settings(deadline=None)
@given(specs, arrivals)
def test_telling_less_changes_nothing(spec: EngineSpec, arrivals: list[Arrival]) -> None:
    """An engine nobody follows closely tells of first tokens, ends and preemptions at the same times as any other."""
    some: Any = (FirstToken, Finished, Preempted)
    plain = [event for event in history(spec, arrivals, longest_run=1 << 30) if isinstance(event, some)]
    assert told(history(spec, arrivals, longest_run=1 << 30, tells_all=False)) == told(plain)


@settings(deadline=None)
@given(specs, arrivals)
def test_every_request_ends_with_all_of_its_tokens(spec: EngineSpec, arrivals: list[Arrival]) -> None:
    """Whoever is not cancelled finishes once, after as many tokens as its answer has; time never goes back."""
    events = history(spec, arrivals, longest_run=1 << 30)
    tokens = tokens_of(events)
    finished = [event.job for event in events if isinstance(event, Finished)]
    assert len(set(finished)) == len(finished)
    assert all(tokens.get(each, 0) == each.output_tokens for each in finished)
    kept = {index for index, each in enumerate(arrivals) if each.cancel_after_s is None}
    assert kept <= {each.key for each in finished}


@settings(deadline=None)
@given(specs, arrivals)
def test_following_the_events_is_knowing_the_cache(spec: EngineSpec, arrivals: list[Arrival]) -> None:
    """Stored and removed blocks never contradict each other, and explain every cached token."""
    known: set[int] = set()
    for event in history(spec, arrivals, longest_run=1 << 30):
        match event:
            case Stored():
                assert not known & set(event.blocks)
                known |= set(event.blocks)
            case Removed(_, blocks):
                assert set(blocks) <= known
                known -= set(blocks)
            case _:
                pass


def reference(capacity: int, jobs: list[Job]) -> list[int]:
    """Cached tokens of requests that run one after the other, with a list of blocks, oldest first, as the cache."""
    memory: list[int | None] = [None] * capacity
    found = []
    for each in jobs:
        hits = 0
        while hits < min(len(each.hashes), (each.prompt_tokens - 1) // 10) and each.hashes[hits] in memory:
            hits += 1
        found.append(hits * 10)
        held: list[int | None] = list(each.hashes[:hits])
        for block in held:
            memory.remove(block)
        computed = each.prompt_tokens + max(0, each.output_tokens - 1)
        for index in range(hits, -(-computed // 10)):
            is_full = (index + 1) * 10 <= computed and index < len(each.hashes)
            memory.pop(0)
            if is_full and each.hashes[index] in memory:  # computed again: one copy is enough
                memory.remove(each.hashes[index])
                memory.insert(0, None)
            held.append(each.hashes[index] if is_full else None)
        memory = [block for block in held if block is None] + memory
        memory += reversed([block for block in held if block is not None])
    return found


@settings(deadline=None)
@given(
    st.integers(11, 30),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(0, 40), st.integers(0, 4)), max_size=20),
)
def test_cached_tokens_are_what_a_plain_list_says(capacity: int, asked: list[tuple[int, int, int, int]]) -> None:
    """One request after the other, the longest contiguous prefix in an LRU list is what is found."""
    one = engine(cache_blocks=capacity)
    jobs = [job(prompt, output, family=family, answers=answers) for family, prompt, output, answers in asked]
    found = [answer(one, each, one._clock).cached_tokens for each in jobs]
    assert found == reference(capacity, jobs)
