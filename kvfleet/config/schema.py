"""The vocabulary of a fleet file: plain frozen data, no behaviour beyond what a field means.

Every field describes itself (see `kvfleet.config.fields`); validation, the JSON Schema and the reference page are made
from these descriptions. Options of components live with the components.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.config.caching import KVEventsConfig, PromptBlocksConfig
from kvfleet.config.fields import choice, flag, listing, mapping, number, secret, section, text
from kvfleet.config.findings import NOWHERE, Origin
from kvfleet.config.health import HealthConfig
from kvfleet.config.limits import ClientLimits
from kvfleet.config.overload import OverloadConfig
from kvfleet.config.simulation import SimulatedFleet

__all__ = [
    "AUTO_MODEL",
    "DATA_CLASSES",
    "DEFAULT_ENDPOINTS",
    "SELF_HOSTED_PROVIDERS",
    "AliasConfig",
    "BudgetConfig",
    "CacheAffinityConfig",
    "FallbackConfig",
    "FleetConfig",
    "GatewayConfig",
    "KeyConfig",
    "LongContextPrices",
    "ModelCapabilities",
    "ModelConfig",
    "OtlpConfig",
    "PolicyConfig",
    "PolicyRule",
    "ProviderType",
    "RateLimitsConfig",
    "RouteRuleConfig",
    "RouteStrategy",
    "SLOConfig",
    "ScoringWeights",
    "SemanticCacheConfig",
    "ShadowConfig",
    "StageConfig",
    "TelemetryConfig",
    "TenantConfig",
    "TraceStoreConfig",
]

AUTO_MODEL = "auto"
"""The model name with which a client leaves the choice to the pipeline."""

DATA_CLASSES = ("public", "internal", "confidential", "restricted")
"""The data classes of a request, from the least to the most sensitive."""

SELF_HOSTED_PROVIDERS = frozenset({"vllm", "sglang", "llama_cpp", "ollama", "tgi", "triton", "mock"})
"""Providers whose engines run where their operator put them; a model of theirs is private unless it says otherwise."""

DEFAULT_ENDPOINTS = {"anthropic": "https://api.anthropic.com"}
"""Where a provider is, for a model that does not say."""


class RouteStrategy(enum.StrEnum):
    """The strategies kvfleet brings, for programs that would rather not spell them; plugins bring more."""

    STATIC = "static"
    WEIGHTED = "weighted"
    RULES = "rules"
    COST_FIRST = "cost_first"
    LATENCY_FIRST = "latency_first"
    QUALITY_FIRST = "quality_first"
    CHEAP_CASCADE = "cheap_cascade"
    HYBRID_SCORE = "hybrid_score"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    SEMANTIC = "semantic"
    DOMAIN = "domain"
    EPSILON_GREEDY = "epsilon_greedy"
    UCB1 = "ucb1"
    THOMPSON_SAMPLING = "thompson_sampling"
    EXP3 = "exp3"
    BANDIT = "bandit"  # the short names: epsilon_greedy, ucb1, thompson_sampling
    LEARNED = "learned"
    THOMPSON = "thompson"


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


_URL = r"https?://[^\s/?#@]+(?:/[^\s?#]*)?"
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
        """Every endpoint of the model, its first one first, without repeats."""
        return tuple(dict.fromkeys(e for e in (self.endpoint, *self.replicas) if e))

    @property
    def is_self_hosted(self) -> bool:
        """True if the engine runs where the operator put it."""
        return self.provider in SELF_HOSTED_PROVIDERS

    @property
    def is_private(self) -> bool:
        """True if no third party sees the prompt: declared so, or self-hosted."""
        return self.is_self_hosted if self.private is None else self.private


@attrs.frozen(kw_only=True)
class ScoringWeights:
    """How much each dimension counts in `hybrid_score`."""

    cost: float = number(0.3, ge=0, le=1, doc="Weight of the price.")
    latency: float = number(0.3, ge=0, le=1, doc="Weight of the expected time.")
    quality: float = number(0.3, ge=0, le=1, doc="Weight of the quality.")
    cache_affinity: float = number(
        0.1, ge=0, le=1, doc="Weight of the prompt's part already in the replica's KV cache."
    )
    hardware_load: float = number(0.0, ge=0, le=1, doc="Weight of the replica's free capacity.")
    compliance: float = number(0.0, ge=0, le=1, doc="Weight of the model's clearance for the request's data class.")
    capacity: float = number(0.0, ge=0, le=1, doc="Weight of what is left of the replica's rate limits.")


@attrs.frozen(kw_only=True)
class FallbackConfig:
    """What happens after a failed attempt."""

    enabled: bool = flag(True, doc="Try another candidate after a failure.")
    max_attempts: int = number(3, ge=1, le=20, doc="Most backend calls for one request.")
    timeout_ms: float = number(10_000, gt=0, unit="ms", doc="Longest wait for a stream's first token in one attempt.")
    promote_on_timeout: bool = flag(True, doc="A timeout also moves on to the next candidate.")
    fallback_order: tuple[str, ...] = listing(
        (), doc="Models to try after the first choice, in this order; the ranking's order if empty.", refers_to="model"
    )
    backoff_ms: float = number(100, gt=0, unit="ms", doc="First wait before the same replica is asked again.")
    longest_wait_ms: float = number(
        5000, ge=0, unit="ms", doc="Longest such wait, also where a backend asks for it; else the client is told."
    )
    retry_ratio: float = number(0.2, ge=0, le=10, doc="Retries for each request: of a model, and of the fleet.")
    min_retries_per_second: float = number(
        3.0, ge=0, doc="Retries that are made in any case, of a model and of the fleet."
    )
    continue_streams: bool = flag(
        doc="Have another replica of the model go on with a stream that breaks, where its engine can and it is safe."
    )


@attrs.frozen(kw_only=True)
class RateLimitsConfig:
    """What providers allow, and when to go elsewhere; what their answers tell of their limits is known without it."""

    default_rpm: int = number(
        0,
        ge=0,
        unit="requests",
        doc="Requests a minute that a backend allows whose model sets no `rpm`; no limit if 0.",
    )
    default_tpm: int = number(0, ge=0, unit="tokens", doc="Tokens a minute, likewise.")
    throttle_threshold: float = number(
        0.85, gt=0, le=1, doc="Share of a limit from which on a replica is left to others; used only if nobody is free."
    )
    cooldown_seconds: float = number(
        10,
        gt=0,
        unit="s",
        doc="How long a replica that refused (429) without saying for how long is left alone; twice as long each "
        "further time, until it answers.",
    )


@attrs.frozen(kw_only=True)
class CacheAffinityConfig:
    """Sending a request where its prompt is already in the KV cache."""

    enabled: bool = flag(True, doc="Know and use which replica served a prompt's beginning.")
    session_ttl_seconds: float = number(3600, gt=0, unit="s", doc="How long a conversation stays bound to its replica.")
    prefix_hash_tokens: int = number(128, ge=1, unit="tokens", doc="Tokens of a prompt's beginning that identify it.")
    min_affinity_score: float = number(0.3, ge=0, le=1, doc="Affinity below this counts as none.")
    consistent_hash_replicas: int = number(150, ge=1, doc="Virtual nodes of each replica on the hash ring.")


@attrs.frozen(kw_only=True)
class ShadowConfig:
    """Sending answered requests to other models too, to compare."""

    enabled: bool = flag(doc="Mirror requests.")
    shadow_models: tuple[str, ...] = listing((), doc="Models to mirror to.", refers_to="model")
    sample_rate: float = number(0.1, ge=0, le=1, doc="Share of the answered requests that is mirrored.")
    log_outputs: bool = flag(doc="Keep prompts and answers with the comparisons. Off unless you need them.")
    compare_outputs: bool = flag(doc="Compute how alike the answers are.")
    exclusive: bool = flag(doc="Keep the shadow models out of ordinary routing: they get mirrored requests only.")


@attrs.frozen(kw_only=True)
class SemanticCacheConfig:
    """Answering from memory what was answered before."""

    enabled: bool = flag(doc="Keep answers, and give them again.")
    max_size: int = number(10_000, ge=1, unit="answers", doc="Most answers kept; the least recently used go first.")
    ttl_seconds: float = number(3600, gt=0, unit="s", doc="How long an answer is kept.")
    similarity_threshold: float = number(0.85, ge=0, le=1, doc="Least similarity of a question that asks the same.")
    any_temperature: bool = flag(doc="Also keep answers to requests whose `temperature` is not 0.")


@attrs.frozen(kw_only=True)
class PolicyRule:
    """One rule: if the condition holds for the request, the action restricts the candidates."""

    name: str = text(doc="The rule's name, as traces and errors show it.")
    description: str = text("", doc="Why the rule exists.")
    condition: str = text(doc="When it applies.", example="data_class == confidential")
    action: str = text(doc="What it does: `require_private`, `require_model`, `block`, `allow`, or a plugin's action.")
    target_models: tuple[str, ...] = listing((), doc="The models the action speaks of.", refers_to="model")
    priority: int = number(100, doc="Rules with lower numbers are applied first.")


@attrs.frozen(kw_only=True)
class PolicyConfig:
    """Who may see what."""

    enabled: bool = flag(doc="Apply the policy.")
    pii_detection: bool = flag(doc="Look for personal data, and keep it on private models.")
    default_data_class: str = choice("internal", of=DATA_CLASSES, doc="Data class of a request that names none.")
    rules: tuple[PolicyRule, ...] = listing((), doc="Rules, applied by priority.")


@attrs.frozen(kw_only=True)
class BudgetConfig:
    """What may be spent: by the month, by one request, by the minute."""

    enabled: bool = flag(doc="Hold requests to it.")
    monthly_budget_usd: float = number(1000.0, ge=0, unit="usd", doc="Most that a calendar month (UTC) may cost.")
    per_request_max_usd: float | None = number(
        1.0, gt=0, unit="usd", doc="Candidates with which one request could cost more are dropped."
    )
    alert_threshold_pct: float = number(
        80.0, gt=0, le=100, unit="%", doc="Share of the month's money at which an alert is logged and counted."
    )
    throttle_on_exceed: bool = flag(True, doc="Refuse requests beyond the month's money; else only alert.")
    requests_per_minute: int | None = number(None, ge=1, unit="requests", doc="Most requests in any minute.")
    tokens_per_minute: int | None = number(
        None, ge=1, unit="tokens", doc="Most tokens, of prompts and answers, in any minute."
    )
    unknown_price: str = choice(
        "refuse",
        of=("refuse", "allow"),
        doc="A model whose price nobody knows: refused when the fleet is checked, or used and counted as `unpriced`.",
    )


@attrs.frozen(kw_only=True)
class SLOConfig:
    """What every answer of the fleet is to keep to; `null` takes one of the limits away."""

    enabled: bool = flag(doc="Hold the fleet to it.")
    target_p95_latency_ms: float | None = number(
        5000.0, gt=0, unit="ms", doc="Time to an answer; who takes longer 5 times in 100 is left to others."
    )
    max_cost_per_request: float | None = number(
        0.1, gt=0, unit="usd", doc="Candidates with which a request may cost more are dropped."
    )
    min_quality_score: float | None = number(0.5, ge=0, le=1, doc="Models that are less good are dropped.")
    load_shed_threshold: float | None = number(
        0.9, gt=0, le=1, doc="Load from which on an engine gets no more requests; a 429 if all have reached it."
    )


@attrs.frozen(kw_only=True)
class TenantConfig:
    """What one tenant may use, and prefers."""

    name: str = text("", doc="The tenant's name for people.")
    preferred_models: tuple[str, ...] = listing((), doc="Use these if any of them is left.", refers_to="model")
    blocked_models: tuple[str, ...] = listing((), doc="Never use these.", refers_to="model")
    allowed_data_classes: tuple[str, ...] = listing(
        ("public", "internal"), of=DATA_CLASSES, doc="Data classes this tenant may send.", example=["public"]
    )
    region: str = text("", doc="The region its requests come from, if the request does not say.")
    strategy: str = text(
        "",
        doc="The strategy for its requests, behind a request's own or its alias's; the pipeline's if empty.",
    )
    max_cost_per_request: float | None = number(
        None, gt=0, unit="usd", doc="Candidates with which a request is expected to cost more are dropped."
    )
    max_latency_ms: float | None = number(
        None, gt=0, unit="ms", doc="Candidates whose typical time to an answer is longer are dropped."
    )
    budget: BudgetConfig = section(BudgetConfig, doc="What the tenant may spend.")


@attrs.frozen(kw_only=True)
class RouteRuleConfig:
    """One rule of the `rules` strategy: if all conditions hold, the target model comes first."""

    name: str = text(doc="The rule's name, as traces show it.")
    condition: Mapping[str, str] = mapping(
        doc="What must hold: `tags.X`, `data_class`, `tenant`.", example={"tags.domain": "coding"}
    )
    target_model: str = text(doc="The model that comes first.", refers_to="model")
    priority: int = number(100, doc="Rules with lower numbers are tried first.")


@attrs.frozen(kw_only=True)
class AliasConfig:
    """A model name of the fleet's own: clients ask for it, the pipeline chooses behind it."""

    models: tuple[str, ...] = listing((), doc="The models it may stand for; all if empty.", refers_to="model")
    strategy: str = text("", doc="The strategy for requests under this name; the pipeline's own if empty.")


