"""The files that traces come in, and what a row must hold: what is wrong is told by file and line, with a remedy."""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from kvfleet.errors import TraceError

__all__ = ["BOM", "MOST_TOKENS", "check_readable", "csv_rows", "json_rows", "tokens_of", "uncounted", "while_reading"]

BOM = b"\xef\xbb\xbf"
MOST_TOKENS = 100_000_000
"""Beyond any model's context: who says more means something else."""
_LONGEST_LINE = 16 * 1024 * 1024
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
}


def check_readable(path: Path, head: bytes) -> None:
    """Refuse, by its beginning, a file that holds no text.

    Raises:
        TraceError: saying what it is, and what to do.
    """
    if not head.strip():
        raise TraceError(f"{path} is empty, or begins with nothing but white space; name a file that holds requests")
    for magic, (what, tool) in _PACKED.items():
        if head.startswith(magic):
            raise TraceError(f"{path} is packed ({what}); unpack it first, with {tool}")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TraceError(f"{path} is written in UTF-16; save it as UTF-8")


def json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects of a file of JSON Lines, by the numbers of their lines.

    Raises:
        TraceError: naming the line that holds none.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            if len(line) > _LONGEST_LINE:
                raise TraceError(f"{path}:{number}: is longer than {_LONGEST_LINE >> 20} MiB; no request is so long")
            text = line.removeprefix(BOM) if number == 1 else line
            if not text.strip():
                continue
            with while_reading(path, number, "a Mooncake"):
                row = orjson.loads(text)
                if not isinstance(row, dict):
                    raise TypeError('it is no object; write one as {"timestamp": …} on each line')
            yield number, row


def csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a CSV file, by the numbers of their lines, and first of all what its columns are called, by 0.

    Bytes that are no UTF-8 are found where they stand, as a cell that cannot be read.

    Raises:
        TraceError: naming the line that is none.
    """
    with path.open(newline="", encoding="utf-8-sig", errors="backslashreplace") as file:
        rows = csv.DictReader(file)
        try:
            yield 0, dict.fromkeys(rows.fieldnames or ())
            for row in rows:
                yield rows.line_num, row
        except csv.Error as error:
            raise TraceError(f"{path}:{rows.line_num + 1}: is no line of CSV: {error}") from error


@contextlib.contextmanager
def while_reading(path: Path, number: int, what: str) -> Iterator[None]:
    """Tell what is wrong with a row by its place.

    Raises:
        TraceError: in the place of what reading a value raises.
    """
    try:
        yield
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        wrong = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise TraceError(f"{path}:{number}: is no line of {what} trace: {wrong}") from error


def tokens_of(row: Mapping[str, Any], name: str, least: int = 0) -> int:
    """A number of tokens.

    Raises:
        KeyError: if the row does not have it.
        ValueError: saying what to give, if it is none.
    """
    value = row[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST_TOKENS:
        raise ValueError(
            f"{name} is {_shown(value)}; give a whole number of tokens, at least {least} and at most {MOST_TOKENS:,}"
        )
    return value


def uncounted(row: Mapping[str, Any], name: str) -> float:
    """A number that is not negative, of whatever unit.

    Raises:
        KeyError: if the row does not have it.
        ValueError: saying what to give, if it is none.
    """
    value = row[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {_shown(value)}; give a number that is not negative")
    return float(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
