"""Personal data: found by pattern and check digit, and redacted.

Every quantifier is bounded, so no text makes a pattern run away. Cards must pass Luhn's check, addresses must have
valid octets, IBANs must pass ISO 13616's check. Names and other free-form data need a model; that is a plugin's work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypedDict

import attrs

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


PII_PATTERNS: Mapping[str, str] = {
    "email": r"\b[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b",
    "phone_us": r"(?<![\w.])(?:\+?1[-.\s]?)?(?:\(\d{3}\)\s?|\d{3}[-.\s])\d{3}[-.\s]\d{4}(?![\w-])",
    "ssn": r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])",
    "credit_card": r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])",
    "ip_address": r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)",
    "date_of_birth": r"(?<![\w/])(?:0[1-9]|1[0-2])/(?:0[1-9]|[12]\d|3[01])/(?:19|20)\d{2}(?![\w/])",
    "passport": r"(?i:passport)(?:\s{1,3}(?i:no|number|nr))?\.?:?\s{0,3}#?\s{0,3}[A-Z]{1,2}\d{6,8}\b",
    "iban": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b",
    "api_key": r"\b(?:sk-[A-Za-z0-9_-]{16,200}|[sr]k_(?:live|test)_[A-Za-z0-9]{16,128}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|AIza[A-Za-z0-9_-]{35}|hf_[A-Za-z0-9]{30,64}|gh[pousr]_[A-Za-z0-9]{36,255}|xox[abprs]-[A-Za-z0-9-]{10,128})",
}
"""The patterns, by type; what they find is checked further where a type has a check digit or a range."""


def _is_card(text: str) -> bool:
    """Luhn's check (ISO/IEC 7812-1)."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [d * 2 - 9 * (d > 4) if i % 2 else d for i, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0 and len(set(digits)) > 1


def _is_address(text: str) -> bool:
    return all(int(octet) < 256 for octet in text.split("."))


def _is_iban(text: str) -> bool:
    """The check of ISO 13616: moved and spelled out in digits, it leaves 1 when divided by 97."""
    plain = text.replace(" ", "")
    moved = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


_CHECKS: Mapping[str, Callable[[str], bool]] = {
    "credit_card": _is_card,
    "ip_address": _is_address,
    "iban": _is_iban,
}


@attrs.define
class PIIDetector:
    """Finds personal data in texts.

    Args:
        patterns: Regular expressions by type; `PII_PATTERNS` by default.
    """

    patterns: Mapping[str, str] = attrs.field(factory=lambda: PII_PATTERNS, repr=False)
    _compiled: tuple[tuple[str, re.Pattern[str]], ...] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        """Compile the patterns."""
        self._compiled = tuple((name, re.compile(pattern)) for name, pattern in self.patterns.items())

    def detect(self, text: str) -> PIIDetectionResult:
        """What is in a text.

        >>> PIIDetector().detect("Email me at user@example.com, SSN: 123-45-6789").pii_types
        ['email', 'ssn']
        """
        matches = sorted(self._matches(text), key=lambda match: (match["start"], -match["end"]))
        kept = _without_overlaps(matches)
        found = {match["type"] for match in kept}
        return PIIDetectionResult([name for name, _ in self._compiled if name in found], kept, text)

    def detect_all(self, texts: Iterable[str]) -> PIIDetectionResult:
        """The types in several texts together; without positions, which would mean nothing."""
        found = {match["type"] for text in texts for match in self.detect(text).matches}
        return PIIDetectionResult([name for name, _ in self._compiled if name in found])

    def has_pii(self, text: str) -> bool:
        """True if there is any."""
        return next(iter(self._matches(text)), None) is not None

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

    def _matches(self, text: str) -> Iterable[PIIMatch]:
        for name, pattern in self._compiled:
            check = _CHECKS.get(name)
            for match in pattern.finditer(text):
                if check is None or check(match[0]):
                    yield PIIMatch(type=name, value=match[0], start=match.start(), end=match.end())


def _without_overlaps(matches: Iterable[PIIMatch]) -> list[PIIMatch]:
    """Of finds that overlap, the one that begins first, and the longest of those."""
    kept: list[PIIMatch] = []
    for match in matches:
        if not kept or match["start"] >= kept[-1]["end"]:
            kept.append(match)
    return kept
