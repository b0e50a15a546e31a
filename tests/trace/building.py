"""Traces for tests: realistic ones made by hand, and a strategy for any that the engine could write."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from kvfleet.trace import names
from kvfleet.trace.spans import Span, SpanKind, Status, Trace

START_NS = 1_780_000_000_123_456_789
A1, A2, B, C = (
    "llama-3-8b@http://gpu-1:8000",
    "llama-3-8b@http://gpu-2:8000",
    "llama-3-70b@http://gpu-3:8000",
    "gpt-4o@https://api.openai.com",
)


def us(micros: float) -> int:
    """A time, microseconds after the start."""
    return START_NS + round(micros * 1000)


def stage(kind: str, name: str, start_us: float, took_us: float, **attributes: Any) -> Span:
    """A stage's span; attributes by their constants' names in `kvfleet.trace.names`."""
    known = {getattr(names, key): value for key, value in attributes.items() if key.isupper()}
    return Span(
        f"{names.STAGE_PREFIX}{kind}.{name}",
        us(start_us),
        us(start_us + took_us),
        {names.STAGE_KIND: kind, names.STAGE_NAME: name, **known, **attributes.get("more", {})},
    )


def attempt(
    number: int,
    replica: str,
    start_us: float,
    took_us: float,
    *,
    reason: str = "first",
    fault: str = "",
    message: str = "",
    usage: tuple[int, int, int | None] | None = None,
    **more: Any,
) -> Span:
    """An attempt's span."""
    model = replica.partition("@")[0]
    span = Span(f"chat {model}", us(start_us), us(start_us + took_us), kind=SpanKind.CLIENT, span_id=f"{number:016x}")
    span.attributes = {
        names.ATTEMPT: number,
        names.ATTEMPT_REASON: reason,
        names.REPLICA: replica,
        names.MODEL: model,
        names.GEN_AI_OPERATION: "chat",
        names.GEN_AI_PROVIDER: "vllm",
        names.GEN_AI_REQUEST_MODEL: f"acme/{model}",
    } | {getattr(names, key): value for key, value in more.items()}
    if usage:
        span.attributes[names.GEN_AI_INPUT_TOKENS], span.attributes[names.GEN_AI_OUTPUT_TOKENS] = usage[:2]
        if usage[2] is not None:
            span.attributes[names.GEN_AI_CACHED_TOKENS] = usage[2]
    if fault:
        span.fail(message)
        span.attributes[names.ERROR_TYPE] = fault
    else:
        span.status = Status.OK
    return span


def route(
    *spans: Span,
    took_us: float,
    outcome: str,
    error: str = "",
    trace_id: str = "4f1c9a2b" + "0" * 24,
    span_id: str = "ab" * 8,
    **attributes: Any,
) -> Trace:
    """A whole trace."""
    own = Span(names.ROUTE_SPAN, START_NS, us(took_us), kind=SpanKind.SERVER, span_id=span_id)
    own.attributes = {
        names.REQUEST_ID: "req-1",
        names.OPERATION: "chat",
        names.STRATEGY: "hybrid_score",
        names.OUTCOME: outcome,
    }
    own.attributes |= {getattr(names, key): value for key, value in attributes.items()}
    if error:
        own.fail(error)
    else:
        own.status = Status.OK
    return Trace(trace_id, [own, *spans])


def page() -> Trace:
    """The decision of the documentation's example."""
    a, b, c = "llama-3-8b@http://gpu-1:8000", "llama-3-70b@http://gpu-2:8000", "gpt-4o@https://api.openai.com"
    return route(
        stage("affinity", "prefix", 1, 5, SCORED=(a, b, c), SCORE_VALUES=(0.0, 0.0, 0.0), SCORE_MODES=("none",) * 3),
        stage(
            "select",
            "hybrid_score",
            10,
            5,
            SCORED=(a, b, c),
            SCORE_VALUES=(0.75, 0.62, 0.48),
            SCORE_UNIT="utility",
            SELECT_MODE="exploit",
        ),
        attempt(1, a, 20, 400_000),
        took_us=400_100,
        outcome="answered",
        CANDIDATES=(a, b, c),
        MODEL_SELECTED="llama-3-8b",
        REPLICA_SELECTED=a,
        MODEL_SERVED="llama-3-8b",
        REPLICA_SERVED=a,
    )


