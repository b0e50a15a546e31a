"""The tokens of a simulated engine: four bytes of text are one, which is free to count and the same everywhere."""

from __future__ import annotations

from array import array

import xxhash

__all__ = ["TOKEN_BYTES", "block_hashes", "count_tokens", "token_ids"]

TOKEN_BYTES = 4
"""A token is four bytes of UTF-8: close to what real tokenizers give for English."""

_VOCABULARY = 151_000


def count_tokens(text: bytes) -> int:
    """Tokens in a rendered prompt.

    >>> count_tokens(b"Hello, world")
    3
    """
    return -(-len(text) // TOKEN_BYTES)


def token_ids(text: bytes) -> list[int]:
    """Numbers of a text's tokens, below 151,000: equal bytes have equal numbers.

    >>> one, two, three = token_ids(b"Hell" + b"o, w" + b"Hell")
    >>> one == three, one == two
    (True, False)
    """
    words = array("I", text + bytes(-len(text) % TOKEN_BYTES))
    return [word % _VOCABULARY for word in words]


def block_hashes(text: bytes, block_tokens: int, *, seed: int = 0) -> tuple[int, ...]:
    """Chained hashes of the full blocks of a rendered prompt: two texts share a hash if they agree up to its end.

    A block is full with its last token, even if that is the end of the text and has fewer than four bytes.

    Args:
        text: The prompt.
        block_tokens: Tokens in a block.
        seed: Texts with another seed share nothing; an engine makes it of what isolates its cache (a salt, a LoRA).

    >>> one, two = block_hashes(b"a" * 8, 1), block_hashes(b"a" * 4 + b"b" * 4, 1)
    >>> one[0] == two[0], one[1] == two[1]
    (True, False)
    """
    size = block_tokens * TOKEN_BYTES
    found = []
    last = seed
    for start in range(0, count_tokens(text) // block_tokens * size, size):
        last = xxhash.xxh3_64_intdigest(text[start : start + size], seed=last)
        found.append(last)
    return tuple(found)
