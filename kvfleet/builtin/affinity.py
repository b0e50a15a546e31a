"""Affinity by blocks of the prompt, learned from where requests were sent and what engines report of their cache."""

from __future__ import annotations

import asyncio
import functools
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.adapters.call import Usage
from kvfleet.builtin.facts import PROMPT, PromptFacts, prompt_of
from kvfleet.builtin.placements import Placement
from kvfleet.builtin.told import Told, ToldCaches
from kvfleet.cache.blocks import BYTES_PER_TOKEN, PromptBlocks, salt_of
from kvfleet.cache.kv_affinity import ConsistentHashRing
from kvfleet.cache.popularity import Popularity
from kvfleet.cache.routed_index import RoutedIndex, Visit
from kvfleet.cache.trust import Trust
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.fields import flag, number
from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Affinity, CacheMode, Kind, Outcome, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.router.scoring import by_model
from kvfleet.telemetry.fleet_gauges import GaugeSource
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.metrics import MetricsExporter

__all__ = ["PrefixAffinity"]

_HOME_TOKENS = 1.0
"""What the home of an unknown beginning is given: enough to break ties, and no more. Its mode is `NONE`."""
_ENOUGH_TOKENS = 64
"""Shorter expectations say nothing of an engine, whose cache has blocks."""
_MOST_SESSIONS = 100_000
_MOST_LOOKED = 10_000


@attrs.define(eq=False)
class _Looked:
    """What was looked up for a request, and where it was sent before it was answered.

    Attributes:
        prompt: Whose it is; kept, so that no other prompt has its identity meanwhile.
        blocks: Its chain.
        expected: By replica: the tokens of it that were sent there before.
        told: By replica: what its engine says.
    """

    prompt: PromptFacts
    blocks: PromptBlocks
    expected: Mapping[str, float]
    told: Mapping[str, Told]
    visits: list[tuple[str, Visit]] = attrs.field(factory=list)
    told_visits: list[tuple[str, Visit]] = attrs.field(factory=list)

    @functools.cached_property
    def known(self) -> int:
        """Whole blocks of it that somebody was sent before."""
        expected = self.expected
        return int(max(expected.values()) / self.blocks.block_tokens + 0.01) if expected else 0


