"""Whether two questions ask the same, told without keeping their text.

A kept answer must never be given to another question, so two questions are alike only if all that carries meaning is
the same in both. `Wording`, the default, lets only the form differ: case, contractions, spaces, the final mark, and
words of courtesy around the question. `Meaning` compares embeddings, and demands that numbers, names, negations,
quotations and signs are the same.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import attrs
import xxhash

__all__ = ["Likeness", "Meaning", "Sketch", "Wording"]

_MOST_CHARACTERS = 500
_WORD = re.compile(r"\w+(?:[.'/:@-]\w+)*|[^\w\s]")
# Code and layout carry meaning in what is normalised away elsewhere.
_LAYOUT = re.compile(r"[\n\r\t`{}<>\\|]| {3}")
# Where the form itself is what is asked about, no other form will do.
_ABOUT_FORM = re.compile(
    r"\b(?:spell|gramma|punctuat|proofread|upper-?case|lower-?case|capital(?:i[sz]|s\b)|capital letter|letters?\b|"
    r"characters?\b|rewrite|rephrase|paraphrase|correct|translate|typo|edit\b|verbatim|repeat|echo\b)|:",
    re.IGNORECASE,
)
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})
_END = frozenset(".?!…")
_CONTRACTIONS = {
    "can't": "can not",
    "cannot": "can not",
    "won't": "will not",
    "shan't": "shall not",
    "let's": "let us",
    "i'm": "i am",
}
_SUFFIXES = {"n't": "not", "'re": "are", "'ve": "have", "'ll": "will"}
# After these, 's is "is"; after a name it is a genitive.
_IS = frozenset({"what", "who", "where", "when", "why", "how", "that", "there", "here", "it", "he", "she"})
_COURTESY_BEFORE = tuple(
    tuple(phrase.split())
    for phrase in (
        "could you please tell me",
        "can you please tell me",
        "would you please tell me",
        "could you tell me",
        "can you tell me",
        "please tell me",
        "please could you",
        "could you please",
        "can you please",
        "would you please",
        "tell me",
        "i want to know",
        "i would like to know",
        "please",
    )
)
_GREETINGS = frozenset({"hi", "hello", "hey"})
_COURTESY_AFTER = (("please",), ("thanks",), ("thank", "you"))
# Words that mean another thing with a capital, in the middle of a sentence.
_CAPITAL_MATTERS = re.compile(
    "access|aids|alphabet|amazon|apple|august|bill|cancer|chase|china|chrome|cologne|cook|dash|devil|earth|excel|fall|"
    "frank|gap|go|god|grace|guinea|hope|it|japan|jack|java|jersey|job|lent|lima|march|mark|mars|may|mercury|meta|mobile|"
    "nice|office|oracle|pole|polish|python|reading|rose|ruby|rust|shell|slack|square|swede|swift|target|turkey|us|visa|"
    "who|will|windows|word|zoom"
)
_NEGATIONS = re.compile("no|not|never|none|nobody|nothing|neither|nor|without|cannot|except|unless|.*n't")


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


@attrs.frozen
class Sketch:
    """What is kept of a question to compare others with it: no word can be read from it.

    Attributes:
        must: What must be the same, as a digest.
        marks: What may differ a little: the hashes of its shingles, or its embedding.
    """

    must: str
    marks: frozenset[int] | tuple[float, ...] = attrs.field(repr=False)


class Likeness(Protocol):
    """A way of telling whether two questions ask the same."""

    def sketch(self, text: str) -> Sketch | None:
        """What others are compared with; None if the text should not be compared at all."""

    def similarity(self, one: Sketch, other: Sketch) -> float:
        """0..1, of two sketches whose `must` is the same."""


@attrs.frozen
class Wording:
    """The same words in the same order; courtesy around them counts as a difference of form.

    >>> wording = Wording()
    >>> one, other = wording.sketch("What's the capital of France?"), wording.sketch("what is the capital of france")
    >>> one.must == other.must, wording.similarity(one, other)
    (True, 1.0)
    >>> one.must == wording.sketch("What's the capital of Spain?").must
    False
    """

    def sketch(self, text: str) -> Sketch | None:
        """The digest of the question itself, and the shingles of all of it."""
        words = _words(text)
        if words is None:
            return None
        core = _without_courtesy(words)
        if not core:
            return None
        return Sketch(_digest(core), frozenset(_shingles(words)))

    def similarity(self, one: Sketch, other: Sketch) -> float:
        """Dice's coefficient of the words and pairs of words."""
        mine, theirs = one.marks, other.marks
        assert isinstance(mine, frozenset)  # noqa: S101 - made by `sketch`
        assert isinstance(theirs, frozenset)  # noqa: S101
        return 2 * len(mine & theirs) / (len(mine) + len(theirs))


