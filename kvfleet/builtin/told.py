"""What engines tell of their KV caches, as the affinity stage uses it: for one request at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import attrs

from kvfleet.builtin.tokens import TOKENS
from kvfleet.cache.knowledge import CacheKnowledge, Held, TokenChain
from kvfleet.cache.kv_state import KVMode
from kvfleet.cache.routed_index import RoutedIndex, Visit
from kvfleet.cache.trust import Trust
from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.contract import CacheMode, RoutingContext

__all__ = ["Told", "ToldCaches"]

_MOST_UNDER_WAY = 200_000
_ENOUGH_TOKENS = 64
"""Smaller claims say nothing of an engine, whose cache has blocks."""
_MODES = {KVMode.EXACT: CacheMode.EXACT, KVMode.DEGRADED: CacheMode.DEGRADED}


@attrs.frozen
class Told:
    """What one replica is known to hold of a prompt.

    Attributes:
        tokens: That many tokens.
        mode: How that is known.
        prompt_tokens: Of so many.
        is_sure: True if the engine said so itself, and all of it; False if some of it is only under way there.
        claimed_tokens: What its events say, where that is not all there is to say: before any discount.
    """

    tokens: float
    mode: CacheMode
    prompt_tokens: int
    is_sure: bool
    claimed_tokens: float = 0.0


@attrs.define
class ToldCaches:
    """What engines said, and what was sent to them and is not said yet.

    A prompt under way is counted on as soon as it is sent, so that its siblings follow it; once it is answered, the
    engine has said itself what became of it. What degraded events claim may be too much, where they do not say what
    some layers lack: it is discounted by the part of it that answers had cached.

    Args:
        caches: What engines said.
        lease_s: How long a prompt may be under way.
        other_tier_worth: What a token outside the device's memory is worth, 0..1.
    """

    caches: CacheKnowledge = attrs.field(factory=CacheKnowledge)
    lease_s: float = 60.0
    other_tier_worth: float = 0.8
    _under_way: RoutedIndex = attrs.field(init=False, factory=lambda: RoutedIndex(_MOST_UNDER_WAY), repr=False)
    _restarts: dict[str, int] = attrs.field(init=False, factory=dict, repr=False)
    _looked_s: float = attrs.field(init=False, default=float("-inf"), repr=False)
    _shares: dict[str, Trust] = attrs.field(init=False, factory=dict, repr=False)
    _said: tuple[object, object, Sequence[str]] = attrs.field(init=False, default=(None, None, ()), repr=False)

    def register(self, models: Iterable[ModelConfig]) -> None:
        """Know the replicas whose engines tell."""
        telling = [model.id for model in models if self.caches.source_of(model.id) is not None]
        self._under_way.register(telling)
        self._restarts = dict.fromkeys(telling, 0)

    def inherit(self, before: ToldCaches) -> None:
        """Know what is under way to the replicas since before a reload."""
        self._under_way = before._under_way
        self._under_way.register(self._restarts)
        self._shares = {one: share for one, share in before._shares.items() if one in self._restarts}
        self._restarts |= {one: count for one, count in before._restarts.items() if one in self._restarts}

    def held(self, ctx: RoutingContext) -> Mapping[str, Told]:
        """By replica: what is known of it for this request's prompt; those of which nothing is known are absent."""
        prompt = ctx.fact_or_none(TOKENS)
        if prompt is None or not prompt.chains:
            return {}
        found: dict[str, Told] = {}
        for model, chain in prompt.chains.items():
            known = self.caches.held(model, chain, ctx.now_s)
            if known:
                coming = self._under_way.depths(chain.hashes, ctx.now_s)
                nothing = {mode: self._told(chain, Held(0.0, 0.0, mode), 0) for mode in _MODES}
                for replica, held in known.items():
                    if held.device_tokens or held.other_tokens or replica in coming:
                        found[replica] = self._told(chain, held, coming.get(replica, 0), replica)
                    else:
                        found[replica] = nothing[held.mode]
        return found

    def reasons(self, ctx: RoutingContext) -> Sequence[str]:
        """Why each candidate that tells of its cache is not known exactly; empty for the others, or of all of them."""
        if not self._restarts:
            return ()
        doubts = self.caches.doubts(ctx.now_s)
        if not doubts:
            return ()
        candidates, (about, by, reasons) = ctx.candidates, self._said
        if about is not candidates or by is not doubts:  # for the same ones it is the same, until something changes
            found = tuple([doubts.get(model.id, "") for model in candidates])
            reasons = found if any(found) else ()
            self._said = candidates, doubts, reasons
        return reasons

    def _told(self, chain: TokenChain, held: Held, coming: int, replica: str = "") -> Told:
        claimed = tokens = held.device_tokens + self.other_tier_worth * held.other_tokens
        is_whole = held.mode is KVMode.EXACT
        if not is_whole and replica in self._shares:
            tokens *= self._shares[replica].share
        under_way = min(coming * chain.block_tokens, chain.tokens - 1)
        if under_way > tokens:
            return Told(under_way, CacheMode.APPROXIMATE, chain.tokens, is_sure=False)
        return Told(tokens, _MODES[held.mode], chain.tokens, is_whole, 0.0 if is_whole else claimed)

    def placed(self, ctx: RoutingContext, candidate: ModelConfig) -> Visit | None:
        """The prompt is under way to a replica."""
        prompt = ctx.fact_or_none(TOKENS)
        chain = prompt.chains.get(candidate.name) if prompt is not None else None
        if chain is None or candidate.id not in self._restarts:
            return None
        return self._under_way.record(candidate.id, chain.hashes, ctx.now_s, self.lease_s)

    def arrived(self, replica: str, visit: Visit) -> None:
        """A prompt is under way no longer: it is answered, or it came to nothing."""
        self._under_way.retract(replica, visit)

    def learn(self, replica: str, told: Told, cached_tokens: int) -> None:
        """An answer's own account, against what degraded events claimed."""
        if told.claimed_tokens >= _ENOUGH_TOKENS:
            self._shares.setdefault(replica, Trust(least=0.0)).learn(replica, told.claimed_tokens, cached_tokens)

    def restarted(self, now_s: float) -> list[str]:
        """The replicas whose engines began anew since this was last asked; it is looked at once a second."""
        if now_s - self._looked_s < 1.0:
            return []
        self._looked_s, found = now_s, []
        for replica, before in self._restarts.items():
            source = self.caches.source_of(replica)
            count = sum(state.counts.restarts for state in source.states) if source is not None else before
            if count != before:
                self._restarts[replica] = count
                self._under_way.clear(replica)
                self._shares.pop(replica, None)
                found.append(replica)
        return found
