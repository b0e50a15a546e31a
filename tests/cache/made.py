"""Events made by hand, and an index that only notes what it is told."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import attrs

from kvfleet.cache.block_chain import token_hashes
from kvfleet.cache.kv_events import BlockRemoved, BlockStored
from kvfleet.cache.resuming import Resuming, Window

__all__ = ["Noted", "held", "removed", "stored", "words"]


@attrs.define
class Noted:
    """An index that refuses what makes no sense: to forget what it was not told."""

    claims: dict[tuple[str, str | Window], set[int]] = attrs.field(factory=dict)

    def store(self, replica: str, hashes: Iterable[int], tier: str | Window = "gpu") -> None:
        """Note it."""
        self.claims.setdefault((replica, tier), set()).update(hashes)

    def remove(self, replica: str, hashes: Iterable[int], tier: str | Window = "gpu") -> None:
        """Note it."""
        gone = set(hashes)
        assert gone <= self.claims.get((replica, tier), set()), "told to forget what nobody claimed"
        self.claims[replica, tier] -= gone

    def limit(self, replica: str, resuming: Resuming | None) -> None:
        """Only layers that need all blocks are noted here."""

    def clear(self, replica: str) -> None:
        """Note it."""
        for key in [key for key in self.claims if key[0] == replica]:
            del self.claims[key]

    def matched(self, hashes: Sequence[int], replica: str = "a", tier: str = "gpu") -> int:
        """How many blocks from the first on are claimed."""
        known = self.claims.get((replica, tier), set())
        return next((at for at, block in enumerate(hashes) if block not in known), len(hashes))


def words(tokens: Iterable[int]) -> bytes:
    """Token ids as the events carry them."""
    tokens = tuple(tokens)
    return struct.pack(f"<{len(tokens)}I", *tokens)


def stored(
    hashes: Sequence[int], tokens: Iterable[int], parent: int | None = None, size: int = 4, **more: object
) -> BlockStored:
    """Blocks stored."""
    return BlockStored(hashes=tuple(hashes), parent=parent, tokens=words(tokens), block_tokens=size, **more)  # type: ignore[arg-type]


def removed(*hashes: int, tier: str = "gpu", group: int = 0) -> BlockRemoved:
    """Blocks removed."""
    return BlockRemoved(hashes, tier, group)


def held(index: Noted, tokens: Iterable[int], *, size: int = 4, salt: str = "", tier: str = "gpu") -> int:
    """How many tokens of a prompt are claimed from its beginning on."""
    return size * index.matched(token_hashes(words(tokens), size, salt), tier=tier)
