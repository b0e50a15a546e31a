"""Compares what a test expects with what the trace says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from kvfleet.config.findings import Path, path_text
from kvfleet.errors import RouteError
from kvfleet.testing.vocabulary import DropExpected, Expected, Range
from kvfleet.trace import names
from kvfleet.trace.attributes import texts
from kvfleet.trace.explanation import Explanation

__all__ = ["Mismatch", "Seen", "is_meant", "mismatches"]

_NOBODY = "nobody"


@attrs.frozen
class Mismatch:
    """One expectation that did not hold: where it stands below ``expect``, what it was, and what came."""

    path: Path
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{path_text(self.path)}: expected {self.expected}, got {self.got}"


@attrs.frozen(kw_only=True)
class Seen:
    """What one request came to.

    Attributes:
        explanation: Its trace, read; None if it was refused before a route began.
        error: Why there was no answer.
        status: The HTTP status a gateway would have sent.
    """

    explanation: Explanation | None
    error: RouteError | None = None
    status: int = 200

    @property
    def served_replica(self) -> str:
        """The replica that answered; empty if none did."""
        return self.explanation.served_replica if self.explanation else ""

    @property
    def candidates(self) -> tuple[str, ...]:
        """The replicas the route began with."""
        return texts(self.explanation.trace.route.attributes, names.CANDIDATES) if self.explanation else ()


def is_meant(target: str, replica: str) -> bool:
    """True if a name in a test, of a model or a replica, means this replica.

    >>> is_meant("m", "m@http://a:1"), is_meant("m@http://b:1", "m@http://a:1")
    (True, False)
    """
    return target == replica or target == replica.partition("@")[0]


def _like(target: str, replica: str) -> str:
    """A replica in the words of the target: by its model if that is how the test speaks."""
    return (replica if "@" in target else replica.partition("@")[0]) or _NOBODY


def mismatches(expect: Expected, seen: Seen) -> Iterator[Mismatch]:
    """Everything that is not as expected."""
    yield from _end(expect, seen)
    yield from _who(expect, seen)
    yield from _lists(expect, seen)
    yield from _drops(expect.dropped, seen)
    for target in expect.kept:
        if not any(is_meant(target, replica) for replica in _left(seen)):
            yield Mismatch(("kept",), f"{target} to be kept", f"it {_fate(target, seen)}")
    yield from _ranges("scores", expect.scores, _totals(seen))
    yield from _ranges("cached", expect.cached, _cached(seen))
    yield from _facts(expect.facts, seen)


def _end(expect: Expected, seen: Seen) -> Iterator[Mismatch]:
    if expect.outcome:
        got = seen.explanation.outcome if seen.explanation else "refused before a route began"
        if got != expect.outcome:
            yield Mismatch(("outcome",), expect.outcome, _with_error(got, seen))
    if expect.error:
        code = seen.error.code if seen.error else seen.explanation.error_code if seen.explanation else ""
        if code != expect.error:
            yield Mismatch(("error",), expect.error, code or "no error")
    if expect.status is not None and expect.status != seen.status:
        yield Mismatch(("status",), str(expect.status), _with_error(str(seen.status), seen))


def _with_error(got: str, seen: Seen) -> str:
    return f"{got} ({seen.error.message})" if seen.error else got


def _who(expect: Expected, seen: Seen) -> Iterator[Mismatch]:
    explanation = seen.explanation
    selected = explanation.selected_replica if explanation else ""
    for key, target, replica in (
        ("selected", expect.selected, selected),
        ("served_by", expect.served_by, seen.served_replica),
    ):
        if target and not is_meant(target, replica):
            yield Mismatch((key,), target, _with_error(_like(target, replica), seen))
    if expect.answered_by:
        stages = explanation.stages if explanation else ()
        answered = next((stage.key for stage in stages if stage.kind == "answer" and stage.is_answer), "no stage")
        if answered != expect.answered_by:
            yield Mismatch(("answered_by",), expect.answered_by, answered)


def _lists(expect: Expected, seen: Seen) -> Iterator[Mismatch]:
    explanation = seen.explanation
    if expect.attempts is not None:
        tried = [attempt.replica for attempt in explanation.attempts] if explanation else []
        if not _agree(expect.attempts, tried):
            yield Mismatch(("attempts",), _listed(expect.attempts), _listed(_in_words(expect.attempts, tried)))
    if expect.shadowed is not None:
        mirrored = texts(explanation.trace.route.attributes, names.SHADOW_REPLICAS) if explanation else ()
        if not _agree(expect.shadowed, mirrored):
            yield Mismatch(("shadowed",), _listed(expect.shadowed), _listed(_in_words(expect.shadowed, mirrored)))
    if expect.ranking:
        choice = explanation.choice if explanation else None
        ranked = choice.scored[: len(expect.ranking)] if choice else ()
        if not _agree(expect.ranking, ranked):
            yield Mismatch(("ranking",), _listed(expect.ranking), _listed(_in_words(expect.ranking, ranked)))


def _agree(targets: Sequence[str], replicas: Sequence[str]) -> bool:
    return len(targets) == len(replicas) and all(map(is_meant, targets, replicas))


def _in_words(targets: Sequence[str], replicas: Sequence[str]) -> list[str]:
    by_replica = any("@" in target for target in targets)
    return [replica if by_replica else replica.partition("@")[0] for replica in replicas]


def _listed(values: Sequence[str]) -> str:
    return f"[{', '.join(values)}]"


def _left(seen: Seen) -> list[str]:
    dropped = {drop.candidate for drop in seen.explanation.drops} if seen.explanation else set()
    return [replica for replica in seen.candidates if replica not in dropped]


def _fate(target: str, seen: Seen) -> str:
    """What became of a candidate, in words."""
    drops = [drop for drop in (seen.explanation.drops if seen.explanation else ()) if is_meant(target, drop.candidate)]
    if drops:
        rule = f" [{drops[0].rule}]" if drops[0].rule else ""
        return f"dropped by {drops[0].stage}{rule}: {drops[0].reason}"
    if any(is_meant(target, replica) for replica in seen.candidates):
        return "kept"
    return "left out: it was no candidate for this request"


def _drops(expected: Mapping[str, DropExpected], seen: Seen) -> Iterator[Mismatch]:
    drops = seen.explanation.drops if seen.explanation else ()
    for target, wanted in expected.items():
        meant = [replica for replica in seen.candidates if is_meant(target, replica)]
        fitting = {
            drop.candidate
            for drop in drops
            if wanted.by in ("", drop.stage) and wanted.rule in ("", drop.rule) and drop.candidate in meant
        }
        if not meant or len(fitting) < len(meant):
            left = next((replica for replica in meant if replica not in fitting), target)
            by = f" by {wanted.by}" if wanted.by else ""
            rule = f" [{wanted.rule}]" if wanted.rule else ""
            yield Mismatch(("dropped", target), f"it to be dropped{by}{rule}", f"it {_fate(left, seen)}")


def _totals(seen: Seen) -> dict[str, float]:
    choice = seen.explanation.choice if seen.explanation else None
    return choice.by_replica if choice else {}


def _cached(seen: Seen) -> dict[str, float]:
    """Expected cached tokens, most first, so that a model is judged by its best replica."""
    candidates = seen.explanation.candidates if seen.explanation else ()
    found = {c.id: c.cached_tokens for c in candidates if c.cached_tokens is not None}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _ranges(key: str, expected: Mapping[str, Range], values: Mapping[str, float]) -> Iterator[Mismatch]:
    """Each value within its range; for a model, its first replica's counts."""
    for target, wanted in expected.items():
        got = next((value for replica, value in values.items() if is_meant(target, replica)), None)
        low = -float("inf") if wanted.min is None else wanted.min
        high = float("inf") if wanted.max is None else wanted.max
        if got is None or not low <= got <= high:
            yield Mismatch((key, target), _range_text(wanted), "no value" if got is None else f"{got:.6g}")


def _range_text(wanted: Range) -> str:
    if wanted.max is None:
        return f"at least {wanted.min:g}" if wanted.min is not None else "a value"
    return f"at most {wanted.max:g}" if wanted.min is None else f"{wanted.min:g} to {wanted.max:g}"


def _facts(expected: Mapping[str, Any], seen: Seen) -> Iterator[Mismatch]:
    found: dict[str, Any] = {}
    for stage in seen.explanation.stages if seen.explanation else ():
        found.update(stage.facts)
    for name, wanted in expected.items():
        got = found.get(name)
        plain = list(got) if isinstance(got, tuple) else got
        if plain != wanted:
            yield Mismatch(("facts", name), repr(wanted), "no such fact" if name not in found else repr(plain))