@attrs.frozen(kw_only=True)
class KeyConfig:
    """One of the gateway's keys: whose it is, what it opens, and what may be spent with it.

    Give either `key` or `sha256`.
    """

    key: str = secret(doc="The key that clients send as a bearer token.")
    sha256: str = text(
        "",
        doc="The key's SHA-256 instead, so that the file holds no key; the key must be long and random.",
        pattern=r"|(?:sha256:)?[0-9A-Fa-f]{64}",
        pattern_doc="64 hexadecimal digits",
    )
    tenant: str = text("", doc="The tenant whose requests it makes; if empty, those of none.")
    role: str = choice(
        "client",
        of=("client", "admin"),
        doc="`client` asks, for its tenant alone, and sees its own statements; `admin` asks for any tenant and sees "
        "everything.",
    )
    budget: BudgetConfig = section(BudgetConfig, doc="What may be spent with it.")
    max_concurrent: int = number(0, ge=0, unit="requests", doc="Most of its requests in flight; no limit if 0.")


@attrs.frozen(kw_only=True)
class AdminConfig:
    """A listener of the operators' own: metrics, dashboard and reload leave the clients' listener for it."""

    host: str = text(
        "127.0.0.1",
        doc="Address to listen on, for this and for `telemetry.prometheus_port`; loopback unless you say so.",
    )
    port: int | None = number(
        None, ge=0, le=65535, doc="Port to listen on, 0 for any free one; if null, operators use the clients' listener."
    )


