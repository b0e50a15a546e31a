"""An engine's cache by its events: a chain of blocks for each kind of its layers, and claims on a prefix index.

Layers with full attention need all blocks of a prompt, and claim them. Layers with a sliding window or a state (Mamba)
need only the latest ones, and an engine drops the others. Their blocks are claimed apart, and the index is told where
the engine can go on with a prompt for all that: see `kvfleet.cache.resuming`. vLLM says in each event which group of
layers it is of, and of which kind that is, so of its hybrid models as much is known as of others.

Where events do not say enough, layers are left out of account, and `flaw` says so: what is claimed then is the most
that can be there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import attrs

from kvfleet.cache.block_chain import BlockChain, BlockCounts
from kvfleet.cache.kv_events import BlockRemoved, BlockStored
from kvfleet.cache.resuming import Resuming, Window

__all__ = ["EngineBlocks", "EngineIndex"]

_WHOLE = frozenset({"", "full_attention", "mla_attention", "sink_full_attention", "sink_full"})
"""Kinds of layers that need all blocks of a prompt."""
_SLIDING = frozenset({"sliding_window", "sliding_window_mla"})
_DEVICE = "gpu"
_LONGEST_KIND = 32
_MOVED = "some layers keep only the latest blocks, and what it moved off its device is not counted"


class EngineIndex(Protocol):
    """What is told of claims; `kvfleet.cache.prefix_index.PrefixIndex` is one."""

    def store(self, replica: str, hashes: Iterable[int], tier: str | Window = "gpu") -> None:
        """The replica holds these blocks, in a tier or for the layers with a window."""

    def remove(self, replica: str, hashes: Iterable[int], tier: str | Window = "gpu") -> None:
        """The replica no longer holds these blocks."""

    def limit(self, replica: str, resuming: Resuming | None) -> None:
        """The replica can go on with a prompt at these places only."""

    def clear(self, replica: str) -> None:
        """Nothing is known of the replica any more."""


@attrs.frozen
class _OfWindow:
    """The part of an index that is for the layers with one window; what is not on the device is not claimed."""

    index: EngineIndex
    window: Window

    def store(self, replica: str, hashes: Iterable[int], tier: str = _DEVICE) -> None:
        """See `BlockIndex`."""
        if tier == _DEVICE:
            self.index.store(replica, hashes, self.window)

    def remove(self, replica: str, hashes: Iterable[int], tier: str = _DEVICE) -> None:
        """See `BlockIndex`."""
        if tier == _DEVICE:
            self.index.remove(replica, hashes, self.window)


@attrs.define
class _Group:
    """A group of layers that need only the latest blocks.

    Attributes:
        block_tokens: Tokens in a block of its.
        window: What it needs; None if that cannot be told.
    """

    block_tokens: int
    window: Window | None


@attrs.define(eq=False)
class EngineBlocks:
    """The blocks of one cache: one replica, one data-parallel rank, one model or adapter.

    Events of layers that need only the latest blocks are taken in when `settle` is called, because they may name blocks
    that an event of other layers tells of a moment later.

    Args:
        index: Told of claims.
        holder: The name under which it is told.
        block_tokens: Tokens in a block of ours.
        lora: Only blocks computed with this adapter count; empty for those computed without one.
        max_blocks: Most blocks of the engine's that are remembered for each kind of layers.
        chunk_tokens: Tokens in a chunk of attention, which no event says; 0 if that is not known.

    Attributes:
        flaw: Why what is claimed may be more, or less, than what the engine finds; empty if it is just that.
    """

    index: EngineIndex
    holder: str
    block_tokens: int
    lora: str = ""
    max_blocks: int = 1_000_000
    chunk_tokens: int = 0
    flaw: str = attrs.field(init=False, default="")
    _whole: BlockChain = attrs.field(init=False, repr=False)
    _groups: dict[int, _Group] = attrs.field(init=False, factory=dict, repr=False)
    _chains: dict[Window, BlockChain] = attrs.field(init=False, factory=dict, repr=False)
    _resuming: Resuming | None = attrs.field(init=False, default=None)
    _later: list[BlockStored | BlockRemoved] = attrs.field(init=False, factory=list, repr=False)

    @_whole.default
    def _make_whole(self) -> BlockChain:
        return BlockChain(self.index, self.holder, self.block_tokens, self.max_blocks)

    def __len__(self) -> int:
        return sum(map(len, self._all()))

    # What is known

    @property
    def copies(self) -> int:
        """Blocks the engine keeps on its device, each as often as it keeps it."""
        return sum(chain.copies for chain in self._all())

    @property
    def counts(self) -> BlockCounts:
        """What became of the blocks that events spoke of."""
        if not self._chains:
            return self._whole.counts
        each = [attrs.astuple(chain.counts) for chain in self._all()]
        return BlockCounts(**dict(zip(attrs.fields_dict(BlockCounts), map(sum, zip(*each, strict=True)), strict=True)))

    @property
    def engine_block_tokens(self) -> int:
        """Tokens between two places where the engine may go on with a prompt; 0 before its first block."""
        return self._whole.engine_block_tokens if self._resuming is None else self._resuming.step * self.block_tokens

    @property
    def is_hybrid(self) -> bool:
        """True if some of its layers keep only the latest blocks."""
        return bool(self._groups)

    @property
    def is_torn(self) -> bool:
        """True if a block of ours lost a part amid it, and claims can no longer be trusted."""
        return self._whole.is_torn

    @property
    def is_cut(self) -> bool:
        """True if there were too many blocks to remember them all."""
        return any(chain.is_cut for chain in self._all())

    def _all(self) -> Iterator[BlockChain]:
        yield self._whole
        yield from self._chains.values()

    # What happens

    def clear(self) -> None:
        """Nothing is known any more, not even of its layers, or nothing is there."""
        for chain in self._all():
            chain.clear()
        self._later.clear()
        self.index.clear(self.holder)
        if self._groups:
            self._groups.clear()
            self._chains.clear()
            self._resuming = None
            self.index.limit(self.holder, None)
        self.flaw = ""

    def stored(self, event: BlockStored) -> None:
        """Take in blocks that the engine keeps from now on."""
        if event.lora != self.lora:
            self._whole.counts.foreign += len(event.hashes)
        elif event.kind not in _WHOLE:
            self._later.append(event)
        else:
            if event.group and not event.kind:
                self.flaw = "it does not say which of its layers keep only the latest blocks"
            elif self._chains and event.tier != _DEVICE:
                self.flaw = _MOVED
            self._whole.stored(event, may_repeat=not self._groups)

    def removed(self, event: BlockRemoved) -> None:
        """Take out blocks that the engine no longer keeps."""
        if event.group in self._groups or any(one.group == event.group for one in self._later):
            self._later.append(event)
        else:
            self._whole.removed(event)

    def settle(self) -> None:
        """That was all for now: take in what waited for that."""
        if not self._later:
            return
        later, self._later = self._later, []
        for event in later:
            chain = self._chain_of(event)
            if isinstance(event, BlockRemoved):
                if chain is not None:
                    chain.removed(event)
            elif chain is None:
                self._whole.counts.foreign += len(event.hashes)
            else:
                chain.stored(event)
                if chain.counts.sparse and not self.is_cut:
                    self.flaw = "it does not say which blocks of a window it keeps"
                elif event.tier != _DEVICE:
                    self.flaw = _MOVED
        self._tell_places()

    # Groups

    def _chain_of(self, event: BlockStored | BlockRemoved) -> BlockChain | None:
        """The chain of an event's layers; None if they are left out of account."""
        group = self._groups.get(event.group)
        if isinstance(event, BlockRemoved):
            if group is None:
                return self._whole
        elif group is None:
            group = self._groups[event.group] = _Group(event.block_tokens, self._window_of(event))
        elif group.block_tokens != event.block_tokens and event.is_dense:
            self.flaw = "blocks of one group of layers differ in size"
            return None
        return None if group.window is None else self._chains[group.window]

    def _window_of(self, event: BlockStored) -> Window | None:
        """What a new group of layers needs; a reason is noted if that cannot be told."""
        step, rest = divmod(event.block_tokens, self.block_tokens)
        if event.kind in _SLIDING and event.window:
            window = Window.sliding(event.window, event.block_tokens, step)
        elif event.kind == "mamba":
            window = Window(step, 1)
        elif (
            event.kind == "chunked_local_attention" and self.chunk_tokens and not self.chunk_tokens % event.block_tokens
        ):
            window = Window(step, self.chunk_tokens // event.block_tokens, is_chunk=True)
        else:
            what = event.kind[:_LONGEST_KIND].replace("_", " ")
            self.flaw = f"some layers keep only the latest blocks, and it does not say how many ({what})"
            return None
        if rest or self._whole.engine_block_tokens % self.block_tokens:
            self.flaw = "some layers keep only the latest blocks, and these are smaller than ours"
            return None
        if window not in self._chains:
            claims = _OfWindow(self.index, window)
            self._chains[window] = BlockChain(
                claims, self.holder, self.block_tokens, self.max_blocks, ends_only=True, others=self._whole
            )
        return window

    def _tell_places(self) -> None:
        """Tell the index where the engine can go on with a prompt, if that is news."""
        if not self._chains:
            return
        windows = sorted(self._chains, key=attrs.astuple)
        resuming = Resuming.of(windows, self._whole.engine_block_tokens // self.block_tokens)
        if list(self._groups) != [0]:  # of others than a lone group, layers that need all may not have told yet
            resuming = attrs.evolve(resuming, needs_all=True)
        if resuming != self._resuming:
            self._resuming = resuming
            self.index.limit(self.holder, resuming)
