"""Several judges as one: made from what a pipeline says of them, asked in turn, and never letting a route fail."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Self

import attrs

from kvfleet.config.convert import structure
from kvfleet.config.findings import Finding, Path
from kvfleet.errors import BackendError, ComponentError, ConfigError, NoCandidatesError
from kvfleet.plugin.component import Services
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.judging import Grade, Judge, Submission

__all__ = ["Panel", "Seat"]

log = logging.getLogger(__name__)


@attrs.frozen
class Seat:
    """One judge and its name."""

    name: str
    judge: Judge

    @property
    def is_costly(self) -> bool:
        """True if it makes calls."""
        return bool(getattr(self.judge, "is_costly", False))

    async def grade(self, submission: Submission) -> Grade:
        """Its verdict; one that fails cannot tell."""
        try:
            grade = await self.judge.grade(submission)
        except (BackendError, NoCandidatesError) as error:
            return Grade(None, f"it could not ask: {error.message}")
        except Exception as error:  # noqa: BLE001 - the plugin border: a judge must not cost the answer
            log.warning("judge failed judge=%s error=%s", self.name, type(error).__name__)
            return Grade(None, f"it failed: {type(error).__name__}")
        if grade.score is not None and not 0 <= grade.score <= 1:
            log.warning("judge out of range judge=%s", self.name)
            return Grade(None, "it gave a score that is not between 0 and 1")
        return grade


@attrs.frozen
class Panel:
    """Judges, those that cost nothing first."""

    seats: tuple[Seat, ...] = ()

    @classmethod
    def read(cls, entries: Sequence[Any], services: Services, path: Path = ("judges",)) -> Self:
        """Make the judges that a pipeline names: each ``name``, or ``{use: name, with: {…}}``.

        Raises:
            ConfigError: with every finding; their paths begin at the component's options.
        """
        findings: list[Finding] = []
        seats = [_seat(entry, services, (*path, index), findings) for index, entry in enumerate(entries)]
        if findings:
            raise ConfigError(findings)
        made = [seat for seat in seats if seat is not None]
        return cls(tuple(sorted(made, key=lambda seat: seat.is_costly)))

    @property
    def wants_logprobs(self) -> bool:
        """True if a judge reads the tokens' probabilities."""
        return any(getattr(seat.judge, "wants_logprobs", False) for seat in self.seats)

    @property
    def answers_each(self) -> int:
        """Most further answers for each answer that is judged."""
        return sum(int(getattr(seat.judge, "answers_each", seat.is_costly)) for seat in self.seats)

    async def grade(self, submission: Submission, *, enough: float = 0.0, may_ask: bool = True) -> Grade:
        """The lowest verdict, with the name of who gave it.

        Args:
            submission: The answer.
            enough: A verdict below this decides: the others are not asked any more.
            may_ask: False to leave out judges that make calls.
        """
        lowest: Grade | None = None
        silent: list[str] = []
        for seat in self.seats:
            if seat.is_costly and not may_ask:
                continue
            grade = await seat.grade(submission)
            if grade.score is None:
                silent.append(f"{seat.name}: {grade.reason}")
            elif lowest is None or lowest.score is None or grade.score < lowest.score:
                lowest = Grade(grade.score, f"{seat.name}: {grade.reason}")
            if lowest is not None and lowest.score is not None and lowest.score < enough:
                break
        return lowest or Grade(None, "; ".join(silent) or "nobody judged it")


def _seat(entry: Any, services: Services, path: Path, findings: list[Finding]) -> Seat | None:
    given = {"use": entry} if isinstance(entry, str) else entry
    if not isinstance(given, Mapping) or not isinstance(given.get("use"), str) or set(given) - {"use", "with"}:
        remedy = "as in `- logprobs`, or `- {use: logprobs, with: {measure: percentile}}`"
        findings.append(
            Finding("must be a judge's name, or a mapping with `use` and `with`", remedy, path, code="type")
        )
        return None
    try:
        component = services.find(Kind.JUDGE, given["use"])
    except ComponentError as error:
        findings.append(Finding(str(error), path=(*path, "use"), code="unknown-judge"))
        return None
    models = {model.name for model in services.models}
    judge, wrong = structure(component.cls, given.get("with") or {}, path=(*path, "with"), models=models)
    findings += wrong
    if judge is None:
        return None
    try:
        if callable(provision := getattr(judge, "provision", None)):
            provision(services)
    except (ComponentError, ValueError) as error:
        findings.append(Finding(str(error), path=path, code="component"))
    return Seat(component.name, judge)
