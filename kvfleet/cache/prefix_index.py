"""Which replica holds which blocks, and how much of a prompt each of them has: one pass over the prompt's blocks.

For each block there is one integer whose bits are the replicas that hold it. Walking along a prompt, the replicas still
in step are one such integer too, and a replica drops out at the first block it has not: so a match costs one dictionary
lookup and one AND a block, whatever the number of replicas, and what it gives is contiguous from the first block. A
hole in what a replica holds ends its match, as it does in the engine. (`benchmarks/index.py` measures time and memory.)
Of replicas whose engines can go on with a prompt at some places only, `kvfleet.cache.resuming` then finds the last one.

`PrefixIndex` holds what is said to be so, and forgets only when told; `kvfleet.cache.routed_index` builds on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import accumulate, repeat
from operator import and_, or_

import attrs

from kvfleet.cache.resuming import Resuming, Window, resumable

__all__ = ["GPU", "Matched", "PrefixIndex"]

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
