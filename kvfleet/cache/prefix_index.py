"""Which replica holds which blocks, and how much of a prompt each of them has: one pass over the prompt's blocks.

For each block there is one integer whose bits are the replicas that hold it. Walking along a prompt, the replicas still
in step are one such integer too, and a replica drops out at the first block it has not: so a match costs one dictionary
lookup and one AND a block, whatever the number of replicas, and what it gives is contiguous from the first block. A
hole in what a replica holds ends its match, as it does in the engine. (`benchmarks/index.py` measures time and memory.)
Of replicas whose engines can go on with a prompt at some places only, `kvfleet.cache.resuming` then finds the last one.

`PrefixIndex` holds what is said to be so, and forgets only when told. `RoutedIndex` holds what was routed, and forgets
as an engine does.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import accumulate, filterfalse, repeat
from operator import and_, or_

import attrs

from kvfleet.cache.resuming import Resuming, Window, resumable

__all__ = ["GPU", "Matched", "PrefixIndex", "RoutedIndex", "Visit"]

GPU = "gpu"
"""The tier that needs no loading."""


@attrs.frozen
class Matched:
    """How many blocks from the prompt's first on a replica holds, without a hole, and can go on from.

    Attributes:
        blocks: In any tier.
        device_blocks: Those of them at the beginning that are in the GPU's memory, and need no loading.
    """

    blocks: int
    device_blocks: int


@attrs.define
class PrefixIndex:
    """The blocks of each replica, by tier.

    Args:
        max_entries: Most pairs of a block and a replica; a block beyond them is not taken in, and `refused` counts it.
    """

    max_entries: int = 10_000_000
    entries: int = attrs.field(init=False, default=0)
    refused: int = attrs.field(init=False, default=0)
    _tiers: dict[str | Window, dict[int, int]] = attrs.field(init=False, factory=lambda: {GPU: {}}, repr=False)
    _device: dict[int, int] = attrs.field(init=False, repr=False)
    _bits: dict[str, int] = attrs.field(init=False, factory=dict, repr=False)
    _names: list[str] = attrs.field(init=False, factory=list, repr=False)
    _counts: dict[str, int] = attrs.field(init=False, factory=dict, repr=False)
    _resuming: dict[Resuming, int] = attrs.field(init=False, factory=dict, repr=False)

    @_device.default
    def _make_device(self) -> dict[int, int]:
        return self._tiers[GPU]

    def __len__(self) -> int:
        return self.entries

    def count(self, replica: str) -> int:
        """Blocks known of a replica, in all tiers."""
        return self._counts.get(replica, 0)

    def store(self, replica: str, hashes: Iterable[int], tier: str | Window = GPU) -> None:
        """The replica holds these blocks, in a tier or for the layers with a window."""
        bit = self._bits.get(replica) or self._add(replica)
        held = self._tiers.setdefault(tier, {})
        new = dict.fromkeys(hashes, bit)  # the shared object, not a new one: a block on one replica costs no integer
        added = len(new)
        if held.keys().isdisjoint(new):
            held.update(new)
        else:
            for block in new:
                mask = held.get(block, 0)
                if mask & bit:
                    added -= 1
                else:
                    held[block] = mask | bit
        self._grow(replica, added)
        if self.entries > self.max_entries:
            self._refuse(replica, held, new)

    def remove(self, replica: str, hashes: Iterable[int], tier: str | Window = GPU) -> None:
        """The replica no longer holds these blocks; those it did not hold are passed over."""
        bit, held = self._bits.get(replica), self._tiers.get(tier)
        if bit is None or held is None:
            return
        removed = 0
        for block in hashes:
            mask = held.get(block, 0)
            if mask & bit:
                removed += 1
                if mask == bit:
                    del held[block]
                else:
                    held[block] = mask ^ bit
        self._grow(replica, -removed)

    def limit(self, replica: str, resuming: Resuming | None) -> None:
        """The replica can go on with a prompt at these places only, and from its device only; or again anywhere."""
        bit = self._bits.get(replica) or self._add(replica)
        self._resuming = {key: bits & ~bit for key, bits in self._resuming.items() if bits & ~bit}
        if resuming is not None:
            self._resuming[resuming] = self._resuming.get(resuming, 0) | bit

    def clear(self, replica: str) -> None:
        """Nothing is known of the replica any more. Takes a pass over the whole index."""
        bit = self._bits.get(replica)
        if bit is None or not self._counts.get(replica):
            return
        for tier, held in self._tiers.items():
            self.remove(replica, [block for block, mask in held.items() if mask & bit], tier)

    def forget(self, replicas: Iterable[str]) -> None:
        """These replicas are gone for good: their places may be taken by others."""
        for replica in replicas:
            if replica in self._bits:
                self.clear(replica)
                self.limit(replica, None)
                bit = self._bits.pop(replica)
                self._names[bit.bit_length() - 1] = ""
                del self._counts[replica]

    def match(self, hashes: Sequence[int], most: int | None = None) -> dict[str, Matched]:
        """By replica: how much of a prompt it holds; those that hold nothing are absent.

        Args:
            hashes: The prompt's blocks.
            most: From how many of them an engine may go on, where it can do so at some places only; all if None.
        """
        names = self._names
        others = () if len(self._tiers) == 1 else [held for tier, held in self._tiers.items() if _is_other(tier, held)]
        walk = _walk(hashes, self._device, ())
        if self._resuming:
            return self._match_limited(hashes[:most], walk, _walk(hashes, self._device, others) if others else walk)
        if not others:
            return {names[i]: Matched(n, n) for i, n in walk}
        on_device = dict(walk)
        return {names[i]: Matched(n, on_device.get(i, 0)) for i, n in _walk(hashes, self._device, others)}

    def _match_limited(
        self, hashes: Sequence[int], device: Sequence[tuple[int, int]], anywhere: Sequence[tuple[int, int]]
    ) -> dict[str, Matched]:
        """The same, where some replicas can go on at some places only."""
        names, on_device, most = self._names, dict(device), len(hashes)
        limited = reduce(or_, self._resuming.values())
        found = {names[i]: Matched(n, on_device.get(i, 0)) for i, n in anywhere if not limited >> i & 1}
        for resuming, bits in self._resuming.items():
            if resuming.needs_all:
                depths = [(i, min(n, most)) for i, n in device if bits >> i & 1]
            else:
                depths = []
                _places(bits, most, depths)
            places = resumable(hashes, depths, resuming, lambda window: self._tiers.get(window, _NOBODY))
            found.update({names[i]: Matched(n, n) for i, n in places})
        return found

    def depths(self, hashes: Sequence[int]) -> dict[str, int]:
        """The same, of all tiers together, as plain numbers."""
        tiers, names = self._tiers, self._names
        others = () if len(tiers) == 1 else [held for tier, held in tiers.items() if _is_other(tier, held)]
        if not others and (not hashes or hashes[0] not in self._device):
            return {}
        return {names[i]: n for i, n in _walk(hashes, self._device, others)}

    def holds(self, replica: str, block: int, tier: str | Window = GPU) -> bool:
        """True if the replica is known to hold the block."""
        return bool(self._tiers.get(tier, {}).get(block, 0) & self._bits.get(replica, 0))

    def holders(self, block: int) -> list[str]:
        """The replicas that hold one block in the GPU's memory."""
        bits = self._device.get(block)
        if not bits:
            return []
        if not bits & (bits - 1):  # one, as most often
            return [self._names[bits.bit_length() - 1]]
        found: list[tuple[int, int]] = []
        _places(bits, 0, found)
        return [self._names[place] for place, _ in found]

    def _add(self, replica: str) -> int:
        try:
            place = self._names.index("")
            self._names[place] = replica
        except ValueError:
            place = len(self._names)
            self._names.append(replica)
        self._counts[replica] = 0
        bit = self._bits[replica] = 1 << place
        return bit

    def _grow(self, replica: str, by: int) -> None:
        self.entries += by
        self._counts[replica] += by

    def _refuse(self, replica: str, held: dict[int, int], hashes: Iterable[int]) -> None:
        """There is no room: let go of what came last, and say so."""
        excess = self.entries - self.max_entries
        bit = self._bits[replica]
        last = [block for block in hashes if held.get(block, 0) & bit][-excess:]
        for tier, blocks in self._tiers.items():
            if blocks is held:
                self.remove(replica, last, tier)
        self.refused += len(last)


