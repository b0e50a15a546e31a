"""Personal data in and around embedded files: whatever can be read is looked through, and nothing else is touched."""

from __future__ import annotations

import base64
import binascii
from typing import Any
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.policy.embedded import read, rewritten
from kvfleet.policy.pii import PIIDetector
from kvfleet.policy.redaction import Redaction
from kvfleet.policy.texts import strings_of

DETECTOR = PIIDetector()
MAIL, SSN = "ada@example.com", "123-45-6789"
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20
IN_BASE64 = base64.b64encode(PICTURE).decode()
URL = f"data:image/png;base64,{IN_BASE64}"
HEADS = (
    "",
    "data:image/png;base64,",
    "data:;base64,",
    "data:text/plain;base64,",
    "data:text/plain,",
    "DATA:a/b;x=1;base64,",
)
KEYS = ("data", "url", "file_data", "content", "zzz")


def types_in(value: Any) -> set[str]:
    """What is found in a JSON value."""
    return set(DETECTOR.detect_all(strings_of(value)).pii_types)


def redacted(key: str, value: str) -> str:
    """A field's text as it leaves."""
    made = Redaction.of({"messages": [{"role": "user", "content": [{"type": "x", key: value}]}]}, DETECTOR)
    return value if made is None else str(made.body["messages"][0]["content"][0][key])


def in_base64(text: str, encoding: str = "utf-8") -> str:
    """A text as a file."""
    return base64.b64encode(text.encode(encoding)).decode()


