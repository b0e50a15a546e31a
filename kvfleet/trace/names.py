"""Every span and attribute name kvfleet writes, in one table, from which the reference page is made.

Names are public API. Names under ``gen_ai.``, ``server.``, ``http.`` and ``error.`` are OpenTelemetry's own (GenAI
semantic conventions, in development: https://opentelemetry.io/docs/specs/semconv/gen-ai/).
"""

from __future__ import annotations

import attrs

__all__ = ["ATTRIBUTES", "SPANS", "Attribute", "SpanName"]


@attrs.frozen
class SpanName:
    """One kind of span: its name (a pattern), OpenTelemetry kind, and meaning."""

    name: str
    kind: str
    doc: str


@attrs.frozen
class Attribute:
    """One attribute: its name, the spans it stands on, its type, its unit if it has one, and its meaning."""

    name: str
    span: str
    type: str
    doc: str
    unit: str = ""


ROUTE_SPAN = "kvfleet.route"
STAGE_PREFIX = "kvfleet."

SPANS = (
    SpanName(
        ROUTE_SPAN, "server (in the gateway) or internal", "One request, from its arrival to the end of its answer."
    ),
    SpanName(
        "kvfleet.<kind>.<component>",
        "internal",
        "One stage of the pipeline; `kvfleet.select.<strategy>` for the choice.",
    ),
    SpanName("<operation> <model>", "client", "One attempt: one call to one replica."),
)

_table: list[Attribute] = []


def _name(name: str, span: str, type_: str, doc: str, unit: str = "") -> str:
    _table.append(Attribute(name, span, type_, doc, unit))
    return name


# The route
REQUEST_ID = _name(
    "kvfleet.request.id", "route", "string", "The request's identifier, the caller's own if it sent one."
)
OPERATION = _name("kvfleet.operation", "route", "string", "chat, completion, embedding or rerank.")
MODEL_REQUESTED = _name(
    "kvfleet.model.requested", "route", "string", "The model the caller asked for; `auto` leaves it open."
)
STREAM = _name("kvfleet.stream", "route", "bool", "True if a stream was asked for.")
TENANT = _name("kvfleet.tenant", "route", "string", "The tenant, if known.")
KEY = _name("kvfleet.key", "route", "string", "The name of the gateway's key the request came with; never the key.")
DATA_CLASS = _name("kvfleet.data_class", "route", "string", "The request's data class.")
REGION = _name("kvfleet.region", "route", "string", "The request's source region, if known.")
FLEET = _name("kvfleet.fleet", "route", "string", "The fleet's name.")
PIPELINE_HASH = _name(
    "kvfleet.pipeline.hash", "route", "string", "Tells one version of the configuration from another."
)
SEED = _name("kvfleet.seed", "route", "int", "Seed of the decision's random choices.")
DRY_RUN = _name("kvfleet.dry_run", "route", "bool", "True for a simulated decision; absent otherwise.")
CANDIDATES = _name("kvfleet.candidates", "route", "string[]", "Replicas (`model@endpoint`) the route began with.")
STRATEGY = _name("kvfleet.strategy", "route", "string", "The strategy that ranked the candidates.")
STRATEGY_OVERRIDDEN = _name(
    "kvfleet.strategy.overridden", "route", "bool", "True if the request asked for that strategy."
)
MODEL_SELECTED = _name("kvfleet.model.selected", "route", "string", "The model ranked first.")
REPLICA_SELECTED = _name("kvfleet.replica.selected", "route", "string", "The replica ranked first.")
MODEL_SERVED = _name("kvfleet.model.served_by", "route", "string", "The model that answered.")
REPLICA_SERVED = _name("kvfleet.replica.served_by", "route", "string", "The replica that answered.")
OUTCOME = _name(
    "kvfleet.outcome", "route", "string", "answered, cached, simulated, refused, no_candidates, failed or cancelled."
)
STATUS_CODE = _name("http.response.status_code", "route, attempt", "int", "HTTP status of the answer.")
ERROR_TYPE = _name("error.type", "route, stage, attempt", "string", "Error code of the route, or fault of the attempt.")
TTFB_S = _name(
    "kvfleet.time_to_first_byte", "route, attempt", "double", "From the start to the first byte of the answer.", "s"
)
COST_USD = _name("kvfleet.cost", "route", "double", "What the answer cost; absent if a price is unknown.", "usd")
PROMPT = _name("kvfleet.content.prompt", "route", "string", "The prompt, only under `telemetry.capture_content`.")
ANSWER = _name("kvfleet.content.answer", "route", "string", "The answer, only under `telemetry.capture_content`.")
SHADOW_REPLICAS = _name(
    "kvfleet.shadow.replicas", "route", "string[]", "Replicas the answered request is mirrored to; absent for none."
)
SHADOW_EXCLUDED = _name(
    "kvfleet.shadow.excluded",
    "route",
    "string[]",
    "Shadow models a sampled request is not mirrored to, and why, as `model: reason [stage]`.",
)

