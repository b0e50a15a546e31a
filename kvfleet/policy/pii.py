"""Personal data: found by pattern and check digit, and redacted.

Every quantifier is bounded, so no text makes a pattern run away. Cards must pass Luhn's check, addresses must have
valid octets, IBANs must pass ISO 13616's check. Names and other free-form data need a model; that is a plugin's work.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypedDict

import attrs

from kvfleet.policy.pii_checks import CHECKS
from kvfleet.policy.pii_gate import Gate, as_ascii, make_gate

__all__ = ["PII_PATTERNS", "PIIDetectionResult", "PIIDetector", "PIIMatch"]


class PIIMatch(TypedDict):
    """One find: its type, the text, and where it stands."""

    type: str
    value: str
    start: int
    end: int


@attrs.frozen
class PIIDetectionResult:
    """What was found in a text. Its repr shows types and counts, never the text.

    Attributes:
        pii_types: The types found, in the detector's order.
        matches: Every find, by position.
        redacted_text: The text without the finds; the text itself where nothing was redacted.
    """

    pii_types: list[str] = attrs.field(factory=list)
    matches: list[PIIMatch] = attrs.field(factory=list, repr=False)
    redacted_text: str = attrs.field(default="", repr=False)

    @property
    def has_pii(self) -> bool:
        """True if anything was found."""
        return bool(self.pii_types)


_H = "[0-9A-Fa-f]{1,4}"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"

PII_PATTERNS: Mapping[str, str] = {
    "email": r"\b[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b",
    "phone_us": r"(?<![\w.])(?:(?:\+|00)?1[-.\s]?)?(?:\(\d{3}\)\s?|\d{3}[-.\s])\d{3}[-.\s]\d{4}"
    r"(?:\s?x\d{1,6}(?!\w)|(?![\w-]))",
    "ssn": r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])",
    "credit_card": r"(?<![\w.-])(?:[3-6]|2[2-7])(?:\d{11,18}|\d{2,3}[ .-]"
    r"(?:\d{4}[ .-]\d{4}[ .-]\d{1,7}|\d{6}[ .-]\d{4,5}))(?![\w-])",
    "ip_address": rf"(?<![\w.:])(?:(?:{_OCTET}\.){{3}}{_OCTET}(?!\w|\.\d)"
    rf"|(?:(?:{_H}:){{7}}{_H}|(?:{_H}:){{2,6}}(?::{_H}){{1,5}}|{_H}:(?::{_H}){{2,6}})(?![\w:]))",
    "date_of_birth": r"(?<![\w/])(?:0?[1-9]|1[0-2])/(?:0?[1-9]|[12]\d|3[01])/(?:19|20)\d{2}(?![\w/])"
    r"|\b(?i:born|birth|birthday|birthdate|dob)\b[^\n0-9]{0,20}"
    r"(?P<value>(?:19|20)\d{2}-\d{2}-\d{2}|\d{1,2}[./-]\d{1,2}[./-](?:19|20)\d{2})(?!\w)",
    "passport": r"(?i:passport)(?:\s{1,3}(?i:no|number|nr))?\.?:?\s{0,3}#?\s{0,3}[A-Z]{1,2}\d{6,8}\b",
    "iban": r"\b[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]{4}){2,7}(?: ?[A-Za-z0-9]{1,3})?\b",
    "api_key": r"\b(?:sk-[A-Za-z0-9_-]{16,200}|[sr]k_(?:live|test)_[A-Za-z0-9]{16,128}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|AIza[A-Za-z0-9_-]{35}|hf_[A-Za-z0-9]{30,64}|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}"
    r"|glpat-[A-Za-z0-9_-]{20,64}|xox[abprs]-[A-Za-z0-9-]{10,128})",
    "phone": r"(?<![\w.+])(?:\+|00)[1-9]\d{0,14}(?:[ .-]\d{1,8}|[ .-]?\(\d{1,5}\)\d{0,8}){0,6}(?![\w-])"
    r"|(?<![\w.(/+-])(?:0[1-9](?:[ .-]\d{2}){4}|0[1-9][ -]\d{7,8}"
    r"|\(?0[1-9]\d{1,3}\)?[ /-](?:\d{6,8}|\d{3,4}[ -]\d{3,4}|\d{2,3}[ -]\d{2}[ -]\d{2}))(?![\w-])"
    r"|(?<![\w.-])\(\d{2,3}\) \d{3,4}-\d{3,4}(?![\w-])"
    r"|\b(?i:phone|tel|call|mobile|fax|cell|reach|answering)\b(?: (?i:number|no|nr|is|me|us|him|her|at|on)\b){0,3}"
    r"[.:#]?\s{0,3}"
    r"(?P<value>\+?\(?\d{1,12}\)?(?:[ .-]\d{2,8}){0,5})(?![\w-])",
    "us_driver_license": r"(?i:driver'?s?'? licen[cs]e)[^\n0-9]{0,12}?(?P<value>\b[A-Za-z]{0,2}\d{6,14}[A-Za-z]?)\b",
}
"""The patterns, by type, read as ASCII; what they find is checked further where a type has a check digit or a range.

