"""Generated traces."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.errors import ConfigError
from kvfleet.replay.generate import GENERATORS, AgentSessions, Bursts, SharedPrefix, _Text, generator_from


@pytest.mark.parametrize("name", GENERATORS)
def test_a_seed_makes_the_trace(name: str) -> None:
    """The same one again, and another one for another seed."""
    generator: Any = GENERATORS[name]()
    assert generator.generate(3) == generator.generate(3)
    assert generator.generate(3) != generator.generate(4)


def test_shared_prompts_are_as_popular_as_the_law_says() -> None:
    """The most popular of ten under Zipf's law has a third of the questions."""
    trace = SharedPrefix(requests=4000, prompts=10, zipf=1.0, system_tokens=1000).generate(1)
    shares = Counter(one.blocks[0] for one in trace.requests)
    assert len(shares) == 10
    assert shares.most_common(1)[0][1] / 4000 == pytest.approx(0.341, abs=0.03)
    assert trace.requests[-1].at_s == pytest.approx(4000 / 20, rel=0.1)


def test_a_turn_of_a_session_begins_with_the_turn_before_it_and_its_answer() -> None:
    """So the whole conversation can be in one cache."""
    trace = AgentSessions(sessions=20, turns=6).generate(1)
    turns = defaultdict(list)
    for one in trace.requests:
        turns[one.session].append(one)
    assert len(turns) == 20
    for conversation in turns.values():
        assert conversation[0].think_s is None
        for before, after in itertools.pairwise(conversation):
            known = (*before.blocks, *before.answer_blocks)
            assert after.blocks[: len(known)] == known
            assert after.prompt_tokens > before.prompt_tokens + before.output_tokens
            assert after.think_s is not None
    assert len({conversation[0].blocks[0] for conversation in turns.values()}) == 5  # kinds of agents


def test_bursts_come_at_their_times() -> None:
    """Each within a second, all under one system prompt."""
    trace = Bursts(requests=1000, burst=100, every_s=30.0, rate_per_s=1.0).generate(1)
    by_second = Counter(int(one.at_s) for one in trace.requests)
    assert all(by_second[30 * i] + by_second[30 * i + 1] >= 90 for i in range(5))
    assert len({one.blocks[0] for one in trace.requests}) == 1


@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.integers(1, 500))
def test_texts_share_exactly_the_whole_blocks_before_they_part(parts: list[int], more: int) -> None:
    """Blocks are cut where they would be if all had been there at once, and part with the text."""
    text = _Text()
    for number, tokens in enumerate(parts):
        text.add(number, tokens)
    assert len(text.blocks) == sum(parts) // text.block_tokens
    one, other = text.copy(), text.copy()
    one.add(100, more)
    other.add(101, more)
    shared = sum(parts) // text.block_tokens
    assert one.blocks[:shared] == other.blocks[:shared] == text.blocks
    assert not set(one.blocks[shared:]) & set(other.blocks[shared:])
    assert len(one.blocks) == (sum(parts) + more) // text.block_tokens


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("agent_session", "no generator is called 'agent_session'; did you mean agent_sessions?"),
        ("bursts:burst", "'burst' is no option; write name=value"),
        ("bursts:bursts=3", "did you mean burst?"),
        ("bursts:burst=0", "must be at least 1"),
        ("bursts:burst=many", "must be a whole number"),
    ],
)
def test_a_wrong_description_is_told(text: str, words: str) -> None:
    """In the words of a fleet file's findings."""
    with pytest.raises(ConfigError) as caught:
        generator_from(text)
    assert words in str(caught.value)


def test_a_description_gives_options() -> None:
    """With commas."""
    assert generator_from("agent_sessions:sessions=7, turns=2.5") == AgentSessions(sessions=7, turns=2.5)
