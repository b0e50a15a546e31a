"""The gates: what may be in a text, with RE2 and without, and how much work it is to know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvfleet.policy.pii import PII_PATTERNS, PIIDetector
from kvfleet.policy.pii_gate import Gate, PlainGate, RE2Gate, as_ascii

PLAIN = PIIDetector(gate=PlainGate(tuple(PII_PATTERNS)))
RE2 = RE2Gate.of(PII_PATTERNS)
needs_re2 = pytest.mark.skipif(RE2 is None, reason="google-re2 is not installed")

PIECES = (
    "ada@example.com",
    "(555) 123-4567",
    "+1 555-123-4567x89",
    "+44 20 7946 0958",
    "0431 35 06 90",
    "123-45-6789",
    "4111 1111 1111 1111",
    "378282246310005",
    "10.0.0.1",
    "2001:db8::1:2",
    "d80:e4b5:79da:6cf6:71f3:51f7:9161:c319",
    "4/1/1980",
    "born on 1980-04-01",
    "Passport no: X1234567",
    "DE89 3704 0044 0532 0130 00",
    "sk-abcdefghijklmnop1234",
    "driver's license number is A1234567",
    "call me at 9493 7477",
    "12:34:56",
    "2024-05-01",
    "1.2.3.400",
    "00",
    "-",
    " ",
    ".",
    "x",
    "é",
    "(",
)


@pytest.mark.parametrize(
    ("text", "types"),
    [
        ("reach us at +44 20 7946 0958", ["phone"]),
        ("Fax 02.27.96.63.08", ["phone"]),
        ("call me at 9493 7477", ["phone"]),
        ("call 12 people", []),
        ("on 01-02-2024 10:15", []),
        ("555-123-4567x890", ["phone_us"]),
        ("from 2001:db8::1:2", ["ip_address"]),
        ("at 12:34:56", []),
        ("the C++ name ab::cd::ef", []),
        ("mac 00:1a:2b:3c:4d:5e", []),
        ("release 1.2.3.4.5", []),
        ("she was born on 1980-04-01", ["date_of_birth"]),
        ("logged on 1980-04-01", []),
        ("due 4/1/2024", ["date_of_birth"]),
        ("amex 3782-822463-10005", ["credit_card"]),
        ("nanoseconds 1700000000000000000", []),
        ("my iban is gb82 west 1234 5698 7654 32 please", ["iban"]),
        ("XX82 WEST 1234 5698 7654 32", []),
        ("My driver's license number is A1234567", ["us_driver_license"]),
        ("sk-learn-contrib-something-long", []),
        ("我的电话555-123-4567是", ["phone_us"]),
    ],
)
def test_what_is_found(text: str, types: list[str]) -> None:
    """Types that need a word beside them, other countries' numbers, and what only looks like personal data."""
    assert PLAIN.detect(text).pii_types == types
    assert PIIDetector().detect(text).pii_types == types


def test_a_find_beside_a_word_is_the_find_alone() -> None:
    """The word stays in the redacted text."""
    assert PIIDetector().redact("born on 1980-04-01.").redacted_text == "born on [REDACTED](date_of_birth)."


@needs_re2
@given(st.lists(st.sampled_from(PIECES), max_size=12), st.sampled_from(("", " ", ", ")))
@example(["0", "123-45-6789"], "")
def test_with_re2_the_same_is_found(pieces: list[str], between: str) -> None:
    """RE2 says where to look, and changes nothing about what is there."""
    text = between.join(pieces)
    detector = PIIDetector(gate=RE2)
    assert detector.detect(text).matches == PLAIN.detect(text).matches
    assert detector.has_pii(text) is PLAIN.has_pii(text)


@needs_re2
@given(st.text(alphabet="0123456789-. @:aAbBxE+()/é", max_size=120))
def test_with_re2_the_same_is_found_in_noise(text: str) -> None:
    """Also where a find begins in the midst of another's false start."""
    assert PIIDetector(gate=RE2).detect(text).matches == PLAIN.detect(text).matches


@needs_re2
@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_the_quick_answer_names_what_is_there(pieces: list[str]) -> None:
    """`detect_all` looks at a few finds of each type, and finds every type that is there."""
    text = " ".join(pieces)
    assert set(PIIDetector().detect_all([text]).pii_types) >= set(PIIDetector().detect(text).pii_types)


@attrs.define
class Counting:
    """A gate that counts the places that are looked at."""

    inner: Gate
    places: int = 0

    def flagged(self, data: bytes) -> Sequence[str]:
        """As the gate inside."""
        return self.inner.flagged(data)

    def starts(self, name: str, data: bytes) -> Iterator[tuple[int, int]]:
        """The same places, counted."""
        for place in self.inner.starts(name, data) or ():
            self.places += 1
            yield place


@needs_re2
@pytest.mark.parametrize(
    "piece",
    ["4111 1111 1111 1112 ", "DE89370400440532013001 ", "sk-aaaaaaaaaaaaaaaaaaaa ", "x@y.com ", "123-45-6789 ", "+1 "],
)
def test_the_work_is_bounded(piece: str) -> None:
    """However often a text looks like something, a few places of each type are looked at."""
    assert RE2 is not None
    gate = Counting(RE2)
    PIIDetector(gate=gate).detect_all([piece * (65536 // len(piece))])
    assert gate.places <= 32 * 3


@needs_re2
@pytest.mark.parametrize("piece", ["4111 1111 1111 1112 ", "DE89370400440532013001 "])
def test_more_false_starts_than_honest_text_has_count_as_found(piece: str) -> None:
    """So nobody hides a number behind thousands that are none; redaction still looks at every one."""
    text = piece * 500
    assert PIIDetector(gate=RE2).has_pii(text)
    assert not PIIDetector(gate=RE2).has_pii(piece * 5)
    assert PIIDetector(gate=RE2).detect(text + "4111 1111 1111 1111").pii_types == ["credit_card"]


def test_places_agree_in_any_script() -> None:
    """One byte for one character, whatever it is."""
    text = "ñ日本😀 ada@example.com"
    assert len(as_ascii(text)) == len(text)
    (match,) = PIIDetector().detect(text).matches
    assert text[match["start"] : match["end"]] == match["value"] == "ada@example.com"


def test_patterns_of_ones_own_need_no_gate() -> None:
    """They are read as they are, beside ours; and one of ours that was changed is no longer ours."""
    own = PIIDetector({"staff": r"\bE\d{5}\b", "ssn": r"\d{9}", "email": PII_PATTERNS["email"]})
    assert own.detect("E12345, 123456789, a@b.co").pii_types == ["staff", "ssn", "email"]
    assert own.detect("123-45-6789").pii_types == []
    assert own.has_pii("E12345")
