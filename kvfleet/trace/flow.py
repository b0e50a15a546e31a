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
        runs: list[tuple[str, Style]] = [(margin, _plain)]
        used, gap = len(margin), 0
        for word, style, after in _words(pieces):
            is_too_wide = self.columns is not None and used + gap + len(word) > self.columns
            if is_too_wide and used > len(then):
                self._end(runs)
                runs, used, gap = [(then, _plain)], len(then), 0
            if gap == 1 and runs[-1][1] is style:
                runs[-1] = (f"{runs[-1][0]} {word}", style)  # one run of colour, not one a word
            else:
                runs += [(" " * gap, _plain), (word, style)]
            used += gap + len(word)
            gap = after
        self._end(runs)

    def _end(self, runs: list[tuple[str, Style]]) -> None:
        self.lines.append("".join(style(run) for run, style in runs if run).rstrip())

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