JUDGE_SAMPLED = _name(
    "kvfleet.judge.sampled", "route", "bool", "True if the answer is graded once it has left; absent otherwise."
)

# Stages
STAGE_KIND = _name(
    "kvfleet.stage.kind",
    "stage",
    "string",
    "classify, answer, filter, affinity, score, select, execute, observe or admit.",
)
STAGE_NAME = _name("kvfleet.stage.name", "stage", "string", "The stage's name in the pipeline.")
STAGE_SKIPPED = _name(
    "kvfleet.stage.skipped", "stage", "bool", "True if it failed and the pipeline went on without it."
)
STAGE_POLICY = _name(
    "kvfleet.stage.policy", "stage", "bool", "True for a stage that must hold and is never skipped; absent otherwise."
)
CANDIDATES_IN = _name("kvfleet.candidates.in", "stage", "int", "Candidates before the stage.")
CANDIDATES_OUT = _name("kvfleet.candidates.out", "stage", "int", "Candidates after the stage.")
FACT_PREFIX = "kvfleet.fact."
_name("kvfleet.fact.<fact>", "classify", "any", "What was found, never the text it was found in.")
_name("kvfleet.fact.<fact>.<detail>", "classify", "any", "More of what was found, such as a route's `similarity`.")
DROPPED = _name("kvfleet.dropped.candidates", "filter", "string[]", "Replicas dropped here.")
DROPPED_REASONS = _name("kvfleet.dropped.reasons", "filter", "string[]", "Why, one for each.")
DROPPED_RULES = _name("kvfleet.dropped.rules", "filter", "string[]", "By which rule, one for each; empty for none.")
PANIC = _name(
    "kvfleet.health.panic",
    "filter",
    "string[]",
    "Models of which so few replicas may be called that all are (`health.panic_threshold_percent`).",
)
SCORED = _name(
    "kvfleet.score.candidates",
    "affinity, score, select",
    "string[]",
    "Replicas in the order of the values; best first for select.",
)
SCORE_COLUMN = _name("kvfleet.score.column", "score", "string", "The column's name.")
SCORE_UNIT = _name("kvfleet.score.unit", "score, select", "string", "s, usd, utility or tokens.")
SCORE_VALUES = _name(
    "kvfleet.score.values", "affinity, score, select", "double[]", "One for each replica; for affinity in tokens."
)
SCORE_MODES = _name(
    "kvfleet.affinity.modes",
    "affinity",
    "string[]",
    "How each is known: exact, degraded, approximate, observed or none.",
)
SCORE_REASONS = _name(
    "kvfleet.affinity.reasons",
    "affinity",
    "string[]",
    "Mode and reason of each replica that tells of its cache and is not known exactly, as `kvfleet fleet` has them;"
    " empty for the others. Absent where there is no such replica.",
)
TERM_PREFIX = "kvfleet.term."
_name("kvfleet.term.<term>", "select", "double[]", "One part of the totals, one for each replica.")
INSTEAD_PREFIX = "kvfleet.instead."
_name("kvfleet.instead.<choice>", "select", "double", "What another choice would have come to, in the totals' unit.")
SELECT_MODE = _name(
    "kvfleet.select.mode",
    "select",
    "string",
    "exploit, explore, a strategy's own word, or slow_start where a replica that has come back is not first yet.",
)
ANSWERED = _name("kvfleet.answer.hit", "answer", "bool", "True if the stage had the answer.")
ANSWER_MATCH = _name("kvfleet.answer.match", "answer", "string", "exact, or near for a question that asks the same.")
ANSWER_SIMILARITY = _name("kvfleet.answer.similarity", "answer", "double", "How alike the two questions are, 0 to 1.")
ANSWER_AGE_S = _name("kvfleet.answer.age", "answer", "double", "How old the answer is.", "s")
ANSWER_MODEL = _name("kvfleet.answer.model", "answer", "string", "The model that gave the answer.")
ANSWER_SAVED_PROMPT = _name(
    "kvfleet.answer.saved.input_tokens", "answer", "int", "Prompt tokens that no backend read.", "tokens"
)
ANSWER_SAVED_COMPLETION = _name(
    "kvfleet.answer.saved.output_tokens", "answer", "int", "Answer tokens that no backend wrote.", "tokens"
)
ANSWER_SAVED_USD = _name(
    "kvfleet.answer.saved.cost", "answer", "double", "What the answer cost when it was made, if that is known.", "usd"
)
ADMITTED = _name("kvfleet.admit.granted", "admit", "bool", "True if the request was let in.")
REFUSAL = _name("kvfleet.admit.refusal", "admit", "string", "Why it was not.")
QUEUE_WAIT_S = _name(
    "kvfleet.queue.wait", "admit", "double", "How long the request waited for a place; absent if it did not.", "s"
)
QUEUE_AHEAD = _name("kvfleet.queue.ahead", "admit", "double", "About how many were to go before it when it came.")
PRIORITY = _name("kvfleet.priority", "admit", "int", "Its priority while it waited; the greater goes first.")
BUDGET_ACCOUNTS = _name(
    "kvfleet.budget.accounts", "admit", "string[]", "Budgets the request is held to: `fleet`, `tenant/NAME`."
)
BUDGET_RESERVED_USD = _name(
    "kvfleet.budget.reserved", "admit", "double", "Most the request may cost, held until its end.", "usd"
)
BUDGET_REMAINING_USD = _name(
    "kvfleet.budget.remaining", "admit", "double", "Left of the tightest of these budgets, less what is held.", "usd"
)
GRADE = _name(
    "kvfleet.judge.grade", "observe", "double", "How good judges found the answer, 0 to 1; absent if unknown."
)
GRADE_REASON = _name("kvfleet.judge.reason", "observe", "string", "Which judge decided, and why; never content.")
GRADE_TAUGHT = _name("kvfleet.judge.taught", "observe", "bool", "True if a strategy that learns has learned it.")
RETRY_AFTER_S = _name(
    "kvfleet.retry_after", "filter, admit, attempt", "double", "Seconds after which to try again.", "s"
)

