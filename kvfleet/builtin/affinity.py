"""Affinity by conversations and shared beginnings, learned from where requests were answered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import attrs

from kvfleet.adapters.call import Usage
from kvfleet.builtin.facts import PROMPT, PromptFacts, prompt_of
from kvfleet.cache.fingerprints import PromptFingerprinter
from kvfleet.cache.kv_affinity import ConsistentHashRing
from kvfleet.cache.prefix_index import PrefixIndex
from kvfleet.config.fields import number
from kvfleet.config.schema import ModelConfig
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Affinity, CacheMode, Kind, Outcome, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.router.scoring import by_model
from kvfleet.telemetry.metrics import MetricsExporter

__all__ = ["PrefixAffinity"]

_HOME_TOKENS = 1.0
"""What the home of an unknown beginning is given: enough to break ties, and no more. Its mode is `NONE`."""
_ENOUGH_TOKENS = 64
"""Shorter expectations say nothing of an engine, whose cache has blocks."""
_WEIGHT_OF_NEW = 0.2
_MOST_SESSIONS = 100_000


@attrs.define
class _Session:
    """Where a named conversation was answered last."""

    replica: str
    tokens: int
    until_s: float


@attrs.define
class _Trust:
    """How far a replica's expectations came true, 0..1, by the cached tokens its engine reports."""

    share: float = 1.0
    reports: int = 0

    def learn(self, expected: float, reported: int) -> None:
        share = min(reported / expected, 1.0)
        self.share += (share - self.share) * max(_WEIGHT_OF_NEW, 1 / (self.reports + 2))
        self.reports += 1


