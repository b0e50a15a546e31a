"""The steps of a decision, read from its spans: stages, drops, attempts, candidates, policy decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from kvfleet.adapters.call import Usage
from kvfleet.trace import names
from kvfleet.trace.attributes import Attributes, count, flag, number, numbers, text, texts, with_prefix
from kvfleet.trace.spans import AttributeValue, Span, Status

__all__ = ["AttemptRecord", "CandidateScore", "Dropped", "PolicyDecision", "StageRecord", "endpoint_of", "model_of"]


def model_of(replica: str) -> str:
    """The model of a replica's id, ``model@endpoint``; names of models hold no ``@``."""
    return replica.partition("@")[0]


def endpoint_of(replica: str) -> str:
    """The endpoint of a replica's id; empty if it has none."""
    return replica.partition("@")[2]


@attrs.frozen(kw_only=True)
class Dropped:
    """One candidate that a filter dropped: by which stage, why, and by which rule (empty if the filter has none)."""

    stage: str
    candidate: str
    reason: str
    rule: str = ""

    @property
    def model(self) -> str:
        """The candidate's model."""
        return model_of(self.candidate)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return {"stage": self.stage, "candidate": self.candidate, "reason": self.reason, "rule": self.rule}


@attrs.frozen(kw_only=True)
class StageRecord:
    """One stage of the route.

    Attributes:
        kind, name: As in the pipeline.
        start_ms: Milliseconds after the start of the route.
        duration_ms: How long it took.
        candidates_in, candidates_out: How many there were before and after; None if the stage does not change that.
        facts: What a classifier found, as far as traces show it.
        drops: What a filter dropped.
        scored: Replicas with a value, in the order of `values`; best first for a choice.
        values, unit: Tokens for affinity, a column's unit for scores, the totals' unit for a choice.
        modes: How each expectation of an affinity stage is known.
        reasons: Why it is known no better; empty for those of which there is nothing to say.
        panic: Models of which a filter lets all replicas through because too few are well.
        terms: Parts of a choice's totals, by name, in the order of `scored`.
        instead: What other choices would have come to, by name, in the unit of the totals.
        mode: How the first was chosen.
        is_answer: True if the stage answered the request itself.
        match, similarity, age_s: How its answer was found, and how old it is, if the stage says so.
        refusal: Why an admission refused.
        waited_s, ahead: How long the request waited for its place, and about how many were to go before it.
        retry_after_s: When to come back after a refusal; for a filter, when the first of its drops may be back.
        grade, verdict: How good judges found the answer once it had left, 0..1, and which of them decided, and why.
        is_policy: True if the stage must hold.
        is_skipped: True if it failed and the pipeline went on without it.
        error: What went wrong; empty if nothing did.
    """

    kind: str
    name: str
    start_ms: float
    duration_ms: float
    candidates_in: int | None = None
    candidates_out: int | None = None
    facts: Mapping[str, AttributeValue] = attrs.field(factory=dict)
    drops: tuple[Dropped, ...] = ()
    scored: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    unit: str = ""
    modes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    panic: tuple[str, ...] = ()
    terms: Mapping[str, tuple[float, ...]] = attrs.field(factory=dict)
    instead: Mapping[str, float] = attrs.field(factory=dict)
    mode: str = ""
    is_answer: bool = False
    match: str = ""
    similarity: float | None = None
    age_s: float | None = None
    refusal: str = ""
    waited_s: float | None = None
    ahead: float | None = None
    retry_after_s: float | None = None
    grade: float | None = None
    verdict: str = ""
    is_policy: bool = False
    is_skipped: bool = False
    error: str = ""

    @classmethod
    def from_span(cls, span: Span, route_start_ns: int) -> StageRecord:
        """Read a stage's span."""
        a = span.attributes
        kind, name = text(a, names.STAGE_KIND), text(a, names.STAGE_NAME)
        return cls(
            kind=kind,
            name=name,
            start_ms=(span.start_ns - route_start_ns) / 1e6,
            duration_ms=span.duration_ms,
            candidates_in=count(a, names.CANDIDATES_IN),
            candidates_out=count(a, names.CANDIDATES_OUT),
            facts=with_prefix(a, names.FACT_PREFIX),
            drops=_drops(f"{kind}.{name}", a),
            scored=texts(a, names.SCORED),
            values=numbers(a, names.SCORE_VALUES),
            unit="tokens" if kind == "affinity" else text(a, names.SCORE_UNIT),
            modes=texts(a, names.SCORE_MODES),
            reasons=texts(a, names.SCORE_REASONS),
            panic=texts(a, names.PANIC),
            terms={term: numbers(a, names.TERM_PREFIX + term) for term in with_prefix(a, names.TERM_PREFIX)},
            instead={
                choice: value
                for choice in with_prefix(a, names.INSTEAD_PREFIX)
                if (value := number(a, names.INSTEAD_PREFIX + choice)) is not None
            },
            mode=text(a, names.SELECT_MODE),
            is_answer=flag(a, names.ANSWERED),
            match=text(a, names.ANSWER_MATCH),
            similarity=number(a, names.ANSWER_SIMILARITY),
            age_s=number(a, names.ANSWER_AGE_S),
            refusal=text(a, names.REFUSAL),
            waited_s=number(a, names.QUEUE_WAIT_S),
            ahead=number(a, names.QUEUE_AHEAD),
            retry_after_s=number(a, names.RETRY_AFTER_S),
            grade=number(a, names.GRADE),
            verdict=text(a, names.GRADE_REASON),
            is_policy=flag(a, names.STAGE_POLICY),
            is_skipped=flag(a, names.STAGE_SKIPPED),
            error=(span.message or text(a, names.ERROR_TYPE) or "error") if span.status is Status.ERROR else "",
        )

    @property
    def key(self) -> str:
        """``filter.health``: kind and name."""
        return f"{self.kind}.{self.name}"

    @property
    def by_replica(self) -> dict[str, float]:
        """The value of each replica that has one."""
        return dict(zip(self.scored, self.values, strict=False))

    def terms_at(self, place: int) -> dict[str, float]:
        """The parts of the total of the replica at `place` in `scored`."""
        return {term: values[place] for term, values in self.terms.items() if place < len(values)}

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types, without what is empty."""
        whole: dict[str, Any] = {
            "stage": self.key,
            "kind": self.kind,
            "name": self.name,
            "start_ms": self.start_ms,
            "duration_ms": self.duration_ms,
        }
        found = {
            "candidates_in": self.candidates_in,
            "candidates_out": self.candidates_out,
            "facts": {fact: _plain(value) for fact, value in self.facts.items()},
            "drops": [drop.to_dict() for drop in self.drops],
            "panic": list(self.panic),
            "scores": self.by_replica,
            "unit": self.unit if self.scored else "",
            "modes": dict(zip(self.scored, self.modes, strict=False)),
            "reasons": {who: why for who, why in zip(self.scored, self.reasons, strict=False) if why},
            "instead": dict(self.instead),
            "mode": self.mode,
            "answered": self.is_answer,
            "match": self.match,
            "similarity": self.similarity,
            "age_s": self.age_s,
            "refusal": self.refusal,
            "waited_s": self.waited_s,
            "ahead": self.ahead,
            "retry_after_s": self.retry_after_s,
            "grade": self.grade,
            "verdict": self.verdict,
            "policy": self.is_policy,
            "skipped": self.is_skipped,
            "error": self.error,
        }
        return whole | {key: value for key, value in found.items() if value or (value == 0 and value is not False)}


@attrs.frozen(kw_only=True)
class AttemptRecord:
    """One call to one replica.

    Attributes:
        number: 1 for the first.
        reason: Why it was made: ``first``, the fault of the one before, ``low_confidence`` in its answer, or for a
            judge's sake: ``sample``, ``judge``.
        replica, model: Who was called.
        start_ms: Milliseconds after the start of the route.
        duration_ms: Until the end of the answer.
        ttfb_s: Seconds to the first byte; None if there was none.
        fault, message: What went wrong; empty if nothing did.
        status_code: The backend's HTTP status, if it failed with one.
        usage: Tokens, if the engine told.
        finish_reasons: Why the answer ended.
        provider, engine_model: The adapter's name, and the model by the engine's name.
        response_id: The engine's id of the answer.
        repeats: Times the call was repeated on a fresh connection.
        is_discarded: True for a stream that began and was not read on.
        redacted: Types of personal data that were taken out before the request left.
        confidence: How far its answer was trusted, 0..1; None if nobody judged it, or could tell.
        verdict: Which judge decided, and why; empty if nobody judged it.
    """

    number: int
    reason: str
    replica: str
    model: str
    start_ms: float
    duration_ms: float
    ttfb_s: float | None = None
    fault: str = ""
    message: str = ""
    status_code: int | None = None
    usage: Usage | None = None
    finish_reasons: tuple[str, ...] = ()
    provider: str = ""
    engine_model: str = ""
    response_id: str = ""
    repeats: int = 0
    is_discarded: bool = False
    redacted: tuple[str, ...] = ()
    confidence: float | None = None
    verdict: str = ""

    @classmethod
    def from_span(cls, span: Span, route_start_ns: int) -> AttemptRecord:
        """Read an attempt's span."""
        a = span.attributes
        has_failed = span.status is Status.ERROR
        replica = text(a, names.REPLICA)
        return cls(
            number=count(a, names.ATTEMPT) or 0,
            reason=text(a, names.ATTEMPT_REASON),
            replica=replica,
            model=text(a, names.MODEL) or model_of(replica),
            start_ms=(span.start_ns - route_start_ns) / 1e6,
            duration_ms=span.duration_ms,
            ttfb_s=number(a, names.TTFB_S),
            fault=(text(a, names.ERROR_TYPE) or "error") if has_failed else "",
            message=span.message if has_failed else "",
            status_code=count(a, names.STATUS_CODE),
            usage=_usage(a),
            finish_reasons=texts(a, names.GEN_AI_FINISH_REASONS),
            provider=text(a, names.GEN_AI_PROVIDER),
            engine_model=text(a, names.GEN_AI_REQUEST_MODEL),
            response_id=text(a, names.GEN_AI_RESPONSE_ID),
            repeats=count(a, names.ATTEMPT_RECONNECTED) or 0,
            is_discarded=flag(a, names.ATTEMPT_DISCARDED),
            redacted=texts(a, names.REDACTED),
        )

    def judged(self, verdicts: Mapping[int, tuple[float, str]]) -> AttemptRecord:
        """The same with what the judges said of its answer, by the attempts' numbers."""
        found = verdicts.get(self.number)
        if found is None:
            return self
        return attrs.evolve(self, confidence=None if found[0] < 0 else found[0], verdict=found[1])

    @property
    def is_success(self) -> bool:
        """True if the answer came whole."""
        return not self.fault

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        plain = attrs.asdict(self, recurse=False)
        plain["usage"] = self.usage.to_openai() if self.usage else None
        plain["finish_reasons"], plain["redacted"] = list(self.finish_reasons), list(self.redacted)
        return plain


