"""Prompts as an engine's own tokens, made here, and only for what was not seen before.

A tokenizer cuts a text at its special tokens first and then works on each piece by itself. So the tokens of a prompt
are those of its pieces, each with the special token it begins with, one after the other; and as a conversation grows,
all its pieces but the last are known. `LocalTokenizer` keeps them. That cutting changes nothing is tried when it is
loaded, and a tokenizer for which it does is used on whole prompts.
"""

from __future__ import annotations

import itertools
import re
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import xxhash

from kvfleet.adapters.call import Operation
from kvfleet.cache.chat_template import ChatTemplate, UnrenderableError
from kvfleet.errors import ComponentError

__all__ = ["LocalTokenizer", "SegmentCache", "given_tokens", "packed"]

_OVERHEAD = 160
"""Bytes that a piece takes beside its tokens."""
_TRIALS = (
    "",
    "Hello there.",
    " leading and trailing ",
    "line\nline\n\n  indented",
    "naïve café 東京 🙂 ½",
    "def f(x):\n    return {'a': [1, 2.5]}\n",
)


def packed(tokens: Iterable[int]) -> bytes:
    """Token ids as unsigned 32-bit little-endian numbers.

    >>> packed([1, 258]).hex()
    '0100000002010000'
    """
    found = array("I", tokens)
    if sys.byteorder == "big":
        found.byteswap()
    return found.tobytes()


def given_tokens(operation: Operation, body: Mapping[str, Any]) -> bytes | None:
    """The tokens of a prompt that is given as tokens; None for any other, and for several at once."""
    prompt = body.get("prompt") if operation is Operation.COMPLETION else None
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list):
        prompt = prompt[0]
    if not isinstance(prompt, list) or not prompt or not all(type(token) is int for token in prompt):
        return None
    try:
        return packed(prompt)
    except OverflowError:
        return None


@attrs.define
class SegmentCache:
    """The tokens of pieces of text, by a digest of them; the least recently used go first. For any thread.

    Args:
        max_bytes: Most memory for them.
    """

    max_bytes: int = 64 * 1024 * 1024
    size: int = attrs.field(init=False, default=0)
    _kept: OrderedDict[int, bytes] = attrs.field(init=False, factory=OrderedDict, repr=False)
    _lock: threading.Lock = attrs.field(init=False, factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, digest: int) -> bytes | None:
        """The tokens of a piece; None if they are not kept."""
        with self._lock:
            found = self._kept.get(digest)
            if found is not None:
                self._kept.move_to_end(digest)
            return found

    def put(self, digest: int, tokens: bytes) -> None:
        """Keep the tokens of a piece."""
        with self._lock:
            if digest in self._kept:
                return
            self._kept[digest] = tokens
            self.size += len(tokens) + _OVERHEAD
            while self.size > self.max_bytes:
                _, old = self._kept.popitem(last=False)
                self.size -= len(old) + _OVERHEAD


@attrs.define(eq=False)
class LocalTokenizer:
    """A model's tokenizer and chat template, from its files.

    Attributes:
        cuts: True if prompts are tokenised piece by piece.
        tokenised: Characters of text that had to be tokenised so far.
    """

    _tokenizer: Any = attrs.field(repr=False)
    _template: ChatTemplate | None = attrs.field(repr=False)
    _cache: SegmentCache = attrs.field(factory=SegmentCache)
    cuts: bool = attrs.field(init=False, default=False)
    tokenised: int = attrs.field(init=False, default=0)
    _cut: re.Pattern[str] | None = attrs.field(init=False, default=None, repr=False)
    _borders: frozenset[str] = attrs.field(init=False, factory=frozenset, repr=False)

    @classmethod
    def load(cls, path: Path, template: Path | None = None, max_bytes: int = 64 * 1024 * 1024) -> LocalTokenizer:
        """Load a tokenizer; takes up to some seconds.

        Args:
            path: A folder with ``tokenizer.json``, or that file itself; the chat template stands beside it.
            template: The file of another chat template.
            max_bytes: Memory for the tokens of pieces of text.

        Raises:
            ComponentError: if it cannot be loaded, or the extra is not installed.
        """
        try:
            import tokenizers  # noqa: PLC0415 - an extra, imported when it is used
        except ImportError as error:
            raise ComponentError("a tokenizer needs its library: pip install 'kvfleet[tokenizers]'") from error
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare exceptions
            raise ComponentError(f"{file} is no tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        made = cls(tokenizer, ChatTemplate.load(file.parent, template), SegmentCache(max_bytes))
        made._prepare()
        return made

    def _prepare(self) -> None:
        """Find where prompts may be cut, and try whether cutting changes anything."""
        added = [token for token in self._tokenizer.get_added_tokens_decoder().values() if not token.normalized]
        borders = {t.content for t in added if t.special and not (t.lstrip or t.rstrip or t.single_word)}
        if not borders:
            return
        # The longest first, as the tokenizer finds them; those that are no borders only keep others from being found.
        names = sorted((token.content for token in added), key=len, reverse=True)
        self._cut, self._borders = re.compile("|".join(map(re.escape, names))), frozenset(borders)
        border = max(borders, key=len)
        pairs = itertools.pairwise(_TRIALS)
        trials = [f"{a}{border}{b}{border}{border}{c}" for b, c in pairs for a in _TRIALS]
        self.cuts = all(self._in_pieces(text) == self._whole(text) for text in trials)
        self._cache, self.tokenised = SegmentCache(self._cache.max_bytes), 0

    def tokenise(self, operation: Operation, body: Mapping[str, Any]) -> bytes:
        """A request's prompt as token ids, as unsigned 32-bit little-endian numbers. For any thread.

        Raises:
            UnrenderableError: if this request's prompt cannot be made here.
        """
        if operation is Operation.CHAT:
            if self._template is None:
                raise UnrenderableError("the tokenizer has no chat template")
            text = self._template.render(body)
            return self._in_pieces(text) if self.cuts else self._whole(text)
        prompt = body.get("prompt") if operation is Operation.COMPLETION else None
        if not isinstance(prompt, str):
            raise UnrenderableError("only chats, and completions of one text, have one prompt")
        ids: Sequence[int] = self._tokenizer.encode(prompt, add_special_tokens=body.get("add_special_tokens", True)).ids
        self.tokenised += len(prompt)
        return packed(ids)

    def _whole(self, text: str) -> bytes:
        self.tokenised += len(text)
        return packed(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _in_pieces(self, text: str) -> bytes:
        """The tokens of a text, piece by piece."""
        found, start, cache = [], 0, self._cache
        for end in self._ends(text):
            piece = text[start:end]
            # The first piece may be tokenised in another way than the same text after a special token.
            digest = xxhash.xxh3_128_intdigest(piece.encode("utf-8", "surrogatepass"), seed=start == 0)
            tokens = cache.get(digest)
            if tokens is None:
                tokens = self._whole(piece)
                cache.put(digest, tokens)
            found.append(tokens)
            start = end
        return b"".join(found)

    def _ends(self, text: str) -> list[int]:
        """Where the pieces end: before each special token, and at the text's end."""
        assert self._cut is not None  # noqa: S101 - asked for only where there are borders
        borders = self._borders
        return [*(m.start() for m in self._cut.finditer(text) if m.start() and m[0] in borders), len(text)]
