"""What simulated engines tell of their caches, put where a gateway puts the KV events of live ones.

A trace knows blocks by hashes and not by tokens, so a block's hash stands for its content: it is written as two token
ids, and everything that reads events and compares prompts by tokens works on them as on any others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from kvfleet.builtin.tokens import PromptTokens
from kvfleet.cache.block_chain import token_hashes
from kvfleet.cache.knowledge import CacheKnowledge, TokenChain
from kvfleet.cache.kv_events import AllCleared, BlockRemoved, BlockStored, Event
from kvfleet.cache.kv_state import CacheState
from kvfleet.config.caching import KVEventsConfig
from kvfleet.config.schema import FleetConfig
from kvfleet.replay.traces import TracedRequest
from kvfleet.sim.events import Cleared, Removed, Stored
from kvfleet.sim.spec import EngineSpec

__all__ = ["PromptTeller", "telling", "watch"]

_WORDS = 2
_BYTES = 8

Told = Callable[[Stored | Removed | Cleared], None]


def telling(config: FleetConfig, tells: bool | None) -> FleetConfig:
    """The fleet with caches that tell of themselves: those of its `kv_events`, all (True), or none (False)."""
    models = []
    for model in config.models:
        settings = model.kv_events if tells is None else (model.kv_events or KVEventsConfig()) if tells else None
        if settings is not None:
            settings = attrs.evolve(settings, data_parallel_ranks=1, lora="")
            model = attrs.evolve(model, prompt_blocks=attrs.evolve(model.prompt_blocks, block_tokens=_WORDS))  # noqa: PLW2901
        models.append(attrs.evolve(model, kv_events=settings))
    return attrs.evolve(config, models=tuple(models))


def watch(knowledge: CacheKnowledge, replica: str, spec: EngineSpec) -> Told | None:
    """What to tell of a replica's cache, which has such an engine; None if nobody listens to it."""
    source = knowledge.source_of(replica)
    if source is None:
        return None
    state = source.states[0]
    state.connected()
    state.take_in(0, [AllCleared()], 0.0)

    window = -(-(spec.window_tokens - 1) // spec.block_tokens) * _WORDS + 1  # in the tokens that blocks have here

    def told(event: Stored | Removed | Cleared) -> None:
        _tell(state, event, window)

    return told


def _tell(state: CacheState, event: Stored | Removed | Cleared, window: int) -> None:
    said: Event
    if isinstance(event, Stored):
        said = BlockStored(event.blocks, event.parent, _written(event.blocks), _WORDS, group=event.group)
        if event.group:
            said = attrs.evolve(said, kind="sliding_window", window=window)
    elif isinstance(event, Removed):
        said = BlockRemoved(tuple(event.blocks), group=event.group)
    else:
        said = AllCleared()
    state.take_in(0, (said,), 0.0)


def _written(blocks: Sequence[int]) -> bytes:
    return b"".join([block.to_bytes(_BYTES, "little") for block in blocks])


@attrs.frozen
class PromptTeller:
    """Gives prompts as the tokens of the models whose engines tell of their caches.

    Args:
        models: Those models.
        block_tokens: Tokens of a block of the trace.
    """

    models: Sequence[str]
    block_tokens: int

    def tokens(self, request: TracedRequest) -> PromptTokens:
        """One prompt's."""
        hashes = token_hashes(_written(request.blocks), _WORDS)
        chain = TokenChain(hashes, self.block_tokens, request.prompt_tokens)
        return PromptTokens(dict.fromkeys(self.models, chain))
