"""An engine that publishes its events, as messages by hand: numbered, kept for replay, sometimes lost."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import attrs
import msgspec

from kvfleet.cache.block_chain import token_hashes
from kvfleet.cache.kv_sequence import EventStream
from kvfleet.clock import FrozenClock
from tests.cache.made import words

__all__ = ["Publisher", "pump"]

SIZE = 4


@attrs.define
class Publisher:
    """A cache of blocks of four tokens, and the messages that tell of it.

    Attributes:
        clock: For the messages' times.
        keep: How many messages are kept for replay.
        life: Which life of the engine this is; hashes and messages differ from one to the next.
        rank: Which data-parallel rank of its engine it is.
    """

    clock: FrozenClock
    keep: int = 1000
    life: int = 0
    seq: int = 0
    cache: set[tuple[int, ...]] = attrs.field(factory=set)
    buffer: deque[tuple[int, bytes]] = attrs.field(factory=deque)
    rank: int = 0

    def name(self, prompt: Sequence[int]) -> int:
        """The engine's hash of a block, by all the tokens up to its end."""
        return hash((self.life, tuple(prompt))) & 2**64 - 1

    def publish(self, events: list[Any], rank: int | None = None) -> tuple[int, bytes]:
        """A message, and its number."""
        self.clock.advance(0.001)
        payload: bytes = msgspec.msgpack.encode(
            [self.clock.time_ns() / 1e9, events, self.rank if rank is None else rank]
        )
        message = (self.seq, payload)
        self.seq += 1
        self.buffer.append(message)
        while len(self.buffer) > self.keep:
            self.buffer.popleft()
        return message

    def store(self, prompt: Sequence[int]) -> tuple[int, bytes]:
        """Compute a prompt of whole blocks: what is missing of it is stored and told."""
        parents = [tuple(prompt[:end]) for end in range(SIZE, len(prompt) + 1, SIZE)]
        missing = [p for p in parents if p not in self.cache]
        self.cache.update(missing)
        events = [self._stored(p) for p in missing]
        return self.publish(events)

    def _stored(self, prompt: tuple[int, ...]) -> Any:
        before = prompt[:-SIZE]
        return {
            "type": "BlockStored",
            "block_hashes": [self.name(prompt)],
            "parent_block_hash": self.name(before) if before else None,
            "token_ids": list(prompt[-SIZE:]),
            "block_size": SIZE,
        }

    def evict(self, rng: random.Random) -> tuple[int, bytes]:
        """Remove a block that no other follows."""
        leaves = [p for p in sorted(self.cache) if not any(len(q) > len(p) and q[: len(p)] == p for q in self.cache)]
        gone = rng.choice(leaves)
        self.cache.discard(gone)
        return self.publish([["BlockRemoved", [self.name(gone)]]])

    def clear(self) -> tuple[int, bytes]:
        """Empty the cache."""
        self.cache.clear()
        return self.publish([["AllBlocksCleared"]])

    def restart(self) -> None:
        """Begin anew, with an empty cache and a number of 0."""
        self.life += 1
        self.seq = 0
        self.cache.clear()
        self.buffer.clear()

    def held(self) -> set[int]:
        """The blocks of ours that it holds."""
        return {token_hashes(words(prompt), SIZE)[-1] for prompt in self.cache}

    def replay(self, stream: EventStream, *, fails: bool = False) -> None:
        """Answer one request for a replay."""
        start = stream.take_wanted()
        if fails:
            stream.replay_failed()
            return
        for seq, payload in self.buffer:
            if seq >= start:
                stream.replayed(seq, payload)
        stream.replay_ended()


def pump(publisher: Publisher, stream: EventStream) -> int:
    """Answer requests for replays until there are none; how many there were."""
    count = 0
    while stream.wanted is not None:
        publisher.replay(stream)
        count += 1
        assert count < 10, "it asks for ever"
    return count
