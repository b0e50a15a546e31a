"""What may be in a text, found in one linear pass, so that exact patterns run only where there is something.

With RE2 (``pip install kvfleet[re2]``) one automaton for all types reads the text once, 0.1 ms for 64 KB of anything,
and names the places to look at. Without it, cheap conditions that a find cannot do without rule types out, and Python's
own `re` reads the text for those that are left. Both see the text as ASCII, one byte a character, so places agree.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import attrs

from kvfleet.policy.pii_checks import IBAN_LENGTHS

__all__ = ["Gate", "PlainGate", "RE2Gate", "as_ascii", "make_gate"]


class Gate(Protocol):
    """Says which types a text may hold, and where."""

    def flagged(self, data: bytes) -> Sequence[str]:
        """The types that may be there; any that is there is among them."""

    def starts(self, name: str, data: bytes) -> Iterator[tuple[int, int]] | None:
        """Between which places finds of a type may begin, in order; None if only reading all of it can tell."""


def as_ascii(text: str) -> bytes:
    """The text with one byte for each character; what is not ASCII is a question mark."""
    return text.encode("ascii", "replace")


_WORD = "(?:^|[^A-Za-z0-9_])"
_NOT_DOT = "(?:^|[^A-Za-z0-9_.])"
_NOT_DASH = "(?:^|[^A-Za-z0-9_-])"
_END = "(?:$|[^A-Za-z0-9_-])"
_H = "[0-9A-Fa-f]{1,4}"
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_DIGITS = "(?:[ .()-]{0,2}[0-9])"

# In RE2's language, which has no look-around: each as narrow as it can be, group 1 beginning where a find would.
_CANDIDATES: Mapping[str, str] = {
    "email": r"([A-Za-z0-9._%+-]@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2})",
    "phone_us": _NOT_DOT
    + r"((?:(?:\+|00)?1[-.\s]?)?(?:\([0-9]{3}\)\s?|[0-9]{3}[-.\s])[0-9]{3}[-.\s][0-9]{4})"
    + r"(?:\s?x[0-9]|$|[^A-Za-z0-9_-])",
    "ssn": _NOT_DASH
    + r"((?:[1-57-8][0-9]{2}|0(?:0[1-9]|[1-9][0-9])|6(?:[0-57-9][0-9]|6[0-57-9]))-[0-9]{2}-[0-9]{4})"
    + _END,
    "credit_card": r"(?:^|[^A-Za-z0-9_.-])((?:[3-6]|2[2-7])(?:[0-9]{11,18}|[0-9]{2,3}[ .-]"
    r"(?:[0-9]{4}[ .-][0-9]{4}[ .-][0-9]{1,7}|[0-9]{6}[ .-][0-9]{4,5})))" + _END,
    "ip_address": rf"(?:^|[^A-Za-z0-9_.:])((?:{_OCTET}\.){{3}}{_OCTET})(?:$|[^A-Za-z0-9_.]|\.(?:$|[^0-9]))"
    rf"|(?:^|[^A-Za-z0-9_.:])((?:{_H}:){{7}}{_H}|(?:{_H}:){{2,6}}:[0-9A-Fa-f]|{_H}::{_H}:[0-9A-Fa-f])",
    "date_of_birth": r"(?:^|[^A-Za-z0-9_/])((?:0?[1-9]|1[0-2])/(?:0?[1-9]|[12][0-9]|3[01])/(?:19|20)[0-9]{2})"
    r"(?:$|[^A-Za-z0-9_/])"
    r"|\b((?i:born|birth|birthday|birthdate|dob)\b[^\n0-9]{0,20}"
    r"(?:(?:19|20)[0-9]{2}-[0-9]{2}-[0-9]|[0-9]{1,2}[./-][0-9]{1,2}[./-](?:19|20)[0-9]{2}))",
    "passport": r"((?i:passport)(?:\s{1,3}(?i:no|number|nr))?\.?:?\s{0,3}#?\s{0,3}[A-Z]{1,2}[0-9]{6,8})"
    r"(?:$|[^A-Za-z0-9_])",
    "iban": _WORD + rf"((?i:{'|'.join(IBAN_LENGTHS)})[0-9]{{2}}(?: ?[A-Za-z0-9]{{4}}){{2}})",
    "api_key": _WORD + r"(sk-[A-Za-z0-9_-]{16}|[sr]k_(?:live|test)_[A-Za-z0-9]{16}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|AIza[A-Za-z0-9_-]{35}|hf_[A-Za-z0-9]{30}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22}"
    r"|glpat-[A-Za-z0-9_-]{20}|xox[abprs]-[A-Za-z0-9-]{10})",
    "phone": rf"(?:^|[^A-Za-z0-9_.+])((?:\+|00)[1-9]{_DIGITS}{{7}})"
    r"|(?:^|[^A-Za-z0-9_.(/+-])(0[1-9](?:[ .-][0-9]{2}){4}|0[1-9][ -][0-9]{7,8}"
    r"|\(?0[1-9][0-9]{1,3}\)?[ /-](?:[0-9]{6,8}|[0-9]{3,4}[ -][0-9]{3,4}|[0-9]{2,3}[ -][0-9]{2}[ -][0-9]{2}))"
    r"(?:$|[^A-Za-z0-9_-])|(?:^|[^A-Za-z0-9_.-])(\([0-9]{2,3}\) [0-9]{3,4}-[0-9]{3,4})(?:$|[^A-Za-z0-9_-])"
    r"|\b((?i:phone|tel|call|mobile|fax|cell|reach|answering)\b(?: (?i:number|no|nr|is|me|us|him|her|at|on)\b){0,3}"
    rf"[.:#]?\s{{0,3}}\+?\(?[0-9]{_DIGITS}{{5}})",
    "us_driver_license": r"((?i:driver'?s?'? licen[cs]e)[^\n0-9]{0,12}[0-9]{6})",
}
_BEFORE = {"email": 64}  # how far before group 1 a find may begin; 0 for the others
_MOST_MEMORY = 64 * 1024 * 1024


@attrs.define
class RE2Gate:
    """One automaton for all types, and one for each: linear, whatever the text."""

    _names: tuple[str, ...]
    _set: Any
    _each: Mapping[str, Any]

    @classmethod
    def of(cls, names: Iterable[str]) -> RE2Gate | None:
        """A gate for these types; None where RE2 is not installed."""
        try:
            re2 = importlib.import_module("re2")
            options = re2.Options()
            options.encoding, options.max_mem = re2.Options.Encoding.LATIN1, _MOST_MEMORY
            together = re2.Set.SearchSet(options)
        except (ImportError, AttributeError):  # another package may bear the name
            return None
        known = tuple(names)
        for name in known:
            together.Add(_CANDIDATES[name])
        together.Compile()
        return cls(known, together, {name: re2.compile(_CANDIDATES[name].encode(), options) for name in known})

    def flagged(self, data: bytes) -> Sequence[str]:
        """The types with a candidate, by one pass over the text."""
        return [self._names[i] for i in sorted(self._set.Match(data) or ())]

    def starts(self, name: str, data: bytes) -> Iterator[tuple[int, int]]:
        """The candidates one after the other."""
        search, at, before = self._each[name].search, 0, _BEFORE.get(name, 0)
        while (found := search(data, at)) is not None:
            start = found.start(found.lastindex)
            yield max(start - before, 0), start + 1
            at = start + 1


_SHAPES = bytes.maketrans(b"123456789. /\t\n", b"0" * 9 + b"-" * 5)
_LETTERS = bytes.maketrans(b"bcdefghijklmnopqrstuvwxyz", b"a" * 25)
_PREFIXES = (b"sk-", b"k_live_", b"k_test_", b"AKIA", b"ASIA", b"AIza", b"hf_", b"gh", b"glpat-", b"xox")
_CARDS = (b"0" * 12, b"0000-0000-0000-0", b"000-0000-0000-0", b"-000000-0000")
_DATES = (b"0-0-0000", b"0-00-0000")
_PHONES = (b"00-000000", b"00-000-000", b"00-0000-000", b"00-00-00-00")
_PHONE_WORDS = (b"phone", b"tel", b"call", b"mobile", b"fax", b"cell", b"reach", b"answering")


@attrs.define
class PlainGate:
    """Conditions without which there is no find, each one pass of bytes methods; used where RE2 is not installed."""

    _names: tuple[str, ...]

    def flagged(self, data: bytes) -> Sequence[str]:
        """The types whose condition holds."""
        shape = data.translate(_SHAPES)  # 0 for a digit, - for what stands between digits
        if b"0" not in shape and b"@" not in data and b"::" not in data and not _has_any(data, _PREFIXES):
            return ()
        lower = shape.lower()
        birth = _has_any(lower, (b"born", b"birth", b"dob"))
        bare = shape.translate(None, b"()")
        six = b"000000" in bare.translate(None, b"-")
        holds = {
            "email": b"@" in data,
            "phone_us": b"000-0000" in shape,
            "ssn": b"000-00-0000" in shape,
            "credit_card": _has_any(shape, _CARDS),
            "ip_address": b"..." in data.translate(None, _DECIMAL) or b"::" in data or b":::::::" in _no_hex(data),
            "date_of_birth": birth or _has_any(shape, _DATES),
            "passport": b"passport" in lower and b"000000" in shape,
            "iban": b"aa00" in lower.translate(_LETTERS),
            "api_key": _has_any(data, _PREFIXES),
            "phone": six and (b"+" in data or _has_any(bare, _PHONES) or _has_any(lower, _PHONE_WORDS)),
            "us_driver_license": b"driver" in lower and b"000000" in shape,
        }
        return [name for name in self._names if holds[name]]

    def starts(self, name: str, data: bytes) -> None:  # noqa: ARG002 - the gate's signature
        """Not known: Python's `re` has to read all of the text."""
        return


_DECIMAL = b"0123456789"


def _no_hex(data: bytes) -> bytes:
    return data.translate(None, b"0123456789abcdefABCDEF")


def _has_any(data: bytes, wanted: Iterable[bytes]) -> bool:
    return any(one in data for one in wanted)


def make_gate(names: Iterable[str]) -> Gate:
    """The best gate there is for these types."""
    known = tuple(names)
    return RE2Gate.of(known) or PlainGate(known)
