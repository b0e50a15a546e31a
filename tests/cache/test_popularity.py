"""How often beginnings of prompts are asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.cache.popularity import Popularity


def test_a_shared_beginning_is_counted_as_far_as_it_is_shared() -> None:
    """Prompts that part after eight blocks share what is counted up to there."""
    popular = Popularity()
    for end in range(5):
        popular.note([*range(8), 100 + end, 200 + end], now_s=0.0)
    assert dict(popular.uses([*range(8), 104, 300], now_s=0.0)) == {1: 5, 2: 5, 4: 5, 8: 5}
    assert dict(popular.uses([*range(8), 104, 204], now_s=0.0)) == {1: 5, 2: 5, 4: 5, 8: 5, 10: 1}
    assert not dict(popular.uses([99], now_s=0.0))


def test_a_shared_beginning_of_any_length_is_counted_to_its_end() -> None:
    """What is known to be held by somebody when a prompt comes is counted there, not only at the power of two below."""
    popular = Popularity()
    for end in range(5):
        popular.note([*range(13), 100 + end], now_s=0.0, known=13 if end else 0)
    asked = [*range(13), 200]
    assert dict(popular.uses(asked, now_s=0.0, known=13)) == {1: 5, 2: 5, 4: 5, 8: 5, 13: 4}
    assert dict(popular.uses(asked, now_s=0.0)) == {1: 5, 2: 5, 4: 5, 8: 5}
    assert dict(popular.uses(asked[:2], now_s=0.0, known=13)) == {1: 5, 2: 5}


def test_a_count_fades() -> None:
    """To a third in the span, and then to nothing."""
    popular = Popularity(span_s=60)
    popular.note([1], now_s=0.0)
    assert dict(popular.uses([1], now_s=60.0)) == {1: pytest.approx(0.368, abs=0.001)}
    assert not dict(popular.uses([1], now_s=300.0))


def test_what_is_remembered_is_bounded() -> None:
    """Old beginnings are forgotten, what is asked for again and again is not."""
    popular = Popularity(most=100)
    for i in range(10_000):
        popular.note([7], now_s=0.0)
        popular.note([1000 + i], now_s=0.0)
    assert len(popular._counts) + len(popular._older) <= 202
    assert dict(popular.uses([7], now_s=0.0)) == {1: 10_000}


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=30),
    st.lists(st.integers(0, 3), max_size=12),
    st.integers(0, 14),
)
def test_longer_beginnings_are_never_asked_for_more_often(
    prompts: list[list[int]], asked: list[int], known: int
) -> None:
    """Whoever asks for a beginning asks for all beginnings of it that were counted."""
    popular = Popularity()
    for prompt in prompts:
        popular.note(_chained(prompt), now_s=0.0, known=known)
    found = list(popular.uses(_chained(asked), now_s=0.0, known=known))
    whole = [uses for blocks, uses in found if blocks & (blocks - 1) == 0]
    assert whole == sorted(whole, reverse=True)
    assert [blocks for blocks, _ in found] == sorted({blocks for blocks, _ in found})


def _chained(prompt: list[int]) -> list[int]:
    """Hashes that each cover all before."""
    return [hash((i, *prompt[: i + 1])) for i in range(len(prompt))]