@attrs.frozen(kw_only=True)
class GatewayConfig:
    """The HTTP face."""

    host: str = text("127.0.0.1", doc="Address to listen on; loopback unless you say otherwise.")
    port: int = number(8000, ge=0, le=65535, doc="Port to listen on; 0 takes any free one.")
    admin: AdminConfig = section(AdminConfig, doc="A listener of the operators' own.")
    watch: bool = flag(doc="Reload when this file changes, or a file that a secret in it is read from.")
    api_key: str = secret(
        doc="Key that clients must send as a bearer token, or `sha256:` and its digest; none is asked for if empty."
    )
    api_keys: Mapping[str, str] = mapping(
        doc="Further keys, by a name that logs may show; a key named as a tenant is that tenant's. Values are secrets.",
        example={"team-a": "env:TEAM_A_KEY"},
        is_secret=True,
    )
    keys: Mapping[str, KeyConfig] = mapping(
        doc="Keys with a tenant, a role, a budget or limits of their own, by a name that logs and statements show.",
        example={"ml-ci": {"key": "env:ML_CI_KEY", "tenant": "team-ml", "max_concurrent": 4}},
    )
    cors_origins: tuple[str, ...] = listing((), doc="Origins allowed to call from a browser; none by default.")
    allowed_hosts: tuple[str, ...] = listing(
        (),
        doc="Names under which a gateway without keys on the loopback may be called, beside the loopback's own; a "
        "request whose `Host` is another is refused. With keys every name is allowed.",
        example=["gateway.test"],
    )
    passthrough_headers: tuple[str, ...] = listing(
        (), doc="Request headers passed on to the backend.", example=["X-Correlation-ID"]
    )
    strategy_header: str = text("X-KVFleet-Strategy", doc="Header with which a request asks for a strategy.")
    model_allowlist_header: str = text("X-KVFleet-Models", doc="Header with which a request narrows the models.")
    timeout_header: str = text("X-KVFleet-Timeout", doc="Header with a request's own deadline in milliseconds.")
    tenant_header: str = text("", doc="Header that names the tenant; off if empty.", example="X-Tenant-ID")
    data_class_header: str = text("X-KVFleet-Data-Class", doc="Header that names the request's data class.")
    region_header: str = text("X-KVFleet-Region", doc="Header that names the request's source region.")
    session_header: str = text("X-Session-ID", doc="Header that names the conversation.")
    response_id: str = choice(
        "request",
        of=("request", "backend"),
        doc="Whose identifier an answer's `id` is: the request's, as in `X-Request-ID`, or its backend's own.",
    )
    limits: ClientLimits = section(ClientLimits, doc="How large requests may be, and how slow clients.")
    request_timeout_seconds: float | None = number(
        None, gt=0, unit="s", doc="Longest a request may take, its whole stream included; no limit if absent."
    )
    max_body_bytes: int = number(20 * 1024 * 1024, gt=0, unit="bytes", doc="Largest request body.")
    max_concurrent: int = number(0, ge=0, unit="requests", doc="Most requests in flight; no limit if 0.")


