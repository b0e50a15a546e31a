"""Prompts as chains of blocks."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvfleet.cache.blocks import MOST_BLOCKS, Laid, byte_blocks, render_messages, salt_of

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "You answer in verse. " * 30},
    {"role": "user", "content": "Who are you? " * 20},
]
ANSWER = {"role": "assistant", "content": "A poet in a box of sand. " * 20}
MORE = {"role": "user", "content": "Tell me more."}


@given(st.binary(max_size=700), st.binary(max_size=700), st.integers(16, 64))
def test_prompts_share_hashes_as_far_as_they_are_equal(one: bytes, other: bytes, size: int) -> None:
    """Up to the last whole block before they part, and not beyond; with another seed nothing."""
    equal = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    first, second = byte_blocks(Laid(one), 0, size), byte_blocks(Laid(other), 0, size)
    shared = [a == b for a, b in zip(first.hashes, second.hashes, strict=False)]
    assert shared == [i < equal // size for i in range(len(shared))]
    assert len(first.hashes) == len(one) // size
    assert not set(first.hashes) & set(byte_blocks(Laid(one), 1, size).hashes)


def test_the_next_turn_knows_the_one_before_by_its_end() -> None:
    """The mark where the answer begins is the end of the prompt that was answered, and holds the answer too."""
    first, second = byte_blocks(render_messages(TALK)), byte_blocks(render_messages([*TALK, ANSWER, MORE]))
    marks = dict(second.marks)
    assert first.ends[-1] in marks
    assert marks[first.ends[-1]] > first.tokens + 100
    assert marks[second.ends[-1]] == second.tokens


def test_the_end_of_the_system_messages_is_a_mark() -> None:
    """Two questions under one system prompt share it, however short they are."""
    one = byte_blocks(render_messages([TALK[0], {"role": "user", "content": "A"}]))
    two = byte_blocks(render_messages([TALK[0], {"role": "user", "content": "B"}]))
    assert one.ends[0] == two.ends[0]
    assert one.ends[1] != two.ends[1]


def test_everything_that_an_engine_reads_makes_a_difference() -> None:
    """Tools, roles, tool calls, pictures by their content."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 200_000}}
    other = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 199_999 + "B"}}
    made = [
        render_messages(TALK),
        render_messages(TALK, [{"type": "function"}]),
        render_messages([TALK[0], {**TALK[1], "role": "tool"}]),
        render_messages([*TALK, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]),
        render_messages([*TALK, {"role": "user", "content": [{"type": "text", "text": "See"}, picture]}]),
        render_messages([*TALK, {"role": "user", "content": [{"type": "text", "text": "See"}, other]}]),
        render_messages([{"role": "user", "content": "a lone surrogate \ud800"}]),
    ]
    assert len({one.text for one in made}) == len(made)


def test_salts_keep_apart() -> None:
    """And no salt is none."""
    assert salt_of() == salt_of("") == 0
    assert len({salt_of("a"), salt_of("b"), salt_of("a", "b"), salt_of("ab")}) == 4


def test_of_a_very_long_prompt_the_first_blocks_are_known_and_its_marks() -> None:
    """So what is done with it takes no longer than with one of a megabyte, and its next turn still finds it."""
    long = Laid(b"a" * (MOST_BLOCKS * 256 + 1000))
    one, other = byte_blocks(long), byte_blocks(Laid(long.text[:-1] + b"b"))
    assert len(one.hashes) == MOST_BLOCKS
    assert one.hashes == other.hashes
    assert one.ends != other.ends
    assert one.tokens == -(-len(long.text) // 4)
    turn = Laid(long.text + b"an answer" + b"and more", answers=[(len(long.text), len(long.text) + 9)])
    assert one.ends[-1] in [mark for mark, _ in byte_blocks(turn).marks]
