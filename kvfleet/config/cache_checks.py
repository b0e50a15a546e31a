"""What must hold between a model's `kv_events`, its `prompt_blocks`, and the stages that use them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path as FilePath

from kvfleet.config.caching import address_of
from kvfleet.config.findings import Finding, Path
from kvfleet.config.models import rank_of
from kvfleet.config.schema import FleetConfig, ModelConfig

__all__ = ["check_caches"]

_HIGHEST_PORT = 65_535
_TAKE_RANKS = ("vllm", "sglang")
_TOKENS, _AFFINITY = "classify.tokens", "affinity.prefix"


def check_caches(config: FleetConfig) -> Iterator[Finding]:
    """Everything that would make exact knowledge of caches come to nothing, silently."""
    for index, model in enumerate(config.models):
        path: Path = ("models", index)
        yield from _check_events(config, model, (*path, "kv_events"))
        yield from _check_addresses(config, model, (*path, "kv_events", "endpoint"))
        yield from _check_blocks(config, model, (*path, "prompt_blocks"))
        yield from _check_ranks(config, model, (*path, "data_parallel_ranks"))
    yield from _check_order(config)


def _check_events(config: FleetConfig, model: ModelConfig, path: Path) -> Iterator[Finding]:
    events = model.kv_events
    if events is None:
        return
    if model.prompt_blocks.mode == "bytes":
        remedy = "add `prompt_blocks: {mode: tokenizer, tokenizer: FOLDER}`, or `mode: engine`"
        what = "tell of tokens, and the model's prompts are compared by bytes"
        yield config.origin.finding(path, what, remedy, code="events-without-tokens")
    if events.source == "zmq" and (gone := _missing("zmq", "msgspec")):
        what, remedy = f"need {gone}, which is not installed", "pip install 'kvfleet[events]'"
        yield config.origin.finding(path, what, remedy, code="missing-extra")
    if events.bind and "{host}" in events.endpoint:
        what, remedy = "with `bind` the address is this machine's", "write `tcp://*:5557`"
        yield config.origin.finding((*path, "endpoint"), what, remedy, code="address")
    if not events.bind and "*" in events.endpoint:
        what, remedy = "there is no engine at `*`", "write `tcp://{host}:5557`, or `bind: true` to listen there"
        yield config.origin.finding((*path, "endpoint"), what, remedy, code="address")


def _check_addresses(config: FleetConfig, model: ModelConfig, path: Path) -> Iterator[Finding]:
    """Each engine's address is a possible one, and its alone."""
    events, taken = model.kv_events, dict[str, str]()
    if events is None or events.source != "zmq" or events.bind:
        return
    for endpoint in model.all_endpoints():
        for rank in range(events.data_parallel_ranks):
            address = address_of(events.endpoint, endpoint, rank + (rank_of(endpoint) or 0))
            port = address.rpartition(":")[2]
            if address.startswith("tcp://") and int(port) > _HIGHEST_PORT:
                yield config.origin.finding(path, f"there is no port {port}", "use lower ports", code="address")
            if address in taken:
                what = f"{endpoint} and {taken[address]} would both publish at {address}"
                remedy = "on one machine each engine needs ports of its own: write {port+1000} for the port, say"
                yield config.origin.finding(path, what, remedy, code="duplicate-address")
            taken[address] = endpoint


def _check_ranks(config: FleetConfig, model: ModelConfig, path: Path) -> Iterator[Finding]:
    """Ranks are routed to either by us or by the engine, and not every engine lets us."""
    if model.data_parallel_ranks == 1:
        return
    if model.provider not in _TAKE_RANKS:
        what = f"{model.provider} takes no requests for one of its ranks"
        yield config.origin.finding(path, what, "take it out, and let the engine choose", code="ranks")
    if model.kv_events is not None and model.kv_events.data_parallel_ranks > 1:
        what, remedy = "counts the ranks that `kv_events.data_parallel_ranks` counts, too", "take it out there"
        yield config.origin.finding(path, what, remedy, code="ranks")


def _check_blocks(config: FleetConfig, model: ModelConfig, path: Path) -> Iterator[Finding]:
    blocks = model.prompt_blocks
    if blocks.mode == "tokenizer":
        if gone := _missing("tokenizers", "jinja2"):
            what, remedy = f"need {gone}, which is not installed", "pip install 'kvfleet[tokenizers]'"
            yield config.origin.finding(path, what, remedy, code="missing-extra")
        if not blocks.tokenizer:
            yield config.origin.finding(path, "has no `tokenizer`", "name the model's folder", code="missing")
        for key, file in (("tokenizer", blocks.tokenizer), ("chat_template", blocks.chat_template)):
            if file and not FilePath(file).exists():
                what, remedy = f"there is no {file}", "give the path as this machine has it"
                yield config.origin.finding((*path, key), what, remedy, code="file")
    used = {stage.use for stage in config.pipeline}
    if blocks.mode != "bytes" and config.pipeline:
        for use in (_TOKENS, _AFFINITY):
            if use not in used:
                what = f"has no use: `pipeline:` has no stage {use}"
                yield config.origin.finding(path, what, f"add `- {use}`", code="unused-section")


def _check_order(config: FleetConfig) -> Iterator[Finding]:
    """Tokens that are made after they were asked for are made for nothing."""
    uses = [stage.use for stage in config.pipeline]
    if _TOKENS in uses and _AFFINITY in uses and uses.index(_TOKENS) > uses.index(_AFFINITY):
        stage = config.pipeline[uses.index(_TOKENS)]
        what = f"{_TOKENS} comes after {_AFFINITY}, which would use it"
        yield config.origin.finding(stage.path, what, f"move it before {_AFFINITY}", code="order")


def _missing(*modules: str) -> str:
    """The first of some modules that is not installed; empty if all are."""
    return next((module for module in modules if importlib.util.find_spec(module) is None), "")
