"""Prompts as the tokens of the models they may go to, for exact knowledge of KV caches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import attrs
import orjson
import xxhash

from kvfleet.adapters.base import InferenceAdapter
from kvfleet.adapters.call import Operation
from kvfleet.builtin.facts import PROMPT
from kvfleet.cache.block_chain import token_hashes
from kvfleet.cache.chat_template import UnrenderableError
from kvfleet.cache.knowledge import TokenChain
from kvfleet.cache.tokens import LocalTokenizer, SegmentCache, given_tokens, packed
from kvfleet.clock import Clock, SystemClock
from kvfleet.config.caching import PromptBlocksConfig
from kvfleet.config.schema import ModelConfig
from kvfleet.errors import BackendError
from kvfleet.plugin.component import Component, Services
from kvfleet.plugin.contract import Fact, Kind, Outcome, RoutingContext
from kvfleet.plugin.spec import hookimpl
from kvfleet.telemetry.load import FleetLoad
from kvfleet.telemetry.metrics import MetricsExporter

__all__ = ["TOKENS", "PromptTokens", "TokensClassifier"]

_log = logging.getLogger(__name__)
_MOST_MISCOUNTS = 3
_DISTRUST_S = 60.0
_THREADS = 2
_MEMORY = 0.99
"""How much of what was measured before counts beside one more prompt: about the last hundred of them decide."""
_BESIDE_THE_PROMPT = frozenset(
    {"model", "stream", "stream_options", "temperature", "top_p", "max_tokens", "n", "seed", "user", "stop", "metadata"}
)


@attrs.frozen
class PromptTokens:
    """A prompt as blocks of tokens.

    Attributes:
        chains: By model; one for each whose tokens are known.
        missing: By model: why its tokens are not.
        estimate: Where none are known, how many it is likely to have, by other prompts; 0 if that is not known either.
    """

    chains: Mapping[str, TokenChain] = attrs.field(factory=dict)
    missing: Mapping[str, str] = attrs.field(factory=dict)
    estimate: int = 0


def _describe(found: PromptTokens) -> Sequence[str]:
    known = [f"{model}: {chain.tokens} tokens" for model, chain in found.chains.items()]
    missing = [f"{model}: by bytes, {why}" for model, why in found.missing.items()]
    return (*known, *missing, *([f"counted as about {found.estimate} tokens"] if found.estimate else ()))


TOKENS: Fact[PromptTokens] = Fact("tokens", _describe)

_Made = TokenChain | str
"""A prompt's chain, or why there is none."""


