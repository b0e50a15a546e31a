"""The reference of span and attribute names, made from the one table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvfleet.trace.names import ATTRIBUTES, SPANS

__all__ = ["names_markdown"]


def names_markdown() -> str:
    """The reference as Markdown, without a title: the spans, then the attributes in the order of a route."""
    spans = _table(("Span", "Kind", "What it is"), ((f"`{s.name}`", s.kind, s.doc) for s in SPANS))
    attributes = _table(
        ("Attribute", "On", "Type", "Unit", "What it says"),
        ((f"`{a.name}`", a.span, f"`{a.type}`", a.unit or " ", a.doc) for a in ATTRIBUTES),
    )
    return f"## Spans\n\n{spans}\n\n## Attributes\n\n{attributes}\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
