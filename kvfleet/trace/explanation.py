"""Why a request went where it went: a view of the trace, which computes when somebody looks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Protocol

import attrs

from kvfleet.adapters.call import Usage
from kvfleet.trace import names
from kvfleet.trace.attributes import count, flag, is_attempt, is_stage, number, text, texts, verdicts_of
from kvfleet.trace.records import (
    AttemptRecord,
    CandidateScore,
    Dropped,
    PolicyDecision,
    StageRecord,
    endpoint_of,
    model_of,
)
from kvfleet.trace.spans import Status, Trace
from kvfleet.trace.wording import labels, plural, quantity

__all__ = ["Explanation", "TraceSink"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MOST_LINES = 10
_FIRST, _ESCALATED = "first", "low_confidence"
_FOR_JUDGES = ("sample", "judge")
_WORSE = {"s": "Longer expected time", "usd": "Higher price"}


class TraceSink(Protocol):
    """Takes finished traces.

    One that copies them may have `amend(trace, span)` as well, to be told of a span that came late.
    """

    def write(self, trace: Trace) -> None:
        """Take one. Never blocks, never raises."""


@attrs.frozen(slots=False)
class Explanation:
    """Why a request went where it went.

    Everything is read from the trace when first asked for, and kept.

    Attributes:
        trace: The record itself.
    """

    trace: Trace

    @property
    def request_id(self) -> str:
        """The request's identifier."""
        return text(self.trace.route.attributes, names.REQUEST_ID)

    @property
    def trace_id(self) -> str:
        """32 hex digits, the same as in ``traceparent``."""
        return self.trace.trace_id

    @property
    def timestamp(self) -> datetime:
        """When the request arrived, in UTC."""
        return _EPOCH + timedelta(microseconds=self.trace.route.start_ns // 1000)

    @property
    def strategy(self) -> str:
        """The strategy that ranked the candidates."""
        return text(self.trace.route.attributes, names.STRATEGY)

    @property
    def strategy_overridden(self) -> bool:
        """True if the request itself asked for that strategy."""
        return flag(self.trace.route.attributes, names.STRATEGY_OVERRIDDEN)

    @property
    def selected_model(self) -> str:
        """The model ranked first; empty if it did not come to a choice."""
        return text(self.trace.route.attributes, names.MODEL_SELECTED) or model_of(self.selected_replica)

    @property
    def selected_replica(self) -> str:
        """The replica ranked first, ``model@endpoint``."""
        return text(self.trace.route.attributes, names.REPLICA_SELECTED)

    @property
    def selected_endpoint(self) -> str:
        """The endpoint of the replica ranked first."""
        return endpoint_of(self.selected_replica)

    @property
    def served_by(self) -> str:
        """The model that answered; empty if none did."""
        return text(self.trace.route.attributes, names.MODEL_SERVED) or model_of(self.served_replica)

    @property
    def served_replica(self) -> str:
        """The replica that answered."""
        return text(self.trace.route.attributes, names.REPLICA_SERVED)

    @property
    def served_endpoint(self) -> str:
        """The endpoint of the replica that answered."""
        return endpoint_of(self.served_replica)

    @property
    def outcome(self) -> str:
        """How it ended: answered, cached, simulated, refused, no_candidates, failed or cancelled."""
        return text(self.trace.route.attributes, names.OUTCOME)

    @property
    def error(self) -> str:
        """What went wrong; empty if nothing did."""
        route = self.trace.route
        return (route.message or self.error_code) if route.status is Status.ERROR else ""

    @property
    def error_code(self) -> str:
        """The stable code of what went wrong; empty if nothing did."""
        return text(self.trace.route.attributes, names.ERROR_TYPE)

    @property
    def total_latency_ms(self) -> float:
        """Milliseconds from the arrival to the end of the answer."""
        return self.trace.route.duration_ms

    @property
    def ttfb_s(self) -> float | None:
        """Seconds to the first byte of the answer; None if there was none."""
        return number(self.trace.route.attributes, names.TTFB_S)

    @property
    def cost_usd(self) -> float | None:
        """What the answer cost; None if a price is unknown."""
        return number(self.trace.route.attributes, names.COST_USD)

    @cached_property
    def usage(self) -> Usage | None:
        """Tokens of the answer, if the engine told."""
        number_ = count(self.trace.route.attributes, names.ATTEMPT_SERVED)
        may_be_it = [a for a in self.attempts if number_ in (None, a.number)]
        return next((a.usage for a in reversed(may_be_it) if a.usage is not None), None)

    @cached_property
    def stages(self) -> tuple[StageRecord, ...]:
        """The stages, in order."""
        start_ns = self.trace.route.start_ns
        return tuple(StageRecord.from_span(span, start_ns) for span in self.trace.stages if is_stage(span))

    @cached_property
    def attempts(self) -> tuple[AttemptRecord, ...]:
        """The backend calls, in order."""
        start_ns = self.trace.route.start_ns
        found = [AttemptRecord.from_span(span, start_ns) for span in self.trace.stages if is_attempt(span)]
        if names.CONFIDENCE_ATTEMPTS in self.trace.route.attributes:
            verdicts = verdicts_of(self.trace)
            found = [attempt.judged(verdicts) for attempt in found]
        return tuple(sorted(found, key=lambda attempt: attempt.number))

    @cached_property
    def drops(self) -> tuple[Dropped, ...]:
        """Every candidate a filter dropped, in the order of the filters."""
        return tuple(drop for stage in self.stages for drop in stage.drops)

    @cached_property
    def choice(self) -> StageRecord | None:
        """The stage that ranked the candidates; None if it did not come to that."""
        return next((stage for stage in reversed(self.stages) if stage.kind == "select" and stage.scored), None)

    @cached_property
    def replicas(self) -> tuple[str, ...]:
        """Every candidate's id: the ranked ones best first, then those left over, then the dropped ones."""
        ranked = self.choice.scored if self.choice else ()
        dropped = {drop.candidate: None for drop in self.drops}
        began = texts(self.trace.route.attributes, names.CANDIDATES)
        left = (replica for replica in began if replica not in dropped)
        return tuple(dict.fromkeys((*ranked, *left, *dropped)))

    @cached_property
    def labels(self) -> Mapping[str, str]:
        """A short name for each candidate: its model's, with the endpoint if the model has several replicas here."""
        return labels((*self.replicas, *(attempt.replica for attempt in self.attempts)))

    @cached_property
    def candidates(self) -> tuple[CandidateScore, ...]:
        """Every candidate and what became of it, in the order of `replicas`."""
        choice = self.choice
        places = {replica: place for place, replica in enumerate(choice.scored)} if choice else {}
        totals = choice.by_replica if choice else {}
        columns = {stage.name: (stage.by_replica, stage.unit) for stage in self.stages if stage.kind == "score"}
        return tuple(
            CandidateScore(
                id=replica,
                model=model_of(replica),
                endpoint=endpoint_of(replica),
                total_score=totals.get(replica),
                unit=choice.unit if choice and replica in places else "",
                rank=places[replica] + 1 if replica in places else None,
                selected=replica == self.selected_replica,
                served=replica == self.served_replica,
                rejected_reason=self._rejected[replica],
                terms=choice.terms_at(places[replica]) if choice and replica in places else {},
                columns={name: (known[replica], unit) for name, (known, unit) in columns.items() if replica in known},
                cached_tokens=self._cached_tokens.get(replica),
            )
            for replica in self.replicas
        )

    @cached_property
    def _cached_tokens(self) -> dict[str, float]:
        """Expected cached tokens by replica: the most that any affinity stage expects."""
        found: dict[str, float] = {}
        for stage in self.stages:
            if stage.kind == "affinity":
                unknown = {r for r, mode in zip(stage.scored, stage.modes, strict=False) if mode == "none"}
                for replica, tokens in stage.by_replica.items():
                    found[replica] = max(0.0 if replica in unknown else tokens, found.get(replica, 0.0))
        return found

    @cached_property
    def _rejected(self) -> dict[str, str]:
        """Why each candidate was not the one."""
        dropped = {drop.candidate: drop for drop in self.drops}
        failed = {attempt.replica: attempt.fault for attempt in self.attempts}
        untrusted = {a.replica: _trust(a) for a in self.attempts if a.verdict and a.replica != self.served_replica}
        totals = self.choice.by_replica if self.choice else {}
        found = {}
        for replica in self.replicas:
            if replica == self.served_replica and not failed.get(replica):
                found[replica] = ""
            elif drop := dropped.get(replica):
                found[replica] = f"{drop.reason} [{drop.rule}]" if drop.rule else drop.reason
            elif fault := failed.get(replica):
                found[replica] = f"failed: {fault}"
            elif trust := untrusted.get(replica):
                found[replica] = f"not trusted: {trust}"
            elif replica in totals:
                found[replica] = self._behind(totals[replica], totals) if replica != self.selected_replica else ""
            else:
                found[replica] = "Not ranked" if totals else ""
        return found

    def _behind(self, total: float, totals: Mapping[str, float]) -> str:
        best = totals.get(self.selected_replica)
        unit = self.choice.unit if self.choice else ""
        if best is None or total == best:
            return "Equal score, ranked after"
        is_worse = total > best if unit in _WORSE else total < best
        return _WORSE.get(unit, "Lower score") if is_worse else "Ranked after"

    @cached_property
    def policy_decisions(self) -> tuple[PolicyDecision, ...]:
        """What the stages that must hold did: one decision for each rule that dropped somebody, or one pass."""
        return tuple(decision for stage in self.stages if stage.is_policy for decision in _decisions(stage))

    @property
    def fallback_triggered(self) -> bool:
        """True if more than one replica was tried, and not only because an answer was not trusted."""
        went_wrong = any(attempt.reason not in (_FIRST, _ESCALATED) for attempt in self._tries)
        return len(set(self.fallback_chain)) > 1 and went_wrong

    @property
    def escalated(self) -> bool:
        """True if another model was asked because an answer was not trusted."""
        return any(attempt.reason == _ESCALATED for attempt in self.attempts)

    @property
    def _tries(self) -> Sequence[AttemptRecord]:
        """The attempts that were made for the answer itself, not for a judge."""
        return [attempt for attempt in self.attempts if attempt.reason not in _FOR_JUDGES]

    @cached_property
    def fallback_chain(self) -> tuple[str, ...]:
        """The replicas tried, in order, each once in a row."""
        tried = [attempt.replica for attempt in self._tries]
        return tuple(replica for i, replica in enumerate(tried) if i == 0 or replica != tried[i - 1])

    @property
    def cache_affinity_used(self) -> bool:
        """True if the pipeline looked for the prompt in the replicas' KV caches."""
        return any(stage.kind == "affinity" and not stage.is_skipped for stage in self.stages)

    @property
    def cache_hit(self) -> bool:
        """True if the replica that answered (or was ranked first) was expected to have a part of the prompt cached."""
        return self._cached_tokens.get(self._the_one, 0.0) > 0

    @property
    def _the_one(self) -> str:
        return self.served_replica or self.selected_replica

    def summary(self) -> str:
        """A few lines for a person."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"Strategy: {self.strategy}{' (the request asked for it)' if self.strategy_overridden else ''}"
        yield f"Selected: {self.selected_model or 'none'}"
        chosen = self.selected_replica
        if self.selected_endpoint and self.labels.get(chosen) != self.selected_model:
            yield f"Endpoint: {self.selected_endpoint}"
        if self.served_replica and self.served_replica != chosen:
            yield f"Served by: {self.labels.get(self.served_replica, self.served_replica)}"
        if self.outcome not in ("answered", "simulated", ""):
            yield f"Outcome: {self.outcome}{f': {self.error}' if self.error else ''}"
        if self.cache_affinity_used:
            yield f"Cache affinity: {'HIT' if self.cache_hit else 'MISS'}"
        if self.fallback_triggered:
            yield f"Fallback chain: {' → '.join(self.labels[replica] for replica in self.fallback_chain)}"
        if self.escalated:
            judged = [a for a in self.attempts if a.verdict]
            yield f"Escalated: {' → '.join(f'{self.labels[a.replica]} ({_trust(a)})' for a in judged)}"
        yield from self._candidate_lines()
        if self.policy_decisions:
            yield "Policy gates:"
            for decision in self.policy_decisions:
                yield f"  [{'PASS' if decision.passed else 'BLOCK'}] {decision.rule}: {decision.reason}"

    def _candidate_lines(self) -> Iterator[str]:
        if not self.candidates:
            return
        yield "Candidate scores:" if self.choice else "Candidates:"
        the_one = self._the_one
        shown = list(self.candidates[:_MOST_LINES])
        shown += [c for c in self.candidates[_MOST_LINES:] if c.id == the_one]
        for candidate in shown:
            score = "not scored" if candidate.total_score is None else quantity(candidate.total_score, candidate.unit)
            why = f" (rejected: {candidate.rejected_reason})" if candidate.rejected_reason else ""
            yield f"  {'✓' if candidate.id == the_one else '✗'} {self.labels[candidate.id]}: {score}{why}"
        if len(self.candidates) > len(shown):
            yield f"  … and {len(self.candidates) - len(shown):,} more"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        route = self.trace.route.attributes
        return {
            "request_id": self.request_id,
            "trace_id": self.trace_id,
            "timestamp": self.timestamp.isoformat(),
            "operation": text(route, names.OPERATION),
            "model_requested": text(route, names.MODEL_REQUESTED),
            "stream": flag(route, names.STREAM),
            "tenant": text(route, names.TENANT),
            "data_class": text(route, names.DATA_CLASS),
            "region": text(route, names.REGION),
            "fleet": text(route, names.FLEET),
            "pipeline_hash": text(route, names.PIPELINE_HASH),
            "seed": count(route, names.SEED),
            "dry_run": flag(route, names.DRY_RUN),
            "outcome": self.outcome,
            "error": {"code": self.error_code, "message": self.error} if self.error else None,
            "strategy": self.strategy,
            "strategy_overridden": self.strategy_overridden,
            "selected_model": self.selected_model,
            "selected_endpoint": self.selected_endpoint,
            "served_by": self.served_by,
            "served_endpoint": self.served_endpoint,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "policy_decisions": [decision.to_dict() for decision in self.policy_decisions],
            "fallback_triggered": self.fallback_triggered,
            "escalated": self.escalated,
            "fallback_chain": [self.labels[replica] for replica in self.fallback_chain],
            "cache_affinity_used": self.cache_affinity_used,
            "cache_hit": self.cache_hit,
            "shadow_models": [model_of(replica) for replica in texts(route, names.SHADOW_REPLICAS)],
            "total_latency_ms": self.total_latency_ms,
            "ttfb_s": self.ttfb_s,
            "usage": self.usage.to_openai() if self.usage else None,
            "cost_usd": self.cost_usd,
            "drops": [drop.to_dict() for drop in self.drops],
            "attempts": [attempt.to_dict() for attempt in self.attempts],
            "stages": [stage.to_dict() for stage in self.stages],
        }


def _trust(attempt: AttemptRecord) -> str:
    return "unknown" if attempt.confidence is None else f"{attempt.confidence:.2f}"


def _decisions(stage: StageRecord) -> Sequence[PolicyDecision]:
    if not stage.drops:
        left = "" if stage.candidates_out is None else f"{plural(stage.candidates_out, 'candidate')} may go on"
        return [PolicyDecision(rule=stage.name, passed=True, reason=stage.error or left, action="allow")]
    by_rule: dict[tuple[str, str], list[str]] = {}
    for drop in stage.drops:
        by_rule.setdefault((drop.rule or stage.name, drop.reason), []).append(drop.model)
    return [
        PolicyDecision(
            rule=rule,
            passed=False,
            reason=f"{reason} ({', '.join(dict.fromkeys(models))})",
            action="drop",
            models=tuple(dict.fromkeys(models)),
        )
        for (rule, reason), models in by_rule.items()
    ]
