"""What stands in a Markdown page: its fenced blocks, and whether a program printed what one of them shows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

__all__ = ["ROOT", "Block", "ExampleError", "blocks_of", "commands_of", "matches"]

ROOT = Path(__file__).parent.parent.parent

_FENCE = re.compile(r"^( *)```(\w*)[^`]*$")
_COMMENT = re.compile(r"^ *<!-- test: (.+?) -->$")
_FILE = re.compile(r"^# (\S+\.\w+)$")
_SAME = (
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|\+00:00)?"), "WHEN"),
    (re.compile(r"\b\d\d-\d\d \d\d:\d\d:\d\d\b"), "WHEN"),
    (re.compile(r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT"), "WHEN"),
    (re.compile(r"<?\b\d[\d.,]* ?(?:ms|µs|s)\b"), "TIME"),
    (re.compile(r"dur=[\d.]+"), "dur=TIME"),
    (re.compile(r"\b(?:req-|chatcmpl-)?[0-9a-f]{8,32}\b"), "ID"),
    (re.compile(r'"created": ?\d+'), '"created":WHEN'),
    (re.compile(r"(?<=\w)(@\w+-|#)[12]\b"), r"\g<1>N"),  # equal replicas take turns, and chance begins
    (re.compile(r"\s+"), " "),
)


class ExampleError(AssertionError):
    """An example that does not do what the page says; names the page and the line."""


@attrs.frozen
class Block:
    """One fenced block.

    Attributes:
        page: The page, from the repository's root.
        line: Of its opening fence, from 1.
        language: What it is.
        text: What stands in it.
        directive: What the comment before it says; empty without one.
    """

    page: str
    line: int
    language: str
    text: str
    directive: str = ""

    @property
    def word(self) -> str:
        """The directive's first word."""
        return self.directive.partition(" ")[0]

    @property
    def rest(self) -> str:
        """The directive's other words."""
        return self.directive.partition(" ")[2]

    @property
    def file(self) -> str:
        """The file it is, if its first line names one."""
        found = _FILE.match(self.text.partition("\n")[0])
        return found[1] if found else ""

    def wrong(self, what: str) -> ExampleError:
        """The error for this block."""
        return ExampleError(f"{self.page}:{self.line}: {what}")


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    name = str(page.relative_to(ROOT) if page.is_relative_to(ROOT) else page.name)
    opened: tuple[int, str, str, str] | None = None
    lines: list[str] = []
    directive = ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, lines = (number, fence[2], fence[1], directive), []
        elif opened is not None and line.strip() == "```":
            yield Block(name, opened[0], opened[1], "\n".join(lines) + "\n", opened[3])
            opened, directive = None, ""
        elif opened is not None:
            lines.append(line.removeprefix(opened[2]))
        else:
            comment = _COMMENT.match(line)
            directive = comment[1] if comment else directive if not line.strip() else ""


def commands_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a console block, continued lines joined, and what stands below it."""
    command = ""
    shown: list[str] = []
    is_open = False
    for line in text.rstrip("\n").split("\n"):
        if is_open:
            command += "\n" + line
        elif line.startswith("$ "):
            if command:
                yield command, shown
            command, shown = line[2:], []
        else:
            shown.append(line)
        is_open = (is_open or line.startswith("$ ")) and line.endswith("\\")
    if command:
        yield command, shown


def matches(shown: Sequence[str], printed: Sequence[str]) -> bool:
    """True if a program printed what the page shows."""
    wanted = [None if line.strip() == "…" else _pattern(line) for line in shown]
    reached = {0}  # how many of the wanted lines may be behind us
    for line in [*map(_same, printed), None]:
        for at in sorted(reached):  # a line of `…` alone may stand for none
            reached |= {at + past + 1 for past in range(_empty_at(wanted, at))}
        if line is None:
            return len(wanted) in reached
        reached = {
            at if pattern is None else at + 1
            for at in reached
            if at < len(wanted) and ((pattern := wanted[at]) is None or pattern.fullmatch(line))
        }
    return False


def _empty_at(wanted: Sequence[re.Pattern[str] | None], at: int) -> int:
    """How many lines from one on may stand for nothing."""
    return next((past for past, pattern in enumerate(wanted[at:]) if pattern is not None), len(wanted) - at)


def _pattern(line: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in _same(line).split("…")))


def _same(line: str) -> str:
    """A line without what is never the same twice."""
    for pattern, word in _SAME:
        line = pattern.sub(word, line)
    return line.strip()
