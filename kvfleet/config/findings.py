"""Findings: what is wrong with a configuration, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import attrs

__all__ = ["Finding", "Path", "did_you_mean", "path_text"]

Path = tuple[str | int, ...]
"""The way to a value: mapping keys and list positions, as in ``("models", 0, "endpoint")``."""


def path_text(path: Path) -> str:
    """A path as people write it.

    >>> path_text(("models", 0, "endpoint"))
    'models[0].endpoint'
    """
    out = ""
    for step in path:
        out += f"[{step}]" if isinstance(step, int) else f".{step}" if out else str(step)
    return out


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The words closest to `word` as a remedy, or a list of the known ones if none is close.

    >>> did_you_mean("stratgy", ["strategy", "models"])
    'did you mean strategy?'
    >>> did_you_mean("zzz", ["a", "b"])
    'known: a, b'
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    if not names:
        return "there are none"
    shown = ", ".join(names[:12])
    return f"known: {shown}" + (", …" if len(names) > 12 else "")


@attrs.frozen
class Finding:
    """One thing wrong, printed as ``file:line:col: path: what is wrong; what to do``.

    Attributes:
        file: The file (or ``<environment>``, ``<overrides>``); empty if there is none.
        line, column: Counted from 1; 0 if unknown.
        path: The way to the value, empty for the whole file.
        message: What is wrong.
        remedy: What to do.
        code: A stable identifier of the kind of finding (``unknown-key``, ``type``, ``range``, …).
    """

    message: str
    remedy: str = ""
    path: Path = ()
    file: str = ""
    line: int = 0
    column: int = 0
    code: str = "invalid"

    def __str__(self) -> str:
        place = self.file
        if self.line:
            place += f":{self.line}:{self.column}"
        where = path_text(self.path)
        what = f"{self.message}; {self.remedy}" if self.remedy else self.message
        return ": ".join(part for part in (place, where, what) if part)

    def to_dict(self) -> dict[str, str | int]:
        """The finding as plain JSON types, for ``--json``."""
        return {
            "file": self.file,
            "line": self.line,
            "column": self.column,
            "path": path_text(self.path),
            "message": self.message,
            "remedy": self.remedy,
            "code": self.code,
        }
