"""Text that flows: coloured pieces, broken at a width, with a margin that goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import attrs

__all__ = ["PLAIN", "Flow", "Paint", "printable"]

Style = Callable[[str], str]

_SHORT = 40


def _plain(text: str) -> str:
    return text


@attrs.frozen(kw_only=True)
class Paint:
    """How emphasis looks; by default it does not."""

    good: Style = _plain
    bad: Style = _plain
    warn: Style = _plain
    bold: Style = _plain
    dim: Style = _plain


PLAIN = Paint()


def printable(text: str) -> str:
    r"""Text with what a terminal would obey made visible; identifiers come from callers.

    >>> printable("a\x1b[31mb")
    'a�[31mb'
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


@attrs.define
class Flow:
    """Builds lines.

    Attributes:
        columns: Break lines at this width; never if None.
    """

    columns: int | None = None
    lines: list[str] = attrs.field(factory=list)

    def add(self, margin: str, pieces: Iterable[tuple[str, Style]], *, then: str | None = None) -> None:
        """Add a line.

        Args:
            margin: What stands before it.
            pieces: Text and its style; pieces are set apart by two spaces, and long ones broken at single ones.
            then: What stands before its continuations; blanks as wide as `margin` if None.
        """
        then = " " * len(margin) if then is None else then
        line, used, gap = margin, len(margin), 0
        for word, style, before in _words(pieces):
            if used + gap + len(word) > (self.columns or used + gap + len(word)) and used > len(then):
                self.lines.append(line.rstrip())
                line, used, gap = then, len(then), 0
            line += " " * gap + style(word)
            used += gap + len(word)
            gap = before
        self.lines.append(line.rstrip())

    def text(self) -> str:
        """Everything so far."""
        return "\n".join(self.lines)


def _words(pieces: Iterable[tuple[str, Style]]) -> Iterator[tuple[str, Style, int]]:
    """What must not be broken, its style, and how many blanks come after it."""
    for text, style in pieces:
        shown = printable(text)
        words = [shown] if len(shown) <= _SHORT else shown.split(" ")
        for word in words[:-1]:
            yield word, style, 1
        yield words[-1], style, 2