@attrs.frozen
class Meaning:
    """Embeddings, held in check by words: what an embedding hardly sees must be the same.

    Args:
        embed: A text's vector; called once for each question.
    """

    embed: Callable[[str], Sequence[float]] = attrs.field(repr=False)

    def sketch(self, text: str) -> Sketch | None:
        """The digest of numbers, names, negations, quotations and signs, and the unit vector."""
        if _words(text) is None:
            return None
        vector = [float(value) for value in self.embed(text)]
        length = math.sqrt(sum(value * value for value in vector))
        if not length or not math.isfinite(length):
            return None
        return Sketch(_digest(_telling(text)), tuple([value / length for value in vector]))

    def similarity(self, one: Sketch, other: Sketch) -> float:
        """The cosine, and 0 for vectors of different lengths."""
        mine, theirs = one.marks, other.marks
        if len(mine) != len(theirs):
            return 0.0
        return max(0.0, min(1.0, sum(a * b for a, b in zip(mine, theirs, strict=True))))


def _words(text: str) -> list[str] | None:
    """A question's words and signs in their usual form; None for what is long, has a layout, or asks about form."""
    text = text.strip()
    if not text or len(text) > _MOST_CHARACTERS or _LAYOUT.search(text) or _ABOUT_FORM.search(text):
        return None
    found = _WORD.findall(unicodedata.normalize("NFC", text).translate(_QUOTES))
    while found and found[-1] in _END:
        found.pop()
    return [word for place, raw in enumerate(found) for word in _usual(raw, is_first=place == 0)] or None


def _usual(raw: str, *, is_first: bool) -> Iterator[str]:
    """A word as everybody writes it: lower case, contractions in full."""
    low = raw.casefold()
    if _CAPITAL_MATTERS.fullmatch(low) and raw != low and not is_first:
        yield raw
        return
    if low in _CONTRACTIONS:
        yield from _CONTRACTIONS[low].split()
        return
    if low.endswith("'s") and low[:-2] in _IS:
        yield from (low[:-2], "is")
        return
    for suffix, full in _SUFFIXES.items():
        if low.endswith(suffix) and len(low) > len(suffix):
            yield from (low[: -len(suffix)], full)
            return
    yield low


def _without_courtesy(words: list[str]) -> list[str]:
    """The question itself."""
    if len(words) > 2 and words[0] in _GREETINGS and words[1] in (",", "!"):
        words = words[2:]
    for phrase in _COURTESY_BEFORE:
        if tuple(words[: len(phrase)]) == phrase:
            words = words[len(phrase) :]
            words = words[1:] if words[:1] == [","] else words
            break
    for phrase in _COURTESY_AFTER:
        size = len(phrase) + 1
        if len(words) > size and tuple(words[-size + 1 :]) == phrase and words[-size] in (",", ".", "!", "?"):
            words = words[:-size]
            break
    return words


def _shingles(words: Sequence[str]) -> Iterator[int]:
    for word in words:
        yield _hash(word)
    for pair in itertools.pairwise(words):
        yield _hash("\0".join(pair))


def _telling(text: str) -> Iterator[str]:
    """What an embedding hardly sees, in its order: numbers, names, negations, quotations, signs."""
    is_quoted = False
    for place, raw in enumerate(_WORD.findall(unicodedata.normalize("NFC", text.strip()).translate(_QUOTES))):
        low = raw.casefold()
        if raw == '"':
            is_quoted = not is_quoted
        is_sign = not raw[0].isalnum() and raw not in (",", "'", '"', *_END)
        is_name = raw != low and place > 0 and low != "i"
        if is_quoted or is_sign or is_name or any(c.isdigit() for c in raw):
            yield low
        elif _NEGATIONS.fullmatch(low):
            yield "not" if low in ("cannot", "never") or low.endswith("n't") else low


def _digest(parts: Iterable[str]) -> str:
    """A digest that nobody can make collide: it decides whose answer is given."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
