"""Two decisions about the same request: whether it goes elsewhere, and by which stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import attrs

from kvfleet.trace.diff import Change, diff
from kvfleet.trace.explanation import Explanation

__all__ = ["Move", "MoveReport", "move", "report"]

NOBODY = "nobody"


@attrs.frozen(kw_only=True)
class Move:
    """Where a request went, where it would go, and which stage makes the difference.

    Attributes:
        before, after: Models; ``nobody`` if nobody was left.
        stage: The stage that makes the difference, as in ``filter.policy``; empty if it goes to the same model.
        reason: Why, in words.
        changes: Everything that differs between the two decisions.
    """

    trace_id: str
    request_id: str
    before: str
    after: str
    stage: str = ""
    reason: str = ""
    changes: tuple[Change, ...] = attrs.field(default=(), repr=False)

    @property
    def is_moved(self) -> bool:
        """True if it would go to another model."""
        return self.before != self.after

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return {**attrs.asdict(self, recurse=False), "changes": [change.to_dict() for change in self.changes]}


@attrs.frozen(kw_only=True)
class MoveReport:
    """Many moves, counted.

    Attributes:
        requests: All of them.
        moved: Those that go to another model.
        groups: The most frequent first: how many go from one model to another by one stage, with the first as example.
        before, after: How many requests each model gets.
    """

    requests: int
    moved: int
    groups: tuple[tuple[int, Move], ...]
    before: dict[str, int]
    after: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        shown = ("before", "after", "stage", "reason", "trace_id")
        groups = [{"requests": number, **{name: getattr(one, name) for name in shown}} for number, one in self.groups]
        return {**attrs.asdict(self, recurse=False), "groups": groups}


def move(before: Explanation, after: Explanation) -> Move:
    """What another pipeline makes of a request."""
    old, new = before.selected_model or NOBODY, after.selected_model or NOBODY
    stage, reason = _cause(before, after, old, new) if old != new else ("", "")
    return Move(
        trace_id=before.trace_id,
        request_id=before.request_id,
        before=old,
        after=new,
        stage=stage,
        reason=reason,
        changes=tuple(change for change in diff(before, after) if change.part != "outcome"),
    )


def _cause(before: Explanation, after: Explanation, old: str, new: str) -> tuple[str, str]:
    """The stage that makes the difference: one that drops a model only here or only there, or else the strategy."""
    for drop in after.drops:
        if drop.model == old and not _is_left(after, old):
            return drop.stage, f"drops {old}: {drop.reason}"
    for drop in before.drops:
        if drop.model == new and not _is_left(before, new):
            return drop.stage, f"dropped {new}: {drop.reason}"
    for name, explanation, words in ((old, after, "is not a candidate"), (new, before, "was not a candidate")):
        if name != NOBODY and not any(candidate.model == name for candidate in explanation.candidates):
            return "request", f"{name} {words}"
    if NOBODY in (old, new):
        error = after.error or before.error
        failed = next((one for one in (*after.stages, *before.stages) if one.error), None)
        return (failed.key if failed else "request"), error or "no choice was made"
    strategy = f"select.{after.strategy}"
    if before.strategy != after.strategy:
        return strategy, f"was select.{before.strategy}"
    return strategy, f"ranks {new} before {old}"


def _is_left(explanation: Explanation, model: str) -> bool:
    """True if a replica of the model was not dropped."""
    gone = {drop.candidate for drop in explanation.drops}
    return any(one.model == model and one.id not in gone for one in explanation.candidates)


def report(moves: Iterable[Move]) -> MoveReport:
    """Count moves."""
    everything = list(moves)
    moved = [one for one in everything if one.is_moved]
    counts = Counter((one.before, one.after, one.stage) for one in moved)
    examples = {(one.before, one.after, one.stage): one for one in reversed(moved)}
    return MoveReport(
        requests=len(everything),
        moved=len(moved),
        groups=tuple((number, examples[key]) for key, number in counts.most_common()),
        before=dict(Counter(one.before for one in everything).most_common()),
        after=dict(Counter(one.after for one in everything).most_common()),
    )
