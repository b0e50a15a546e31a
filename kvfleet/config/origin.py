"""Where each value of a configuration stands."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from kvfleet.config.findings import Finding, Path, path_text
from kvfleet.config.secrets import SecretReader

__all__ = ["NOWHERE", "Origin"]


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