@attrs.frozen(kw_only=True)
class TraceStoreConfig:
    """The local store behind `kvfleet trace`."""

    enabled: bool = flag(True, doc="Keep traces of a running gateway.")
    path: str = text("", doc="The SQLite file; in the user's state directory if empty.")
    max_megabytes: float = number(256, ge=1, doc="Largest size of the file; the oldest traces go first.")
    max_age_days: float = number(7, gt=0, doc="Oldest trace kept.")


@attrs.frozen(kw_only=True)
class OtlpConfig:
    """OpenTelemetry export. The standard `OTEL_*` variables work too; what is written here wins."""

    endpoint: str = text(
        "",
        doc="OTLP/HTTP collector, as in `http://127.0.0.1:4318`; no export if empty.",
        pattern=_URL,
        pattern_doc="an http:// or https:// URL",
    )
    headers: Mapping[str, str] = mapping(doc="Headers for the collector; values may be secrets.", is_secret=True)
    service_name: str = text("kvfleet", doc="`service.name` of the exported spans.")
    sample_ratio: float = number(1.0, ge=0, le=1, doc="Share of routes exported, unless the caller decided already.")


@attrs.frozen(kw_only=True)
class TelemetryConfig:
    """What is measured, and where it goes."""

    prometheus_enabled: bool = flag(True, doc="Serve `/metrics` on the gateway.")
    prometheus_port: int | None = number(None, ge=0, le=65535, doc="Serve metrics on a port of their own too.")
    health_check_interval_seconds: float = number(30, gt=0, unit="s", doc="Time between health checks of a replica.")
    load_poll_interval_seconds: float = number(1, gt=0, unit="s", doc="Time between readings of a replica's metrics.")
    structured_logs: bool = flag(doc="Log JSON lines instead of plain text.")
    log_route_decisions: bool = flag(doc="Log one line for each route.")
    capture_content: bool = flag(doc="Put prompts and answers into traces. Off unless you need it.")
    otlp: OtlpConfig = section(OtlpConfig, doc="OpenTelemetry export.")
    trace_store: TraceStoreConfig = section(TraceStoreConfig, doc="The local store behind `kvfleet trace`.")


