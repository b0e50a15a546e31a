"""vLLM: OpenAI's API, and metrics of its KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs

from kvfleet.adapters.base import EngineLoad
from kvfleet.adapters.call import Operation
from kvfleet.adapters.exposition import Reader, Samples, whole_of
from kvfleet.adapters.metered import MeteredAdapter, tokens_of
from kvfleet.config.models import rank_of
from kvfleet.errors import BackendError

__all__ = ["VLLMAdapter"]

# Newest name first. The older ones are those of vLLM before 0.11 (``gpu_``) and of its first engine (throughput gauge).
_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_CPU_USAGE = "vllm:cpu_cache_usage_perc"
_QUERIES = ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries")
_HITS = ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits")
_CONFIG = "vllm:cache_config_info"
_GENERATED = "vllm:generation_tokens_total"
_THROUGHPUT = "vllm:avg_generation_throughput_toks_per_s"
# What of a chat's body goes into its prompt.
_RENDERED = (
    *("messages", "tools", "add_generation_prompt", "continue_final_message", "add_special_tokens"),
    *("chat_template", "chat_template_kwargs", "mm_processor_kwargs"),
)


@attrs.define(kw_only=True)
class VLLMAdapter(MeteredAdapter):
    """vLLM's OpenAI server. Start it with ``--enable-prompt-tokens-details`` to have cached tokens reported."""

    usual_surfaces: ClassVar[frozenset[str]] = frozenset({"messages"})
    refuses_unlisted: ClassVar[bool] = True
    continues: ClassVar[frozenset[Operation]] = frozenset({Operation.CHAT, Operation.COMPLETION})
    prefix: ClassVar[str] = "vllm:"
    rank_label: ClassVar[str] = "engine"
    reader: ClassVar[Reader] = Reader(
        [_RUNNING, _WAITING, *_KV_USAGE, _CPU_USAGE, *_QUERIES, *_HITS, _CONFIG, _GENERATED, _THROUGHPUT]
    )

    def load_of(self, samples: Samples) -> EngineLoad:
        """Running, waiting and cache figures summed over the engines of a process; the KV usage is their mean."""
        blocks, block_tokens = _cache_size(samples)
        throughput = samples.total(_THROUGHPUT)
        return EngineLoad(
            running=samples.count(_RUNNING),
            waiting=samples.count(_WAITING),
            kv_usage=samples.mean(*_KV_USAGE),
            cache_blocks=blocks,
            block_tokens=block_tokens,
            cache_tokens=_cache_tokens(samples),
            prefix_queries_tokens=samples.total(*_QUERIES),
            prefix_hits_tokens=samples.total(*_HITS),
            tokens_per_second=self.throughput(samples.total(_GENERATED)) if throughput is None else throughput,
        )

    async def load_without_metrics(self) -> EngineLoad:
        """The number of requests that ``/load`` counts; it does so under ``--enable-server-load-tracking``.

        It counts those of all ranks, so of one nothing is known.
        """
        if rank_of(self.endpoint) is not None:
            return EngineLoad()
        try:
            found = await self.control_json("GET", "/load")
        except BackendError:
            return EngineLoad()
        load = found.get("server_load") if isinstance(found, dict) else None
        return EngineLoad(running=load if isinstance(load, int) else None)

    async def prompt_tokens(self, operation: Operation, body: Mapping[str, Any]) -> Sequence[int] | None:
        """What ``/tokenize`` makes of it; see `InferenceAdapter.prompt_tokens`."""
        if operation is Operation.CHAT:
            asked = {key: body[key] for key in _RENDERED if key in body}
        elif operation is Operation.COMPLETION and isinstance(body.get("prompt"), str):
            asked = {"prompt": body["prompt"], "add_special_tokens": body.get("add_special_tokens", True)}
        else:
            return None
        return tokens_of(await self.control_json("POST", "/tokenize", {**asked, "model": self.model_id}))

    async def get_cache_state(self) -> Mapping[str, float]:
        """State of the KV cache; what is unknown is absent.

        Keys: ``kv_cache_usage_pct``, ``cpu_cache_usage_pct`` (older vLLM), ``num_requests_running``,
        ``num_requests_waiting``, ``prefix_cache_hit_rate``.

        Raises:
            BackendError: if the engine cannot be asked.
        """
        state = dict(await super().get_cache_state())
        samples = await self._samples()
        cpu = None if samples is None else samples.mean(_CPU_USAGE)
        if cpu is not None:
            state["cpu_cache_usage_pct"] = cpu * 100
        return state


def _cache_size(samples: Samples) -> tuple[int | None, int | None]:
    """Blocks of all engines together, and tokens in one block."""
    configs = [sample.labels for sample in samples.all(_CONFIG)]
    blocks = [blocks for one in configs if (blocks := whole_of(one.get("num_gpu_blocks"))) is not None]
    sizes = [size for one in configs if (size := whole_of(one.get("block_size")))]
    return sum(blocks) if blocks else None, sizes[0] if sizes else None


def _cache_tokens(samples: Samples) -> int | None:
    """Tokens that fit into the caches of all engines, as vLLM itself reckons with a hybrid model's groups (0.32)."""
    sizes = [whole_of(sample.labels.get("kv_cache_size_tokens")) for sample in samples.all(_CONFIG)]
    known = [size for size in sizes if size]
    return sum(known) if known and len(known) == len(sizes) else None