@attrs.define
class PrefixAffinity:
    """Expect a prompt's beginning in the KV cache of the replica that answered it before.

    Known are conversations that name themselves (a session header, or ``prompt_cache_key``), and beginnings of prompts:
    the turns of a conversation, system prompts, the first tokens. A replica whose engine reports fewer cached tokens
    than expected is believed less. A long beginning nobody has answered yet has a home on a consistent hash, so that a
    burst of requests, or many gateways, begin at the same replica. What is remembered is bounded, in number and time.
    """

    session_ttl_s: float = number(3600.0, gt=0, unit="s", doc="How long a conversation or a beginning is remembered.")
    prefix_tokens: int = number(128, ge=1, unit="tokens", doc="Tokens of a prompt's beginning that identify it.")
    virtual_nodes: int = number(150, ge=1, doc="Points of each replica on the hash ring.")
    min_affinity: float = number(
        0.3, ge=0, le=1, doc="A known part of the prompt below this share of it counts as none."
    )
    max_entries: int = number(50_000, ge=1, doc="Most beginnings remembered; each takes about 400 bytes.")
    _index: PrefixIndex = attrs.field(init=False, repr=False, eq=False)
    _fingerprinter: PromptFingerprinter = attrs.field(init=False, repr=False, eq=False)
    _sessions: OrderedDict[tuple[str, str], _Session] = attrs.field(init=False, factory=OrderedDict, repr=False)
    _trust: dict[str, _Trust] = attrs.field(init=False, factory=dict, repr=False)
    _rings: dict[str, ConsistentHashRing] = attrs.field(init=False, factory=dict, repr=False)
    _metrics: MetricsExporter | None = attrs.field(init=False, default=None, repr=False, eq=False)

    @_index.default
    def _make_index(self) -> PrefixIndex:
        return PrefixIndex(self.session_ttl_s, self.max_entries)

    @_fingerprinter.default
    def _make_fingerprinter(self) -> PromptFingerprinter:
        return PromptFingerprinter(self.prefix_tokens)

    def provision(self, services: Services) -> None:
        """Put the replicas of each model on a ring."""
        self._metrics = services.metrics
        self._trust = {model.id: _Trust() for model in services.models}
        groups = by_model(services.models)
        self._rings = {
            name: ConsistentHashRing.of([model.id for model in replicas], self.virtual_nodes)
            for name, replicas in groups.items()
            if len(replicas) > 1
        }

    def affinity(self, ctx: RoutingContext) -> Affinity:
        """The expectations."""
        prompt = prompt_of(ctx)
        held = self._held(ctx, prompt)
        tokens = [held.get(model.id, 0.0) for model in ctx.candidates] if held else ()
        if not any(tokens):
            return self._homes(ctx, prompt)
        modes = [self._mode(model.id) if held.get(model.id) else CacheMode.NONE for model in ctx.candidates]
        return Affinity(tokens, modes)

    async def observe(self, outcome: Outcome) -> None:
        """Learn where the prompt was answered, and what its engine said of its cache."""
        served, ctx, error = outcome.served_by, outcome.context, outcome.error
        is_whole = error is None or error.code == "client_left"
        if served is None or ctx.dry_run or not is_whole:
            return
        prompt = prompt_of(ctx)
        if ctx.affinity.get(served.id, 0.0) > _HOME_TOKENS and self._metrics is not None:
            bound = self._session(ctx, prompt)
            is_session = bound is not None and bound.replica == served.id
            self._metrics.record_cache_hit("session" if is_session else "prefix")
        self._learn_trust(ctx, prompt, served, outcome.usage)
        self._index.record(prompt.fingerprint_by(self._fingerprinter).marks, served.id, ctx.now_s)
        if prompt.session:
            self._bind(ctx, prompt, served, outcome.usage)

    def state(self) -> Mapping[str, float]:
        """How much is remembered."""
        return {**self._index.state(), "sessions": len(self._sessions)}

    # Expecting

    def _held(self, ctx: RoutingContext, prompt: PromptFacts) -> dict[str, float]:
        """By replica: the tokens of the prompt it is expected to have, as far as that is worth anything."""
        least = self.min_affinity * prompt.fingerprint_by(self._fingerprinter).token_estimate
        trust = self._trust
        held = {}
        for replica, tokens in self._known(ctx, prompt).items():
            if tokens >= least:
                known = trust.get(replica)
                held[replica] = tokens * known.share if known is not None else float(tokens)
        return held

    def _known(self, ctx: RoutingContext, prompt: PromptFacts) -> dict[str, int]:
        """By replica: the tokens of the prompt that went there before."""
        fingerprint = prompt.fingerprint_by(self._fingerprinter)
        found = self._index.lookup(fingerprint.marks, ctx.now_s)
        bound = self._session(ctx, prompt)
        if bound is not None:
            found[bound.replica] = max(found.get(bound.replica, 0), min(bound.tokens, fingerprint.token_estimate))
        return found

    def _mode(self, replica: str) -> CacheMode:
        known = self._trust.get(replica)
        return CacheMode.OBSERVED if known is not None and known.reports else CacheMode.APPROXIMATE

    def _homes(self, ctx: RoutingContext, prompt: PromptFacts) -> Affinity:
        """Nobody has the prompt: the replica of each model on which its beginning falls."""
        candidates = ctx.candidates
        tokens = [0.0] * len(candidates)
        fingerprint = prompt.fingerprint_by(self._fingerprinter)
        if self._rings and fingerprint.token_estimate >= self.prefix_tokens:
            place = {model.id: i for i, model in enumerate(candidates)}
            beginning = fingerprint.beginning
            for ring in self._rings.values():
                home = ring.get_node(beginning, place)
                if home is not None:
                    tokens[place[home]] = _HOME_TOKENS
        return Affinity(tokens, [CacheMode.NONE] * len(candidates))

    def _session(self, ctx: RoutingContext, prompt: PromptFacts) -> _Session | None:
        if not prompt.session:
            return None
        bound = self._sessions.get((ctx.tenant, prompt.session))
        return bound if bound is not None and bound.until_s >= ctx.now_s else None

    # Learning

    def _bind(self, ctx: RoutingContext, prompt: PromptFacts, served: ModelConfig, usage: Usage | None) -> None:
        """Remember where a named conversation is; its next turn holds the answer too."""
        sessions, key = self._sessions, (ctx.tenant, prompt.session)
        tokens = prompt.token_estimate + (usage.completion_tokens if usage is not None else 0)
        sessions.pop(key, None)
        sessions[key] = _Session(served.id, tokens, ctx.now_s + self.session_ttl_s)
        while len(sessions) > _MOST_SESSIONS or next(iter(sessions.values())).until_s < ctx.now_s:
            sessions.popitem(last=False)

    def _learn_trust(self, ctx: RoutingContext, prompt: PromptFacts, served: ModelConfig, usage: Usage | None) -> None:
        """Compare what was to be expected with what the engine reports."""
        trust = self._trust.get(served.id)
        if trust is None or usage is None or usage.cached_tokens is None:
            return
        expected = self._known(ctx, prompt).get(served.id, 0)
        if expected >= _ENOUGH_TOKENS:
            trust.learn(expected, usage.cached_tokens)


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The affinity stage."""
    yield Component(Kind.AFFINITY, "prefix", PrefixAffinity, needs=(PROMPT,))
