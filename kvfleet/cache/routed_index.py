"""What each replica holds by what was sent there: it forgets as an engine does."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import filterfalse

import attrs

from kvfleet.cache.prefix_index import PrefixIndex

__all__ = ["RoutedIndex", "Visit"]

_NOTHING = array("Q")


@attrs.define(eq=False)
class Visit:
    """The blocks one request left on a replica.

    Attributes:
        blocks: All of them, in order; the first `left` were not looked at for eviction yet.
        until_s: How long they are believed to be there.
        fresh: Those that were not there before it came, until it is confirmed.
        number: Of the replica's visits.
    """

    blocks: array[int]
    until_s: float
    left: int
    fresh: array[int]
    number: int


@attrs.define
class _Held:
    """What one replica is taken to hold, in the order in which it will forget it.

    Attributes:
        capacity: Most blocks.
        last: By block: the number of the visit that left it or used it last. It is a number, because a dictionary of
            those alone is nothing to the garbage collector, which else takes 35 ms for a million blocks.
        visits: The visits, oldest first.
        queued: Their blocks that were not looked at for eviction yet.
        count: How many visits there were.
    """

    capacity: int
    last: dict[int, int] = attrs.field(factory=dict)
    visits: deque[Visit] = attrs.field(factory=deque)
    queued: int = 0
    count: int = 0


@attrs.define
class RoutedIndex:
    """What each replica holds if it keeps what was sent there, and forgets the least recently used blocks first.

    An engine frees the blocks of a prompt from its end, so of one visit the last blocks go first
    (https://docs.vllm.ai/en/latest/design/prefix_caching.html). What was used again since counts as used then.

    Args:
        max_entries: Most pairs of a block and a replica over all replicas; each has an equal part of them.
        capacity: Blocks of a replica whose cache's size is not known.
    """

    max_entries: int = 1_000_000
    capacity: int = 50_000
    known: PrefixIndex = attrs.field(init=False)
    _held: dict[str, _Held] = attrs.field(init=False, factory=dict, repr=False)
    _sizes: dict[str, int] = attrs.field(init=False, factory=dict, repr=False)
    _swept_s: float = attrs.field(init=False, default=0.0, repr=False)

    @known.default
    def _make_known(self) -> PrefixIndex:
        return PrefixIndex(2 * self.max_entries)  # the bound is held here; between taking in and trimming it is passed

    def __len__(self) -> int:
        return len(self.known)

    def register(self, replicas: Iterable[str]) -> None:
        """Know these replicas, and forget all others."""
        replicas = tuple(replicas)
        self.known.forget([gone for gone in self._held if gone not in replicas])
        self._held = {name: self._held.get(name) or _Held(0) for name in replicas}
        self._share_out()

    def resize(self, replica: str, blocks: int) -> None:
        """The replica's cache holds so many blocks."""
        if self._sizes.get(replica) != blocks and replica in self._held:
            self._sizes[replica] = blocks
            self._share_out()

    def record(self, replica: str, hashes: Sequence[int], now_s: float, ttl_s: float) -> Visit | None:
        """The replica computes a prompt of these blocks; believed for `ttl_s` seconds, or until it is confirmed.

        Returns:
            What `confirm` makes last and `retract` takes back; None if there is nothing to remember.
        """
        held = self._held.get(replica)
        if held is None or not hashes:
            return None
        if len(hashes) > held.capacity:
            hashes = hashes[: held.capacity]
        size = len(hashes)
        last = held.last
        fresh = array("Q", filterfalse(last.__contains__, hashes))
        held.count = number = held.count + 1
        visit = Visit(array("Q", hashes), now_s + ttl_s, size, fresh, number)
        last.update(dict.fromkeys(hashes, number))
        if fresh:
            self.known.store(replica, fresh)
        held.visits.append(visit)
        held.queued += size
        self._trim(replica, held, now_s)
        return visit

    def confirm(self, visit: Visit, until_s: float) -> None:
        """The prompt was computed, and that is believed until then."""
        visit.until_s, visit.fresh = until_s, _NOTHING

    def retract(self, replica: str, visit: Visit) -> None:
        """What was recorded did not come to pass: what nobody else left there is not there."""
        held = self._held.get(replica)
        if held is None:
            return
        gone = [block for block in visit.fresh if held.last.get(block) == visit.number]
        for block in gone:
            del held.last[block]
        self.known.remove(replica, gone)

    def clear(self, replica: str) -> None:
        """The replica lost everything, as after a restart."""
        held = self._held.get(replica)
        if held is not None:
            self.known.remove(replica, held.last)
            held.last.clear()
            held.visits.clear()
            held.queued = 0

    def depths(self, hashes: Sequence[int], now_s: float) -> dict[str, int]:
        """By replica: how many blocks of a prompt it holds, from the first on; those with none are absent."""
        if now_s - self._swept_s >= 1.0:
            self._sweep(now_s)
        return self.known.depths(hashes)

    def holders(self, block: int) -> list[str]:
        """The replicas that hold one block."""
        return self.known.holders(block)

    def state(self) -> Mapping[str, int]:
        """How many pairs of block and replica there are, and how many there may be."""
        return {"entries": len(self.known), "max_entries": self.max_entries}

    def _share_out(self) -> None:
        most = max(1, self.max_entries // max(len(self._held), 1))
        for name, held in self._held.items():
            held.capacity = min(self._sizes.get(name, self.capacity), most)

    def _sweep(self, now_s: float) -> None:
        self._swept_s = now_s
        for replica, held in self._held.items():
            if held.visits and held.visits[0].until_s < now_s:
                self._trim(replica, held, now_s)

    def _trim(self, replica: str, held: _Held, now_s: float) -> None:
        """Forget what no longer fits, and what is too old."""
        last, visits, gone = held.last, held.visits, []
        while visits:
            oldest = visits[0]
            is_old = oldest.until_s < now_s
            if len(last) <= held.capacity and not is_old:
                break
            while oldest.left and (is_old or len(last) > held.capacity):
                oldest.left -= 1
                held.queued -= 1
                block = oldest.blocks[oldest.left]
                if last.get(block) == oldest.number:
                    del last[block]
                    gone.append(block)
            if not oldest.left:
                visits.popleft()
        if gone:
            self.known.remove(replica, gone)
        if held.queued > 2 * len(last) + 1024:
            _compact(held)


def _compact(held: _Held) -> None:
    """Drop from old visits what was used again since."""
    held.queued = 0
    for visit in held.visits:
        kept = array("Q", [b for b in visit.blocks[: visit.left] if held.last.get(b) == visit.number])
        visit.blocks, visit.left = kept, len(kept)
        held.queued += len(kept)
    held.visits = deque(visit for visit in held.visits if visit.left)
