"""Every metric there is, in one table, from which the reference page is made."""

from __future__ import annotations

import attrs

__all__ = ["METRICS", "METRIC_BY_NAME", "MetricInfo"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_OVERHEAD = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@attrs.frozen
class MetricInfo:
    """One metric: its name as scraped, its type, labels, meaning, and a histogram's buckets.

    `is_read` marks a counter that somebody else keeps and that is read at each scrape.
    """

    name: str
    type: str
    labels: tuple[str, ...]
    doc: str
    buckets: tuple[float, ...] = ()
    is_read: bool = False


METRICS: tuple[MetricInfo, ...] = (
    MetricInfo("kvfleet_route_requests_total", "counter", ("strategy", "status"), "Requests, by how they ended."),
    MetricInfo(
        "kvfleet_route_latency_seconds", "histogram", ("strategy",), "From a request's start to its end.", _SECONDS
    ),
    MetricInfo(
        "kvfleet_decision_seconds", "histogram", ("strategy",), "What the stages before the call took.", _OVERHEAD
    ),
    MetricInfo(
        "kvfleet_time_to_first_byte_seconds", "histogram", ("model",), "From a request's start to its answer.", _SECONDS
    ),
    MetricInfo("kvfleet_model_selected_total", "counter", ("model",), "Decisions for a model."),
    MetricInfo("kvfleet_attempts_total", "counter", ("model", "outcome"), "Backend calls: `ok`, or the fault."),
    MetricInfo(
        "kvfleet_rate_limited_total",
        "counter",
        ("model", "endpoint"),
        "Calls that a backend refused, asking to wait: 429, or 503 with `Retry-After`.",
    ),
    MetricInfo(
        "kvfleet_fallback_triggered_total", "counter", ("from_model", "to_model"), "Moves to the next candidate."
    ),
    MetricInfo(
        "kvfleet_stream_breaks_total",
        "counter",
        ("model", "then"),
        "Streams that broke where others might go on: `continued`, or why not.",
    ),
    MetricInfo(
        "kvfleet_retries_refused_total",
        "counter",
        ("model", "budget"),
        "Retries not made because the budget of the `model` or the `fleet` was used up.",
    ),
    MetricInfo(
        "kvfleet_escalations_total",
        "counter",
        ("from_model", "to_model"),
        "Moves on for an answer that was not trusted.",
    ),
    MetricInfo(
        "kvfleet_confidence", "histogram", ("model",), "How far judges trusted a model's answers, 0..1.", _SHARES
    ),
    MetricInfo(
        "kvfleet_cache_affinity_hits_total", "counter", ("type",), "Requests sent where their prompt was known to be."
    ),
    MetricInfo(
        "kvfleet_canary_requests_total", "counter", ("model", "side", "outcome"), "What a canary is compared by."
    ),
    MetricInfo("kvfleet_canary_changes_total", "counter", ("model", "to"), "Steps, promotions and rollbacks."),
    MetricInfo(
        "kvfleet_prompt_tokens_missing_total", "counter", ("model",), "Prompts compared by bytes for want of tokens."
    ),
    MetricInfo(
        "kvfleet_prompt_tokens_miscounted_total", "counter", ("model",), "Prompts of which the engine counted others."
    ),
    MetricInfo("kvfleet_answers_total", "counter", ("stage", "hit"), "Lookups of stages that may answer at once."),
    MetricInfo("kvfleet_answer_hits_total", "counter", ("stage", "match"), "Answers from memory: `exact`, or `near`."),
    MetricInfo(
        "kvfleet_answer_saved_tokens_total", "counter", ("stage", "type"), "Tokens that no backend read or wrote."
    ),
    MetricInfo("kvfleet_answer_saved_usd_total", "counter", ("stage",), "What those answers had cost, where known."),
    MetricInfo(
        "kvfleet_embeddings_total",
        "counter",
        ("result",),
        "Prompts' vectors: made, remembered, or why not.",
    ),
    MetricInfo("kvfleet_tokens_total", "counter", ("model", "type"), "Tokens: prompt, cached (of those), completion."),
    MetricInfo("kvfleet_cost_usd_total", "counter", ("model",), "What answers cost, where prices are known."),
    MetricInfo("kvfleet_policy_blocks_total", "counter", ("rule",), "Candidates dropped by a policy rule."),
    MetricInfo("kvfleet_drops_total", "counter", ("stage", "rule"), "Candidates dropped."),
    MetricInfo("kvfleet_stage_failures_total", "counter", ("stage", "skipped"), "Stages that failed."),
    MetricInfo("kvfleet_admissions_refused_total", "counter", ("stage",), "Requests refused before any backend."),
    MetricInfo("kvfleet_queue_depth", "gauge", ("priority",), "Requests that wait for a place in the gateway."),
    MetricInfo(
        "kvfleet_queue_wait_seconds", "histogram", ("priority",), "How long those waited that got one.", _SECONDS
    ),
    MetricInfo(
        "kvfleet_queue_refusals_total",
        "counter",
        ("reason",),
        "Requests that got none: `full`, `wait` or `deadline` (it would take too long), `timeout`, `displaced`.",
    ),
    MetricInfo("kvfleet_budget_spend_usd_total", "counter", ("account",), "What was booked to a budget."),
    MetricInfo("kvfleet_budget_refusals_total", "counter", ("account", "code"), "Requests a budget refused."),
    MetricInfo("kvfleet_budget_alerts_total", "counter", ("account",), "Months in which a budget reached its alert."),
    MetricInfo("kvfleet_shadow_requests_total", "counter", ("model",), "Requests mirrored to a model."),
    MetricInfo("kvfleet_shadow_outcomes_total", "counter", ("model", "outcome"), "Mirrored calls: `ok`, or the fault."),
    MetricInfo(
        "kvfleet_shadow_skipped_total",
        "counter",
        ("reason",),
        "Sampled requests not mirrored: a filter, or a full queue.",
    ),
    MetricInfo("kvfleet_shadow_cost_usd_total", "counter", ("model",), "What mirrored calls cost; on nobody's budget."),
    MetricInfo(
        "kvfleet_reward", "histogram", ("strategy", "model"), "Rewards that a learned strategy took, 0..1.", _SHARES
    ),
    MetricInfo("kvfleet_feedback_total", "counter", ("model",), "Answers that somebody rated."),
    MetricInfo(
        "kvfleet_judge_grade", "histogram", ("model",), "How good judges found a model's answers, 0..1.", _SHARES
    ),
    MetricInfo(
        "kvfleet_judge_outcomes_total", "counter", ("outcome",), "Sampled answers: `graded`, `unknown`, `queue_full`."
    ),
    MetricInfo("kvfleet_judge_cost_usd_total", "counter", ("model",), "What judges' calls cost; on nobody's budget."),
    MetricInfo(
        "kvfleet_event_loop_lag_seconds",
        "histogram",
        ("worker",),
        "How late the event loop was: what one request's work makes others wait.",
        _OVERHEAD,
    ),
    MetricInfo(
        "kvfleet_event_loop_held_seconds",
        "histogram",
        ("worker",),
        "The part of that in which the gateway had the CPU; the rest is the machine's.",
        _OVERHEAD,
    ),
    MetricInfo(
        "kvfleet_trace_store_dropped_total", "counter", (), "Traces the local store could not take.", is_read=True
    ),
    MetricInfo(
        "kvfleet_observers_dropped_total", "counter", (), "Outcomes the observers' queue could not take.", is_read=True
    ),
    MetricInfo(
        "kvfleet_kv_events_total", "counter", ("model", "endpoint"), "Events of an engine's KV cache.", is_read=True
    ),
    MetricInfo(
        "kvfleet_kv_gaps_total", "counter", ("model", "endpoint"), "Times that such events were missing.", is_read=True
    ),
    MetricInfo(
        "kvfleet_kv_replays_total",
        "counter",
        ("model", "endpoint"),
        "Times that they were asked for again.",
        is_read=True,
    ),
    MetricInfo(
        "kvfleet_kv_losses_total",
        "counter",
        ("model", "endpoint"),
        "Times that all that was known of a cache was given up.",
        is_read=True,
    ),
    MetricInfo(
        "kvfleet_kv_restarts_total",
        "counter",
        ("model", "endpoint"),
        "Restarts of an engine, by its events.",
        is_read=True,
    ),
    MetricInfo(
        "kvfleet_kv_orphans_total",
        "counter",
        ("model", "endpoint"),
        "Blocks told of whose beginning is not known.",
        is_read=True,
    ),
    MetricInfo(
        "kvfleet_kv_unreadable_total", "counter", ("model", "endpoint"), "Events that could not be read.", is_read=True
    ),
    MetricInfo("kvfleet_kv_mode", "gauge", ("model", "endpoint", "mode"), "1 for how the KV cache is known, else 0."),
    MetricInfo("kvfleet_kv_lag_seconds", "gauge", ("model", "endpoint"), "Age of the last event when it was read."),
    MetricInfo("kvfleet_kv_blocks", "gauge", ("model", "endpoint"), "Blocks known to be in the KV cache."),
    MetricInfo("kvfleet_model_health", "gauge", ("model", "endpoint"), "1 if the replica is healthy, else 0."),
    MetricInfo(
        "kvfleet_breaker_state", "gauge", ("model", "endpoint"), "Circuit breaker: 0 closed, 1 half-open, 2 open."
    ),
    MetricInfo(
        "kvfleet_replica_share",
        "gauge",
        ("model", "endpoint"),
        "What the replica is to get of its usual share, 0..1: 0 with an open breaker, below 1 in a slow start.",
    ),
    MetricInfo(
        "kvfleet_ejections_total",
        "counter",
        ("endpoint", "cause"),
        "Breakers opened: for `calls`, `checks`, `success_rate` or `latency`; `overflow` if too many were open.",
        is_read=True,
    ),
    MetricInfo(
        "kvfleet_panic_routes_total", "counter", ("model",), "Requests while too few of its replicas were well."
    ),
    MetricInfo("kvfleet_in_flight_requests", "gauge", ("model", "endpoint"), "Our requests at the replica."),
    MetricInfo("kvfleet_model_queue_depth", "gauge", ("model", "endpoint"), "Requests waiting in the engine."),
    MetricInfo(
        "kvfleet_model_gpu_memory_pct", "gauge", ("model", "endpoint"), "Share of the engine's KV cache in use, 0..100."
    ),
    MetricInfo("kvfleet_expected_ttfb_seconds", "gauge", ("model", "endpoint"), "Expected time to a first byte, now."),
    MetricInfo(
        "kvfleet_queued_prompt_tokens",
        "gauge",
        ("model", "endpoint"),
        "Prompt tokens that our requests there wait for.",
    ),
    MetricInfo(
        "kvfleet_prefill_tokens_per_second", "gauge", ("model", "endpoint"), "Learned pace of reading a prompt."
    ),
    MetricInfo(
        "kvfleet_cache_trust", "gauge", ("model", "endpoint"), "Share of expected cached tokens that came true, 0..1."
    ),
    MetricInfo(
        "kvfleet_cache_prediction_error_tokens",
        "gauge",
        ("model", "endpoint"),
        "Mean difference between the cached tokens that were expected and those the engine reported.",
    ),
    MetricInfo(
        "kvfleet_cache_trust_alarm", "gauge", ("model", "endpoint"), "1 while too few expectations come true, else 0."
    ),
    MetricInfo(
        "kvfleet_rate_limit_capacity",
        "gauge",
        ("model", "endpoint"),
        "Share of the tightest rate limit that is left, 0..1; 0 in a cooldown, absent where no limit is known.",
    ),
    MetricInfo("kvfleet_fleet_info", "gauge", ("fleet", "strategy", "version"), "Always 1; its labels tell."),
)
"""Every metric, in the order of the reference page."""

METRIC_BY_NAME = {info.name: info for info in METRICS}
"""The same by name, as scraped."""
