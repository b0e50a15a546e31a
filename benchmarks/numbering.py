"""Numbers for the blocks of prompts, so that a measured load can be kept without its prompts."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Numbering"]


class Numbering:
    """Gives each full block a number: equal beginnings have equal numbers.

    Args:
        block_tokens: Tokens in a block.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}

    def blocks(self, prompt: Sequence[int]) -> list[int]:
        """The numbers of a prompt's full blocks."""
        found: list[int] = []
        for start in range(0, len(prompt) - self._block_tokens + 1, self._block_tokens):
            tokens = tuple(prompt[start : start + self._block_tokens])
            key = (found[-1] if found else -1, tokens)
            found.append(self._known.setdefault(key, len(self._known)))
        return found