@attrs.frozen(kw_only=True)
class CandidateScore:
    """One candidate and what became of it.

    Attributes:
        id, model, endpoint: Who.
        total_score, unit: Its total in the choice's unit; None if it was not ranked.
        rank: 1 for the first choice; None if it was not ranked.
        selected: True for the first choice.
        served: True for the one that answered, or whose stream began.
        rejected_reason: Why it was not the one; empty for the one.
        terms: Parts of the total; those of the seven dimensions are utilities 0..1, and `cost_score` and its like.
        columns: What each scorer said of it: the value and its unit.
        cached_tokens: Prompt tokens expected in its cache; None if nobody looked.
    """

    id: str
    model: str
    endpoint: str
    total_score: float | None = None
    unit: str = ""
    rank: int | None = None
    selected: bool = False
    served: bool = False
    rejected_reason: str = ""
    terms: Mapping[str, float] = attrs.field(factory=dict)
    columns: Mapping[str, tuple[float, str]] = attrs.field(factory=dict)
    cached_tokens: float | None = None

    @property
    def cost_score(self) -> float | None:
        """The utility of its price; None if the strategy did not use it, as for the other six."""
        return self.terms.get("cost")

    @property
    def latency_score(self) -> float | None:
        """The utility of its expected time."""
        return self.terms.get("latency")

    @property
    def quality_score(self) -> float | None:
        """The utility of its quality."""
        return self.terms.get("quality")

    @property
    def cache_affinity_score(self) -> float | None:
        """The utility of what it has cached."""
        return self.terms.get("cache_affinity")

    @property
    def hardware_load_score(self) -> float | None:
        """The utility of its free capacity."""
        return self.terms.get("hardware_load")

    @property
    def compliance_score(self) -> float | None:
        """The utility of its clearance."""
        return self.terms.get("compliance")

    @property
    def capacity_score(self) -> float | None:
        """The utility of what is left of its rate limits."""
        return self.terms.get("capacity")

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return {
            "id": self.id,
            "model": self.model,
            "endpoint": self.endpoint,
            "total_score": self.total_score,
            "unit": self.unit,
            "rank": self.rank,
            "cost_score": self.cost_score,
            "latency_score": self.latency_score,
            "quality_score": self.quality_score,
            "cache_affinity_score": self.cache_affinity_score,
            "hardware_load_score": self.hardware_load_score,
            "compliance_score": self.compliance_score,
            "capacity_score": self.capacity_score,
            "selected": self.selected,
            "served": self.served,
            "rejected_reason": self.rejected_reason,
            "terms": dict(self.terms),
            "columns": {name: {"value": value, "unit": unit} for name, (value, unit) in self.columns.items()},
            "cached_tokens": self.cached_tokens,
        }


