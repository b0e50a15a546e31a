"""A large JSON body parsed in steps: the elements of its one long list (messages, inputs, prompts) some at a time.

Where one element ends and the next begins is guessed, and parsing proves the guess: what stands between two places of
a list is valid as a list of its own only if both are between elements. Where the list stands, and that it is the one
its key has in the end, is proven by parsing the rest with a word that nobody knows in its place. Whatever does not work
out has the body parsed at once, so value and error are those of `orjson.loads` in every case, and the work is at most
three times as much.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

import attrs
import orjson

from kvfleet.turns import Steps

__all__ = ["loaded"]

_SLICE = 256 * 1024
_KEYS = (b'"messages"', b'"input"', b'"prompt"')
_BEGINS = re.compile(rb'"(\w+)"\s*:\s*\[\s*')
_FIRST = re.compile(rb'\{\s*"[^"\\]{1,40}"\s*:')
_MOST_FAILURES = 6
_LONGEST = 4  # steps that one element may be long


def loaded(raw: bytes, size: int = _SLICE) -> Steps[Any]:
    """The value of a JSON text, parsed about so many bytes at a step.

    Raises:
        orjson.JSONDecodeError: as `orjson.loads` does.
    """
    found = _list_in(raw, size)
    if found is not None:
        yield
        if (yield from found.read()):
            word = secrets.token_hex(16)
            value = _or_none(b'%b["w%b"]%b' % (raw[: found.start], word.encode(), raw[found.at :]))
            if isinstance(value, dict) and value.get(found.key) == [f"w{word}"]:
                value[found.key] = found.items
                return value
        yield
    return orjson.loads(raw)


def _or_none(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None


def _list_in(raw: bytes, size: int) -> _List | None:
    """The list that seems to be the long one; None if there seems to be none."""
    places = [at for key in _KEYS if (at := raw.find(key, 0, size)) >= 0]
    begins = _BEGINS.match(raw, min(places)) if places else None
    if begins is None:
        return None
    first = raw[begins.end() : begins.end() + 1]
    if first == b"{":
        opening = _FIRST.match(raw, begins.end())
        marks: list[tuple[bytes, ...]] = [(b"},{", b"}, {")]
        if opening is not None:
            marks.insert(0, (b"}," + opening[0], b"}, " + opening[0]))  # parts of an element begin otherwise
    else:
        marks = [{b'"': (b'","', b'", "'), b"[": (b"],[", b"], [")}.get(first, (b",",))]
    start = raw.index(b"[", begins.end(1))
    return _List(raw=raw, key=begins[1].decode(), start=start, at=start + 1, marks=marks, size=size)


@attrs.define
class _List:
    """A list within a text, as far as it was read.

    Attributes:
        raw: The text.
        key: The list's.
        start: Where its bracket is.
        at: The place behind what was read of it.
        marks: What may stand between two elements, the surer ones first.
        size: Bytes to read at a step.
        items: What was read.
    """

    raw: bytes
    key: str
    start: int
    at: int
    marks: list[tuple[bytes, ...]]
    size: int
    items: list[Any] = attrs.field(factory=list)

    def read(self) -> Steps[bool]:
        """Read it to its end; False if that did not work out."""
        failures, before = 0, 0
        while failures < _MOST_FAILURES:
            end = self._boundary(before)
            if end is None:
                return False
            text = b"[[" + self.raw[self.at :] if end == len(self.raw) else b"[[%b]]" % self.raw[self.at : end]
            try:
                found = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                yield
                place = self.at + _bytes_before(error) - 2
                if place < end or end == len(self.raw):  # the list ended before
                    return self._ends_at(self.raw.rfind(b"]", self.at, place))
                failures, before = failures + 1, end - 1
                continue
            if len(found) > 1 or end == len(self.raw):
                return False
            self.items += found[0]
            self.at, before, failures = self.raw.index(b",", end) + 1, 0, max(failures - 1, 0)
            yield
        return False

    def _boundary(self, before: int) -> int | None:
        """Where an element seems to end: a step further on, or the last place before a given one; None if nowhere.

        The end of the text where the rest is short.
        """
        most = before or self.at + self.size
        if most >= len(self.raw):
            return len(self.raw)
        skip = self.marks[0] != (b",",)  # the first letter of a mark is the element's last
        for marks in self.marks:
            if (found := max(self.raw.rfind(mark, self.at, most) for mark in marks)) > self.at:
                return found + skip
        if before:
            return None
        furthest = self.at + _LONGEST * self.size
        for marks in self.marks:
            if places := [at for mark in marks if (at := self.raw.find(mark, most, furthest)) >= 0]:
                return min(places) + skip
        return len(self.raw) if furthest >= len(self.raw) else None

    def _ends_at(self, end: int) -> bool:
        found = _or_none(b"[[%b]]" % self.raw[self.at : end]) if end >= 0 else None
        if found is None or len(found) > 1:
            return False
        self.items += found[0]
        self.at = end + 1
        return True


def _bytes_before(error: orjson.JSONDecodeError) -> int:
    """How many bytes stand before the place of an error, which is told in characters."""
    return error.pos if error.doc.isascii() else len(error.doc[: error.pos].encode("utf-8", "replace"))
