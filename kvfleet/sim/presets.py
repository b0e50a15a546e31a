"""Engines by what they are: paces taken from published measurements where there are some, and from data sheets else.

How close they come is shown in ``docs/explanation/simulator.md``, and held by a test.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from kvfleet.sim.spec import EngineSpec

__all__ = ["PRESETS", "Preset"]


@attrs.frozen(kw_only=True)
class Preset:
    """An engine by what it is: the model and the machine.

    Attributes:
        doc: In words.
        source: Where its pace comes from.
        spec: Its pace; give it the block size you need with `sized`.
        cache_tokens: Tokens of its KV cache: what nine tenths of the machine's memory leave.
    """

    doc: str
    source: str
    spec: EngineSpec
    cache_tokens: int

    def sized(self, block_tokens: int = 16, *, context_tokens: int | None = None, speed: float = 1.0) -> EngineSpec:
        """The engine with blocks of a size, all of its cache in them.

        >>> PRESETS["a100-8b"].sized(512).cache_blocks
        800
        """
        return attrs.evolve(
            self.spec,
            block_tokens=block_tokens,
            cache_blocks=max(self.cache_tokens // block_tokens, 1),
            context_tokens=self.spec.context_tokens if context_tokens is None else context_tokens,
            speed=speed,
        )


_KERNELS = (
    "Kernel times of Microsoft's Vidur (https://github.com/microsoft/vidur, MIT), data/profiling/compute/{}: their sum"
    " over the layers, fitted; attention and the output layer from the data sheet."
)
_SHEET = (
    "The machine's data sheet: half the peak of dense bf16 arithmetic for prompts (2 operations for a parameter and a"
    " token, 4 * layers * width for a pair of tokens), four fifths of the memory's bandwidth for answers, 2.5 ms a step"
    " for all else. Not measured."
)

PRESETS: Mapping[str, Preset] = {
    "a100-8b": Preset(
        doc="Llama 3 8B in bf16 on one A100 80 GB.",
        source=_KERNELS.format("a100/meta-llama/Meta-Llama-3-8B"),
        spec=EngineSpec(
            token_budget=2048,
            max_running=256,
            step_s=0.00982 + 0.00064,  # the layers, and the output layer
            prefill_s_per_token=6.69e-5,
            hidden_tokens=60,
            prefill_s_per_token_context=2.8e-9,
            decode_s_per_seq=3.96e-5,
            decode_s_per_context_token=8.0e-8,
        ),
        cache_tokens=410_000,
    ),
    "h100-8b": Preset(
        doc="Llama 3 8B in bf16 on one H100 80 GB.",
        source=_KERNELS.format("h100/meta-llama/Llama-2-7b-hf")
        + " The profiled model has a smaller feed-forward part; times are scaled by the parameters.",
        spec=EngineSpec(
            token_budget=8192,
            max_running=512,
            step_s=0.00603 + 0.00039,
            prefill_s_per_token=2.07e-5,
            hidden_tokens=60,
            prefill_s_per_token_context=1.1e-9,
            decode_s_per_seq=1.43e-5,
            decode_s_per_context_token=4.9e-8,
        ),
        cache_tokens=410_000,
    ),
    "h200-8b": Preset(
        doc="Llama 3 8B in bf16 on one H200 141 GB.",
        source="Measured on one: a vLLM 0.26's time to the first token of prompts of 2,048 tokens and more and its time"
        " for each further one, and steps of such a decoder in PyTorch for batches, contexts, and what is hidden"
        " (benchmarks/gpu_steps.py). The cache's size from the data sheet.",
        spec=EngineSpec(
            token_budget=8192,
            max_running=512,
            step_s=0.00515,
            prefill_s_per_token=2.25e-5,
            hidden_tokens=90,
            prefill_s_per_token_context=9.5e-10,
            decode_s_per_seq=1.26e-5,
            decode_s_per_context_token=2.68e-8,
        ),
        cache_tokens=890_000,
    ),
    "l4-8b": Preset(
        doc="A model of 8 billion parameters in bf16 on one L4 24 GB.",
        source=_SHEET,
        spec=EngineSpec(
            token_budget=2048,
            max_running=128,
            step_s=0.0677,
            prefill_s_per_token=2.64e-4,
            prefill_s_per_token_context=8.7e-9,
            decode_s_per_context_token=5.5e-7,
        ),
        cache_tokens=35_000,
    ),
    "h100x4-70b": Preset(
        doc="A model of 70 billion parameters in bf16 on four H100 80 GB.",
        source=_SHEET,
        spec=EngineSpec(
            token_budget=8192,
            max_running=512,
            step_s=0.0161,
            prefill_s_per_token=7.1e-5,
            prefill_s_per_token_context=1.3e-9,
            decode_s_per_context_token=3.1e-8,
        ),
        cache_tokens=420_000,
    ),
}
"""Engines by name; `kvfleet.config.simulation` has the names."""
