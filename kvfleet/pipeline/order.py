"""What the build checks of a pipeline as a whole: its order, and the facts that flow through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvfleet.config.findings import Finding, Path
from kvfleet.config.origin import Origin
from kvfleet.config.schema import StageConfig
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Fact, Kind
from kvfleet.plugin.manager import ComponentTable

__all__ = ["check_facts", "check_order"]

_DECIDES = 0
_PHASES = {Kind.SELECT: 1, Kind.EXECUTE: 2, Kind.OBSERVE: 3}


def check_order(
    places: Sequence[tuple[Component, str, StageConfig]], origin: Origin, *, complete: bool = True
) -> list[Finding]:
    """Findings about the order of the stages.

    Args:
        places: Each stage's component, its name, and its entry.
        origin: Where the entries stand.
        complete: False if some entries could not be read; what is missing is then not a finding.
    """
    findings = _check_phases(places, origin) + _check_names(places, origin) + _check_answers(places, origin)
    for kind in (Kind.SELECT, Kind.EXECUTE):
        found = [stage for component, _, stage in places if component.kind is kind]
        if not found and complete:
            findings.append(
                origin.finding(("pipeline",), f"there is no {kind} stage", f"add `- {kind}`", code="missing-stage")
            )
        findings += [
            origin.finding(_at(stage), f"there is more than one {kind} stage", "keep one", code="order")
            for stage in found[1:]
        ]
    return findings


def _check_phases(places: Sequence[tuple[Component, str, StageConfig]], origin: Origin) -> list[Finding]:
    """What decides comes before select, execute after it, observe last."""
    findings = []
    latest, latest_name = _DECIDES, ""
    for component, _, stage in places:
        phase = _PHASES.get(component.kind, _DECIDES)
        if phase < latest:
            what = f"{component.key} comes after {latest_name}"
            findings.append(origin.finding(_at(stage), what, f"move it before {latest_name}", code="order"))
        elif phase > latest:
            latest, latest_name = phase, component.key
    return findings


def _check_names(places: Sequence[tuple[Component, str, StageConfig]], origin: Origin) -> list[Finding]:
    """Every stage has a name of its own among its kind, or traces and columns could not be told apart."""
    findings = []
    seen: set[tuple[Kind, str]] = set()
    for component, name, stage in places:
        if (component.kind, name) in seen:
            what = f"there are two {component.kind} stages called {name!r}"
            findings.append(origin.finding(_at(stage), what, "give one a `name:`", code="duplicate-stage"))
        seen.add((component.kind, name))
    return findings


def _check_answers(places: Sequence[tuple[Component, str, StageConfig]], origin: Origin) -> list[Finding]:
    """A short-circuit answer obeys the policy too, so no policy filter may follow it."""
    findings = []
    answer = ""
    for component, _, stage in places:
        if component.kind is Kind.ANSWER:
            answer = answer or component.key
        elif answer and component.must_hold and component.kind is not Kind.ADMIT:  # an answer from memory is free
            what = f"{component.key} comes after {answer}, which could answer around it"
            findings.append(origin.finding(_at(stage), what, f"move it before {answer}", code="order"))
    return findings


def check_facts(
    places: Sequence[tuple[Component, Any, StageConfig]], table: ComponentTable, origin: Origin
) -> list[Finding]:
    """Findings about facts that a stage needs and no stage before it gives."""
    findings = []
    given: set[Fact[Any]] = set()
    for component, instance, stage in places:
        wanted = getattr(instance, "required_facts", None)
        needs = (*component.needs, *(wanted() if callable(wanted) else ()))
        for fact in dict.fromkeys(needs):
            if fact not in given:
                givers = [c.key for c in table.of_kind(Kind.CLASSIFY) if fact in c.gives]
                remedy = f"put {' or '.join(givers)} before it" if givers else "no installed classifier gives it"
                what = f"{component.key} needs the fact {fact.name!r}, which no stage before it gives"
                findings.append(origin.finding(_at(stage), what, remedy, code="missing-fact"))
        given.update(component.gives)
    return findings


def _at(stage: StageConfig) -> Path:
    return stage.path or ("pipeline",)
