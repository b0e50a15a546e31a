"""Files that stand in texts, as ``data:`` URLs or bare base64: where they are, and what can be read in them.

What claims to be base64 has to be base64 to its end, else it is a text like any other. A file that is text is read,
whatever it is said to be; pictures, sound and PDFs are not. The work is linear in a text's length, and done a slice at
a time, so that in a thread no step of it keeps the event loop waiting.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Iterator
from urllib.parse import quote, unquote

import attrs

__all__ = ["has_files", "read", "rewritten"]

_HEAD = re.compile(r"data:([\w.+/-]{0,255}+)((?:;[^;,\s\"]{0,255}+){0,16}+),", re.ASCII | re.IGNORECASE)
_FOREIGN = re.compile(r"[^A-Za-z0-9+/=_\r\n-]", re.ASCII)
_END_OF_URL = re.compile(r"[\s\"'<>`\\]")
_TEXTUAL = re.compile(r"\Z|text/|[\w.+/-]*(?:json|xml|yaml|csv|script|html|markdown|sql)", re.IGNORECASE | re.ASCII)
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_BESIDE = b"-_=\r\n"  # of RFC 4648's other alphabet, padding, and wrapped lines
_TO_ONE_ALPHABET = bytes.maketrans(b"-_", b"+/")
_BARE = frozenset({"data", "file_data"})
_AFTER = frozenset("\"'<>()[]{},;`\\ \t\r\n")
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\f\r"))
_SLICE = 128 * 1024  # a multiple of 4; a step with one takes less than 1 ms
_SHORTEST = 32  # characters; what is shorter may be a word or a number
_LOOKED_AT = 1024  # characters by which text is told from what is none


def has_files(value: str, key: str = "") -> bool:
    """True if there may be a file in a field's text, in which something else can be read than in the text itself."""
    if key in _BARE:
        return True
    return (";" in value or "%" in value) and ("data:" in value or value[:5].lower() == "data:")


def read(key: str, value: str) -> Iterator[str]:
    """Every text there is in a field's text: itself, unless it is a file as a whole, and those of the files in it.

    >>> list(read("url", "data:text/plain;base64,SSBhbSBBZGEgTG92ZWxhY2UsIGFuZCB5b3U/"))
    ['I am Ada Lovelace, and you?']
    >>> list(read("url", "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAAB"))
    []
    """
    files = tuple(_files(key, value))
    if not (files and files[0].is_all):
        yield value
    for file in files:
        yield from file.texts()


def rewritten(key: str, value: str, change: Callable[[str], str]) -> str:
    """A field's text with whatever can be read in it changed, also within files, which are then encoded again.

    >>> rewritten("url", "data:text/plain;base64,SSBhbSBBZGE=", lambda text: text.replace("Ada", "Bob"))
    'data:text/plain;base64,SSBhbSBCb2I='
    """
    if not has_files(value, key):
        return change(value)
    outside = _joined(value, [(file, file.content) for file in _files(key, value) if file.is_closed], change)
    return _joined(outside, [(file, file.rewritten(change)) for file in _files(key, outside)])


def _joined(value: str, contents: list[tuple[_File, str]], change: Callable[[str], str] = str) -> str:
    parts, at = [], 0
    for file, content in contents:
        parts += [change(value[at : file.start]), content]
        at = file.end
    return "".join([*parts, change(value[at:])])


@attrs.frozen
class _File:
    """A file's content within a text.

    Attributes:
        whole: The text.
        start: Where the content begins.
        end: Where it ends.
        is_textual: True if it is said to be text.
        beside: What letters beside those of base64 there are in it, in order; None if it is percent-encoded.
        is_first: True if the text begins with it.
    """

    whole: str
    start: int
    end: int
    is_textual: bool
    beside: bytes | None
    is_first: bool

    @property
    def content(self) -> str:
        return self.whole[self.start : self.end]

    @property
    def is_closed(self) -> bool:
        """True if nobody can read it as it stands: base64 as RFC 4648 has it, in one line or in lines alike."""
        is_alone = self.end == len(self.whole) or self.whole[self.end] in _AFTER
        if self.beside is None or not is_alone or self.end - self.start < _SHORTEST:
            return False
        content = self.content.rstrip("\r\n")
        beside = self.beside[: len(self.beside) - (self.end - self.start - len(content))]
        padding = beside[-2:].replace(b"\r", b"").replace(b"\n", b"")
        if not content.endswith(padding.decode()):
            return False
        breaks = beside[: len(beside) - len(padding)]
        if breaks and not _are_lines(content, breaks):
            return False
        return padding in {b"", b"=", b"=="} and (len(content) - len(breaks)) % 4 == 0

    @property
    def is_all(self) -> bool:
        """True if there is nothing to be read beside it."""
        return self.is_first and not self.whole[self.end :].strip() and self.is_closed

    def texts(self) -> Iterator[str]:
        """What can be read in it: two texts where a padding stands in the middle, where readers differ."""
        if self.beside is None:
            if "%" in self.content:
                yield unquote(self.content, errors="surrogateescape")
        elif self._is_text():
            for part in self._parts():
                yield _as_text(part)[0]

    def rewritten(self, change: Callable[[str], str]) -> str:
        """The content, with what can be read in it changed."""
        if self.beside is None:
            text = unquote(self.content, errors="surrogateescape")
            made = change(text)
            return self.content if made == text else quote(made, safe="/:,=@[]", errors="surrogateescape")
        told = [_as_text(part) for part in self._parts()] if self._is_text() else []
        changed = [change(text) for text, _ in told]
        if changed == [text for text, _ in told]:
            return self.content
        whole = b"".join(text.encode(encoding) for text, (_, encoding) in zip(changed, told, strict=True))
        return binascii.b2a_base64(whole, newline=False).decode()

    def _parts(self) -> list[bytes]:
        """What is decoded, before a padding in the middle and after it."""
        pieces = (self.whole[at : min(at + _SLICE, self.end)] for at in range(self.start, self.end, _SLICE))
        head, _, rest = b"".join(map(_letters, pieces)).partition(b"=")
        return [_decoded(part) for part in (head, rest.translate(None, b"=")) if part]

    def _is_text(self) -> bool:
        if self.is_textual:
            return True
        letters = _letters(self.whole[self.start : min(self.start + _LOOKED_AT, self.end)]).partition(b"=")[0]
        beginning = _decoded(letters)
        if len(beginning.translate(None, _CONTROLS)) < len(beginning):
            return False
        try:
            beginning.decode()
        except UnicodeDecodeError as error:
            return error.start >= len(beginning) - 3  # a letter that is cut in two
        return True


