"""Answers given before, found again by the prompt's fingerprint or by a question that asks the same.

For Python programs; in a pipeline the stage `answer.semantic_cache` does it, and makes the keys itself.

    >>> from kvfleet.cache.fingerprints import PromptFingerprinter
    >>> cache, fingerprinter = SemanticCache(max_size=100), PromptFingerprinter()
    >>> asked = fingerprinter.fingerprint([{"role": "user", "content": "What is two and two?"}])
    >>> cache.put(asked, "Four.", "small")
    >>> cache.get(asked).content
    'Four.'
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from typing import Any

import attrs

from kvfleet.cache.answer_memory import AnswerMemory, Held
from kvfleet.cache.fingerprints import PromptFingerprint
from kvfleet.cache.likeness import Likeness, Sketch, Wording
from kvfleet.clock import Clock, SystemClock

__all__ = ["CachedResponse", "SemanticCache"]


@attrs.define
class CachedResponse:
    """An answer in the cache.

    Attributes:
        content: Its text.
        model: The model that gave it.
        fingerprint: What its prompt is recognised by.
        timestamp: When it was kept, in Unix seconds.
        usage_count: How often it has been given since.
        metadata: What the caller kept with it.
        similarity: How much the question it was given for is like its own; 1 for the same.
    """

    content: str = attrs.field(repr=False)
    model: str
    fingerprint: PromptFingerprint
    timestamp: float = 0.0
    usage_count: int = 0
    metadata: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    similarity: float = 1.0


@attrs.define
class SemanticCache:
    """Answers by fingerprint; and by likeness, where the question's text is given too. Safe to share among threads.

    A fingerprint knows the messages alone. Whoever serves several tenants, data classes or models, or sets parameters
    that change an answer, says so in `scope`: answers are found again in their own scope only.

    Args:
        max_size: Most answers; the least recently used go first.
        ttl_seconds: How long an answer is kept.
        similarity_threshold: Least similarity, 0..1, of a question that asks the same.
        max_bytes: Most bytes of answers.
        likeness: How questions are compared; by their wording if absent.
        clock: The time.
    """

    max_size: int = 10_000
    ttl_seconds: float = 3600.0
    similarity_threshold: float = 0.85
    max_bytes: float = 64e6
    likeness: Likeness = attrs.field(factory=Wording)
    clock: Clock = attrs.field(factory=SystemClock, repr=False)
    _memory: AnswerMemory[CachedResponse] = attrs.field(init=False, repr=False)
    _lock: threading.Lock = attrs.field(init=False, factory=threading.Lock, repr=False, eq=False)
    _hits: int = attrs.field(init=False, default=0)
    _near: int = attrs.field(init=False, default=0)
    _misses: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        """Check the bounds.

        Raises:
            ValueError: for a bound that nothing could keep.
        """
        if self.max_size < 1 or self.ttl_seconds <= 0 or not 0 <= self.similarity_threshold <= 1:
            raise ValueError("max_size and ttl_seconds must be above 0, similarity_threshold from 0 to 1")
        self._memory = AnswerMemory(self.max_bytes, self.max_size)

    def get(self, fingerprint: PromptFingerprint, text: str = "", *, scope: str = "") -> CachedResponse | None:
        """The answer to this prompt, or to a question that asks the same; None if there is none.

        Args:
            fingerprint: Of the whole prompt.
            text: The question, which is the last message, to look for what is like it; what stands before it must be
                the same. Empty for the very same prompt alone.
            scope: As it was given to `put`.
        """
        near, sketch = self._near_parts(fingerprint, text, scope)
        with self._lock:
            found = self._find(_key(fingerprint, scope), near, sketch)
            if found is None:
                self._misses += 1
                return None
            key, held, similarity = found
            self._hits += 1
            self._memory.touch(key)
            held.value.usage_count += 1
            return attrs.evolve(held.value, similarity=similarity)

    def _find(
        self, key: Hashable, near: str, sketch: Sketch | None
    ) -> tuple[Hashable, Held[CachedResponse], float] | None:
        now_s = self.clock.now_s()
        held = self._memory.get(key, now_s)
        if held is not None:
            return key, held, 1.0
        if sketch is None:
            return None
        found = self._memory.nearest(
            sketch, near, self.likeness, threshold=self.similarity_threshold, now_s=now_s, fits=lambda _: True
        )
        self._near += found is not None
        return found

    def _near_parts(self, fingerprint: PromptFingerprint, text: str, scope: str) -> tuple[str, Sketch | None]:
        near = _near_scope(fingerprint, text, scope) if text else None
        return ("", None) if near is None else (near, self.likeness.sketch(text))

    def put(
        self,
        fingerprint: PromptFingerprint,
        content: str,
        model: str,
        *,
        text: str = "",
        scope: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep an answer. Give `text`, the question, and other wordings of it find the answer too."""
        near, sketch = self._near_parts(fingerprint, text, scope)
        with self._lock:
            now_s = self.clock.now_s()
            value = CachedResponse(content, model, fingerprint, self.clock.time_ns() / 1e9, metadata=metadata or {})
            size = len(content.encode("utf-8", "surrogatepass"))
            held = Held(value, size, now_s, now_s + self.ttl_seconds, scope, near, sketch)
            self._memory.put(_key(fingerprint, scope), held)

    def invalidate(self, fingerprint: PromptFingerprint, *, scope: str = "") -> bool:
        """Forget an answer; True if there was one."""
        with self._lock:
            return self._memory.drop(_key(fingerprint, scope))

    def clear(self) -> None:
        """Forget every answer."""
        with self._lock:
            self._memory.clear()

    @property
    def size(self) -> int:
        """How many answers there are."""
        return len(self._memory)

    def stats(self) -> dict[str, float]:
        """How much is kept, and of what use it was; `near_hits` are among `hits`."""
        asked = self._hits + self._misses
        return {
            "size": self.size,
            "max_size": self.max_size,
            "bytes": self._memory.size,
            "hits": self._hits,
            "near_hits": self._near,
            "misses": self._misses,
            "hit_rate": self._hits / asked if asked else 0.0,
        }


def _key(fingerprint: PromptFingerprint, scope: str) -> tuple[str, str, int, str]:
    """The whole prompt, never a part of it: prompts that begin alike are different questions."""
    return (scope, fingerprint.full_hash, fingerprint.token_estimate, fingerprint.conversation_hash)


def _near_scope(fingerprint: PromptFingerprint, text: str, scope: str) -> str | None:
    """What must be the same beside the question: the scope, and all that stands before it; None if that is unknown."""
    before = fingerprint.before(text)
    return None if before is None else f"{scope}\0{before:016x}"
