"""A small model of how vLLM keeps the blocks of hybrid models, and of what it finds of a prompt.

Written after the description of vLLM's rule, and not after our index: blocks are prompts, and a search goes from the end
of a prompt to its beginning, as `find_longest_cache_hit` of vLLM's managers does, until all groups agree.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence

import attrs

from kvfleet.cache.kv_events import BlockRemoved, BlockStored, Event
from tests.cache.made import words

__all__ = ["HybridEngine", "Layers"]

Prompt = tuple[int, ...]


@attrs.frozen
class Layers:
    """A group of layers: its kind as events name it, tokens in a block, and the size of a sliding window, or a chunk.

    Events do not say a chunk's.
    """

    kind: str
    block_tokens: int
    window: int = 0

    @property
    def told_window(self) -> int:
        """What events say of it."""
        return self.window if self.kind == "sliding_window" else 0


@attrs.define(eq=False)
class HybridEngine:
    """What each group keeps, changed by prompts that come and blocks that go, with the events of both."""

    groups: Sequence[Layers]
    kept: list[Counter[Prompt]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.kept = [Counter() for _ in self.groups]

    # What comes and goes

    def compute(self, prompt: Prompt) -> list[Event]:
        """Compute a prompt from what is found of it, and keep its whole blocks."""
        start = self.hit(prompt)
        events: list[Event] = []
        for number, layers in enumerate(self.groups):
            size = layers.block_tokens
            ends = list(range(start + size, len(prompt) + 1, size))
            if not ends:
                continue
            kept = ends[-1:] if layers.kind == "mamba" else ends  # of a state there are gaps
            self.kept[number].update(prompt[:end] for end in kept)
            events.append(
                BlockStored(
                    hashes=tuple(name(prompt[:end]) for end in kept),
                    parent=name(prompt[:start]) if start else None,
                    tokens=words(prompt[start : ends[-1]]),
                    block_tokens=size,
                    group=number,
                    kind=layers.kind,
                    window=layers.told_window,
                )
            )
        return events

    def lose(self, rng: random.Random) -> list[Event]:
        """One copy of some block of some group goes, wherever in a prompt it is."""
        number = rng.randrange(len(self.groups))
        if not self.kept[number]:
            return []
        gone = rng.choice(sorted(self.kept[number]))
        self.kept[number][gone] -= 1
        if not self.kept[number][gone]:
            del self.kept[number][gone]
        return [BlockRemoved((name(gone),), "gpu", number)]

    # What is found

    def hit(self, prompt: Prompt) -> int:
        """Tokens of the longest beginning, short of the whole prompt, that all groups have what they need of."""
        alike: dict[Layers, list[int]] = {}
        for number, layers in enumerate(self.groups):
            alike.setdefault(layers, []).append(number)
        align = math.lcm(*(layers.block_tokens for layers in self.groups))
        length = len(prompt) - 1
        while True:
            before = length
            for layers, numbers in alike.items():
                length = self._longest(prompt, length, layers, numbers, align)
            if length == before:
                return length

    def _longest(self, prompt: Prompt, most: int, layers: Layers, numbers: list[int], align: int) -> int:
        size = layers.block_tokens
        has = [all(prompt[:end] in self.kept[n] for n in numbers) for end in _ends(size, most)]
        if layers.kind == "full_attention":
            whole = has.index(False) if False in has else len(has)
            return whole * size // align * align
        if layers.kind == "chunked_local_attention":
            start = most // layers.window * layers.window // size
            return next((at for at in range(start, len(has)) if not has[at]), len(has)) * size
        wanted = 1 if layers.kind == "mamba" else max(1, math.ceil((layers.window - 1) / size))
        for at in range(len(has), 0, -1):
            if not at * size % align and all(has[max(0, at - wanted) : at]):
                return at * size
        return 0


def _ends(size: int, most: int) -> Iterator[int]:
    return iter(range(size, most + 1, size))


def name(prompt: Prompt) -> int:
    """The engine's name of the block that ends a prompt: the same in all groups, as it says what is before its end."""
    return hash(("block", *prompt)) & 2**64 - 1
