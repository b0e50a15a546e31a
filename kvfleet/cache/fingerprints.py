"""Prompts recognised by their beginnings, without a tokenizer and without keeping any text.

A fingerprint is one chain of 64-bit hashes (xxh3, https://xxhash.com) over the messages as they stand: KV caches tell
upper from lower case and one space from two, so nothing is normalised. Each *mark* on the chain stands for a beginning
of the prompt: the end of each message, and some fixed distances from the start. Two prompts that share a mark share
everything before it. So the second turn of a conversation holds the last mark of the first, and two questions under one
system prompt share the mark at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import orjson
import xxhash

from kvfleet.adapters.base import ChatMessage
from kvfleet.config.fields import number

__all__ = ["Mark", "PromptFingerprint", "PromptFingerprinter", "estimate_tokens"]

_BYTES_PER_TOKEN = 4
_GROWTH = 4
_WHOLE_PART = 131_072
_SYSTEM_ROLES = frozenset({"system", "developer"})

_hash = xxhash.xxh3_64_intdigest

Mark = tuple[int, int, bool]
"""A beginning of a prompt: its hash, about how many tokens it has, and whether it ends within an answer."""

Message = ChatMessage | Mapping[str, Any]


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has: a quarter of its UTF-8 bytes, rounded up."""
    size = len(text) if text.isascii() else len(text.encode())
    return -(-size // _BYTES_PER_TOKEN)


@attrs.frozen
class PromptFingerprint:
    """What one prompt is recognised by. Hashes are 16 hex digits; no text can be read from them.

    Attributes:
        full_hash: Of the whole prompt.
        system_hash: Of the system messages it begins with.
        prefix_hash: Of its first tokens; of the whole prompt if it has fewer.
        conversation_hash: Of the first message of the user, which stays the same from turn to turn.
        token_estimate: About how many tokens it has.
        metadata: More, for whoever makes fingerprints.
        marks: Its beginnings, shortest first; the last is the whole prompt.
        system_tokens: About how many tokens the system messages have.
    """

    full_hash: str
    system_hash: str
    prefix_hash: str
    conversation_hash: str
    token_estimate: int
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    marks: tuple[Mark, ...] = attrs.field(default=(), repr=False)
    system_tokens: int = 0

    @property
    def session_key(self) -> str:
        """The same for every turn of a conversation."""
        return f"{self.system_hash}:{self.conversation_hash}"

    @property
    def prefix_key(self) -> str:
        """The same for prompts that begin alike."""
        return f"{self.system_hash}:{self.prefix_hash}"

    @property
    def beginning(self) -> int:
        """What prompts of one kind share: the hash of the system messages, or else of the first tokens."""
        return int(self.system_hash if self.system_tokens else self.prefix_hash, 16)

    def before(self, question: str) -> int | None:
        """What stands before the question, as a hash; None unless the last message is this text of a user alone.

        None too for a question so long that one of the fixed distances lies within it.
        """
        if not self.marks:
            return None
        earlier = self.marks[-2][0] if len(self.marks) > 1 else int(self.system_hash, 16)
        text = question.encode("utf-8", "surrogatepass")
        return earlier if _hash(text, _hash(b"user", earlier)) == self.marks[-1][0] else None

    def similarity(self, other: PromptFingerprint) -> float:
        """1 for the same prompt; else 0.5 for the same system messages, 0.3 for the same first tokens, 0.2 for the
        same opening of the user, added up.
        """  # noqa: D205 - one sentence
        if self.full_hash == other.full_hash:
            return 1.0
        return (
            0.5 * (self.system_hash == other.system_hash)
            + 0.3 * (self.prefix_hash == other.prefix_hash)
            + 0.2 * (self.conversation_hash == other.conversation_hash)
        )


@attrs.define
class _Chain:
    """The chain while it grows."""

    value: int
    stop: int
    size: int = 0
    is_answer: bool = False
    marks: list[Mark] = attrs.field(factory=list)

    def add(self, text: bytes) -> None:
        """Text of the prompt; marks are set where it passes one of the fixed distances."""
        start = 0
        while self.size + len(text) - start >= self.stop:
            end = start + self.stop - self.size
            self.value = _hash(text[start:end], self.value)
            self.size, start = self.stop, end
            self.mark()
            self.stop *= _GROWTH
        if start < len(text):
            self.value = _hash(text[start:] if start else text, self.value)
            self.size += len(text) - start

    def mix(self, other: bytes) -> None:
        """What distinguishes prompts but is no text of theirs: roles, pictures, tool calls."""
        self.value = _hash(other, self.value)

    def mark(self) -> None:
        """Set a mark here, unless there is one."""
        if not self.marks or self.marks[-1][0] != self.value:
            self.marks.append((self.value, self.tokens, self.is_answer))

    @property
    def tokens(self) -> int:
        """About how many tokens there are so far."""
        return -(-self.size // _BYTES_PER_TOKEN)


@attrs.frozen
class PromptFingerprinter:
    """Makes fingerprints. A prompt of 32 KB takes about 10 µs.

    Args:
        prefix_tokens: Where the first of the fixed distances lies; each further one is four times as far.
    """

    prefix_tokens: int = number(128, ge=1, unit="tokens", doc="Tokens of a prompt's beginning that identify it.")

    def fingerprint(self, messages: Iterable[Message], *, tools: Sequence[Any] | None = None) -> PromptFingerprint:
        """The fingerprint of a conversation.

        Args:
            messages: `ChatMessage` objects or OpenAI message objects.
            tools: The request's tools; chat templates put them at the prompt's start.
        """
        chain = self._begin(tools)
        system, is_leading, opening = (chain.value, 0, False), True, b""
        for message in messages:
            role, content, calls = _parts_of(message)
            is_leading = is_leading and role in _SYSTEM_ROLES
            chain.mix(role.encode())
            chain.is_answer = role == "assistant"
            text = _add_content(chain, content)
            if calls:
                chain.mix(_plain(calls))
            chain.mark()
            if is_leading:
                system = chain.marks[-1]
            if not opening and role == "user":
                opening = text
        return self._done(chain, system, opening)

    def fingerprint_text(self, text: str) -> PromptFingerprint:
        """The fingerprint of a plain prompt."""
        chain = self._begin(None)
        system, opening = (chain.value, 0, False), text.encode("utf-8", "surrogatepass")
        chain.add(opening)
        chain.mark()
        return self._done(chain, system, opening)

    def _begin(self, tools: Sequence[Any] | None) -> _Chain:
        return _Chain(_hash(_plain(tools), 0) if tools else 0, self.prefix_tokens * _BYTES_PER_TOKEN)

    def _done(self, chain: _Chain, system: Mark, opening: bytes) -> PromptFingerprint:
        first = self.prefix_tokens
        prefix = next((value for value, tokens, _ in chain.marks if tokens >= first), chain.value)
        return PromptFingerprint(
            full_hash=f"{chain.value:016x}",
            system_hash=f"{system[0]:016x}",
            prefix_hash=f"{prefix:016x}",
            conversation_hash=f"{_hash(opening, 0):016x}",
            token_estimate=chain.tokens,
            marks=tuple(chain.marks),
            system_tokens=system[1],
        )


def _parts_of(message: Message) -> tuple[str, Any, Any]:
    if isinstance(message, ChatMessage):
        return message.role, message.content, message.tool_calls
    return str(message.get("role") or ""), message.get("content"), message.get("tool_calls")


def _add_content(chain: _Chain, content: Any) -> bytes:
    """Add a message's content to the chain; its text, or as much of it as identifies it."""
    if isinstance(content, str):
        text = content.encode("utf-8", "surrogatepass")
        chain.add(text)
        return text
    if not isinstance(content, Sequence):
        return b""
    first = b""
    for part in content:
        text = _add_part(chain, part)
        first = first or text
    return first


def _add_part(chain: _Chain, part: Any) -> bytes:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        text = part["text"].encode("utf-8", "surrogatepass")
        chain.add(text)
        return bytes(text)
    other = _digest(part)
    chain.mix(other)
    return other


def _digest(part: Any) -> bytes:
    """A picture or a sound: its URL, or the length, head and tail of one that carries the data itself."""
    url = part.get("image_url") if isinstance(part, Mapping) else None
    url = url.get("url") if isinstance(url, Mapping) else url
    if isinstance(url, str) and len(url) > _WHOLE_PART:
        half = _WHOLE_PART // 2
        return f"{len(url)}:{url[:half]}{url[-half:]}".encode("utf-8", "surrogatepass")
    return _plain(part)


def _plain(value: Any) -> bytes:
    """Plain data as bytes; what JSON cannot say (a lone surrogate, a Python object) by its repr."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return repr(value).encode("utf-8", "backslashreplace")
