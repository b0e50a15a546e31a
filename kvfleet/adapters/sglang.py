"""SGLang: OpenAI's API, and metrics of its radix cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs

from kvfleet.adapters.base import EngineLoad
from kvfleet.adapters.call import Operation
from kvfleet.adapters.exposition import Reader, Samples, whole_of
from kvfleet.adapters.metered import MeteredAdapter, tokens_of
from kvfleet.config.models import rank_of
from kvfleet.errors import BackendError, Fault

__all__ = ["SGLangAdapter"]

_RUNNING = "sglang:num_running_reqs"
_WAITING = "sglang:num_queue_reqs"
_KV_USAGE = "sglang:token_usage"
_PROMPT = "sglang:prompt_tokens_total"
_CACHED = "sglang:cached_tokens_total"
_PAGES = "sglang:num_pages"
_PAGE_SIZE = "sglang:page_size"
_CONFIG = "sglang:cache_config_info"
_THROUGHPUT = "sglang:gen_throughput"


@attrs.define(kw_only=True)
class SGLangAdapter(MeteredAdapter):
    """SGLang's OpenAI server. Start it with ``--enable-metrics`` and, for cached tokens, ``--enable-cache-report``."""

    usual_surfaces: ClassVar[frozenset[str]] = frozenset({"messages"})
    prefix: ClassVar[str] = "sglang:"
    rank_label: ClassVar[str] = "dp_rank"
    # Every rank of one engine reports the engine's figures; those of data-parallel ranks are their own and are summed.
    reader: ClassVar[Reader] = Reader(
        [_RUNNING, _WAITING, _KV_USAGE, _PROMPT, _CACHED, _PAGES, _PAGE_SIZE, _CONFIG, _THROUGHPUT],
        only={"tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"},
    )

    def load_of(self, samples: Samples) -> EngineLoad:
        """Running, waiting and cache figures summed over data-parallel ranks; the KV usage is their mean."""
        config = samples.first(_CONFIG)
        labels = config.labels if config is not None else {}
        pages = samples.count(_PAGES)
        page_size = samples.mean(_PAGE_SIZE)
        return EngineLoad(
            running=samples.count(_RUNNING),
            waiting=samples.count(_WAITING),
            kv_usage=samples.mean(_KV_USAGE),
            cache_blocks=pages if pages is not None else whole_of(labels.get("num_pages")),
            block_tokens=round(page_size) if page_size is not None else whole_of(labels.get("page_size")),
            prefix_queries_tokens=samples.total(_PROMPT),
            prefix_hits_tokens=samples.total(_CACHED),
            tokens_per_second=samples.total(_THROUGHPUT),
        )

    async def prompt_tokens(self, operation: Operation, body: Mapping[str, Any]) -> Sequence[int] | None:
        """What ``/v1/tokenize`` makes of a plain prompt; SGLang has no such question for a chat."""
        prompt = body.get("prompt")
        if operation is not Operation.COMPLETION or not isinstance(prompt, str):
            return None
        return tokens_of(await self.control_json("POST", "/v1/tokenize", {"model": self.model_id, "prompt": prompt}))

    async def load_without_metrics(self) -> EngineLoad:
        """What ``/v1/loads`` says, and before SGLang had it, ``/get_load``."""
        try:
            found = await self.control_json("GET", "/v1/loads?include=core")
            return load_of_ranks(found.get("loads") if isinstance(found, dict) else found, rank_of(self.endpoint))
        except BackendError as error:
            if error.kind is not Fault.NOT_FOUND:
                raise
        return load_of_ranks(await self.control_json("GET", "/get_load"), rank_of(self.endpoint))


def load_of_ranks(ranks: Any, rank: int | None = None) -> EngineLoad:
    """The load from one object for each data-parallel rank, in the words of either endpoint; of one rank, or of all."""
    rows = [row for row in ranks if isinstance(row, Mapping)] if isinstance(ranks, list) else []
    if rank is not None:
        rows = [row for row in rows if row.get("dp_rank") == rank]
    waiting = _sum(rows, "num_waiting_reqs")
    running = _sum(rows, "num_running_reqs")
    if running is None and (everything := _sum(rows, "num_reqs")) is not None:
        running = everything - (waiting or 0)
    usages = [row["token_usage"] for row in rows if isinstance(row.get("token_usage"), int | float)]
    return EngineLoad(
        running=None if running is None else round(running),
        waiting=None if waiting is None else round(waiting),
        kv_usage=sum(usages) / len(usages) if usages else None,
        tokens_per_second=_sum(rows, "gen_throughput"),
    )


def _sum(rows: list[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    return sum(values) if values else None
