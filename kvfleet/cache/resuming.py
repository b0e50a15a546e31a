"""Where an engine can go on with a prompt whose layers keep only the latest blocks: sliding windows, and states.

vLLM's rule (``vllm/v1/core/kv_cache_coordinator.py`` and ``single_type_kv_cache_manager.py``, 0.32): a beginning of a
prompt is found if every group of layers with full attention has all of its blocks, every group with a sliding window
the blocks that hold the last ``window - 1`` tokens before its end, and every group with a state (Mamba) the state at
its end; and if it ends where blocks of all groups do. Groups with chunks of attention (Llama 4) need the blocks of the
chunk in which it ends. The longest such beginning is the one. (A draft model's layers drop one block more; events do
not say that there are any.)

An index knows the holders of each block as the bits of one integer. So who has the last *n* blocks is the AND of *n*
integers, for all replicas at once, and takes log2 *n* passes over a prompt for all of its ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, repeat
from operator import and_

import attrs

__all__ = ["Resuming", "Window", "chunk_held", "last_held", "resumable"]


@attrs.frozen
class Window:
    """The latest blocks of a prompt that some layers need to go on with it.

    Attributes:
        step: Blocks of ours in one of the engine's.
        blocks: How many of the engine's they need: those of a sliding window, or 1 for a state.
        is_chunk: True if they need those since the last multiple of so many, and none at one.

    >>> Window.sliding(512, 16, 1)
    Window(step=1, blocks=32, is_chunk=False)
    """

    step: int
    blocks: int
    is_chunk: bool = False

    @classmethod
    def sliding(cls, tokens: int, block_tokens: int, step: int) -> Window:
        """That of layers which look back `tokens` tokens, the one that is computed among them."""
        return cls(step, max(1, -(-(tokens - 1) // block_tokens)))


@attrs.frozen
class Resuming:
    """Where a replica can go on with a prompt.

    Attributes:
        step: Blocks of ours between two places where it may.
        windows: What must be held before such a place.
        needs_all: True if all blocks before it must be held too, as layers with full attention need them.
    """

    step: int
    windows: tuple[Window, ...]
    needs_all: bool = True

    @classmethod
    def of(cls, windows: Sequence[Window], whole_step: int) -> Resuming:
        """Of an engine's groups; `whole_step` is that of the blocks of full attention, or 0 if it has none."""
        steps = [window.step for window in windows] + ([whole_step] if whole_step else [])
        return cls(math.lcm(*steps), tuple(windows), bool(whole_step))


def resumable(
    hashes: Sequence[int],
    depths: Sequence[tuple[int, int]],
    resuming: Resuming,
    held: Callable[[Window], Mapping[int, int]],
) -> list[tuple[int, int]]:
    """The place of each replica that can go on with a prompt, and from how many of its blocks.

    Args:
        hashes: The prompt's blocks.
        depths: The place of each replica that is asked for, and the most blocks it may go on from, in ascending order.
        resuming: Where they can, one and all.
        held: For a window: who holds each of the engine's blocks, as bits by the hash of its end.
    """
    step = resuming.step
    rounds = depths[-1][1] // step if depths else 0
    good: list[int] | None = None
    for window in resuming.windows:
        skip = step // window.step
        ends = map(held(window).get, hashes[window.step - 1 : rounds * step : window.step], repeat(0))
        held_to = chunk_held if window.is_chunk else last_held
        there = held_to(list(ends), window.blocks)[skip - 1 :: skip]
        good = there if good is None else list(map(and_, good, there))
    found: list[tuple[int, int]] = []
    waiting, left = 0, len(depths)
    for at in range(rounds, 0, -1):
        while left and depths[left - 1][1] >= at * step:
            left -= 1
            waiting |= 1 << depths[left][0]
        here = waiting if good is None else good[at - 1] & waiting
        waiting ^= here
        while here:
            bit = here & -here
            found.append((bit.bit_length() - 1, at * step))
            here ^= bit
        if not waiting and not left:
            break
    return found


def chunk_held(masks: list[int], count: int) -> list[int]:
    """For each place: who is in all of the masks up to it since the last multiple of `count`; all at a multiple itself.

    >>> chunk_held([0b11, 0b01, 0b11, 0b10, 0b11], 3)
    [3, 1, -1, 2, 2]
    """
    found: list[int] = []
    for start in range(0, len(masks), count):
        found += accumulate(masks[start : start + count], and_)
        if len(found) == start + count:
            found[-1] = -1
    return found


def last_held(masks: list[int], count: int) -> list[int]:
    """For each place: who is in all of the last `count` masks up to it, or in all of them if there are fewer.

    >>> last_held([0b11, 0b11, 0b01, 0b11], 2)
    [3, 3, 1, 1]
    """
    span = 1
    while span < min(count, len(masks)):
        by = min(span, count - span)
        masks = masks[:by] + list(map(and_, masks[by:], masks))
        span += by
    return masks
