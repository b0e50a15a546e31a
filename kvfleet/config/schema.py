"""The vocabulary of a fleet file: plain frozen data, no behaviour beyond what a field means.

Every field describes itself (see `kvfleet.config.fields`); validation, the JSON Schema and the reference page are made
from these descriptions. Options of components live with the components. Models (`kvfleet.config.models`), who asks
(`kvfleet.config.access`) and what is measured (`kvfleet.config.measuring`) have files of their own, and are imported
from here all the same.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.config.access import AdminConfig, BudgetConfig, GatewayConfig, KeyConfig, TenantConfig
from kvfleet.config.fields import choice, flag, listing, mapping, number, section, text
from kvfleet.config.health import HealthConfig
from kvfleet.config.measuring import OtlpConfig, TelemetryConfig, TraceStoreConfig
from kvfleet.config.models import (
    DATA_CLASSES,
    DEFAULT_ENDPOINTS,
    SELF_HOSTED_PROVIDERS,
    LongContextPrices,
    ModelCapabilities,
    ModelConfig,
    ProviderType,
)
from kvfleet.config.origin import NOWHERE, Origin
from kvfleet.config.overload import OverloadConfig
from kvfleet.config.simulation import SimulatedFleet

__all__ = [
    "AUTO_MODEL",
    "DATA_CLASSES",
    "DEFAULT_ENDPOINTS",
    "SELF_HOSTED_PROVIDERS",
    "AdminConfig",
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
