"""A prompt as a chain of blocks, the unit in which engines keep and share their KV cache.

A block's hash covers its own content and the hash before it, so two prompts that share a hash share everything up to
the end of that block (the scheme of vLLM's automatic prefix caching,
https://docs.vllm.ai/en/latest/design/prefix_caching.html). Without a tokenizer the blocks are of bytes: fixed pieces of
the prompt as a chat template would lay it out, tools first, then the messages in their order. A piece of text is the
same tokens wherever it stands in such a chain, up to its last few, so blocks of bytes and the engine's own blocks agree
on where two prompts part, to within one block.

Hashes are xxh3-64 (https://xxhash.com), each seeded with the one before. They hold no text, and none can be read from
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import orjson
import xxhash

__all__ = [
    "BLOCK_BYTES",
    "BYTES_PER_TOKEN",
    "MOST_BLOCKS",
    "Laid",
    "PromptBlocks",
    "byte_blocks",
    "render_messages",
    "salt_of",
]

BLOCK_BYTES = 256
"""Bytes of a block: about 64 tokens, so that a prompt of 32 KB has 128 blocks."""
BYTES_PER_TOKEN = 4
"""Close to what tokenizers of today give for English; what it is wrong by, it is wrong by for all replicas alike."""

MOST_BLOCKS = 4096
"""Of a prompt's beginning: what lies beyond the first megabyte, some 260,000 tokens, is known by its marks alone. So no
prompt takes the event loop for long, however long it is itself (`benchmarks/loop_lag.py`)."""

_hash = xxhash.xxh3_64_intdigest
_WHOLE_PART = 131_072
_LATEST_ANSWERS = 2
_MARK = 0x6D61726B
_SYSTEM_ROLES = frozenset({"system", "developer"})


@attrs.frozen
class PromptBlocks:
    """A prompt's chain.

    Attributes:
        hashes: Of its whole blocks, in order, each an unsigned 64-bit number; of a very long prompt the first ones.
        block_tokens: Tokens in a block; an estimate for blocks of bytes.
        tokens: Tokens in the prompt, the last part of a block included.
        is_exact: True for blocks of the engine's own tokens.
        usual_tokens: Tokens in a block of any prompt, whether this one's were counted or not.
        marks: Beginnings of the prompt that end within a block: their hash, and how many tokens a replica holds that
            computed just that. They stand at the end of the system messages, at the prompt's own end, and where each
            answer in it begins: who computed the prompt up to there wrote the answer, and so holds it too.
        ends: The marks by which this prompt is found in others: at the end of its system messages, and at its own.
    """

    hashes: Sequence[int]
    block_tokens: float
    tokens: int
    is_exact: bool = False
    marks: Sequence[tuple[int, float]] = ()
    ends: Sequence[int] = ()
    usual_tokens: float = attrs.field(kw_only=True)

    @usual_tokens.default
    def _is_usual(self) -> float:
        return self.block_tokens

    def of_tokens(self, tokens: int) -> PromptBlocks:
        """The same chain of a prompt that has so many tokens, each block and mark its share of them.

        >>> byte_blocks(Laid(b"a" * 512)).of_tokens(64).block_tokens
        32.0
        """
        if tokens == self.tokens or not self.tokens:
            return self
        share = tokens / self.tokens
        marks = [(mark, count * share) for mark, count in self.marks]
        return attrs.evolve(self, block_tokens=self.block_tokens * share, tokens=tokens, marks=marks)


@attrs.frozen
class Laid:
    """A prompt laid out as bytes.

    Attributes:
        text: The bytes.
        system_end: Where its leading system messages end; 0 if it has none.
        answers: Where each answer in it begins and ends.
    """

    text: bytes
    system_end: int = 0
    answers: Sequence[tuple[int, int]] = ()


def byte_blocks(laid: Laid, seed: int = 0, block_bytes: int = BLOCK_BYTES) -> PromptBlocks:
    """The chain of a prompt laid out as bytes. 32 KB take about 20 µs.

    Args:
        laid: The prompt.
        seed: Keeps apart what must not be shared; see `salt_of`.
        block_bytes: Bytes of a block.

    >>> one, two = byte_blocks(Laid(b"a" * 512 + b"b" * 256)), byte_blocks(Laid(b"a" * 512 + b"c" * 300))
    >>> [x == y for x, y in zip(one.hashes, two.hashes)], one.tokens, one.block_tokens
    ([True, True, False], 192, 64.0)
    """
    digest, last, text, view = _hash, seed, laid.text, memoryview(laid.text)
    hashes = [
        last := digest(text[start : start + block_bytes], last)
        for start in range(0, min(len(text) - block_bytes + 1, MOST_BLOCKS * block_bytes), block_bytes)
    ]

    def mark(place: int) -> int:
        whole = min(place // block_bytes, MOST_BLOCKS)
        # Another seed than a block's, so that a mark where a block ends is not that block.
        return digest(view[whole * block_bytes : place], (hashes[whole - 1] if whole else seed) ^ _MARK)

    marks = [(mark(start), end / BYTES_PER_TOKEN) for start, end in laid.answers[-_LATEST_ANSWERS:]]
    ends, tokens = [mark(len(text))], -(-len(text) // BYTES_PER_TOKEN)
    marks.append((ends[0], tokens))
    if laid.system_end:
        system = mark(laid.system_end)
        marks.insert(0, (system, laid.system_end / BYTES_PER_TOKEN))
        ends.insert(0, system)
    return PromptBlocks(hashes, block_bytes / BYTES_PER_TOKEN, tokens, marks=marks, ends=ends)


def salt_of(*parts: str) -> int:
    """A seed that is another one for other parts, and 0 for none.

    >>> salt_of(), salt_of("", ""), salt_of("team-a") == salt_of("team-b")
    (0, 0, False)
    """
    return _hash("\x1f".join(parts).encode("utf-8", "surrogatepass")) if any(parts) else 0


def render_messages(messages: Sequence[Mapping[str, Any]], tools: Any = None) -> Laid:
    r"""A conversation as bytes, in the order in which chat templates put it.

    Tools come first, then each message after its role. Texts stand as they are; pictures and other parts by a hash of
    their content.

    >>> render_messages([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}])
    Laid(text=b'\x1euser\x1fHi\x1eassistant\x1fYes?', system_end=0, answers=[(8, 23)])
    """
    pieces: list[bytes] = [_plain(tools)] if tools else []
    answers: list[tuple[int, int]] = []
    size = len(pieces[0]) if pieces else 0
    system_end, is_leading = 0, True
    for message in messages:
        role = message.get("role", "")
        piece = b"\x1e%b\x1f%b" % (str(role).encode("utf-8", "surrogatepass"), _content(message.get("content")))
        calls = message.get("tool_calls")
        if calls:
            piece += _plain(calls)
        if role == "assistant":
            answers.append((size, size + len(piece)))
        size += len(piece)
        pieces.append(piece)
        is_leading = is_leading and role in _SYSTEM_ROLES
        if is_leading:
            system_end = size
    return Laid(b"".join(pieces), system_end, answers)


def _content(content: Any) -> bytes:
    if isinstance(content, str):
        return content.encode("utf-8", "surrogatepass")
    if isinstance(content, Sequence):
        return b"".join([_part(part) for part in content])
    return b""


def _part(part: Any) -> bytes:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"]).encode("utf-8", "surrogatepass")
    return b"\x1d%016x" % _hash(_identity(part))


def _identity(part: Any) -> bytes:
    """What tells one picture or sound from another: all of it, or the length, head and tail of a large one."""
    url = part.get("image_url") if isinstance(part, Mapping) else None
    url = url.get("url") if isinstance(url, Mapping) else url
    if isinstance(url, str) and len(url) > _WHOLE_PART:
        half = _WHOLE_PART // 2
        return f"{len(url)}:{url[:half]}{url[-half:]}".encode("utf-8", "surrogatepass")
    return _plain(part)


def _plain(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # a lone surrogate, or a Python object
        return repr(value).encode("utf-8", "backslashreplace")
