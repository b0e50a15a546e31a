"""The pipeline drawn: as text, Mermaid or Graphviz dot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import attrs

from kvfleet.config.schema import FleetConfig
from kvfleet.pipeline.build import Built, read
from kvfleet.plugin.component import Component
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.manager import ComponentTable

__all__ = ["StageView", "as_dot", "as_mermaid", "as_text", "describe"]


@attrs.frozen(kw_only=True)
class StageView:
    """One stage as a graph shows it.

    Attributes:
        kind, name: ``filter`` and ``health``.
        summary: What it does, in its component's words.
        distribution: Who brought it.
        needs, gives: Names of facts.
        ends: How a route may end here, in words; empty if it cannot.
        observes: True if it is also told of every outcome.
    """

    kind: str
    name: str
    summary: str = ""
    distribution: str = ""
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    ends: str = ""
    observes: bool = False

    @property
    def key(self) -> str:
        """``filter.health``."""
        return f"{self.kind}.{self.name}"


def describe(config: FleetConfig, table: ComponentTable) -> tuple[StageView, ...]:
    """The stages of a configuration's pipeline, in order; entries that cannot be read are left out."""
    return tuple(_view(entry) for entry in read(config, table)[0])


def _view(entry: Built) -> StageView:
    component = entry.component
    wanted = getattr(entry.instance, "required_facts", None)
    needs = (*component.needs, *(wanted() if callable(wanted) else ()))
    return StageView(
        kind=component.kind.value,
        name=entry.name,
        summary=component.summary,
        distribution=component.distribution,
        needs=tuple(dict.fromkeys(fact.name for fact in needs)),
        gives=tuple(fact.name for fact in component.gives),
        ends=_ends(component),
        observes=component.kind is not Kind.OBSERVE and hasattr(component.cls, "observe"),
    )


def _ends(component: Component) -> str:
    if component.kind is Kind.FILTER and not getattr(component.cls, "limits_rates", False):
        if getattr(component.cls, "judges_request", False):
            return "400"
        return "403" if component.must_hold else "503"
    return {Kind.FILTER: "429", Kind.ADMIT: "429", Kind.ANSWER: "answered"}.get(component.kind, "")


def as_text(stages: Sequence[StageView], *, compact: bool = False) -> str:
    """A tree of lines; compact puts neighbours of one kind on one line, as `kvfleet run` shows it."""
    rows = _compact(stages) if compact else [(stage.key, _notes(stage)) for stage in stages]
    width = max((len(key) for key, notes in rows if notes), default=0)
    lines = ["request"]
    for index, (key, notes) in enumerate(rows):
        branch = "└" if index == len(rows) - 1 else "├"
        lines.append(f"{branch} {key:<{width}}  {notes}".rstrip())
    return "\n".join(lines)


def _notes(stage: StageView) -> str:
    parts = []
    if stage.needs:
        parts.append("needs " + ", ".join(stage.needs))
    if stage.gives:
        parts.append("gives " + ", ".join(stage.gives))
    if stage.ends:
        parts.append(f"may end: {stage.ends}")
    if stage.observes:
        parts.append("observes")
    if stage.distribution not in ("", "kvfleet"):
        parts.append(f"from {stage.distribution}")
    return "   ".join(parts)


def _compact(stages: Sequence[StageView]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for stage in stages:
        if rows and rows[-1][0] == stage.kind:
            rows[-1] = (stage.kind, f"{rows[-1][1]} · {stage.name}")
        else:
            rows.append((stage.kind, stage.name))
    return rows


def as_mermaid(stages: Sequence[StageView]) -> str:
    """A Mermaid flowchart."""
    lines = ["flowchart TD", "  request([request])"]
    before = "request"
    for index, stage in enumerate(stages):
        node = f"s{index}"
        lines.append(f'  {node}["{stage.key}"]')
        lines.append(f"  {before} --> {node}")
        if stage.ends:
            lines.append(f'  {node} -. "{stage.ends}" .-> end{index}(({stage.ends}))')
        before = node
    lines.append(f"  {before} --> done([answer])")
    return "\n".join(lines)


def as_dot(stages: Sequence[StageView]) -> str:
    """A Graphviz digraph."""
    lines = [
        "digraph pipeline {",
        "  rankdir=TB;",
        "  node [shape=box];",
        "  request [shape=oval];",
        "  answer [shape=oval];",
    ]
    chain = ["request", *(stage.key for stage in stages), "answer"]
    lines += [f'  "{a}" -> "{b}";' for a, b in itertools.pairwise(chain)]
    lines += [f'  "{s.key}" -> "{s.ends}" [style=dashed];' for s in stages if s.ends]
    lines.append("}")
    return "\n".join(lines)