@attrs.define
class PrefixAffinity:
    """Expect a prompt's beginning in the KV cache of the replicas that computed it before.

    A prompt is a chain of blocks (`kvfleet.cache.blocks`), and of each replica it is known which blocks were sent
    there and are not forgotten yet: turns of a conversation, system prompts, documents, whatever prompts share. A
    replica forgets as its engine does, by the size of its cache, which its engine tells. Where a request goes counts at
    once, under a lease, so that a burst of siblings stays together; an attempt that comes to nothing is taken back. A
    replica whose engine reports fewer cached tokens than expected is believed less. A long beginning nobody holds has a
    home on a consistent hash, so that many gateways begin at the same replica.

    Where an engine itself tells what it holds (`kv_events` of its model) and the prompt's tokens are known
    (`classify.tokens`), that is what is expected, also where that is nothing; the rest is for the others, and for when
    it does not tell.
    """

    session_ttl_s: float = number(3600.0, gt=0, unit="s", doc="How long what was sent somewhere is remembered.")
    lease_s: float = number(
        60.0, gt=0, unit="s", doc="How long a request counts as computed where it was sent, before it is answered."
    )
    block_bytes: int = number(
        256, ge=16, unit="bytes", doc="Bytes of a block of the prompt; smaller ones tell prompts apart more finely."
    )
    prefix_tokens: int = number(128, ge=1, unit="tokens", doc="Tokens of an unknown prompt that decide on its home.")
    virtual_nodes: int = number(150, ge=1, doc="Points of each replica on the hash ring of homes.")
    min_affinity: float = number(
        0.0, ge=0, le=1, doc="A known part of the prompt below this share of it counts as none."
    )
    cache_tokens: int = number(
        500_000, ge=1, unit="tokens", doc="Size of a replica's KV cache, until its engine tells."
    )
    max_entries: int = number(
        1_000_000, ge=1, doc="Most blocks remembered, over all replicas; each takes about 170 bytes."
    )
    isolate_tenants: bool = flag(doc="Tenants share no cache, because engines salt it or each has its own.")
    min_trust: float = number(
        0.5, ge=0, le=1, doc="A replica whose expectations come true to less than this share raises the alarm."
    )
    other_tier_worth: float = number(
        0.8, ge=0, le=1, doc="What a cached token is worth that an engine must load from the CPU's memory or a disk."
    )
    _index: RoutedIndex = attrs.field(init=False, repr=False, eq=False)
    _popularity: Popularity = attrs.field(init=False, factory=Popularity, repr=False, eq=False)
    _told: ToldCaches = attrs.field(init=False, factory=ToldCaches, repr=False, eq=False)
    _trust: dict[str, Trust] = attrs.field(init=False, factory=dict, repr=False)
    _looked: dict[int, _Looked] = attrs.field(init=False, factory=dict, repr=False)
    _sessions: OrderedDict[tuple[str, str], tuple[str, float]] = attrs.field(
        init=False, factory=OrderedDict, repr=False
    )
    _rings: dict[str, ConsistentHashRing] = attrs.field(init=False, factory=dict, repr=False)
    _metrics: MetricsExporter | None = attrs.field(init=False, default=None, repr=False, eq=False)
    _clock: Clock = attrs.field(init=False, factory=SystemClock, repr=False, eq=False)
    _news: Callable[[Any, bytes], None] | None = attrs.field(init=False, default=None, repr=False, eq=False)
    _load: FleetLoad = attrs.field(init=False, factory=FleetLoad, repr=False, eq=False)

    @_index.default
    def _make_index(self) -> RoutedIndex:
        return RoutedIndex(self.max_entries, max(1, int(self.cache_tokens * BYTES_PER_TOKEN / self.block_bytes)))

    def provision(self, services: Services) -> None:
        """Know the replicas, and put those of each model on a ring."""
        self._metrics, self._load = services.metrics, services.load
        self._clock, self._news = services.clock, services.news
        self._index.register([model.id for model in services.models])
        self._told = ToldCaches(services.caches, self.lease_s, self.other_tier_worth)
        self._told.register(services.models)
        self._trust = {model.id: Trust(least=self.min_trust) for model in services.models}
        self._show_trust(services.metrics, services.models)
        self._rings = {
            name: ConsistentHashRing.of([model.id for model in replicas], self.virtual_nodes)
            for name, replicas in by_model(services.models).items()
            if len(replicas) > 1
        }

    def inherit(self, before: PrefixAffinity) -> None:
        """Know where prompts, and conversations, were sent before a reload, and how far each replica was believed.

        Where the index's own options have changed, prompts are not known any more, but the conversations' homes are.
        """
        self._sessions, self._looked = before._sessions, before._looked
        self._trust |= {replica: trust for replica, trust in before._trust.items() if replica in self._trust}
        for trust in self._trust.values():
            trust.least = self.min_trust
        self._told.inherit(before._told)
        if before._index_options == self._index_options:
            self._index, self._popularity = before._index, before._popularity
            self._index.register(self._trust)

    @property
    def _index_options(self) -> Sequence[object]:
        """What the index was made with, and what its blocks mean."""
        return self.block_bytes, self.cache_tokens, self.max_entries, self.isolate_tenants

    async def lay_out(self, ctx: RoutingContext) -> PromptFacts:
        """Hash a large prompt before its stages run, in turns of the event loop of its own; the facts that know it."""
        await asyncio.sleep(0)
        prompt = prompt_of(ctx)
        await prompt.blocks_in_turns(self._seed(ctx), self.block_bytes)
        await asyncio.sleep(0)
        return prompt

    def affinity(self, ctx: RoutingContext) -> Affinity:
        """The expectations."""
        looked = self._look(ctx)
        held, candidates = looked.expected, ctx.candidates
        tokens, modes = [held.get(model.id, 0.0) for model in candidates], [CacheMode.NONE] * len(candidates)
        if held:
            least = self.min_affinity * looked.blocks.tokens
            for i, count in enumerate(tokens):
                if count:
                    tokens[i], modes[i] = self._routed(candidates[i].id, count, least)
        if looked.told:
            _listen(looked.told, candidates, tokens, modes)
        reasons = self._told.reasons(ctx)
        if not any(tokens):
            tokens, modes = self._homes(ctx, looked, modes)
            return Affinity(tokens, modes, reasons=reasons)
        return Affinity(tokens, modes, self._returns(looked, tokens, ctx.now_s), reasons)

    def _returns(self, looked: _Looked, tokens: Sequence[float], now_s: float) -> dict[float, float]:
        """How often one more replica that holds the prompt's beginning will be asked for it.

        As often as it was asked for of late, shared among those who hold it and that one.
        """
        if min(tokens) == max(tokens):  # nobody would begin anew what another holds
            return {}
        size, found, held = looked.blocks.block_tokens, {}, sorted(tokens)
        for blocks, uses in self._popularity.uses(looked.blocks.hashes, now_s, looked.known):
            known = blocks * size
            found[known] = uses / (len(held) - bisect_left(held, known) + 1)
        return found

    def _look(self, ctx: RoutingContext) -> _Looked:
        """Look up who has a request's prompt, once for all that this component is asked about it."""
        prompt = prompt_of(ctx)
        found = self._looked.get(id(prompt))
        if found is None:
            blocks = self._blocks(ctx, prompt)
            found = _Looked(prompt, blocks, self._held(blocks, ctx.now_s), self._told.held(ctx))
            if not ctx.dry_run:
                self._looked[id(prompt)] = found
                if len(self._looked) > _MOST_LOOKED:
                    del self._looked[next(iter(self._looked))]
        return found

    def _routed(self, replica: str, held: float, least: float) -> tuple[float, CacheMode]:
        """What is to be expected of a replica to which so many of the tokens were sent, and how that is known.

        Args:
            replica: Which.
            held: The tokens that were sent there.
            least: Fewer tokens count as none.
        """
        known = self._trust.get(replica)
        routed = held * known.share if known is not None and held >= least else 0.0
        if known is None or not routed:
            return 0.0, CacheMode.NONE
        return routed, CacheMode.OBSERVED if known.reports else CacheMode.APPROXIMATE

    def placed(self, ctx: RoutingContext, candidate: ModelConfig) -> None:
        """Count on the prompt being computed there."""
        looked = self._look(ctx)
        if not looked.visits:
            self._popularity.note(looked.blocks.hashes, ctx.now_s, looked.known)
        visit = self._index.record(candidate.id, _whole(looked.blocks), ctx.now_s, self.lease_s)
        if visit is not None:
            looked.visits.append((candidate.id, visit))
            if self._news is not None:
                self._news(self, Placement(candidate.id, visit.blocks, self.lease_s).packed())
        coming = self._told.placed(ctx, candidate)
        if coming is not None:
            looked.told_visits.append((candidate.id, coming))

    async def observe(self, outcome: Outcome) -> None:
        """Learn where the prompt was computed, and what its engine said of its cache."""
        self.settle(outcome)

    def settle(self, outcome: Outcome) -> None:
        """The same, without waiting for anything."""
        served, ctx, error = outcome.served_by, outcome.context, outcome.error
        if ctx.dry_run:
            return
        is_computed = served is not None and (error is None or error.code == "client_left")
        looked = self._looked.pop(id(prompt_of(ctx)), None)
        if looked is None and not is_computed:
            return  # refused before anybody asked who has it: there is nothing to learn
        looked = looked or self._look_again(ctx)
        self._take_back(looked, served.id if served is not None and is_computed else "")
        for replica in self._told.restarted(ctx.now_s):
            self._index.clear(replica)
        if served is None or not is_computed:
            return
        told = looked.told.get(served.id)
        self._count_hit(ctx, looked.prompt, served)
        if outcome.is_continued:
            pass  # asked later than it was looked at, and for a longer prompt: its answer belies nothing
        elif told is None or told.mode is CacheMode.DEGRADED:
            self._learn_trust(looked.blocks.tokens, looked.expected.get(served.id, 0.0), served, outcome.usage)
            if told is not None and outcome.usage is not None and outcome.usage.cached_tokens is not None:
                self._told.learn(served.id, told, outcome.usage.cached_tokens)
        else:
            self._learn_trust(told.prompt_tokens, told.tokens, served, outcome.usage)
            self._hold_to_it(told, served, outcome.usage)
        self._keep(looked, served.id, ctx.now_s + outcome.duration_s)
        self._note_size(served, looked.blocks.block_tokens)
        session = looked.prompt.session
        if session:
            self._bind(ctx.tenant, session, served.id, ctx.now_s)
        if self._news is not None:
            blocks = _whole(looked.blocks)
            self._news(self, Placement(served.id, blocks, self.session_ttl_s, ctx.tenant, session).packed())

    def hear(self, payload: bytes) -> None:
        """Know where another worker of the gateway sent a prompt."""
        one, now_s = Placement.unpacked(payload), self._clock.now_s()
        self._index.record(one.replica, one.blocks, now_s, one.ttl_s)
        if one.session:
            self._bind(one.tenant, one.session, one.replica, now_s)

    def _take_back(self, looked: _Looked, computed_at: str) -> None:
        """Forget where the prompt was sent and not computed; an engine that tells has told by now."""
        for replica, visit in looked.visits:
            if replica != computed_at:
                self._index.retract(replica, visit)
        for replica, visit in looked.told_visits:
            self._told.arrived(replica, visit)

    def _look_again(self, ctx: RoutingContext) -> _Looked:
        """Look up what is not kept any more, and do not keep it."""
        looked = self._look(ctx)
        self._looked.pop(id(looked.prompt), None)
        return looked

    def _keep(self, looked: _Looked, replica: str, now_s: float) -> None:
        """Remember that the replica computed the prompt."""
        visits = [visit for placed_at, visit in looked.visits if placed_at == replica]
        if visits:
            self._index.confirm(visits[-1], now_s + self.session_ttl_s)
        else:
            self._index.record(replica, _whole(looked.blocks), now_s, self.session_ttl_s)

    def state(self) -> Mapping[str, Any]:
        """How much is remembered, and how far each replica is believed."""
        trust = {replica: round(known.share, 3) for replica, known in self._trust.items() if known.reports}
        return {**self._index.state(), "sessions": len(self._sessions), "trust": trust}

    def _show_trust(self, metrics: MetricsExporter, models: Iterable[ModelConfig]) -> None:
        """Let the scrapes see how far each replica is believed."""
        labels = {model.id: (model.name, model.endpoint) for model in models}

        def source(read: Callable[[Trust], float]) -> GaugeSource:
            return lambda: {labels[one]: read(trust) for one, trust in self._trust.items() if trust.reports}

        metrics.read_gauge("kvfleet_cache_trust", source(lambda trust: trust.share))
        metrics.read_gauge("kvfleet_cache_prediction_error_tokens", source(lambda trust: trust.error_tokens))
        metrics.read_gauge("kvfleet_cache_trust_alarm", source(lambda trust: float(trust.is_alarming)))

    # Expecting

    def _blocks(self, ctx: RoutingContext, prompt: PromptFacts) -> PromptBlocks:
        return prompt.blocks(self._seed(ctx), self.block_bytes)

    def _seed(self, ctx: RoutingContext) -> int:
        """What keeps apart the prompts that share no cache."""
        salt = ctx.request.body.get("cache_salt")
        tenant = ctx.tenant if self.isolate_tenants else ""
        return salt_of(tenant, salt if isinstance(salt, str) else "") if salt or tenant else 0

    def _held(self, blocks: PromptBlocks, now_s: float) -> dict[str, float]:
        """By replica: the tokens of the prompt it holds, the answers it wrote included."""
        index, size = self._index, blocks.block_tokens
        held = {replica: depth * size for replica, depth in index.depths(blocks.hashes, now_s).items()}
        for mark, tokens in blocks.marks:
            for replica in index.holders(mark):
                if held.get(replica, 0.0) < tokens:
                    held[replica] = tokens
        return held

    def _homes(
        self, ctx: RoutingContext, looked: _Looked, modes: Sequence[CacheMode]
    ) -> tuple[list[float], list[CacheMode]]:
        """Nobody has the prompt: where its conversation was before, or the replicas on which its beginning falls.

        `modes` say how it is known of each that it has nothing.
        """
        candidates, blocks = ctx.candidates, looked.blocks
        tokens = [0.0] * len(candidates)
        bound = self._session(ctx, looked.prompt)
        if bound:
            tokens = [_HOME_TOKENS if model.id == bound else 0.0 for model in candidates]
            return tokens, [CacheMode.NONE if one else mode for one, mode in zip(tokens, modes, strict=True)]
        at = int(self.prefix_tokens / blocks.usual_tokens)
        if self._rings and at <= len(blocks.hashes) and blocks.hashes:
            place = {model.id: i for i, model in enumerate(candidates)}
            for ring in self._rings.values():
                home = ring.get_node(blocks.hashes[max(at - 1, 0)], place)
                if home is not None:
                    tokens[place[home]] = _HOME_TOKENS
        return tokens, [CacheMode.NONE if one else mode for one, mode in zip(tokens, modes, strict=True)]

    # Learning

    def _count_hit(self, ctx: RoutingContext, prompt: PromptFacts, served: ModelConfig) -> None:
        if ctx.affinity.get(served.id, 0.0) > _HOME_TOKENS and self._metrics is not None:
            is_session = self._session(ctx, prompt) == served.id
            self._metrics.record_cache_hit("session" if is_session else "prefix")

    def _session(self, ctx: RoutingContext, prompt: PromptFacts) -> str:
        """Where a named conversation was answered last; empty if it has no name, or that is too long ago."""
        bound = self._sessions.get((ctx.tenant, prompt.session)) if prompt.session else None
        return bound[0] if bound is not None and bound[1] >= ctx.now_s else ""

    def _bind(self, tenant: str, session: str, replica: str, now_s: float) -> None:
        sessions = self._sessions
        sessions.pop((tenant, session), None)
        sessions[tenant, session] = replica, now_s + self.session_ttl_s
        while len(sessions) > _MOST_SESSIONS or next(iter(sessions.values()))[1] < now_s:
            sessions.popitem(last=False)

    def _hold_to_it(self, told: Told, served: ModelConfig, usage: Usage | None) -> None:
        """Hold an engine's events against its answers."""
        if told.is_sure and usage is not None and usage.cached_tokens is not None:
            self._told.caches.answered(served.id, told.tokens, usage.cached_tokens)

    def _learn_trust(self, tokens: float, expected: float, served: ModelConfig, usage: Usage | None) -> None:
        """Compare what was to be expected with what the engine reports, as shares of the prompt.

        Shares, because the engine counts tokens and we may have estimated them.
        """
        trust = self._trust.get(served.id)
        if trust is None or usage is None or usage.cached_tokens is None or not usage.prompt_tokens:
            return
        scale = usage.prompt_tokens / max(tokens, 1)
        if expected >= _ENOUGH_TOKENS or usage.cached_tokens:
            trust.learn(served.id, expected * scale, usage.cached_tokens, is_enough=expected >= _ENOUGH_TOKENS)

    def _note_size(self, served: ModelConfig, block_tokens: float) -> None:
        """Let the replica forget as its engine does."""
        known = self._load.of(served.id)
        if known is not None and known.capacity_tokens:
            self._index.resize(served.id, max(1, int(known.capacity_tokens / block_tokens)))


def _listen(
    told: Mapping[str, Told], candidates: Sequence[ModelConfig], tokens: list[float], modes: list[CacheMode]
) -> None:
    """Put what engines say in the place of what was routed: all there is, or where some was lost a part of it."""
    for i, model in enumerate(candidates):
        said = told.get(model.id)
        if said is not None:
            is_part = said.mode is CacheMode.DEGRADED
            tokens[i], modes[i] = max(tokens[i], said.tokens) if is_part else said.tokens, said.mode


def _whole(blocks: PromptBlocks) -> list[int]:
    """What a replica that computed a prompt holds: its blocks, and the marks by which more is known of it."""
    *system, end = blocks.ends or (None,)
    return [*system, *blocks.hashes, end] if end is not None else list(blocks.hashes)


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The affinity stage."""
    yield Component(Kind.AFFINITY, "prefix", PrefixAffinity, needs=(PROMPT,))