Where a pattern needs a word beside the find ("born", "phone"), the find is its group ``value``.
"""

_MOST_FINDS = 4
_MOST_FAILED = 24
_MOST_STARTS = 64  # a search by RE2 costs about 5 us: where finds are this dense, reading on with `re` is cheaper


@attrs.define
class PIIDetector:
    """Finds personal data in texts.

    Args:
        patterns: Regular expressions by type; `PII_PATTERNS` by default.
        gate: What says where to look; by default RE2 if it is installed, else plain conditions.
    """

    patterns: Mapping[str, str] = attrs.field(factory=lambda: PII_PATTERNS, repr=False)
    gate: Gate | None = attrs.field(default=None, repr=False, eq=False)
    _compiled: Mapping[str, re.Pattern[str]] = attrs.field(init=False, repr=False)
    _others: tuple[str, ...] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        """Compile the patterns."""
        ours = [name for name, pattern in self.patterns.items() if PII_PATTERNS.get(name) == pattern]
        self.gate = make_gate(ours) if self.gate is None else self.gate
        self._others = tuple(name for name in self.patterns if name not in ours)
        self._compiled = {
            name: re.compile(pattern, re.ASCII if name in ours else 0) for name, pattern in self.patterns.items()
        }

    @classmethod
    def of_types(cls, types: Collection[str]) -> PIIDetector:
        """A detector of some types; of all there are if none is named.

        Raises:
            ValueError: for a type there is no pattern for.
        """
        unknown = sorted(set(types).difference(PII_PATTERNS))
        if unknown:
            raise ValueError(f"no pattern for the type {unknown[0]!r}; known: {', '.join(PII_PATTERNS)}")
        return cls({name: PII_PATTERNS[name] for name in types} if types else PII_PATTERNS)

    def detect(self, text: str) -> PIIDetectionResult:
        """What is in a text.

        >>> PIIDetector().detect("Email me at user@example.com, SSN: 123-45-6789").pii_types
        ['email', 'ssn']
        """
        data = as_ascii(text)
        finds = (match for name in self._flagged(data) for match in self._tries(name, text, data) if match)
        kept = _without_overlaps(finds)
        return PIIDetectionResult(self._in_order(match["type"] for match in kept), kept, text)

    def detect_all(self, texts: Iterable[str]) -> PIIDetectionResult:
        """The types in several texts together; without positions, which would mean nothing.

        The work is bounded: of each type the first finds are looked at. A type of which a text has more false starts
        than any honest text (24 numbers like a card's, and not one that is) counts as found.
        """
        found: set[str] = set()
        for text in texts:
            found |= self._types(text)
        return PIIDetectionResult(self._in_order(found))

    def has_pii(self, text: str) -> bool:
        """True if there is any; its work is bounded as that of `detect_all`."""
        return bool(self._types(text))

    def redact(self, text: str, replacement: str = "[REDACTED]") -> PIIDetectionResult:
        """The text with every find replaced.

        >>> PIIDetector().redact("Call (555) 123-4567 for info").redacted_text
        'Call [REDACTED](phone_us) for info'
        """
        result = self.detect(text)
        parts, at = [], 0
        for match in result.matches:
            parts += [text[at : match["start"]], f"{replacement}({match['type']})"]
            at = match["end"]
        return attrs.evolve(result, redacted_text="".join([*parts, text[at:]]))

    def _in_order(self, found: Iterable[str]) -> list[str]:
        those = set(found)
        return [name for name in self._compiled if name in those] if those else []

    def _flagged(self, data: bytes) -> Sequence[str]:
        """The types that may be in a text."""
        assert self.gate is not None  # noqa: S101 - made in __attrs_post_init__
        flagged = self.gate.flagged(data)
        return self._in_order([*flagged, *self._others]) if self._others else flagged

    def _types(self, text: str) -> set[str]:
        data = as_ascii(text)
        finds: list[PIIMatch] = []
        found: set[str] = set()
        for name in self._flagged(data):
            mine, is_suspect = self._first_finds(name, text, data)
            finds += mine
            if is_suspect:
                found.add(name)
        return found.union(match["type"] for match in _without_overlaps(finds)) if finds else found

    def _first_finds(self, name: str, text: str, data: bytes) -> tuple[list[PIIMatch], bool]:
        """The first finds of a type, and whether there were too many false starts to go on."""
        finds: list[PIIMatch] = []
        failed = 0
        for match in self._tries(name, text, data):
            if match is not None:
                finds.append(match)
            else:
                failed += 1
            if len(finds) == _MOST_FINDS or failed == _MOST_FAILED:
                break
        return finds, failed == _MOST_FAILED and not finds

    def _tries(self, name: str, text: str, data: bytes) -> Iterator[PIIMatch | None]:
        """Every place worth a look, in order: the find there, or None."""
        check = CHECKS.get(name)
        for found in self._places(name, text, data):
            if found is None:
                yield None
                continue
            start, end = found.span("value" if found.lastgroup else 0)
            length = end - start if check is None else check(text[start:end])
            value = text[start : start + length]
            yield PIIMatch(type=name, value=value, start=start, end=start + length) if length else None

    def _places(self, name: str, text: str, data: bytes) -> Iterator[re.Match[str] | None]:
        """What the exact pattern finds, where the gate says or in all of the text; None for a false start."""
        pattern = self._compiled[name]
        starts = None if name in self._others or self.gate is None else self.gate.starts(name, data)
        if starts is None:
            yield from pattern.finditer(text)
            return
        done = last = 0
        for first, last in itertools.islice(starts, _MOST_STARTS):
            if last <= done:
                continue
            found = _search(pattern, text, max(first, done), last)
            done = found.end() if found is not None else done
            yield found
        if next(starts, None) is not None:
            yield from pattern.finditer(text, max(done, last))


_LONGEST_MATCH = 640


def _search(pattern: re.Pattern[str], text: str, first: int, last: int) -> re.Match[str] | None:
    """The match that begins at a place, or in a few places."""
    if last - first == 1:
        return pattern.match(text, first)
    return pattern.search(text, first, last + _LONGEST_MATCH)


def _without_overlaps(matches: Iterable[PIIMatch]) -> list[PIIMatch]:
    """Of finds that overlap, the one that begins first, and the longest of those."""
    kept: list[PIIMatch] = []
    for match in sorted(matches, key=lambda match: (match["start"], -match["end"])):
        if not kept or match["start"] >= kept[-1]["end"]:
            kept.append(match)
    return kept