_NOBODY: Mapping[int, int] = {}


def _is_other(tier: str | Window, held: Mapping[int, int]) -> bool:
    """True for what is elsewhere than on the device."""
    return bool(held) and tier != GPU and isinstance(tier, str)


def _walk(
    hashes: Sequence[int], device: Mapping[int, int], others: Sequence[Mapping[int, int]]
) -> list[tuple[int, int]]:
    """The place of each replica that holds the first block, and how many blocks it holds from there on."""
    found: list[tuple[int, int]] = []
    alive, size, none = -1, len(hashes), repeat(0)
    for start in range(0, size, _STRIDE):
        some = hashes[start : start + _STRIDE] if size > _STRIDE else hashes
        masks = map(device.get, some, none)
        for held in others:
            masks = map(or_, masks, map(held.get, some, none))
        steps = list(accumulate(masks, and_, initial=alive))
        if steps[-1] == alive:
            continue
        # Who is still in step only becomes fewer, so equals stand together, and counting them is searching in C.
        at = steps.count(alive)
        while at < len(steps):
            still = steps[at]
            if start + at > 1:
                _places(alive ^ still, start + at - 1, found)
            if not still:
                return found
            alive = still
            at += steps.count(still)
    if size:
        _places(alive, size, found)
    return found


def _places(bits: int, depth: int, found: list[tuple[int, int]]) -> None:
    """Add the place of each bit."""
    if bits.bit_count() < _FEW:
        while bits:
            bit = bits & -bits
            found.append((bit.bit_length() - 1, depth))
            bits ^= bit
        return
    text = bin(bits)[:1:-1]  # of large numbers, searching the digits is twice as fast as arithmetic
    place = text.find("1")
    while place >= 0:
        found.append((place, depth))
        place = text.find("1", place + 1)


_FEW = 12
_STRIDE = 64
"""Blocks looked up at once: few enough to stop early, enough to be worth it."""


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
