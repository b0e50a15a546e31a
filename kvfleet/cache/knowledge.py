"""What engines themselves tell of their KV caches: an index for each model, and how far each engine may be believed."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.cache.block_chain import holder_of
from kvfleet.cache.engine_blocks import EngineBlocks
from kvfleet.cache.kv_drain import EventDrain
from kvfleet.cache.kv_sequence import EventStream
from kvfleet.cache.kv_state import CacheState, KVMode
from kvfleet.cache.prefix_index import Matched, PrefixIndex
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.caching import KVEventsConfig, PromptBlocksConfig
from kvfleet.config.schema import ModelConfig

__all__ = ["CacheKnowledge", "Held", "Source", "TokenChain"]

_FRESH_S = 0.05
_BEST_FIRST = (KVMode.EXACT, KVMode.DEGRADED, KVMode.APPROXIMATE, KVMode.LOAD_ONLY)


@attrs.frozen
class TokenChain:
    """A prompt as the blocks of tokens of one model.

    Attributes:
        hashes: Of its whole blocks, in order.
        block_tokens: Tokens in a block.
        tokens: Tokens in all.
    """

    hashes: Sequence[int] = attrs.field(repr=False)
    block_tokens: int
    tokens: int


@attrs.frozen
class Held:
    """What a replica is known to hold of a prompt: tokens on its device, tokens elsewhere, and how that is known."""

    device_tokens: float
    other_tokens: float
    mode: KVMode


@attrs.define(eq=False)
class Source:
    """An engine that tells of its cache.

    Attributes:
        endpoint: The engine's own, as the fleet file has it.
        settings: Where it tells.
        place: Which of its model's replicas it is, from 0; an engine that connects to us has a port for each.
        replicas: The ids of the replicas that it is; more than one if several models have this endpoint.
        states: For each data-parallel rank that publishes by itself, what it told.
    """

    endpoint: str
    settings: KVEventsConfig
    place: int
    replicas: list[str] = attrs.field(factory=list)
    states: list[CacheState] = attrs.field(factory=list)

    def judge(self) -> tuple[KVMode, str]:
        """The mode of the engine's cache as a whole, and if it is not exact, why."""
        mode, why = max((state.judge() for state in self.states), key=lambda found: _BEST_FIRST.index(found[0]))
        if mode is KVMode.EXACT and len(self.states) > 1:
            return KVMode.DEGRADED, f"{len(self.states)} data-parallel ranks, of which the engine chooses one"
        return mode, why

    def ranks(self) -> Sequence[int]:
        """The data-parallel ranks that were heard of."""
        return tuple(dict.fromkeys(rank for state in self.states for rank in state.ranks))

    def blocks(self) -> Iterator[EngineBlocks]:
        """Every set of blocks."""
        for state in self.states:
            yield from state.blocks()

    def block_tokens(self) -> int:
        """Tokens in a block of the engine's; 0 before its first."""
        return max((blocks.engine_block_tokens for blocks in self.blocks()), default=0)


@attrs.frozen
class _Readable:
    """A replica whose cache may be read now, as it was a moment ago.

    Attributes:
        replica: Its id.
        holders: The names under which the index has it: one for each rank.
        block_tokens: Tokens in a block of its engine's.
        nothing: What it holds if it holds nothing.
        dropped: Tokens at the end of what it holds that it computes all the same.
    """

    replica: str
    holders: Sequence[str]
    block_tokens: int
    nothing: Held
    dropped: int


