"""What a fleet file says of its models: where they run, what they can do, what they cost."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.config.caching import KVEventsConfig, PromptBlocksConfig
from kvfleet.config.fields import choice, flag, listing, mapping, number, secret, section, text

__all__ = [
    "DATA_CLASSES",
    "DEFAULT_ENDPOINTS",
    "SELF_HOSTED_PROVIDERS",
    "LongContextPrices",
    "ModelCapabilities",
    "ModelConfig",
    "ProviderType",
    "rank_of",
]

DATA_CLASSES = ("public", "internal", "confidential", "restricted")
"""The data classes of a request, from the least to the most sensitive."""

SELF_HOSTED_PROVIDERS = frozenset({"vllm", "sglang", "llama_cpp", "ollama", "tgi", "triton", "mock"})
"""Providers whose engines run where their operator put them; a model of theirs is private unless it says otherwise."""

DEFAULT_ENDPOINTS = {"anthropic": "https://api.anthropic.com"}
"""Where a provider is, for a model that does not say."""


class ProviderType(enum.StrEnum):
    """The kinds of engine kvfleet itself speaks to, in the same way."""

    VLLM = "vllm"
    SGLANG = "sglang"
    LLAMA_CPP = "llama_cpp"
    OLLAMA = "ollama"
    TGI = "tgi"
    TRITON = "triton"
    OPENAI_COMPAT = "openai_compat"
    ANTHROPIC = "anthropic"
    CUSTOM_HTTP = "custom_http"
    MOCK = "mock"


_ENDPOINT = r"(https?|mock)://[^\s/?#@]+(?:/[^\s?#]*)?"  # a user:password@ would end up in traces
_NAME = r"[A-Za-z0-9][A-Za-z0-9._:/+-]*"


@attrs.frozen(kw_only=True)
class ModelCapabilities:
    """What a model can do. A request that needs more than a model declares is not routed to it."""

    model_type: str = choice(
        "chat", of=("chat", "completion", "embedding", "rerank"), doc="What kind of calls it serves."
    )
    supports_tools: bool = flag(doc="It accepts `tools` and answers with tool calls.")
    supports_json_mode: bool = flag(doc="It honours `response_format` (JSON mode and JSON schema).")
    supports_streaming: bool = flag(True, doc="It can stream its answer.")
    supports_vision: bool = flag(doc="It accepts images.")
    supports_audio: bool = flag(doc="It accepts audio.")
    supports_video: bool = flag(doc="It accepts video.")
    max_context_window: int | None = number(
        None, gt=0, unit="tokens", doc="Longest prompt plus answer; unknown if absent, and then not checked."
    )
    supported_languages: tuple[str, ...] = listing(
        (),
        doc="Languages (ISO 639-1) it is good at, and gets no others if `classify.language` can tell; empty means any.",
        pattern=r"[a-z]{2,3}",
        pattern_doc="a language as ISO 639 has it, as in `de`",
        example=["en", "de"],
    )


@attrs.frozen(kw_only=True)
class LongContextPrices:
    """What a model costs once a prompt is longer than a border that its provider draws; all its tokens then."""

    from_tokens: int = number(gt=0, unit="tokens", doc="Prompts longer than this are billed at these prices.")
    cost_per_1k_input_tokens: float = number(ge=0, unit="usd", doc="Price of 1,000 prompt tokens.")
    cost_per_1k_output_tokens: float = number(ge=0, unit="usd", doc="Price of 1,000 answer tokens.")
    cost_per_1k_cached_input_tokens: float | None = number(
        None, ge=0, unit="usd", doc="Price of 1,000 cached prompt tokens; as other prompt tokens if absent."
    )


def rank_of(endpoint: str) -> int | None:
    """The data-parallel rank that a replica's endpoint names; None if it is the engine as a whole.

    >>> rank_of("http://gpu-1:8000#3"), rank_of("http://gpu-1:8000")
    (3, None)
    """
    _, mark, rank = endpoint.rpartition("#")
    return int(rank) if mark else None


@attrs.frozen(kw_only=True)
class ModelConfig:
    """One model of the fleet and where it runs.

    In a running fleet each replica is one of these: `kvfleet.registry.models` expands a model with several endpoints
    into one `ModelConfig` per endpoint, told apart by `id`.
    """

    name: str = text(doc="The name clients and pipelines use.", pattern=_NAME, pattern_doc="letters, digits and ._:/+-")
    endpoint: str = text(
        "",
        doc="Base URL of the engine, with or without /v1; `mock://NAME` for an engine of the `mock` provider.",
        pattern=_ENDPOINT,
        pattern_doc="an http:// or https:// URL",
        example="http://gpu-1:8000",
    )
    replicas: tuple[str, ...] = listing(
        (),
        doc="Base URLs of further replicas.",
        pattern=_ENDPOINT,
        pattern_doc="an http:// or https:// URL",
        example=["http://gpu-2:8000"],
    )
    data_parallel_ranks: int = number(
        1,
        ge=1,
        le=256,
        doc="Data-parallel ranks of each vLLM or SGLang, to route to each by itself: each is a replica, whose endpoint "
        "is shown with `#` and its number. With 1 the engine chooses.",
    )
    provider: str = text("openai_compat", doc="Which adapter speaks to it; `kvfleet components` lists them.")
    model_id: str = text("", doc="The engine's own name of the model; `name` if absent.")
    api_key: str = secret(doc="The credential for this backend.")
    capabilities: ModelCapabilities = section(ModelCapabilities, doc="What the model can do.")
    cost_per_1k_input_tokens: float | None = number(
        None,
        ge=0,
        unit="usd",
        doc="Price of 1,000 prompt tokens; by default the built-in list's (free on a self-hosted engine).",
    )
    cost_per_1k_output_tokens: float | None = number(
        None,
        ge=0,
        unit="usd",
        doc="Price of 1,000 answer tokens; by default the built-in list's (free on a self-hosted engine).",
    )
    cost_per_1k_cached_input_tokens: float | None = number(
        None, ge=0, unit="usd", doc="Price of 1,000 cached prompt tokens; as other prompt tokens if absent."
    )
    cost_per_1k_cache_write_tokens: float | None = number(
        None,
        ge=0,
        unit="usd",
        doc="Price of 1,000 prompt tokens written to a cache that is paid for; as other prompt tokens if absent.",
    )
    cost_per_1k_batch_input_tokens: float | None = number(
        None,
        ge=0,
        unit="usd",
        doc="Price of 1,000 prompt tokens through the provider's batch interface, for estimates; the gateway has none.",
    )
    cost_per_1k_batch_output_tokens: float | None = number(
        None, ge=0, unit="usd", doc="Price of 1,000 answer tokens through the provider's batch interface."
    )
    long_context: LongContextPrices | None = section(None, doc="Prices for long prompts, if they differ.")
    price_source: str = text("", doc="Where the prices come from, for people; filled in if absent.")
    latency_p50_ms: float = number(
        500, gt=0, unit="ms", doc="Typical time to an answer, until measurements replace it."
    )
    latency_p95_ms: float = number(2000, gt=0, unit="ms", doc="Slow but usual time to an answer.")
    step_tokens: int = number(
        8192,
        ge=1,
        unit="tokens",
        doc="Most prompt tokens its engine computes in one step: vLLM's `--max-num-batched-tokens`, SGLang's "
        "`--chunked-prefill-size`. Engines do not tell it.",
    )
    quality_score: float = number(0.5, ge=0, le=1, doc="How good its answers are, 0 to 1.")
    allowed_data_classes: tuple[str, ...] = listing(
        ("public", "internal", "confidential"), of=DATA_CLASSES, doc="Data classes it may see.", example=["public"]
    )
    region: str = text("", doc="Where it runs, as in `eu-west-1`; used by residency rules.")
    private: bool | None = flag(
        None, doc="True if no third party sees the prompt; by default so for self-hosted providers."
    )
    tags: Mapping[str, str] = mapping(doc="Free labels for rules and strategies.", example={"domain": "coding"})
    weight: float = number(1.0, ge=0, doc="Its share under the `weighted` strategy.")
    enabled: bool = flag(True, doc="False keeps it in the file but out of every route.")
    custom_headers: Mapping[str, str] = mapping(
        doc="Headers sent with every call to it; values may be secrets.", example={"X-Team": "ml"}, is_secret=True
    )
    custom_chat_path: str = text("/generate", doc="Path of a `custom_http` engine's chat call.")
    custom_health_path: str = text("/health", doc="Path of a `custom_http` engine's health check.")
    custom_request_template: Mapping[str, Any] = mapping(
        doc="Body of a `custom_http` call; `{prompt}`, `{messages}`, `{model}`, `{max_tokens}` and `{temperature}` are "
        "filled in."
    )
    custom_content_key: str = text(
        "", doc="Where a `custom_http` answer's text stands, as in `output` or `data.0.text`."
    )
    connect_timeout_seconds: float = number(5, gt=0, unit="s", doc="Longest wait for a connection.")
    timeout_seconds: float = number(60, gt=0, unit="s", doc="Longest wait for the first byte of an answer.")
    idle_timeout_seconds: float = number(60, gt=0, unit="s", doc="Longest silence amid an answer.")
    max_retries: int = number(
        1,
        ge=0,
        doc="How often the same replica is asked again for a request, if nothing had been received, it had not kept "
        "silent, and nobody else is left.",
    )
    rpm: int | None = number(
        None,
        gt=0,
        unit="requests",
        doc="Requests a minute that its provider allows; those of the section `rate_limits` if absent.",
    )
    tpm: int | None = number(None, gt=0, unit="tokens", doc="Tokens a minute that its provider allows, likewise.")
    shared_rate_limit: bool = flag(
        doc="Its provider holds all such models of one endpoint and credential to one rate limit, not each to its own."
    )
    stream_usage: bool = flag(True, doc="Ask the engine for token usage at the end of a stream.")
    kv_events: KVEventsConfig | None = section(None, doc="Where its engines tell what is in their KV caches.")
    prompt_blocks: PromptBlocksConfig = section(PromptBlocksConfig, doc="How its prompts are compared with them.")
    options: Mapping[str, Any] = mapping(
        doc="Options of the adapter itself; `kvfleet components` lists them.", is_shown=False
    )
    id: str = attrs.field(init=False, eq=False, repr=False)

    @id.default
    def _make_id(self) -> str:
        return f"{self.name}@{self.endpoint}" if self.endpoint else self.name

    def get_model_id(self) -> str:
        """The engine's own name of the model."""
        return self.model_id or self.name

    def all_endpoints(self) -> tuple[str, ...]:
        """Every endpoint, its first one first, without repeats; with `#RANK`, if its ranks are replicas."""
        found = dict.fromkeys(e for e in (self.endpoint, *self.replicas) if e)
        if self.data_parallel_ranks == 1:
            return tuple(found)
        return tuple(f"{endpoint}#{rank}" for endpoint in found for rank in range(self.data_parallel_ranks))

    @property
    def is_self_hosted(self) -> bool:
        """True if the engine runs where the operator put it."""
        return self.provider in SELF_HOSTED_PROVIDERS

    @property
    def is_private(self) -> bool:
        """True if no third party sees the prompt: declared so, or self-hosted."""
        return self.is_self_hosted if self.private is None else self.private
