"""Findings: what is wrong with a configuration, where, and what to do; and where each value of a file stands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from kvfleet.config.secrets import SecretReader

__all__ = ["NOWHERE", "Finding", "Origin", "Path", "did_you_mean", "path_text"]

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


@attrs.frozen
class Origin:
    """Where a configuration came from: the file, and the position of every value in it.

    Attributes:
        file: The file's name as the user gave it.
        positions: For each path, the line and column (from 1) of its key, or of the item for a list.
        others: Paths set from elsewhere (``<environment> KVFLEET__STRATEGY``), by path.
        secrets: What resolves references to secrets in this configuration; the process's own environment if None.
    """

    file: str = ""
    positions: Mapping[Path, tuple[int, int]] = attrs.field(factory=dict, repr=False)
    others: Mapping[Path, str] = attrs.field(factory=dict, repr=False)
    secrets: SecretReader | None = attrs.field(default=None, repr=False)

    def sets(self, path: Path) -> bool:
        """True if the file, or another source, says something about a value or what is below it."""
        return path in self.positions or any(place[: len(path)] == path for place in self.others)

    def place_of(self, path: Path) -> str:
        """Where a value stands, as a remedy names it: its line, its other source, or at least its path."""
        if path in self.positions:
            return f"line {self.positions[path][0]}"
        return self.others.get(path) or path_text(path)

    def finding(self, path: Path, message: str, remedy: str = "", *, code: str = "invalid") -> Finding:
        """A finding at `path`, placed at the nearest enclosing value whose position is known."""
        for end in range(len(path), -1, -1):
            near = path[:end]
            if near in self.others:
                return Finding(message, remedy, path, self.others[near], code=code)
            if near in self.positions:
                line, column = self.positions[near]
                return Finding(message, remedy, path, self.file, line, column, code)
        return Finding(message, remedy, path, self.file, code=code)


NOWHERE = Origin()