@attrs.frozen(kw_only=True)
class StageConfig:
    """One entry of `pipeline:`, written `- filter.health` or `{use, name, on_error, with}`.

    Attributes:
        use: The component: ``kind.name``, or ``select``/``execute`` alone for their usual ones.
        name: A name of its own in traces, if it is used twice.
        on_error: ``fail`` or ``skip``; empty for the kind's default.
        options: What stands under ``with:``, still as written; the component's class checks it at build.
        path: Where the entry stands in the file.
    """

    use: str
    name: str = ""
    on_error: str = ""
    options: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    path: tuple[str | int, ...] = ()


@attrs.frozen(kw_only=True)
class FleetConfig:
    """A whole fleet file."""

    fleet_name: str = text("default", doc="The fleet's name in traces and metrics.")
    models: tuple[ModelConfig, ...] = listing((), doc="The models and where they run.", ge=1)
    strategy: str = text(
        "hybrid_score",
        doc="How the best candidate is chosen; `kvfleet components` lists the strategies. A file that names none gets "
        "`expected_latency` if its models are self-hosted and alike in quality and price.",
    )
    scoring_weights: ScoringWeights = section(ScoringWeights, doc="Weights of `hybrid_score`.")
    default_model: str = text("", doc="The model of the `static` strategy.", refers_to="model")
    route_rules: tuple[RouteRuleConfig, ...] = listing((), doc="Rules of the `rules` strategy.")
    domain_models: Mapping[str, str] = mapping(
        doc="The model of the `domain` strategy for each domain.", example={"coding": "deepseek-coder"}
    )
    fallback: FallbackConfig = section(FallbackConfig, doc="What happens after a failed attempt.")
    health: HealthConfig = section(HealthConfig, doc="When a replica is left alone, and how it comes back.")
    overload: OverloadConfig = section(OverloadConfig, doc="More requests than the fleet can serve.")
    rate_limits: RateLimitsConfig = section(RateLimitsConfig, doc="What providers allow, and when to go elsewhere.")
    cache_affinity: CacheAffinityConfig = section(CacheAffinityConfig, doc="Use of the replicas' KV caches.")
    shadow: ShadowConfig = section(ShadowConfig, doc="Mirroring requests to other models.")
    semantic_cache: SemanticCacheConfig = section(SemanticCacheConfig, doc="Answers from memory.")
    policy: PolicyConfig = section(PolicyConfig, doc="Who may see what.")
    budget: BudgetConfig = section(BudgetConfig, doc="What the whole fleet may spend, all tenants together.")
    slo: SLOConfig = section(SLOConfig, doc="What every answer is to keep to.")
    tenants: Mapping[str, TenantConfig] = mapping(doc="Tenants, by the identifier requests carry.")
    aliases: Mapping[str, AliasConfig] = mapping(
        doc="Model names of the fleet's own.", example={"fast": {"strategy": "latency_first"}}
    )
    gateway: GatewayConfig = section(GatewayConfig, doc="The HTTP face.")
    telemetry: TelemetryConfig = section(TelemetryConfig, doc="What is measured, and where it goes.")
    pipeline: tuple[StageConfig, ...] = listing((), doc="The stages, in order; made from the sections above if absent.")
    tests: tuple[Mapping[str, Any], ...] = listing((), doc="Tests of the pipeline, run by `kvfleet test`.")
    simulation: SimulatedFleet = section(SimulatedFleet, doc="The engines of `kvfleet replay`.")
    origin: Origin = attrs.field(default=NOWHERE, eq=False, repr=False)
