"""How the command line looks: findings, tables, aligned fields, JSON.

Colours appear on a terminal only; piped output is plain and never cut to a width, so that it can be searched.
``NO_COLOR`` switches colours off everywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kvfleet.config.findings import Finding

__all__ = [
    "bad",
    "bold",
    "choose_colour",
    "count",
    "dim",
    "echo",
    "echo_json",
    "fields",
    "finding_line",
    "findings",
    "github_line",
    "good",
    "progress",
    "table",
    "warn",
    "width",
]

_GAP = "  "
_LEAST = 20
"""Columns that are left to a table's last column, however narrow the terminal."""


def choose_colour(environ: Mapping[str, str] | None = None) -> bool | None:
    """False if ``NO_COLOR`` is set (https://no-color.org), True under ``FORCE_COLOR``, else None: as the output is."""
    environ = os.environ if environ is None else environ
    if environ.get("NO_COLOR"):
        return False
    return True if environ.get("FORCE_COLOR") else None


def width() -> int | None:
    """Columns of the terminal; None if the output goes elsewhere, and must not be cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def bold(text: str) -> str:
    """What a line is about."""
    return click.style(text, bold=True)


def dim(text: str) -> str:
    """What one may skip."""
    return click.style(text, dim=True)


def good(text: str) -> str:
    """What went well."""
    return click.style(text, fg="green")


def bad(text: str) -> str:
    """What did not."""
    return click.style(text, fg="red")


def warn(text: str) -> str:
    """What needs an eye."""
    return click.style(text, fg="yellow")


def echo(text: str = "", *, err: bool = False) -> None:
    """Print a line, without colours where nobody sees them."""
    click.echo(text, err=err)


def echo_json(value: Any) -> None:
    """Print a value as JSON that people can read too."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def progress(text: str) -> None:
    """Say on standard error what takes a while, if somebody watches."""
    if sys.stderr.isatty():
        echo(dim(text), err=True)


def count(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun.

    >>> count(1, "finding"), count(2, "finding"), count(2, "entry", "entries")
    ('1 finding', '2 findings', '2 entries')
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def finding_line(finding: Finding) -> str:
    """A finding as ``file:line:col: path: what is wrong; what to do``, its parts set apart by colour."""
    place = finding.file + (f":{finding.line}:{finding.column}" if finding.line else "")
    where = _where(finding)
    what = bad(finding.message) + (f"; {finding.remedy}" if finding.remedy else "")
    return ": ".join(part for part in (place, bold(where) if where else "", what) if part)


def _where(finding: Finding) -> str:
    from kvfleet.config.findings import path_text  # noqa: PLC0415 - brings in attrs, which `--help` does not need

    return path_text(finding.path)


def github_line(finding: Finding) -> str:
    """A finding as a GitHub Actions annotation."""

    def escape(text: str, more: str = "") -> str:
        for character in "%\r\n" + more:
            text = text.replace(character, f"%{ord(character):02X}")
        return text

    place = {"file": finding.file, "line": finding.line, "col": finding.column, "title": f"kvfleet {finding.code}"}
    shown = ",".join(f"{key}={escape(str(value), ',:')}" for key, value in place.items() if value)
    text = f"{finding.message}; {finding.remedy}" if finding.remedy else finding.message
    where = _where(finding)
    return f"::error {shown}::{escape(f'{where}: {text}' if where else text)}"


def findings(found: Sequence[Finding], *, err: bool = False) -> None:
    """Print findings, one a line, and how many there are."""
    for finding in found:
        echo(finding_line(finding), err=err)
    echo(bad(count(len(found), "finding")), err=err)


def fields(pairs: Iterable[tuple[str, str]], *, indent: str = "  ") -> str:
    """Names and values, the values below each other; pairs without a value are left out."""
    kept = [(name, value) for name, value in pairs if value]
    wide = max((len(name) for name, _ in kept), default=0)
    return "\n".join(f"{indent}{dim(name.ljust(wide))}{_GAP}{value}" for name, value in kept)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, columns: int | None = None) -> str:
    """A table with aligned columns; if it is too wide, the last column is wrapped below itself.

    Args:
        headers: The columns' names.
        rows: The cells; they may be coloured, but for those of the last column.
        columns: Width to keep to; unlimited if None.
    """
    sizes = [max(len(click.unstyle(row[i])) for row in [headers, *rows]) for i in range(len(headers))]
    before = sum(sizes[:-1]) + len(_GAP) * (len(sizes) - 1)
    room = max(columns - before, _LEAST) if columns else None
    lines = []
    for row in [[dim(header.upper()) for header in headers], *rows]:
        begin = _GAP.join([_padded(cell, size) for cell, size in zip(row[:-1], sizes[:-1], strict=True)] + [""])
        last = textwrap.wrap(click.unstyle(row[-1]), room) if room and len(click.unstyle(row[-1])) > room else [row[-1]]
        lines += [f"{begin}{last[0]}".rstrip(), *(" " * before + more for more in last[1:])]
    return "\n".join(lines)


def _padded(text: str, size: int) -> str:
    return text + " " * (size - len(click.unstyle(text)))
