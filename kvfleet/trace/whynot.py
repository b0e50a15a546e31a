"""Why a model was not the one that answered: read from the spans alone, with what would have to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs

from kvfleet.config.findings import did_you_mean
from kvfleet.errors import Fault, TraceError
from kvfleet.trace import names
from kvfleet.trace.attributes import text
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.records import AttemptRecord, CandidateScore, Dropped, StageRecord
from kvfleet.trace.wording import duration, plural, quantity

__all__ = ["Verdict", "why_not"]

_LESS_IS_BETTER = ("s", "usd")

_DROP_REMEDIES = {
    "policy": "Change that rule, the model's `allowed_data_classes` or `private`, or send a request it lets pass.",
    "residency": "Change the residency rule, the model's `region`, or send the request from another region.",
    "tenant": "Change the tenant's `preferred_models`, `blocked_models` or `allowed_data_classes`.",
    "capabilities": "Declare what it can do under the model's `capabilities`, or send a request that needs less.",
    "rate_limits": "It comes back by itself when that is over; ask its provider for more, or add a replica.",
    "health": "It comes back by itself once it answers again; `kvfleet health` asks it now.",
}
_RULE_REMEDIES = {
    (
        "tenant",
        "unknown_tenant",
    ): "Send the tenant's header (`gateway.tenant_header`) or key, and name it under `tenants:`.",
    (
        "health",
        "model",
    ): "Set the model's `model_id` to what its engine lists, or have the engine serve it: `kvfleet health`.",
}
_FAULT_REMEDIES: Mapping[str, str] = {
    Fault.CONNECT: "See that its engine runs and that its `endpoint` is right: `kvfleet health`.",
    Fault.CONNECT_TIMEOUT: "See that its engine can be reached from the gateway: `kvfleet health`.",
    Fault.TIMEOUT: "Give it longer (`fallback.timeout_ms`, the model's `timeout_seconds`) or less to do.",
    Fault.IDLE_TIMEOUT: "Give it longer (the model's `idle_timeout_seconds`), or look at its engine's log.",
    Fault.RATE_LIMITED: "It takes no more requests now: a higher limit there, or more replicas.",
    Fault.OVERLOADED: "Its queue was full: more replicas, or fewer requests at a time.",
    Fault.BAD_REQUEST: "The request itself has to change; its engine does not take it.",
    Fault.CONTEXT_LENGTH: "A shorter prompt, or a truthful `capabilities.max_context_window`, so that it is not tried.",
    Fault.CONTENT_POLICY: "The provider refuses this content.",
    Fault.UNAUTHORIZED: "See that the model's `api_key` is valid there.",
    Fault.NOT_FOUND: "See that `model_id` is what its engine calls the model, and that `endpoint` is right.",
    Fault.CANCELLED: "The client left before it had answered.",
    Fault.CIRCUIT_OPEN: "It has just failed, and one call at a time finds out whether it is well again.",
    Fault.DEADLINE: "The request's own deadline passed; it needs a longer one.",
}


@attrs.frozen(kw_only=True)
class Verdict:
    """What became of one replica.

    Attributes:
        replica: Its id.
        verdict: served, selected, dropped, failed, ranked_lower, not_tried, not_ranked or not_reached.
        stage, rule: Which stage dropped it, by which rule.
        text: One or two sentences.
        remedy: What would have to change; empty if nothing has to.
    """

    replica: str
    verdict: str
    text: str
    remedy: str = ""
    stage: str = ""
    rule: str = ""

    def to_dict(self) -> dict[str, str]:
        """The same as plain JSON types."""
        return attrs.asdict(self)


def why_not(explanation: Explanation, name: str) -> tuple[Verdict, ...]:
    """What became of a model: one verdict for each of its replicas, in the order of the ranking.

    Args:
        explanation: The route.
        name: A model, or one replica: its id, or as `kvfleet trace show` calls it.

    Raises:
        TraceError: if nobody of that name was among the candidates.
    """
    found = [c for c in explanation.candidates if name in (c.model, c.id, explanation.labels[c.id])]
    if not found:
        raise TraceError(_stranger(explanation, name))
    return tuple(_verdict(explanation, candidate) for candidate in found)


def _stranger(explanation: Explanation, name: str) -> str:
    models = dict.fromkeys(candidate.model for candidate in explanation.candidates)
    asked = text(explanation.trace.route.attributes, names.MODEL_REQUESTED)
    maybe = "it may be disabled, or of another type" + (
        f", or the request, which asked for {asked}, ruled it out" if asked else ""
    )
    if not models:
        return f"the route had no candidates, so {name!r} was none; {maybe}"
    return (
        f"{name!r} was not among the {plural(len(models), 'model')} this route began with; "
        f"{did_you_mean(name, models)}; {maybe}"
    )


def _verdict(explanation: Explanation, candidate: CandidateScore) -> Verdict:
    replica = candidate.id
    drop = next((drop for drop in explanation.drops if drop.candidate == replica), None)
    attempts = [a for a in explanation.attempts if a.replica == replica]
    attempt = next((a for a in reversed(attempts) if a.verdict), attempts[-1] if attempts else None)
    if attempt is not None:
        return _tried(explanation, candidate, attempt)
    if drop is not None:
        return _dropped(explanation, drop)
    if explanation.choice is None:
        return _not_reached(explanation, candidate)
    if candidate.rank is None:
        who, by = explanation.labels[replica], explanation.choice.key
        return Verdict(
            replica=replica,
            verdict="not_ranked",
            stage=by,
            text=f"{who} was left over by {by}, which ranked {len(explanation.choice.scored)} others.",
            remedy="Ask for another strategy, or change that one's options.",
        )
    if candidate.selected:
        return _selected(explanation, candidate)
    return _behind(explanation, candidate, explanation.choice)


def _tried(explanation: Explanation, candidate: CandidateScore, attempt: AttemptRecord) -> Verdict:
    who = explanation.labels[candidate.id]
    if attempt.is_success and explanation.served_replica not in ("", candidate.id):
        return _answered_in_vain(explanation, candidate, attempt)
    if attempt.is_success:
        said = f"{who} did answer, in {duration(attempt.duration_ms)}, as attempt {attempt.number}."
        return Verdict(replica=candidate.id, verdict="served", text=said)
    after = duration(attempt.duration_ms)
    said = f"{who} was tried as attempt {attempt.number} and failed after {after} with {attempt.fault}"
    said += f": {attempt.message}." if attempt.message else "."
    if explanation.served_replica and explanation.served_replica != candidate.id:
        said += f" {explanation.labels.get(explanation.served_replica, explanation.served_by)} answered instead."
    remedy = _FAULT_REMEDIES.get(attempt.fault, "Look at its engine's log.")
    return Verdict(replica=candidate.id, verdict="failed", text=said, remedy=remedy)


def _answered_in_vain(explanation: Explanation, candidate: CandidateScore, attempt: AttemptRecord) -> Verdict:
    """It answered, and another's answer was given."""
    who = explanation.labels[candidate.id]
    served = explanation.labels.get(explanation.served_replica, explanation.served_by)
    if not attempt.verdict:
        said = f"{who} was asked for a judge's sake, as attempt {attempt.number}; {served} gave the answer."
        return Verdict(replica=candidate.id, verdict="judge", text=said)
    trust = "unknown" if attempt.confidence is None else f"{attempt.confidence:.2f}"
    said = f"{who} answered as attempt {attempt.number}, and {served}'s answer was given: confidence in the first was"
    return Verdict(
        replica=candidate.id,
        verdict="not_trusted",
        text=f"{said} {trust} ({attempt.verdict}).",
        remedy="Lower the `threshold` of execute.escalate, or change its `judges`.",
    )


