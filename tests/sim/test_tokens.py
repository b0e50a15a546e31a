"""Tokens and block hashes of texts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvfleet.sim.tokens import block_hashes, count_tokens, token_ids


@given(st.binary(max_size=600), st.binary(max_size=600), st.integers(1, 8))
def test_block_hashes_agree_exactly_as_far_as_the_texts_do(one: bytes, two: bytes, block_tokens: int) -> None:
    """Two texts share as many leading hashes as they share whole leading blocks of tokens."""
    blocks, others = (
        [text[i : i + 4 * block_tokens] for i in range(0, len(text), 4 * block_tokens)] for text in (one, two)
    )
    fewest = min(count_tokens(one), count_tokens(two)) // block_tokens
    same = next((i for i in range(fewest) if blocks[i] != others[i]), fewest)
    hashes, rest = block_hashes(one, block_tokens), block_hashes(two, block_tokens)
    assert len(hashes) == count_tokens(one) // block_tokens
    assert next((i for i, (a, b) in enumerate(zip(hashes, rest, strict=False)) if a != b), fewest) == same


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_token_ids_are_those_of_the_bytes(one: bytes, two: bytes) -> None:
    """There are as many as are counted, and a text that begins with whole tokens of another begins with its numbers."""
    assert len(token_ids(one)) == count_tokens(one)
    whole = one[: len(one) // 4 * 4]
    assert token_ids(whole + two) == token_ids(whole) + token_ids(two)


def test_a_seed_isolates() -> None:
    """The same text under another salt shares nothing."""
    assert not set(block_hashes(b"x" * 64, 4)) & set(block_hashes(b"x" * 64, 4, seed=1))