@attrs.frozen(kw_only=True)
class PolicyDecision:
    """What one rule of a stage that must hold did; a stage that dropped nobody passes under its own name."""

    rule: str
    passed: bool
    reason: str
    action: str = ""
    models: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return attrs.asdict(self) | {"models": list(self.models)}


def _drops(stage: str, attributes: Attributes) -> tuple[Dropped, ...]:
    candidates = texts(attributes, names.DROPPED)
    if not candidates:
        return ()
    reasons, rules = texts(attributes, names.DROPPED_REASONS), texts(attributes, names.DROPPED_RULES)
    return tuple(
        Dropped(
            stage=stage,
            candidate=candidate,
            reason=reasons[i] if i < len(reasons) else "",
            rule=rules[i] if i < len(rules) else "",
        )
        for i, candidate in enumerate(candidates)
    )


def _usage(attributes: Attributes) -> Usage | None:
    prompt = count(attributes, names.GEN_AI_INPUT_TOKENS)
    answer = count(attributes, names.GEN_AI_OUTPUT_TOKENS)
    if prompt is None and answer is None:
        return None
    cached = count(attributes, names.GEN_AI_CACHED_TOKENS)
    written = count(attributes, names.GEN_AI_CACHE_WRITTEN_TOKENS)
    return Usage(prompt or 0, answer or 0, (prompt or 0) + (answer or 0), cached, written)


def _plain(value: AttributeValue) -> Any:
    return list(value) if isinstance(value, tuple) else value