# Attempts
ATTEMPT = _name("kvfleet.attempt", "attempt", "int", "1 for the first attempt.")
ATTEMPT_REASON = _name(
    "kvfleet.attempt.reason",
    "attempt",
    "string",
    "Why this attempt was made: first, the fault of the one before, low_confidence in its answer, continuation of its "
    "stream, or for a judge: sample, judge.",
)
CONFIDENCE_THRESHOLD = _name(
    "kvfleet.confidence.threshold",
    "route",
    "double",
    "Confidence from which on an answer is given (`execute.escalate`).",
)
CONFIDENCE_ATTEMPTS = _name("kvfleet.confidence.attempts", "route", "int[]", "Attempts whose answers were judged.")
CONFIDENCE_VALUES = _name(
    "kvfleet.confidence.values", "route", "double[]", "How far each was trusted, 0 to 1; -1 if no judge could tell."
)
CONFIDENCE_REASONS = _name(
    "kvfleet.confidence.reasons", "route", "string[]", "Which judge decided on each, and why; never content."
)
ESCALATION_STOPPED = _name(
    "kvfleet.escalation.stopped",
    "route",
    "string",
    "Why nobody else was asked: confident, unknown, nobody_left, max_attempts, deadline or cost_limit.",
)
ATTEMPT_SERVED = _name(
    "kvfleet.attempt.served_by", "route", "int", "The attempt whose answer was given; only where several made one."
)
ATTEMPT_DISCARDED = _name(
    "kvfleet.attempt.discarded",
    "attempt",
    "bool",
    "True for a stream that began and was not read on; else absent.",
)
DEADLINE_S = _name(
    "kvfleet.deadline", "route", "double", "How long the request may take, from its start; absent for no limit.", "s"
)
DEADLINE_BY = _name("kvfleet.deadline.by", "route", "string", "What set that: a header, a field, an option.")
DEADLINE_LEFT_S = _name(
    "kvfleet.deadline.left",
    "route, attempt",
    "double",
    "What was left of it: as the attempt began, or as the route ended.",
    "s",
)
LIMIT = _name(
    "kvfleet.limit", "attempt", "string", "The time limit that ended the attempt, by its option or header; else absent."
)
CONTINUED = _name(
    "kvfleet.continued", "route", "int", "How often another replica went on with a stream that broke; absent for never."
)
RETRIES_LEFT = _name(
    "kvfleet.retry.left",
    "route",
    "double",
    "Retries left in the budget of the request's model or the fleet; only where one was made.",
)
RETRY_STOPPED = _name(
    "kvfleet.retry.stopped",
    "route",
    "string",
    "Why no more was tried: final, timeout, nobody_left, max_attempts, deadline, retry_after, model_budget or "
    "fleet_budget.",
)
REDACTED = _name(
    "kvfleet.redacted", "attempt", "string[]", "Types of personal data taken out before the request left, if any was."
)
ATTEMPT_RECONNECTED = _name(
    "kvfleet.attempt.repeats", "attempt", "int", "Times the call was repeated on a fresh connection."
)
RATE_LIMIT_LEFT = _name(
    "kvfleet.rate_limit.left",
    "attempt",
    "double",
    "Share of the tightest rate limit left after this call, 0 to 1; absent if none is known.",
)
REPLICA = _name("kvfleet.replica", "attempt", "string", "The replica called.")
MODEL = _name("kvfleet.model", "attempt", "string", "The model called, by the fleet's name.")
GEN_AI_OPERATION = _name("gen_ai.operation.name", "attempt", "string", "chat, text_completion, embeddings or rerank.")
GEN_AI_PROVIDER = _name("gen_ai.provider.name", "attempt", "string", "The adapter's name.")
GEN_AI_REQUEST_MODEL = _name("gen_ai.request.model", "attempt", "string", "The model, by the engine's name.")
GEN_AI_RESPONSE_MODEL = _name("gen_ai.response.model", "attempt", "string", "The name the engine answered under.")
GEN_AI_RESPONSE_ID = _name("gen_ai.response.id", "attempt", "string", "The engine's id of the answer.")
GEN_AI_FINISH_REASONS = _name("gen_ai.response.finish_reasons", "attempt", "string[]", "Why the answer ended.")
GEN_AI_INPUT_TOKENS = _name(
    "gen_ai.usage.input_tokens", "attempt", "int", "Prompt tokens, cached ones included.", "tokens"
)
GEN_AI_OUTPUT_TOKENS = _name("gen_ai.usage.output_tokens", "attempt", "int", "Answer tokens.", "tokens")
GEN_AI_CACHED_TOKENS = _name(
    "gen_ai.usage.cache_read.input_tokens", "attempt", "int", "Prompt tokens found in the cache.", "tokens"
)
GEN_AI_CACHE_WRITTEN_TOKENS = _name(
    "gen_ai.usage.cache_creation.input_tokens",
    "attempt",
    "int",
    "Prompt tokens written to a cache that is paid for.",
    "tokens",
)
SERVER_ADDRESS = _name("server.address", "attempt", "string", "The replica's host.")
SERVER_PORT = _name("server.port", "attempt", "int", "The replica's port.")

ATTRIBUTES = tuple(_table)