@attrs.define(eq=False)
class CacheKnowledge:
    """What is told of every cache of the fleet. It only keeps; `kvfleet.telemetry.kv_watch` listens.

    Args:
        clock: For how old something is.
    """

    clock: Clock = attrs.field(factory=SystemClock)
    sources: list[Source] = attrs.field(init=False, factory=list)
    _indexes: dict[str, PrefixIndex] = attrs.field(init=False, factory=dict, repr=False)
    _of_replica: dict[str, Source] = attrs.field(init=False, factory=dict, repr=False)
    _models: dict[str, list[ModelConfig]] = attrs.field(init=False, factory=dict, repr=False)
    _readable: dict[str, list[_Readable]] = attrs.field(init=False, factory=dict, repr=False)
    _judged_s: float = attrs.field(init=False, default=float("-inf"), repr=False)
    _doubts: Mapping[str, str] = attrs.field(init=False, factory=dict, repr=False)

    def register(self, models: Sequence[ModelConfig]) -> None:
        """Know the replicas whose engines tell of their caches, instead of any known before."""
        self.sources, self._indexes, self._of_replica, self._models = [], {}, {}, {}
        self._readable, self._judged_s = {}, float("-inf")
        telling: dict[tuple[str, KVEventsConfig], Source] = {}
        for model in models:
            settings = model.kv_events
            if settings is None or not model.enabled:
                continue
            replicas = self._models.setdefault(model.name, [])
            self._indexes.setdefault(model.name, PrefixIndex())
            key = (model.endpoint, attrs.evolve(settings, lora=""))
            source = telling.get(key)
            if source is None:
                source = telling[key] = Source(model.endpoint, settings, len(replicas))
                self.sources.append(source)
            replicas.append(model)
            source.replicas.append(model.id)
            self._of_replica[model.id] = source
        for source in self.sources:
            self._begin(source)

    def inherit(self, before: CacheKnowledge) -> None:
        """Take over what another one was told by the engines that are the same; nobody may tell it anything any more.

        An engine is the same if it is asked in the same way for the same replicas.
        """
        same = {before._identity(source): source for source in before.sources}
        for name in self._indexes:
            if self._blocks_of(name) == before._blocks_of(name):
                self._indexes[name] = before._indexes[name]
        for source in self.sources:
            known = same.pop(self._identity(source), None)
            if known is None:
                self._begin(source)
            else:
                source.states = known.states
        for gone in same.values():
            for blocks in gone.blocks():
                blocks.clear()
        self._judged_s = float("-inf")

    def _identity(self, source: Source) -> Hashable:
        """What makes it the same engine in another reading of the fleet file; its place only if that means a port."""
        models = [model for found in self._models.values() for model in found if model.id in source.replicas]
        place = source.place if source.settings.bind else 0
        return source.endpoint, place, tuple((one.id, one.kv_events, one.prompt_blocks) for one in models)

    def _blocks_of(self, name: str) -> PromptBlocksConfig | None:
        """How the prompts of a model are compared; None if its engines tell of nothing."""
        return self._models[name][0].prompt_blocks if name in self._models else None

    def _begin(self, source: Source) -> None:
        """Know nothing yet of an engine."""
        by_id = {model.id: model for found in self._models.values() for model in found}
        source.states = self._states(source, [by_id[replica] for replica in source.replicas])

    def _states(self, source: Source, models: Sequence[ModelConfig]) -> list[CacheState]:
        settings = source.settings

        def make_blocks(rank: int) -> list[EngineBlocks]:
            return [
                EngineBlocks(
                    index=self._indexes[model.name],
                    holder=holder_of(model.id, rank),
                    block_tokens=model.prompt_blocks.block_tokens,
                    lora=model.kv_events.lora if model.kv_events is not None else "",
                    max_blocks=settings.max_blocks,
                    chunk_tokens=settings.attention_chunk_tokens,
                )
                for model in models
            ]

        common: dict[str, Any] = {
            "make_blocks": make_blocks,
            "clock": self.clock,
            "silence_s": settings.silence_seconds,
        }
        if settings.source == "trtllm":
            return [EventDrain(**common)]
        ranks = range(settings.data_parallel_ranks)
        return [EventStream(**common, can_replay=bool(settings.replay), rank=rank) for rank in ranks]

    # Reading

    def tells(self, model: str) -> bool:
        """True if engines of this model tell of their caches."""
        return model in self._indexes

    def source_of(self, replica: str) -> Source | None:
        """Who tells of a replica's cache; None if nobody does."""
        return self._of_replica.get(replica)

    def mode(self, replica: str) -> tuple[KVMode, str] | None:
        """How a replica's cache is known, and if not exactly, why; None if nobody tells of it."""
        source = self._of_replica.get(replica)
        return None if source is None else source.judge()

    def doubts(self, now_s: float) -> Mapping[str, str]:
        """By replica: how its cache is known and why no better; those known exactly are absent, and who tells nothing.

        The same mapping is given for as long as nothing changes.
        """
        if not 0 <= now_s - self._judged_s < _FRESH_S:
            self._judge(now_s)
        return self._doubts

    def held(self, model: str, chain: TokenChain, now_s: float) -> Mapping[str, Held]:
        """By replica of the model: what it holds of a prompt. Those of which that is not known now are absent.

        An engine finds whole blocks of its own, and computes at least the last token itself.
        """
        index, found = self._indexes.get(model), dict[str, Held]()
        if index is None:
            return found
        readable = self._judge(now_s).get(model, ())
        matched = index.match(chain.hashes, max(chain.tokens - 1, 0) // chain.block_tokens)
        for one in readable:
            if len(one.holders) > 1:
                found[one.replica] = _mean_held(chain, one, matched)
            else:
                at = matched.get(one.holders[0])
                found[one.replica] = one.nothing if at is None else _held(chain, one, at)
        return found

    def _judge(self, now_s: float) -> Mapping[str, Sequence[_Readable]]:
        """By model: whose caches may be read; at most a twentieth of a second old."""
        if now_s - self._judged_s >= _FRESH_S or now_s < self._judged_s:
            self._judged_s = now_s
            judged = [(source, *source.judge()) for source in self.sources]
            modes = {id(source): (mode, source) for source, mode, _ in judged}
            self._readable = {
                model: [
                    _readable(replica.id, mode, source)
                    for replica in replicas
                    for mode, source in (modes[id(self._of_replica[replica.id])],)
                    if mode in (KVMode.EXACT, KVMode.DEGRADED)
                ]
                for model, replicas in self._models.items()
            }
            doubts = {replica: f"{mode}: {why}" for source, mode, why in judged if why for replica in source.replicas}
            if doubts != self._doubts:
                self._doubts = doubts
        return self._readable

    def answered(self, replica: str, expected_tokens: float, cached_tokens: int) -> None:
        """An answer's own account of the cache, against what was held to be there."""
        source = self._of_replica.get(replica)
        if source is not None and len(source.states) == 1:
            source.states[0].answered(expected_tokens, cached_tokens)

    def state(self) -> Mapping[str, object]:
        """How much is known, for people."""
        return {model: {"entries": len(index), "refused": index.refused} for model, index in self._indexes.items()}


_NOTHING = Matched(0, 0)


def _readable(replica: str, mode: KVMode, source: Source) -> _Readable:
    holders = [holder_of(replica, rank) for rank in source.ranks() or (0,)]
    size = max(source.block_tokens(), 1)
    dropped = size if any(state.drops_block for state in source.states) else 0
    return _Readable(replica, holders, size, Held(0.0, 0.0, mode), dropped)


def _held(chain: TokenChain, one: _Readable, matched: Matched) -> Held:
    """What is matched, in whole blocks of the engine's."""
    size, most = one.block_tokens, chain.tokens - 1
    device = min(matched.device_blocks * chain.block_tokens, most) // size * size
    if matched.blocks == matched.device_blocks:
        return Held(max(device - one.dropped, 0), 0.0, one.nothing.mode)
    all_of_it = max(min(matched.blocks * chain.block_tokens, most) // size * size - one.dropped, 0)
    return Held(min(device, all_of_it), max(all_of_it - device, 0), one.nothing.mode)


def _mean_held(chain: TokenChain, one: _Readable, matched: Mapping[str, Matched]) -> Held:
    """What is found in the cache of one of the ranks, on average, as any of them may be the one."""
    found = [_held(chain, one, matched.get(holder, _NOTHING)) for holder in one.holders]
    device, other = sum(held.device_tokens for held in found), sum(held.other_tokens for held in found)
    return Held(device / len(found), other / len(found), one.nothing.mode)