def _files(key: str, value: str) -> Iterator[_File]:
    """The files in a text, in order; they do not overlap."""
    head = _HEAD.match(value)
    if head is not None:
        file = _file_after(head, value, is_first=True)
        yield file
        yield from _files_after(value, file.end)
        return
    if key in _BARE and len(value) >= _SHORTEST:
        end, beside = _base64_from(value, 0)
        if end == len(value):
            yield _File(value, 0, end, is_textual=False, beside=beside, is_first=True)
            return
    if has_files(value):
        yield from _files_after(value, 0)


def _files_after(value: str, at: int) -> Iterator[_File]:
    """Those from some place on."""
    while at < len(value):
        found = value.find("data:", at, at + _SLICE)
        if found < 0:
            at += _SLICE - 4
            continue
        head = _HEAD.match(value, found)
        if head is None:
            at = found + 5
            continue
        file = _file_after(head, value, is_first=False)
        yield file
        at = file.end


def _file_after(head: re.Match[str], value: str, *, is_first: bool) -> _File:
    start, is_textual = head.end(), _TEXTUAL.match(head[1]) is not None
    if "base64" in head[2].lower():
        end, beside = _base64_from(value, start)
        return _File(value, start, end, is_textual=is_textual, beside=beside, is_first=is_first)
    following = value.find("data:", start)
    end = len(value) if following < 0 else following
    ended = None if is_first else _END_OF_URL.search(value, start, end)
    end = end if ended is None else ended.start()
    return _File(value, start, end, is_textual=is_textual, beside=None, is_first=is_first)


def _base64_from(value: str, at: int) -> tuple[int, bytes]:
    """The first place from there on with a letter that no base64 has, and what was seen beside the letters all have."""
    seen: list[bytes] = []
    step = 64  # small at first: there may be many files
    while at < len(value):
        piece = value[at : at + step]
        beside = piece.encode("ascii", "replace").translate(None, _ALPHABET)
        if beside.translate(None, _BESIDE):
            found = _FOREIGN.search(piece)
            piece = piece if found is None else piece[: found.start()]
            return at + len(piece), b"".join([*seen, piece.encode().translate(None, _ALPHABET)])
        seen.append(beside)
        at, step = at + step, min(2 * step, _SLICE)
    return len(value), b"".join(seen)


def _are_lines(content: str, breaks: bytes) -> bool:
    """True if these are all its breaks, and all lines but the last are as long as the first, which is no word."""
    width = content.find("\n")
    mark = b"\r\n" if width > 0 and content[width - 1] == "\r" else b"\n"
    width -= len(mark) - 1
    step = width + len(mark)
    count = len(range(width, len(content), step)) if width >= _SHORTEST else 0
    found = [content[width + place :: step].strip(chr(letter)) for place, letter in enumerate(mark)]
    return count > 0 and breaks == mark * count and not any(found)


def _letters(piece: str) -> bytes:
    return piece.encode().translate(_TO_ONE_ALPHABET, b"\r\n")


def _decoded(letters: bytes) -> bytes:
    """What letters stand for; a single one at the end, for nothing."""
    pieces = [letters[at : at + _SLICE] for at in range(0, len(letters), _SLICE)]
    return b"".join(binascii.a2b_base64(piece[: len(piece) - (len(piece) % 4 == 1)] + b"==") for piece in pieces)


def _as_text(data: bytes) -> tuple[str, str]:
    """A file's text, and the encoding that gives the same bytes again."""
    guess = (
        "utf-8" if b"\0" not in data[:4] else "utf-16-le" if data[1:2] == b"\0" or data[:1] == b"\xff" else "utf-16-be"
    )
    try:
        return data.decode(guess), guess
    except UnicodeDecodeError:
        return data.decode("latin-1"), "latin-1"