def _dropped(explanation: Explanation, drop: Dropped) -> Verdict:
    rule = f" under the rule {drop.rule}" if drop.rule else ""
    name = drop.stage.partition(".")[2]
    remedy = _RULE_REMEDIES.get((name, drop.rule)) or _DROP_REMEDIES.get(name)
    return Verdict(
        replica=drop.candidate,
        verdict="dropped",
        stage=drop.stage,
        rule=drop.rule,
        text=f"{explanation.labels[drop.candidate]} was dropped by {drop.stage}{rule}: {drop.reason}.",
        remedy=remedy or f"Change {drop.stage} in the pipeline, or send a request that it lets pass.",
    )


def _not_reached(explanation: Explanation, candidate: CandidateScore) -> Verdict:
    last = explanation.stages[-1] if explanation.stages else None
    where = f" at {last.key}" if last else ""
    if last is not None and last.is_answer:
        why = f"the route was answered{where}, before any model was chosen."
    else:
        why = f"the route ended{where} before any model was chosen: {explanation.error or explanation.outcome}."
    text_ = f"{explanation.labels[candidate.id]} was still a candidate when {why}"
    return Verdict(replica=candidate.id, verdict="not_reached", stage=last.key if last else "", text=text_)


def _selected(explanation: Explanation, candidate: CandidateScore) -> Verdict:
    who = explanation.labels[candidate.id]
    if explanation.outcome == "simulated":
        return Verdict(replica=candidate.id, verdict="selected", text=f"{who} was chosen; the route was simulated.")
    why = explanation.error or explanation.outcome
    return Verdict(replica=candidate.id, verdict="selected", text=f"{who} was chosen, and not called: {why}.")


