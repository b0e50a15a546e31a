"""A route as a tree, for a terminal or a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvfleet.trace import names
from kvfleet.trace.attributes import flag, text, texts
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.flow import PLAIN, Flow, Paint, Style
from kvfleet.trace.records import AttemptRecord, StageRecord
from kvfleet.trace.spans import AttributeValue
from kvfleet.trace.wording import duration, plural, quantity

__all__ = ["headline", "render"]

_Pieces = list[tuple[str, Style]]
_Step = StageRecord | AttemptRecord
_MOST_NAMES = 4
_TIME_WIDTH = 9
_WHY = {"low_confidence": "escalated", "sample": "for a judge, again", "judge": "as a judge"}


def _bare(word: str) -> str:
    return word


def render(explanation: Explanation, *, columns: int | None = None, paint: Paint = PLAIN, most: int = 5) -> str:
    """The tree: what was asked, each stage with what it did, each attempt, and how it ended.

    Args:
        explanation: The route.
        columns: Break lines at this width; never if None.
        paint: Colours.
        most: Show so many candidates of a ranking, and the one that answered.
    """
    flow = Flow(columns)
    flow.add("", headline(explanation, paint), then="  ")
    flow.add("", [(piece, paint.dim) for piece in _asked(explanation)], then="  ")
    steps: Sequence[_Step] = sorted((*explanation.stages, *explanation.attempts), key=_order)
    wide = max((len(_key(step)) for step in steps), default=0)
    for step in steps:
        is_last = step is steps[-1]
        _step(
            flow,
            explanation,
            step,
            wide=wide,
            bar="  " if is_last else "│ ",
            tee="└ " if is_last else "├ ",
            paint=paint,
        )
        if isinstance(step, StageRecord):
            rows = _rows_below(explanation, step, paint, most)
            for row in rows:
                flow.add("  " if is_last else "│ ", row, then=("  " if is_last else "│ ") + " " * 6)
    _mirrors(flow, explanation, paint)
    if explanation.error:
        flow.add("", [(f"✗ {explanation.error_code}", paint.bad), (explanation.error, _bare)], then="  ")
    return flow.text()


def _mirrors(flow: Flow, explanation: Explanation, paint: Paint) -> None:
    """Whom the request was mirrored to, and whom not, and why."""
    attributes = explanation.trace.route.attributes
    mirrored = [explanation.labels.get(one, one) for one in texts(attributes, names.SHADOW_REPLICAS)]
    if mirrored:
        flow.add("", [(f"mirrored to {', '.join(mirrored)}", paint.dim)])
    for told in texts(attributes, names.SHADOW_EXCLUDED):
        flow.add("", [(f"not mirrored to {told}", paint.dim)])


def _order(step: _Step) -> tuple[float, bool]:
    return step.start_ms, isinstance(step, AttemptRecord)


def _key(step: _Step) -> str:
    return step.key if isinstance(step, StageRecord) else f"attempt {step.number}"


def headline(explanation: Explanation, paint: Paint = PLAIN) -> _Pieces:
    """Which route, and how it ended."""
    pieces: _Pieces = [(f"route {explanation.trace_id[:8]}", paint.bold)]
    took = duration(explanation.total_latency_ms)
    served = explanation.labels.get(explanation.served_replica, explanation.served_by)
    selected = explanation.labels.get(explanation.selected_replica, explanation.selected_model)
    outcome = explanation.outcome
    if outcome == "answered":
        pieces.append((f"answered by {served} in {took}", paint.good))
    elif outcome == "simulated":
        pieces.append((f"would go to {selected}", paint.good) if selected else ("would go to nobody", paint.bad))
    elif outcome == "cached":
        by = next((stage.key for stage in explanation.stages if stage.is_answer), "a cache")
        pieces.append((f"answered from {by} in {took}", paint.good))
    else:
        pieces.append((f"{outcome or 'unfinished'} after {took}", paint.bad))
    return pieces + [(piece, _bare) for piece in _measured(explanation)]


def _measured(explanation: Explanation) -> Iterator[str]:
    if explanation.ttfb_s is not None:
        yield f"first byte {duration(explanation.ttfb_s * 1000)}"
    if explanation.cost_usd is not None:
        yield quantity(explanation.cost_usd, "usd")


def _asked(explanation: Explanation) -> Iterator[str]:
    attributes = explanation.trace.route.attributes
    yield f"{explanation.timestamp:%Y-%m-%d %H:%M:%S} UTC"
    if explanation.request_id:
        yield f"request {explanation.request_id}"
    asked = text(attributes, names.MODEL_REQUESTED)
    stream = ", streamed" if flag(attributes, names.STREAM) else ""
    yield f"{text(attributes, names.OPERATION)}{f' for {asked}' if asked else ''}{stream}"
    for word, name in (("tenant", names.TENANT), ("data", names.DATA_CLASS), ("from", names.REGION)):
        if found := text(attributes, name):
            yield f"{word} {found}"
    for word, name in (("fleet", names.FLEET), ("pipeline", names.PIPELINE_HASH)):
        if found := text(attributes, name):
            yield f"{word} {found}"


def _step(flow: Flow, explanation: Explanation, step: _Step, *, wide: int, bar: str, tee: str, paint: Paint) -> None:
    margin = f"{tee}{_key(step).ljust(wide)}{duration(step.duration_ms).rjust(_TIME_WIDTH)}  "
    pieces = _stage(explanation, step, paint) if isinstance(step, StageRecord) else _attempt(explanation, step, paint)
    flow.add(margin, pieces, then=bar + " " * (len(margin) - len(bar)))


def _stage(explanation: Explanation, stage: StageRecord, paint: Paint) -> _Pieces:
    pieces: _Pieces = []
    if stage.error and not stage.drops:
        skipped = ", and was skipped" if stage.is_skipped else ""
        pieces.append((f"failed: {stage.error}{skipped}", paint.bad))
    pieces += [(f"{fact} {_shown(value)}", _bare) for fact, value in stage.facts.items()]
    pieces += _who_stays(stage, paint)
    if stage.drops and stage.retry_after_s is not None:
        pieces.append((f"the first again in {duration(stage.retry_after_s * 1000)}", _bare))
    if stage.kind == "affinity" and stage.scored:
        pieces += [(piece, _bare) for piece in _affinity(explanation, stage)]
    elif stage.kind == "score" and stage.scored:
        pieces += [(piece, _bare) for piece in _column(explanation, stage)]
    elif stage.kind == "select" and stage.mode:
        pieces.append((stage.mode, _bare))
    elif stage.kind == "answer" and not stage.error:
        pieces.append(("had the answer", paint.good) if stage.is_answer else ("had no answer", _bare))
        pieces += [(piece, _bare) for piece in _from_memory(stage)]
    if stage.verdict:
        grade = "cannot tell" if stage.grade is None else f"grade {stage.grade:.2f}"
        pieces.append((f"{grade} ({stage.verdict})", _bare))
    if stage.waited_s is not None:
        pieces.append((f"waited {duration(stage.waited_s * 1000)} behind {stage.ahead or 0:.0f}", paint.warn))
    if stage.refusal:
        again = "" if stage.retry_after_s is None else f"; again in {duration(stage.retry_after_s * 1000)}"
        pieces.append((f"refused: {stage.refusal}{again}", paint.bad))
    return pieces


def _who_stays(stage: StageRecord, paint: Paint) -> _Pieces:
    """How many a stage left, and whether it did so in panic."""
    if stage.candidates_in is None:
        return []
    is_same = stage.candidates_out == stage.candidates_in
    told = f"{stage.candidates_in} stay" if is_same else f"{stage.candidates_in} → {stage.candidates_out}"
    pieces: _Pieces = [(told, _bare)]
    if stage.panic:
        pieces.append((f"panic: too few of {', '.join(stage.panic)} are well, so all are used", paint.bad))
    return pieces


def _from_memory(stage: StageRecord) -> Iterator[str]:
    """How an answer was found, and how old it is."""
    if stage.match == "near" and stage.similarity is not None:
        yield f"near, similarity {stage.similarity:.2f}"
    if stage.age_s is not None:
        yield f"{duration(stage.age_s * 1000)} old"


def _affinity(explanation: Explanation, stage: StageRecord) -> Iterator[str]:
    """Who has a part of the prompt, and how that is known."""
    modes = dict(zip(stage.scored, stage.modes, strict=False))
    having = {replica: n for replica, n in stage.by_replica.items() if n and modes.get(replica) != "none"}
    if not having:
        yield "nothing cached"
        return
    best = sorted(having, key=lambda replica: -having[replica])
    for replica in best[:_MOST_NAMES]:
        mode = modes.get(replica, "")
        known = f" ({mode})" if mode else ""
        yield f"{_label(explanation, replica)} {quantity(having[replica], 'tokens')}{known}"
    if rest := len(stage.scored) - min(len(best), _MOST_NAMES):
        yield f"nothing at {plural(rest, 'other')}" if len(best) <= _MOST_NAMES else f"… and {rest:,} more"


def _column(explanation: Explanation, stage: StageRecord) -> Iterator[str]:
    """Values in the order of the ranking."""
    values = stage.by_replica
    ordered = [replica for replica in explanation.replicas if replica in values]
    for replica in ordered[:_MOST_NAMES]:
        yield f"{_label(explanation, replica)} {quantity(values[replica], stage.unit)}"
    if len(ordered) > _MOST_NAMES:
        yield f"… and {len(ordered) - _MOST_NAMES:,} more"


def _rows_below(explanation: Explanation, stage: StageRecord, paint: Paint, most: int) -> Iterator[_Pieces]:
    """Under a filter its drops, under an affinity why caches are known no better, under a choice its ranking."""
    groups: dict[tuple[str, str], list[str]] = {}
    for drop in stage.drops:
        groups.setdefault((drop.reason, drop.rule), []).append(_label(explanation, drop.candidate))
    for (reason, rule), who in groups.items():
        by: _Pieces = [(f"[{rule}]", paint.warn)] if rule else []
        yield [(f"  ✗ {', '.join(_some(who))}", paint.bad), (reason, _bare), *by]
    doubts: dict[str, list[str]] = {}
    for replica, reason in zip(stage.scored, stage.reasons, strict=False):
        if reason:
            doubts.setdefault(reason, []).append(_label(explanation, replica))
    for reason, who in doubts.items():
        yield [(f"  ? {', '.join(_some(who))}", paint.warn), (reason, _bare)]
    if stage is explanation.choice:
        yield from _ranking(explanation, stage, paint, most)


def _some(who: Sequence[str]) -> list[str]:
    """The first of them by name, and how many more there are."""
    more = [f"and {len(who) - _MOST_NAMES:,} more"] if len(who) > _MOST_NAMES else []
    return [*who[:_MOST_NAMES], *more]


def _ranking(explanation: Explanation, stage: StageRecord, paint: Paint, most: int) -> Iterator[_Pieces]:
    ranked = explanation.candidates[: len(stage.scored)]
    shown = [c for i, c in enumerate(ranked) if i < most or c.served or c.selected]
    wide = max(len(_label(explanation, c.id)) for c in shown)
    total_wide = max(len(quantity(c.total_score or 0.0, c.unit)) for c in shown)
    for c in shown:
        style = paint.good if c.served else paint.bad if c.rejected_reason.startswith("failed") else _bare
        total = quantity(c.total_score or 0.0, c.unit).rjust(total_wide)
        head = f"  {c.rank or 0:>3} {_label(explanation, c.id).ljust(wide)}  {total}"
        yield [(head, style), *((f"{term} {value:.3g}", paint.dim) for term, value in c.terms.items())]
    if len(ranked) > len(shown):
        yield [(f"      … and {len(ranked) - len(shown):,} more", paint.dim)]
    if stage.instead:
        others = [
            (f"{choice.removesuffix('_s').replace('_', ' ')} {quantity(value, stage.unit)}", paint.dim)
            for choice, value in stage.instead.items()
        ]
        yield [("      instead", paint.dim), *others]


def _attempt(explanation: Explanation, attempt: AttemptRecord, paint: Paint) -> _Pieces:
    who = _label(explanation, attempt.replica)
    if attempt.fault:
        status = f" {attempt.status_code}" if attempt.status_code else ""
        pieces: _Pieces = [(f"✗ {who}", paint.bad), (f"{attempt.fault}{status}: {attempt.message}", _bare)]
    else:
        pieces = [(f"✓ {who}", paint.good)]
    if attempt.reason in _WHY:
        pieces.append((_WHY[attempt.reason], paint.dim))
    return pieces + [(piece, _bare) for piece in _answer(attempt)]


def _answer(attempt: AttemptRecord) -> Iterator[str]:
    if attempt.ttfb_s is not None:
        yield f"first byte {duration(attempt.ttfb_s * 1000)}"
    usage = attempt.usage
    if usage is not None:
        cached = "" if usage.cached_tokens is None else f" ({usage.cached_tokens:,} cached)"
        yield f"{usage.prompt_tokens:,}{cached} in / {usage.completion_tokens:,} out tokens"
    if attempt.finish_reasons:
        yield ", ".join(attempt.finish_reasons)
    if attempt.redacted:
        yield f"without {', '.join(attempt.redacted)}"
    if attempt.is_discarded:
        yield "not read on"
    if attempt.verdict:
        trust = "unknown" if attempt.confidence is None else f"{attempt.confidence:.2f}"
        yield f"confidence {trust} ({attempt.verdict})"
    if attempt.repeats:
        yield f"repeated {plural(attempt.repeats, 'time')}"


def _label(explanation: Explanation, replica: str) -> str:
    return explanation.labels.get(replica, replica)


def _shown(value: AttributeValue) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(str(item) for item in value) or "none"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
