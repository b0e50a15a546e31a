"""Layers that are alike, in our own words: from the events of their blocks to claims on a prefix index.

Engines name blocks by hashes whose algorithm, seed and version are their own affair. Here the engine's hash is only a
key to remember a block by. What a block *is* comes from its token ids: `token_hashes` chains 64-bit hashes over them,
the same way for a prompt and for an event, so nothing has to match between an engine's settings and ours.

An engine may keep a block twice (vLLM does not merge equal blocks), in several tiers, and once for each group of a
hybrid model's layers. A `BlockChain` counts, and claims a block in a tier only while every group has it there. Layers
that differ in what they keep have chains of their own: `kvfleet.cache.engine_blocks` puts them together.

An engine may also tell again of what it has: vLLM does for requests with ``kv_cache_report_mode: full``, in the same
words (``BlockPool.emit_cached_block_events``, 0.32). Such a report begins with the prompt's first block, which an
engine that looks into its cache first does not compute twice, unless another group of layers lacks it, or it is all of
the prompt: so a single block counts as told again only if several were before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import attrs
import xxhash

from kvfleet.cache.kv_events import ANYWHERE, BlockRemoved, BlockStored

__all__ = ["BlockChain", "BlockCounts", "BlockIndex", "holder_of", "token_hashes"]

_hash = xxhash.xxh3_64_intdigest
_WORD = 4


def token_hashes(tokens: bytes, block_tokens: int, salt: str = "") -> list[int]:
    """The hashes of a prompt's whole blocks, each covering all before it. 8,000 tokens in blocks of 16 take 150 µs.

    Args:
        tokens: Its token ids, as unsigned 32-bit little-endian numbers.
        block_tokens: Tokens in a block.
        salt: What keeps it apart from others with the same tokens, as ``cache_salt`` does.

    >>> ids = b"".join(number.to_bytes(4, "little") for number in range(40))
    >>> len(token_hashes(ids, 16)), token_hashes(ids, 16) == token_hashes(ids[:130], 16)
    (2, True)
    """
    size, last, digest = block_tokens * _WORD, _seed(salt), _hash
    view = memoryview(tokens)
    return [last := digest(view[start : start + size], last) for start in range(0, len(tokens) - size + 1, size)]


def _seed(salt: str) -> int:
    return _hash(salt.encode("utf-8", "surrogatepass")) if salt else 0


def holder_of(replica: str, rank: int) -> str:
    """The name under which an index knows a data-parallel rank of a replica: each has a cache of its own."""
    return f"{replica}#{rank}" if rank else replica


class BlockIndex(Protocol):
    """What is told of claims in the tiers of a cache."""

    def store(self, replica: str, hashes: Iterable[int], tier: str = "gpu") -> None:
        """The replica holds these blocks."""

    def remove(self, replica: str, hashes: Iterable[int], tier: str = "gpu") -> None:
        """The replica no longer holds these blocks."""


@attrs.define
class _Block:
    """A block of the engine's that is not exactly one of ours.

    Attributes:
        key: Our hash of all before its end, to the last whole block of ours.
        keys: Our blocks that end in it.
        tail: Tokens since the last whole block of ours.
        parent: The block before it, if it is smaller than ours.
        children: How many follow it, if it is smaller than ours.
    """

    key: int
    keys: tuple[int, ...] = ()
    tail: bytes = b""
    parent: int | None = None
    children: int = 0


@attrs.define(kw_only=True)
class BlockCounts:
    """What became of the blocks that events spoke of.

    Attributes:
        stored, removed: Taken in, and taken out.
        orphans: Not taken in, because the block before them is not known.
        foreign: Not taken in, because they are of another adapter or of layers that are not counted.
        sparse: Not taken in, because their tokens are not all there, their size does not fit ours, or they follow such.
        refused: Not taken in, because there were too many.
        strangers: Removed by the engine and not known before.
    """

    stored: int = 0
    removed: int = 0
    orphans: int = 0
    foreign: int = 0
    sparse: int = 0
    refused: int = 0
    strangers: int = 0


@attrs.define(eq=False)
class BlockChain:
    """The blocks of one cache for layers that are alike.

    Args:
        index: Told of claims.
        holder: The name under which it is told.
        block_tokens: Tokens in a block of ours.
        max_blocks: Most blocks of the engine's that are remembered, at about 300 bytes each with the index's part.
        ends_only: True if only the end of each of the engine's blocks is claimed, not all of ours in it.
        others: Those of other layers, which may know blocks that are not known here.

    Attributes:
        copies: Blocks the engine keeps on its device, each as often as it keeps it.
        engine_block_tokens: Tokens in a block of the engine's; 0 before the first.
        is_torn: True if a block of ours lost a part amid it, and claims can no longer be trusted.
        is_cut: True if there were too many blocks to remember them all.
    """

    index: BlockIndex
    holder: str
    block_tokens: int
    max_blocks: int = 1_000_000
    ends_only: bool = False
    others: BlockChain | None = None
    copies: int = attrs.field(init=False, default=0)
    counts: BlockCounts = attrs.field(init=False, factory=BlockCounts)
    engine_block_tokens: int = attrs.field(init=False, default=0)
    is_torn: bool = attrs.field(init=False, default=False)
    is_cut: bool = attrs.field(init=False, default=False)
    _tells_again: bool = attrs.field(init=False, default=False)
    _skipped: set[int] = attrs.field(init=False, factory=set, repr=False)
    _blocks: dict[int, int | _Block] = attrs.field(init=False, factory=dict, repr=False)
    _slots: dict[tuple[str, int], dict[int, int]] = attrs.field(init=False, factory=dict, repr=False)
    _shared: dict[tuple[str, int], int] = attrs.field(init=False, factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self._blocks)

    def clear(self) -> None:
        """Nothing is known any more, or nothing is there; whoever calls clears the index."""
        self._blocks.clear()
        self._slots.clear()
        self._shared.clear()
        self._skipped.clear()
        self.copies = 0
        self.is_torn = self.is_cut = self._tells_again = False

    def key_of(self, block: int) -> int | None:
        """Our hash of all before the end of one of the engine's blocks; None if that is not known."""
        known = self._blocks.get(block)
        if isinstance(known, _Block):
            return None if known.tail else known.key
        if known is None and self.others is not None:
            return self.others.key_of(block)
        return known

    def has_skipped(self, block: int) -> bool:
        """True for a block that could not be taken in, or may be one of those."""
        return block in self._skipped or self.is_cut or (self.others is not None and self.others.has_skipped(block))

    def stored(self, event: BlockStored, *, may_repeat: bool = False) -> None:
        """Take in blocks that the engine keeps from now on.

        Args:
            event: Which.
            may_repeat: True if blocks at the beginning of a prompt, of which the first is there, are told again rather
                than kept twice.
        """
        parent = event.parent
        if not event.is_dense or not self._fits(event.block_tokens):
            self._take_again(event)
        elif parent is None or parent in self._blocks or self.key_of(parent) is not None:
            self.engine_block_tokens = max(self.engine_block_tokens, event.block_tokens)
            self._take_in(event, may_repeat=may_repeat and parent is None)
        elif self.has_skipped(parent):
            self._skip(event.hashes)
        else:
            self.counts.orphans += len(event.hashes)

    def removed(self, event: BlockRemoved) -> None:
        """Take out blocks that the engine no longer keeps."""
        tiers = [event.tier] if event.tier != ANYWHERE else [tier for tier, g in self._slots if g == event.group]
        for tier in tiers or ["gpu"]:
            self._take_out(event.hashes, tier, self._slots.get((tier, event.group), {}), is_sure=len(tiers) < 2)

    def _take_out(self, hashes: Sequence[int], tier: str, slot: dict[int, int], *, is_sure: bool) -> None:
        """Take blocks out of a tier; `is_sure` if they should be there."""
        gone: list[int] = []
        for block in hashes:
            copies = slot.get(block)
            if copies is None:
                self.counts.strangers += is_sure and block not in self._skipped
                self._skipped.discard(block)
                continue
            self.copies -= tier == "gpu"
            if copies > 1:
                slot[block] = copies - 1
            else:
                if self._is_everywhere(block, tier):
                    gone.extend(self._released(block, tier))
                del slot[block]
                self.counts.removed += 1
                self._forget(block)
        if gone:
            self.index.remove(self.holder, gone, tier)

    # Taking in

    def _fits(self, engine_tokens: int) -> bool:
        """True if one of the two sizes divides the other."""
        return not engine_tokens % self.block_tokens or not self.block_tokens % engine_tokens

    def _take_in(self, event: BlockStored, *, may_repeat: bool) -> None:
        slot = self._slot(event.tier, event.group)
        is_again = may_repeat and self._is_again(event, slot)
        size, tokens, claimed = event.block_tokens * _WORD, event.tokens, list[int]()
        parent, extras = event.parent, event.extras
        last = self._last(parent, event.salt)
        for at, block in enumerate(event.hashes):
            known = self._blocks.get(block)
            if is_again and known is not None and block in slot:
                parent, last = block, known
                continue
            if known is None:
                if len(self._blocks) >= self.max_blocks:
                    self.counts.refused += len(event.hashes) - at
                    self.is_cut = True
                    break
                extra = extras[at] if at < len(extras) else b""
                known = self._make(last, tokens[at * size : (at + 1) * size], extra, parent)
                self._blocks[block] = known
            copies = slot[block] = slot.get(block, 0) + 1
            self.counts.stored += 1
            self.copies += event.tier == "gpu"
            if copies == 1 and self._is_everywhere(block, event.tier):
                claimed.extend(self._taken(block, event.tier))
            parent, last = block, known
        if claimed:
            self.index.store(self.holder, claimed, event.tier)

    def _is_again(self, event: BlockStored, slot: Mapping[int, int]) -> bool:
        """True for blocks at the beginning of a prompt that are told again."""
        if event.hashes[0] not in slot or any(group != event.group for _, group in self._slots):
            return False
        self._tells_again = self._tells_again or len(event.hashes) > 1
        return self._tells_again

    def _last(self, parent: int | None, salt: str) -> int | _Block:
        """The block before an event's first, which is known."""
        if parent is None:
            return _seed(salt)
        last: int | _Block | None = self._blocks.get(parent)
        if last is None:
            last = self.key_of(parent)
        assert last is not None  # noqa: S101 - the contract
        return last

    def _take_again(self, event: BlockStored) -> None:
        """Blocks without their tokens: known ones are enough.

        So vLLM announces what it has copied to another tier, and what it keeps of a state's blocks with gaps.
        """
        self._learn(event.hashes)
        known = [block for block in event.hashes if block in self._blocks]
        self._skip([block for block in event.hashes if block not in self._blocks])
        slot = self._slot(event.tier, event.group) if known else {}
        claimed: list[int] = []
        for block in known:
            copies = slot[block] = slot.get(block, 0) + 1
            self.counts.stored += 1
            self.copies += event.tier == "gpu"
            if copies == 1 and self._is_everywhere(block, event.tier):
                claimed.extend(self._taken(block, event.tier))
        if claimed:
            self.index.store(self.holder, claimed, event.tier)

    def _learn(self, hashes: Sequence[int]) -> None:
        """Know of blocks what other layers know of them."""
        if self.others is None:
            return
        for block in hashes:
            key = self.key_of(block)
            if key is not None and len(self._blocks) < self.max_blocks:
                self._blocks.setdefault(block, key)

    def _skip(self, hashes: Sequence[int]) -> None:
        """Blocks that cannot be taken in; those that follow them are no orphans."""
        self.counts.sparse += len(hashes)
        if len(self._skipped) + len(hashes) > self.max_blocks:
            self.is_cut = True
        else:
            self._skipped.update(hashes)

    def _make(self, before: int | _Block, tokens: bytes, extra: bytes, parent: int | None) -> int | _Block:
        """The block that follows another: just our hash where it is one block of ours."""
        key = before if isinstance(before, int) else before.key
        if extra:
            key = _hash(extra, key)
        own = self.block_tokens * _WORD
        if len(tokens) == own:
            return _hash(tokens, key)
        if len(tokens) > own:
            keys = tuple(key := _hash(tokens[at : at + own], key) for at in range(0, len(tokens), own))
            return _Block(key, keys)
        if isinstance(before, _Block):
            before.children += 1
            tokens = before.tail + tokens
        if len(tokens) < own:
            return _Block(key, (), tokens, parent)
        key = _hash(tokens, key)
        return _Block(key, (key,), b"", parent)

    # Counting

    def _slot(self, tier: str, group: int) -> dict[int, int]:
        """What a group keeps in a tier. As a group appears, what others keep in that tier is no longer all there."""
        slot = self._slots.get((tier, group))
        if slot is None:
            others = [held for (other, _), held in self._slots.items() if other == tier]
            if others:
                everywhere = [block for block in others[0] if self._is_everywhere(block, tier)]
                self.index.remove(self.holder, [key for b in everywhere for key in self._released(b, tier)], tier)
            slot = self._slots[tier, group] = {}
        return slot

    def _is_everywhere(self, block: int, tier: str) -> bool:
        if len(self._slots) == 1:
            return True
        return all(block in slot for (other, _), slot in self._slots.items() if other == tier)

    def _keys(self, block: int) -> tuple[int, ...]:
        known = self._blocks[block]
        if isinstance(known, int):
            return (known,)
        return known.keys[-1:] if self.ends_only else known.keys

    def _taken(self, block: int, tier: str) -> tuple[int, ...] | list[int]:
        """Our blocks that are claimed with this one. Those that begin one of the engine's may begin others too."""
        keys = self._keys(block)
        if len(keys) < 2:
            return keys
        shared, fresh = self._shared, []
        for key in keys:
            count = shared[tier, key] = shared.get((tier, key), 0) + 1
            if count == 1:
                fresh.append(key)
        return fresh

    def _released(self, block: int, tier: str) -> tuple[int, ...] | list[int]:
        """Our blocks that are no longer claimed without this one."""
        keys = self._keys(block)
        if len(keys) < 2:
            return keys
        shared, gone = self._shared, []
        for key in keys:
            shared[tier, key] -= 1
            if not shared[tier, key]:
                del shared[tier, key]
                gone.append(key)
        return gone

    def _forget(self, block: int) -> None:
        """Forget a block that is in no tier and no group; what follows it is known by itself."""
        if any(block in slot for slot in self._slots.values()):
            return
        known = self._blocks.pop(block)
        if not isinstance(known, _Block):
            return
        if known.children and not known.keys:  # a block of ours that ends further on has lost a part
            self.is_torn = True
        parent = self._blocks.get(known.parent) if known.parent is not None else None
        if isinstance(parent, _Block):
            parent.children -= 1