def fallback() -> Trace:
    """Personal data, three replicas, a policy that drops the cloud, and a first attempt that times out."""
    return route(
        stage("classify", "prompt", 2, 40, more={names.FACT_PREFIX + "prompt": "312 tokens"}),
        stage("classify", "pii", 45, 90, more={names.FACT_PREFIX + "pii": ("email", "phone_us")}),
        stage(
            "filter",
            "policy",
            140,
            20,
            STAGE_POLICY=True,
            CANDIDATES_IN=4,
            CANDIDATES_OUT=3,
            DROPPED=(C,),
            DROPPED_REASONS=("has_pii == true: private models only",),
            DROPPED_RULES=("pii-to-private",),
        ),
        stage("filter", "tenant", 162, 9, STAGE_POLICY=True, CANDIDATES_IN=3, CANDIDATES_OUT=3),
        stage("filter", "health", 172, 8, CANDIDATES_IN=3, CANDIDATES_OUT=3),
        stage(
            "affinity",
            "prefix",
            182,
            30,
            SCORED=(A1, A2, B),
            SCORE_VALUES=(256.0, 0.0, 0.0),
            SCORE_MODES=("approximate", "none", "none"),
        ),
        stage(
            "score",
            "cost",
            214,
            10,
            SCORE_COLUMN="cost",
            SCORE_UNIT="usd",
            SCORED=(A1, A2, B),
            SCORE_VALUES=(0.0002, 0.0002, 0.0009),
        ),
        stage(
            "score",
            "latency",
            226,
            10,
            SCORE_COLUMN="latency",
            SCORE_UNIT="s",
            SCORED=(A1, A2),
            SCORE_VALUES=(0.21, 0.35),
        ),
        stage(
            "select",
            "hybrid_score",
            240,
            30,
            SCORED=(B, A1, A2),
            SCORE_VALUES=(0.75, 0.62, 0.55),
            SCORE_UNIT="utility",
            SELECT_MODE="exploit",
            more={
                names.TERM_PREFIX + "cost": (0.0, 1.0, 1.0),
                names.TERM_PREFIX + "quality": (0.9, 0.6, 0.6),
                names.TERM_PREFIX + "cache_affinity": (0.0, 1.0, 0.0),
            },
        ),
        attempt(1, B, 280, 10_000_000, fault="timeout", message="no first token within 10 s"),
        attempt(
            2,
            A1,
            10_000_300,
            402_000,
            reason="timeout",
            usage=(312, 64, 256),
            TTFB_S=0.052,
            GEN_AI_FINISH_REASONS=("stop",),
        ),
        took_us=10_402_500,
        outcome="answered",
        MODEL_REQUESTED="auto",
        STREAM=True,
        TENANT="team-ml",
        DATA_CLASS="internal",
        FLEET="gpu-fleet",
        PIPELINE_HASH="0a1b2c3d4e5f",
        SEED=7,
        CANDIDATES=(A1, A2, B, C),
        MODEL_SELECTED="llama-3-70b",
        REPLICA_SELECTED=B,
        MODEL_SERVED="llama-3-8b",
        REPLICA_SERVED=A1,
        TTFB_S=10.0524,
        COST_USD=0.00031,
        STRATEGY_OVERRIDDEN=False,
    )


def nobody() -> Trace:
    """Everybody dropped: the cloud by policy, the rest by health."""
    health = stage(
        "filter",
        "health",
        30,
        8,
        CANDIDATES_IN=2,
        CANDIDATES_OUT=0,
        DROPPED=(A1, A2),
        DROPPED_REASONS=("breaker open for 12 s", "unhealthy"),
        DROPPED_RULES=("", ""),
        RETRY_AFTER_S=12.0,
    )
    health.fail("no_candidates")
    return route(
        stage(
            "filter",
            "policy",
            5,
            20,
            STAGE_POLICY=True,
            CANDIDATES_IN=3,
            CANDIDATES_OUT=2,
            DROPPED=(C,),
            DROPPED_REASONS=("confidential data stays on private models",),
            DROPPED_RULES=("confidential",),
        ),
        health,
        took_us=60,
        outcome="no_candidates",
        error="no model may or can serve this request",
        ERROR_TYPE="no_candidates",
        STATUS_CODE=503,
        CANDIDATES=(A1, A2, C),
        DATA_CLASS="confidential",
        trace_id="9d02be11" + "0" * 24,
    )


# What the engine could write -----------------------------------------------------------------------------------------

