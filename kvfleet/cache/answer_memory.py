"""A bounded memory for answers: by key, and by likeness where the question is sketched.

The one mechanism under `SemanticCache` and the stages `answer.exact_cache` and `answer.semantic_cache`. It is bounded
by count and by bytes. When it is full, whoever holds the most gives up what has not been used for longest, so that one
tenant cannot drive out the others' answers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import attrs

from kvfleet.cache.likeness import Likeness, Sketch

__all__ = ["AnswerMemory", "Held"]

V = TypeVar("V")
_MOST_ALIKE = 128


@attrs.frozen
class Held(Generic[V]):
    """One answer in memory.

    Attributes:
        value: The answer.
        size: Its bytes.
        kept_s, until_s: When it came, and when it is too old, in monotonic seconds.
        group: Who holds it, for a fair bound.
        scope: What must be the same beside the question, for answers found by likeness.
        sketch: Of the question; None if it is found by its key alone.
    """

    value: V = attrs.field(repr=False)
    size: int
    kept_s: float
    until_s: float
    group: str = ""
    scope: str = ""
    sketch: Sketch | None = attrs.field(default=None, repr=False)


@attrs.define
class AnswerMemory(Generic[V]):
    """Answers by key, the least recently used first to go.

    Args:
        max_bytes: Most bytes of answers.
        max_entries: Most answers.
    """

    max_bytes: float
    max_entries: int = 1_000_000
    size: int = attrs.field(init=False, default=0)
    _held: dict[Hashable, Held[V]] = attrs.field(init=False, factory=dict, repr=False)
    _groups: dict[str, OrderedDict[Hashable, None]] = attrs.field(init=False, factory=dict, repr=False)
    _alike: dict[tuple[str, str], OrderedDict[Hashable, None]] = attrs.field(init=False, factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable, now_s: float) -> Held[V] | None:
        """The answer under a key, unless it is too old: then it is dropped."""
        held = self._held.get(key)
        if held is not None and held.until_s < now_s:
            self.drop(key)
            return None
        return held

    def touch(self, key: Hashable) -> None:
        """Note that an answer was of use."""
        held = self._held.get(key)
        if held is not None:
            self._groups[held.group].move_to_end(key)

    def put(self, key: Hashable, held: Held[V]) -> None:
        """Keep an answer instead of any under the same key; what is too much goes."""
        self.drop(key)
        if held.size > self.max_bytes:
            return
        self._held[key] = held
        self._groups.setdefault(held.group, OrderedDict())[key] = None
        self.size += held.size
        if held.sketch is not None:
            self._alike.setdefault((held.scope, held.sketch.must), OrderedDict())[key] = None
        self._trim()

    def resize(self, max_bytes: float, max_entries: int) -> None:
        """Have other bounds from now on; what is too much goes."""
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self._trim()

    def _trim(self) -> None:
        while len(self._held) > self.max_entries or self.size > self.max_bytes:
            largest = max(self._groups.values(), key=len)
            self.drop(next(iter(largest)))

    def nearest(
        self,
        sketch: Sketch,
        scope: str,
        likeness: Likeness,
        *,
        threshold: float,
        now_s: float,
        fits: Callable[[V], bool],
    ) -> tuple[Hashable, Held[V], float] | None:
        """The most alike answer of the same scope that fits: its key, itself, and the similarity.

        Only the newest of those that could be alike are compared, so that the time is bounded.
        """
        best: tuple[Hashable, Held[V], float] | None = None
        among = list(reversed(self._alike.get((scope, sketch.must), ())))
        for key in among[:_MOST_ALIKE]:
            held = self.get(key, now_s)
            if held is None or held.sketch is None or not fits(held.value):
                continue
            found = likeness.similarity(sketch, held.sketch)
            if found >= threshold and (best is None or found > best[2]):
                best = (key, held, found)
        return best

    def drop(self, key: Hashable) -> bool:
        """Forget an answer; True if there was one."""
        held = self._held.pop(key, None)
        if held is None:
            return False
        self.size -= held.size
        _leave(self._groups, held.group, key)
        if held.sketch is not None:
            _leave(self._alike, (held.scope, held.sketch.must), key)
        return True

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._groups.clear()
        self._alike.clear()
        self.size = 0


K = TypeVar("K", bound=Hashable)


def _leave(index: dict[K, OrderedDict[Hashable, None]], name: K, key: Hashable) -> None:
    members = index[name]
    del members[key]
    if not members:
        del index[name]
