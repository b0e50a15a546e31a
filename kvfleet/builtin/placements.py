"""Where a prompt was sent, as workers of one gateway tell each other."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Self

import attrs
import orjson

__all__ = ["Placement"]

_HEAD = struct.Struct("<I")
_MOST_BLOCKS = 6_000
"""What a datagram has room for: the beginning of a prompt of 1.5 MB, at 256 bytes a block."""


@attrs.frozen
class Placement:
    """A prompt that a replica computes, or has computed.

    Attributes:
        replica: Its id.
        blocks: The prompt's, from its beginning.
        ttl_s: How long that is to be believed.
        tenant, session: The conversation that is at home there now; no session if empty.

    >>> Placement.unpacked(Placement("llama@http://gpu", [1, 2], 60.0).packed()).blocks
    array('Q', [1, 2])
    """

    replica: str
    blocks: Sequence[int] = attrs.field(repr=False)
    ttl_s: float
    tenant: str = ""
    session: str = attrs.field(default="", repr=False)

    def packed(self) -> bytes:
        """As bytes, at most `_MOST_BLOCKS` blocks of it."""
        head = orjson.dumps((self.replica, self.ttl_s, self.tenant, self.session))
        return _HEAD.pack(len(head)) + head + array("Q", self.blocks[:_MOST_BLOCKS]).tobytes()

    @classmethod
    def unpacked(cls, data: bytes) -> Self:
        """From bytes.

        Raises:
            ValueError: for bytes that are none.
        """
        (size,) = _HEAD.unpack_from(data)
        replica, ttl_s, tenant, session = orjson.loads(data[_HEAD.size : _HEAD.size + size])
        blocks = array("Q")
        blocks.frombytes(data[_HEAD.size + size :])
        return cls(replica, blocks, ttl_s, tenant, session)
