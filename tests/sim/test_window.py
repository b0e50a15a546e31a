"""The pool of a hybrid model's latest blocks: what can be found of a prompt, and what is forgotten."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvfleet.sim.window import WindowPool


@given(st.integers(1, 40), st.integers(1, 8), st.sets(st.integers(0, 19)), st.integers(0, 20))
def test_the_last_place_is_one_before_which_the_window_is_there(
    window: int, size: int, kept: set[int], most: int
) -> None:
    """Or all there is before it; and no place after it is such a one."""
    pool = WindowPool.of(100, window, size)
    for block in sorted(kept):
        pool.keep([block])

    def is_good(place: int) -> bool:
        start = max(0, place * size - (window - 1)) if window > 1 else max(0, place - 1) * size
        return all(block in kept for block in range(start // size, place))

    assert pool.last(range(20), most) == max(place for place in range(most + 1) if is_good(place))


def test_what_was_used_last_stays() -> None:
    """A request that goes on from a place uses the window before it, and no more."""
    pool = WindowPool.of(3, window_tokens=9, block_tokens=8)
    pool.keep([1, 2, 3])
    pool.use([1, 2, 3], 2)
    assert pool.keep([4, 5]) == ([1, 3], [])
    assert pool.last([1, 2], 2) == 2


def test_what_is_there_is_not_told_again() -> None:
    """Nor what is forgotten in the same moment, because there is room for fewer."""
    pool = WindowPool.of(2, window_tokens=9, block_tokens=8)
    pool.keep([1, 2])
    assert pool.keep([2, 3, 4, 5]) == ([1, 2], [0, 1])
    assert len(pool) == 2
    pool.clear()
    assert (len(pool), pool.last([4, 5], 2)) == (0, 0)