@attrs.define(eq=False)
class _Maker:
    """Makes the tokens of one model's prompts.

    Attributes:
        replicas: The model's.
        settings: How.
        local: Its tokenizer, once it is loaded.
        kept: Tokens of whole prompts that an engine was asked for before.
        miscounts: Answers in a row whose engine counted other tokens.
        distrusted_until_s: Until when its tokens are not used for that.
        made, estimated: Tokens of its prompts of late, and what their bytes came to, together.
    """

    settings: PromptBlocksConfig
    replicas: list[ModelConfig] = attrs.field(factory=list)
    local: LocalTokenizer | None = None
    kept: SegmentCache = attrs.field(init=False)
    miscounts: int = 0
    distrusted_until_s: float = float("-inf")
    made: float = 0.0
    estimated: float = 0.0

    @kept.default
    def _make_kept(self) -> SegmentCache:
        return SegmentCache(_bytes_of(self.settings))

    def chain(self, tokens: bytes, body: Mapping[str, Any]) -> TokenChain:
        """The blocks of a prompt's tokens."""
        salt, size = body.get("cache_salt"), self.settings.block_tokens
        return TokenChain(token_hashes(tokens, size, salt if isinstance(salt, str) else ""), size, len(tokens) // 4)

    def measure(self, estimate: int, tokens: int) -> None:
        """A prompt whose bytes come to so many tokens has so many."""
        self.made = _MEMORY * self.made + tokens
        self.estimated = _MEMORY * self.estimated + estimate

    def usual(self, estimate: int) -> int:
        """How many tokens a prompt is likely to have whose bytes come to so many; 0 if no prompt was measured."""
        return round(estimate * self.made / self.estimated) if self.estimated else 0

    def make(self, operation: Operation, body: Mapping[str, Any]) -> TokenChain:
        """A prompt's blocks, made here; for a thread."""
        assert self.local is not None  # noqa: S101 - asked for only where there is one
        return self.chain(self.local.tokenise(operation, body), body)


@attrs.define
class TokensClassifier:
    """Make the prompt's tokens, as each model's `prompt_blocks` says, to compare it with what engines hold.

    It works off the event loop and has a deadline; a prompt whose tokens are not there in time, or cannot be made (it
    has pictures, say), is compared by its bytes, and the trace says why. An engine that counts other tokens than were
    made here, three times in a row, is not believed to be of this tokenizer for a minute.
    """

    _makers: dict[str, _Maker] = attrs.field(init=False, factory=dict, repr=False)
    _clock: Clock = attrs.field(init=False, factory=SystemClock, repr=False, eq=False)
    _load: FleetLoad = attrs.field(init=False, factory=FleetLoad, repr=False, eq=False)
    _metrics: MetricsExporter = attrs.field(init=False, factory=MetricsExporter, repr=False, eq=False)
    _services: Services = attrs.field(init=False, factory=Services, repr=False, eq=False)
    _threads: anyio.CapacityLimiter | None = attrs.field(init=False, default=None, repr=False, eq=False)

    def provision(self, services: Services) -> None:
        """Know the models whose prompts are compared by tokens."""
        self._clock, self._load, self._metrics = services.clock, services.load, services.metrics
        self._services = services
        for model in services.models:
            if model.prompt_blocks.mode != "bytes":
                self._makers.setdefault(model.name, _Maker(model.prompt_blocks)).replicas.append(model)

    async def aopen(self) -> None:
        """Load the tokenizers; models that share one's files share it.

        Raises:
            ComponentError: if one cannot be loaded.
        """
        self._threads = anyio.CapacityLimiter(_THREADS)
        loaded: dict[tuple[str, str], LocalTokenizer] = {}
        for maker in self._makers.values():
            files = (maker.settings.tokenizer, maker.settings.chat_template)
            if maker.settings.mode == "tokenizer" and files not in loaded:
                loaded[files] = await anyio.to_thread.run_sync(_load, maker.settings)
            maker.local = loaded.get(files) if maker.settings.mode == "tokenizer" else None

    async def classify(self, ctx: RoutingContext) -> Mapping[Fact[Any], Any]:
        """Gives `TOKENS`."""
        names = [name for name in dict.fromkeys([m.name for m in ctx.candidates]) if name in self._makers]
        if not names or ctx.request.operation not in (Operation.CHAT, Operation.COMPLETION):
            return {TOKENS: PromptTokens()}
        found: dict[str, _Made] = {}
        if len(names) == 1:
            found[names[0]] = await self._chain(ctx, names[0])
        else:

            async def put(name: str) -> None:
                found[name] = await self._chain(ctx, name)

            async with anyio.create_task_group() as group:
                for name in names:
                    group.start_soon(put, name)
        chains = {name: one for name in names if isinstance(one := found[name], TokenChain)}
        missing = {name: one for name in names if isinstance(one := found[name], str)}
        for name in missing:
            self._metrics.count("kvfleet_prompt_tokens_missing_total", name)
        return {TOKENS: PromptTokens(chains, missing, self._count(ctx, chains, missing))}

    def _count(self, ctx: RoutingContext, chains: Mapping[str, TokenChain], missing: Mapping[str, str]) -> int:
        """Let the prompt have as many tokens as its engine counts; of models that count otherwise, the most.

        Where its tokens are not known they are estimated by those of others, so that queues, caches and learned paces
        have one unit all the same. Gives that estimate; 0 if there is none, or none is needed.
        """
        prompt = ctx.fact_or_none(PROMPT)
        if prompt is None:
            return 0
        estimate = prompt.token_estimate
        if not chains:
            likely = max([self._makers[name].usual(estimate) for name in missing])
            prompt.counted(likely)
            return likely
        if not ctx.dry_run and isinstance(ctx.request.body.get("prompt"), str | None):  # not given as tokens already
            for name, chain in chains.items():
                self._makers[name].measure(estimate, chain.tokens)
        prompt.counted(max([chain.tokens for chain in chains.values()]))
        return 0

    async def observe(self, outcome: Outcome) -> None:
        """Compare the number of tokens with what the engine counted."""
        served, usage = outcome.served_by, outcome.usage
        found = outcome.context.fact_or_none(TOKENS)
        chain = found.chains.get(served.name) if found is not None and served is not None else None
        if served is None or chain is None or usage is None or not usage.prompt_tokens or outcome.error is not None:
            return
        if outcome.is_continued:  # the engine that went on counted what was said as a part of the prompt
            return
        maker = self._makers[served.name]
        if usage.prompt_tokens == chain.tokens:
            maker.miscounts = 0
            return
        self._metrics.count("kvfleet_prompt_tokens_miscounted_total", served.name)
        maker.miscounts += 1
        if maker.miscounts >= _MOST_MISCOUNTS:
            maker.miscounts = 0
            maker.distrusted_until_s = self._clock.now_s() + _DISTRUST_S
            _log.warning(
                "prompt tokens miscounted model=%s made=%d counted=%d", served.name, chain.tokens, usage.prompt_tokens
            )

    def state(self) -> Mapping[str, Any]:
        """How much had to be tokenised."""
        local = {name: maker.local for name, maker in self._makers.items() if maker.local is not None}
        return {name: {"cut": one.cuts, "tokenised_characters": one.tokenised} for name, one in local.items()}

    # Making

    async def _chain(self, ctx: RoutingContext, name: str) -> _Made:
        """The prompt's chain for a model; or why there is none."""
        maker, request = self._makers[name], ctx.request
        if ctx.now_s < maker.distrusted_until_s:
            return "the engine counts other tokens"
        given = given_tokens(request.operation, request.body)
        return maker.chain(given, request.body) if given is not None else await self._make(ctx, maker)

    async def _make(self, ctx: RoutingContext, maker: _Maker) -> _Made:
        request = ctx.request
        try:
            with anyio.fail_after(maker.settings.deadline_ms / 1000):
                if maker.local is None:
                    return await self._ask(ctx, maker)
                return await anyio.to_thread.run_sync(
                    maker.make, request.operation, request.body, limiter=self._threads, abandon_on_cancel=True
                )
        except TimeoutError:
            return f"not made within {maker.settings.deadline_ms:g} ms"
        except UnrenderableError as error:
            return str(error)
        except BackendError as error:
            return f"the engine did not say ({error.kind})"
        except OverflowError:
            return "the engine gave no token ids"

    async def _ask(self, ctx: RoutingContext, maker: _Maker) -> _Made:
        """Ask the least busy replica that is in the race."""
        body = ctx.request.body
        digest = xxhash.xxh3_128_intdigest(_identity(body))
        kept = maker.kept.get(digest)
        if kept is not None:
            return maker.chain(kept, body)
        if ctx.dry_run:
            return "nobody is asked in a simulation"
        ids = {model.id for model in maker.replicas}
        candidates = [model.id for model in ctx.candidates if model.id in ids]
        adapter: InferenceAdapter = self._services.adapters[min(candidates, key=self._load.in_flight)]
        tokens = await adapter.prompt_tokens(ctx.request.operation, body)
        if tokens is None:
            return "the engine cannot be asked for it"
        made = packed(tokens)
        maker.kept.put(digest, made)
        return maker.chain(made, body)


def _bytes_of(settings: PromptBlocksConfig) -> int:
    return round(settings.cache_megabytes * 1024 * 1024)


def _load(settings: PromptBlocksConfig) -> LocalTokenizer:
    template = Path(settings.chat_template) if settings.chat_template else None
    return LocalTokenizer.load(Path(settings.tokenizer), template, _bytes_of(settings))


def _identity(body: Mapping[str, Any]) -> bytes:
    """What of a request's body goes into its prompt, and a little more, as bytes."""
    kept = {key: value for key, value in body.items() if key not in _BESIDE_THE_PROMPT}
    try:
        return orjson.dumps(kept, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:  # a lone surrogate, or a Python object
        return repr(kept).encode("utf-8", "backslashreplace")


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """The classifier."""
    yield Component(Kind.CLASSIFY, "tokens", TokensClassifier, gives=(TOKENS,))
