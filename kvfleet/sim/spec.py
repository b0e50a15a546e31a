"""The size and the pace of a simulated engine."""

from __future__ import annotations

import attrs

__all__ = ["EngineSpec"]

# A step always takes time, so that a caller who waits for its end never waits for a moment that is already there.
_SHORTEST_STEP_S = 1e-6


@attrs.frozen(kw_only=True)
class EngineSpec:
    """How big an engine is and how long its steps take.

    A step computes `prefill` new prompt tokens and one token for each decoding request, and takes, divided by `speed`::

        step_s + prefill_s_per_token * (prefill beyond the hidden tokens)
               + prefill_s_per_token_context * (pairs of a prefill token and one before it)
               + decode_s_per_seq * decoding requests + decode_s_per_context_token * (tokens they look back on)

    The first few tokens of a step are hidden behind the reading of the weights, which takes the same time for one token
    as for many: on an A100 and for a model of 8 billion parameters the first 80 cost next to nothing, and a chunk of
    2048 costs 14 times a decode step.

    Attributes:
        token_budget: Tokens computed in a step, for decodes (one each) and prefill chunks together; vLLM calls it
            ``max_num_batched_tokens``.
        max_running: Requests in the batch; ``max_num_seqs``.
        max_waiting: Requests that may queue beyond the batch's free places, one more is refused; None for no limit, as
            in vLLM.
        cache_blocks: Blocks of the KV cache.
        block_tokens: Tokens in a block.
        window_tokens: Tokens that some layers of a hybrid model look back on, the one that is computed among them
            (``sliding_window``); 0 for a model all of whose layers look back on everything.
        window_cache_blocks: Blocks of those layers' part of the KV cache.
        context_tokens: Longest prompt plus answer.
        step_s: What every step costs: reading the weights, launching, sampling.
        prefill_s_per_token: Seconds for each prompt token computed, beyond the hidden ones.
        hidden_tokens: Tokens of a step, decodes first, that are computed while the weights are read.
        prefill_s_per_token_context: Seconds for each pair of a prompt token and a token before it (attention).
        decode_s_per_seq: Seconds for each decoding request in a step.
        decode_s_per_context_token: Seconds for each token that a decoding request looks back on.
        speed: How many times faster than that everything goes.
    """

    token_budget: int = attrs.field(default=2048, validator=attrs.validators.ge(1))
    max_running: int = attrs.field(default=128, validator=attrs.validators.ge(1))
    max_waiting: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(0)))
    cache_blocks: int = attrs.field(default=8192, validator=attrs.validators.ge(1))
    block_tokens: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    window_tokens: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    window_cache_blocks: int = attrs.field(default=2048, validator=attrs.validators.ge(1))
    context_tokens: int = attrs.field(default=131_072, validator=attrs.validators.ge(1))
    step_s: float = attrs.field(default=0.008, validator=attrs.validators.ge(0))
    prefill_s_per_token: float = attrs.field(default=1 / 8000, validator=attrs.validators.ge(0))
    hidden_tokens: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    prefill_s_per_token_context: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    decode_s_per_seq: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    decode_s_per_context_token: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    speed: float = attrs.field(default=1.0, validator=attrs.validators.gt(0))

    def __attrs_post_init__(self) -> None:
        if self.token_budget < self.max_running:
            raise ValueError(
                f"token_budget ({self.token_budget}) must be at least max_running ({self.max_running}): every decoding"
                " request takes one token of it in each step"
            )

    @property
    def all_blocks(self) -> int:
        """Blocks of all layers."""
        return self.cache_blocks + (self.window_cache_blocks if self.window_tokens else 0)

    @property
    def room_tokens(self) -> int:
        """Longest prompt plus answer that can ever be answered."""
        return min(self.context_tokens, self.cache_blocks * self.block_tokens)

    def step_time_s(self, prefill: int, pairs: float, decoding: int, context: int) -> float:
        """Seconds of one step.

        Args:
            prefill: Prompt tokens computed.
            pairs: Pairs of such a token and one before it.
            decoding: Requests that decode.
            context: Tokens they look back on, together.

        >>> EngineSpec(step_s=0.005, prefill_s_per_token=0.0001).step_time_s(100, 0, 0, 0)
        0.015
        """
        hidden = max(0, self.hidden_tokens - decoding)
        seconds = (
            self.step_s
            + self.prefill_s_per_token * max(0, prefill - hidden)
            + self.prefill_s_per_token_context * pairs
            + self.decode_s_per_seq * decoding
            + self.decode_s_per_context_token * context
        )
        return max(_SHORTEST_STEP_S, seconds / self.speed)