def _behind(explanation: Explanation, candidate: CandidateScore, choice: StageRecord) -> Verdict:
    """Ranked, and not first: behind whom and by what; or passed over once the first had failed."""
    rank = candidate.rank or 0
    served = next((c for c in explanation.candidates if c.served), None)
    is_passed_over = bool(explanation.attempts) and (served is None or (served.rank or 0) > rank)
    rival = explanation.candidates[0] if served is None or is_passed_over else served
    who, other = explanation.labels[candidate.id], explanation.labels[rival.id]
    mine, theirs = candidate.total_score or 0.0, rival.total_score or 0.0
    said = (
        f"{who} was ranked {rank} of {len(choice.scored)} by {choice.key}: "
        f"{quantity(mine, choice.unit)} against {quantity(theirs, choice.unit)} for {other}"
    )
    compared = "; ".join(_compared(candidate, rival, choice.unit))
    said += f" ({compared})." if compared else "."
    if not is_passed_over:
        remedy = _lead(mine, theirs, choice, other)
        return Verdict(replica=candidate.id, verdict="ranked_lower", stage=choice.key, text=said, remedy=remedy)
    tried = " → ".join(explanation.labels[replica] for replica in explanation.fallback_chain)
    return Verdict(
        replica=candidate.id,
        verdict="not_tried",
        stage=choice.key,
        text=f"{said} It was not tried; the attempts were {tried}.",
        remedy="`fallback.max_attempts` and `fallback.fallback_order` say who is tried after a failure.",
    )


def _compared(mine: CandidateScore, first: CandidateScore, unit: str) -> Iterator[str]:
    """Where it was behind and where ahead, the greatest difference first."""
    gaps = {term: mine.terms[term] - first.terms[term] for term in mine.terms if term in first.terms}
    for word, sign in (("behind in", 1.0), ("ahead in", -1.0)):
        toward = sign if unit in _LESS_IS_BETTER else -sign
        there = sorted((t for t, gap in gaps.items() if gap * toward > 0), key=lambda t: -abs(gaps[t]))
        shown = ", ".join(f"{t} {_bare(mine.terms[t])} against {_bare(first.terms[t])}" for t in there[:3])
        if shown:
            yield f"{word} {shown}"


def _bare(value: float) -> str:
    return f"{value:.3g}"


def _lead(mine: float, theirs: float, choice: StageRecord, best: str) -> str:
    """What it would take to be first."""
    gap = abs(mine - theirs)
    is_less = choice.unit in _LESS_IS_BETTER
    if gap == 0:
        return f"It has the same score; whoever stands first in the file goes first, or {choice.key} broke the tie."
    if (mine > theirs) != is_less:
        return f"Its score was the better one; {choice.key} chose by {choice.mode or 'its own order'}."
    return f"It would come before {best} with {quantity(gap, choice.unit)} {'less' if is_less else 'more'}."