FILES: dict[str, tuple[str, str]] = {
    "a picture": ("url", URL),
    "a picture whose scheme is in capitals": ("url", URL.replace("data:", "DATA:")),
    "a picture with a line's end after it": ("url", f"{URL}\n"),
    "a picture in lines": ("data", base64.encodebytes(PICTURE).decode()),
    "a picture in lines of mail": ("data", base64.encodebytes(PICTURE).decode().replace("\n", "\r\n")),
    "sound": ("data", base64.b64encode(b"RIFF\x24\0\0\0WAVEfmt " + bytes(2000)).decode()),
    "a document": ("file_data", base64.b64encode(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + PICTURE).decode()),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_no_text(name: str) -> None:
    """It is not looked through, and leaves as it came."""
    key, value = FILES[name]
    assert list(read(key, value)) == []
    assert redacted(key, value) == value


BEHIND: dict[str, tuple[str, str]] = {
    "a space": ("url", f"{URL} {SSN}"),
    "the padding": ("url", f"{URL}{SSN}"),
    "bare base64": ("data", f"{IN_BASE64}, {SSN}"),
    "base64 of a file": ("file_data", f"{IN_BASE64}={SSN}"),
    "lines": ("data", base64.encodebytes(PICTURE).decode() + SSN),
    "lines of one word": ("data", f"{'QUJD' * 16}\n{SSN}\n{'QUJD' * 16}"),
    "a megabyte": ("url", f"data:image/png;base64,{'QUJD' * 300_000}\n\n{SSN}"),
    "an alphabet of its own": ("data", f"{IN_BASE64.rstrip('=')}-_+{SSN}"),
    "a second picture": ("url", f"{URL};{URL} {SSN}"),
    "a head": ("url", f"data:image/png;base64,{SSN}"),
    "a head that is none": ("url", f"data:image/png;base64 {SSN}"),
    "a short word": ("url", f"data:image/png;base64,QUJD{SSN.replace('-', '')}, {SSN}"),
}


@pytest.mark.parametrize("place", BEHIND)
def test_a_text_behind_a_file_is_looked_through(place: str) -> None:
    """What claims to be a file has to be one to its end."""
    key, value = BEHIND[place]
    assert "ssn" in types_in({key: value})
    assert SSN not in redacted(key, value)
    assert "[SSN_1]" in redacted(key, value)


def as_url(text: str, kind: str = "text/plain", encoding: str = "utf-8") -> str:
    """A text as a file in a URL."""
    return f"data:{kind};base64,{in_base64(text, encoding)}"


SAID = f"Write to {MAIL}, or else to nobody."
READ: dict[str, tuple[str, str]] = {
    "text": ("url", as_url(SAID)),
    "a short text": ("url", as_url(MAIL)),
    "text of no name": ("url", as_url(SAID, "")),
    "text of a wrong name": ("url", as_url(SAID, "image/png")),
    "a table": ("file_data", as_url(f"mail;name\n{MAIL};Ada\n", "text/csv;charset=utf-8")),
    "JSON": ("file_data", as_url(f'{{"mail":"{MAIL}"}}', "application/json")),
    "a drawing": ("url", as_url(f"<svg><text>{MAIL}</text></svg>", "image/svg+xml")),
    "a bare file": ("file_data", in_base64(f"é, {SAID}")),
    "a source": ("data", in_base64(f"{SAID} ü\N{GRINNING FACE}")),
    "wide letters": ("url", as_url(f"\ufeffTo {MAIL}", encoding="utf-16-le")),
    "old letters": ("url", as_url(f"é {MAIL}", encoding="latin-1")),
    "lines": ("data", base64.encodebytes(SAID.encode() * 20).decode()),
    "the other alphabet": (
        "url",
        "data:text/plain;base64," + base64.urlsafe_b64encode(b"??>>" + MAIL.encode()).decode(),
    ),
    "percents": ("url", f"data:text/plain,Write%20to%20{quote(MAIL)}"),
    "a sentence": ("content", f"See {as_url(SAID)}, and tell me."),
    "a sentence with percents": ("content", f"See <data:text/plain,{quote(MAIL)}> and tell me."),
    "the second of two": ("content", f"{URL}, {as_url(SAID)}"),
    "JSON in JSON": ("arguments", f'{{"file":"{as_url(SAID)}"}}'),
    "behind padding": ("url", f"data:text/plain;base64,QUI={in_base64(MAIL)}"),
}


def contents(value: str) -> str:
    """A text with all that is in base64 or percents in it, made in another way than ours."""
    found = [value, unquote(value)]
    for word in value.replace("\n", "").replace('"', " ").replace(",", " ").split():
        for part in word.split("="):
            try:
                decoded = base64.urlsafe_b64decode(part.replace("+", "-").replace("/", "_") + "==")
            except binascii.Error:
                continue
            found += [decoded.decode("utf-8", "replace"), decoded.replace(b"\0", b"").decode("latin-1")]
    return "\n".join(found)


@pytest.mark.parametrize("place", READ)
def test_a_file_that_is_text_is_read(place: str) -> None:
    """What is in it is found, taken out, and the file is one still."""
    key, value = READ[place]
    assert MAIL in contents(value)
    assert types_in({key: value}) == {"email"}
    left = redacted(key, value)
    assert MAIL not in contents(left)
    assert "[EMAIL_1]" in contents(left)
    assert types_in({key: left}) == set()


def test_the_rest_of_a_file_stays_as_it_is() -> None:
    """Letters of all alphabets, and the bytes of what is no proper text."""
    for text, encoding in ((f"é {MAIL} ü", "utf-8"), (f"é {MAIL} ü", "latin-1"), (f"\ufeffé {MAIL}", "utf-16-le")):
        left = redacted("url", f"data:text/plain;base64,{in_base64(text, encoding)}")
        assert left.startswith("data:text/plain;base64,")
        assert base64.b64decode(left.partition(",")[2]).decode(encoding) == text.replace(MAIL, "[EMAIL_1]")


def test_a_placeholder_that_stands_in_a_file_is_not_given_again() -> None:
    """It would come back as somebody's address."""
    url = f"data:text/plain;base64,{in_base64('What does [EMAIL_1] mean in this sentence?')}"
    made = Redaction.of({"messages": [{"role": "user", "content": [{"text": MAIL}, {"url": url}]}]}, DETECTOR)
    assert made is not None
    assert made.body["messages"][0]["content"] == [{"text": "[EMAIL_2]"}, {"url": url}]


LETTERS = st.text('ABCabc019+/=-_ \n\r,;:%é{}"data@', max_size=80)
PIECES = st.lists(LETTERS | st.sampled_from([*HEADS, IN_BASE64, URL, "QUJD" * 9]), max_size=6).map("".join)


@given(st.sampled_from(KEYS), PIECES, PIECES)
def test_no_file_hides_a_text(key: str, before: str, after: str) -> None:
    """Personal data anywhere in a text that is not wholly base64 is found, and taken out."""
    value = f"{before} {SSN} {after}"
    assert "ssn" in types_in({key: value})
    assert SSN not in redacted(key, value)


@given(st.sampled_from(KEYS), PIECES)
def test_what_is_not_changed_stays(key: str, value: str) -> None:
    """To the letter, whatever files it has."""
    assert rewritten(key, value, str) == value


@given(st.sampled_from(HEADS), PIECES, PIECES)
def test_a_text_in_a_file_is_found_among_anything(head: str, before: str, after: str) -> None:
    """Wherever in a text it stands, if a file's end can be seen."""
    value = f"{before} data:text/plain;base64,{in_base64(f'To {MAIL}.')} {head} {after}"
    assert "email" in types_in({"content": value})