_names = st.sampled_from([A1, A2, B, C, "m", "weird name@http://[::1]:1"])
_floats = st.floats(allow_nan=False)
_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_word = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8)
_anything = st.one_of(
    _texts,
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    _floats,
    st.lists(_texts, max_size=3).map(tuple),
    st.lists(_floats, max_size=3).map(tuple),
    st.lists(st.booleans(), max_size=3).map(tuple),
)
_STAGE_ATTRIBUTES = [
    a.name for a in names.ATTRIBUTES if "<" not in a.name and not {"route", "attempt"} & set(a.span.split(", "))
]
_ROUTE_ATTRIBUTES = [a.name for a in names.ATTRIBUTES if "route" in a.span.split(", ")]
_ATTEMPT_ATTRIBUTES = [a.name for a in names.ATTRIBUTES if "attempt" in a.span.split(", ") and a.name != names.ATTEMPT]


@st.composite
def _scored(draw: st.DrawFn) -> dict[str, Any]:
    ids = tuple(draw(st.lists(_names, unique=True, max_size=4)))
    values = tuple(draw(st.lists(_floats, min_size=len(ids), max_size=len(ids))))
    terms = draw(st.dictionaries(_word, st.lists(_floats, min_size=len(ids), max_size=len(ids)).map(tuple), max_size=2))
    unit = draw(st.sampled_from(["s", "usd", "utility", "tokens"]))
    found: dict[str, Any] = {names.SCORED: ids, names.SCORE_VALUES: values, names.SCORE_UNIT: unit}
    return found | {names.TERM_PREFIX + key: value for key, value in terms.items()}


@st.composite
def _dropped(draw: st.DrawFn) -> dict[str, Any]:
    drops = draw(st.lists(st.tuples(_names, _texts, _texts), max_size=3))
    return {
        names.DROPPED: tuple(d[0] for d in drops),
        names.DROPPED_REASONS: tuple(d[1] for d in drops),
        names.DROPPED_RULES: tuple(d[2] for d in drops),
    }


def _finish(draw: st.DrawFn, span: Span) -> Span:
    span.status = draw(st.sampled_from(list(Status)))
    if span.status is Status.ERROR:
        span.message = draw(_texts)
    return span


@st.composite
def _stage(draw: st.DrawFn, start_ns: int, end_ns: int) -> Span:
    kind = draw(st.sampled_from(["classify", "filter", "affinity", "score", "select", "admit", "answer"]))
    name = draw(_word)
    attributes = {names.STAGE_KIND: kind, names.STAGE_NAME: name}
    attributes |= draw(
        st.one_of(_scored(), _dropped(), st.dictionaries(st.sampled_from(_STAGE_ATTRIBUTES), _anything, max_size=4))
    )
    attributes |= draw(st.dictionaries(_word.map(lambda word: names.FACT_PREFIX + word), _anything, max_size=2))
    attributes |= {names.STAGE_KIND: kind, names.STAGE_NAME: name}
    return _finish(draw, Span(f"{names.STAGE_PREFIX}{kind}.{name}", start_ns, end_ns, attributes))


@st.composite
def _attempt(draw: st.DrawFn, start_ns: int, end_ns: int, number: int) -> Span:
    attributes = draw(st.dictionaries(st.sampled_from(_ATTEMPT_ATTRIBUTES), _anything, max_size=5))
    attributes |= {names.ATTEMPT: number, names.REPLICA: draw(_names)}
    span = Span(f"chat {draw(_word)}", start_ns, end_ns, attributes, kind=SpanKind.CLIENT, span_id=f"{number:016x}")
    return _finish(draw, span)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Any trace the engine could write, and worse: attributes may have any type."""
    clock = draw(st.integers(1, 2**62))
    attributes = draw(st.dictionaries(st.sampled_from(_ROUTE_ATTRIBUTES), _anything, max_size=6))
    attributes[names.CANDIDATES] = tuple(draw(st.lists(_names, unique=True, max_size=4)))
    if draw(st.booleans()):
        attributes[names.REPLICA_SELECTED] = draw(_names)
    if draw(st.booleans()):
        attributes[names.REPLICA_SERVED] = draw(_names)
    own = Span(
        names.ROUTE_SPAN, clock, kind=draw(st.sampled_from([SpanKind.SERVER, SpanKind.INTERNAL])), attributes=attributes
    )
    own.span_id = "ab" * 8
    spans = [_finish(draw, own)]
    stages, attempts = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    for place in range(stages + attempts):
        start_ns = clock + draw(st.integers(0, 10**9))
        clock = start_ns + draw(st.integers(0, 10**9))
        spans.append(draw(_stage(start_ns, clock) if place < stages else _attempt(start_ns, clock, place - stages + 1)))
    own.end_ns = clock
    parent = draw(st.sampled_from(["", "cd" * 8]))
    return Trace(f"{draw(st.integers(1, 2**128 - 1)):032x}", spans, parent)
