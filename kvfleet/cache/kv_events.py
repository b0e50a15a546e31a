"""What engines say of their KV caches: messages of vLLM, SGLang and whoever publishes alike, as typed events.

An engine publishes batches in msgpack: ``[time, events, data-parallel rank]``, an event being ``BlockStored``,
``BlockRemoved`` or ``AllBlocksCleared``. Of this several encodings are in the wild, as the engines changed their minds
(vllm-project/vllm#42892, sgl-project/sglang#37482): batch and event may each be an array or a map, trailing fields may
be absent, hashes may be signed, unsigned or bytes. All of them are read; fields and events that nobody here knows are
passed over, and the events counted. In an array the field after ``medium`` is a LoRA's name to vLLM and other things to
SGLang, so what is not a name there ends the part of the array that is understood.

Hashes are the engine's own, made to unsigned 64 bits. They mean nothing to anybody else: `kvfleet.cache.block_chain`
takes them as keys, and computes its own from the tokens.
"""

from __future__ import annotations

import functools
import math
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import xxhash

from kvfleet.errors import ComponentError, KVEventError

__all__ = [
    "ANYWHERE",
    "AllCleared",
    "BlockRemoved",
    "BlockStored",
    "Event",
    "EventBatch",
    "decode",
    "hash_of",
    "tier_of",
    "words",
]

ANYWHERE = ""
"""In place of a tier: whichever it was."""

_U64 = (1 << 64) - 1
_STORED = (
    *("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys"),
    *("group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window", "locality"),
)
_REMOVED = ("block_hashes", "medium", "group_idx", "locality")
_FIELDS: Mapping[str, tuple[str, ...]] = {"BlockStored": _STORED, "BlockRemoved": _REMOVED, "AllBlocksCleared": ()}
_TIERS = {"gpu": "gpu", "hbm": "gpu", "device": "gpu", "cpu": "cpu", "cpu_pinned": "cpu", "host": "cpu", "dram": "cpu"}
_RANKS = ("data_parallel_rank", "attn_dp_rank", "dp_rank")
_LONGEST_WORD = 32


@attrs.frozen
class BlockStored:
    """Blocks that are now in the cache, each following the one before it.

    Attributes:
        hashes: The engine's hashes of them.
        parent: The hash of the block before the first; None at the beginning of a prompt.
        tokens: Their token ids, as unsigned 32-bit little-endian numbers.
        block_tokens: Tokens in a block.
        tier: Where they are: ``gpu``, ``cpu``, or the engine's own word in lower case.
        group: Which of a hybrid model's groups of layers they belong to.
        kind: The attention of that group, such as ``full_attention``; empty if the engine does not say.
        window: How many tokens it looks back, the present one among them, if it has a sliding window; 0 if it has none,
            or the engine does not say.
        lora: The LoRA adapter they were computed with; empty for none.
        salt: What keeps this prompt apart from others with the same tokens; empty for nothing.
        extras: For each block what else went into it, such as a picture's hash; empty if nothing did.
    """

    hashes: tuple[int, ...]
    parent: int | None
    tokens: bytes = attrs.field(repr=False)
    block_tokens: int
    tier: str = "gpu"
    group: int = 0
    kind: str = ""
    window: int = 0
    lora: str = ""
    salt: str = attrs.field(default="", repr=False)
    extras: tuple[bytes, ...] = attrs.field(default=(), repr=False)

    @property
    def is_dense(self) -> bool:
        """True if the tokens are those of all the blocks, no more and no fewer."""
        return len(self.tokens) == 4 * self.block_tokens * len(self.hashes)


@attrs.frozen
class BlockRemoved:
    """Blocks that are no longer in a tier of the cache, or `ANYWHERE` in it."""

    hashes: tuple[int, ...]
    tier: str = "gpu"
    group: int = 0


@attrs.frozen
class AllCleared:
    """The cache is empty."""


Event = BlockStored | BlockRemoved | AllCleared


@attrs.frozen
class EventBatch:
    """One message.

    Attributes:
        time_s: When the engine made it, in Unix seconds; 0 if it does not say.
        events: What happened, in order.
        rank: The data-parallel rank it happened on; None if the engine does not say.
        unknown: Events of types nobody here knows.
        malformed: Events of known types that could not be read, and are missing.
    """

    time_s: float
    events: tuple[Event, ...]
    rank: int | None = None
    unknown: int = 0
    malformed: int = 0


def decode(payload: bytes) -> EventBatch:
    """Read one message.

    Raises:
        KVEventError: if it is not a batch of events at all. An event in it that cannot be read is counted instead.
        ComponentError: if the extra that reads msgpack is not installed.
    """
    batch = _unpack(payload)
    if isinstance(batch, Mapping):
        time_s, events = batch.get("ts"), batch.get("events")
        rank = next((batch[key] for key in _RANKS if key in batch), None)
    elif isinstance(batch, list) and len(batch) >= 2:
        time_s, events = batch[0], batch[1]
        rank = batch[2] if len(batch) > 2 else None
    else:
        raise KVEventError("the message is not a batch: neither an array of at least two nor a map")
    if not isinstance(events, list):
        raise KVEventError("the batch has no list of events")
    found: list[Event] = []
    unknown = malformed = 0
    for event in events:
        try:
            read = _event(event)
        except KVEventError:
            malformed += 1
            continue
        if read is None:
            unknown += 1
        else:
            found.append(read)
    is_rank = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0
    return EventBatch(_time(time_s), tuple(found), rank if is_rank else None, unknown, malformed)


def _time(value: Any) -> float:
    is_time = (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12 and math.isfinite(value)
    )
    return float(value) if is_time else 0.0


@functools.cache
def _unpacker() -> tuple[Callable[[bytes], Any], type[Exception]]:
    try:
        import msgspec  # noqa: PLC0415 - an extra, imported when it is used
    except ImportError as error:
        raise ComponentError("KV events need msgpack: pip install 'kvfleet[events]'") from error
    return msgspec.msgpack.Decoder().decode, msgspec.MsgspecError


def _unpack(payload: bytes) -> Any:
    unpack, wrong = _unpacker()
    try:
        return unpack(payload)
    except (wrong, RecursionError, ValueError, OverflowError, MemoryError, TypeError) as error:
        raise KVEventError(f"the message is not msgpack ({type(error).__name__})") from error


def _event(event: Any) -> Event | None:
    """One event; None for a type nobody here knows."""
    if isinstance(event, Mapping):
        tag, fields = event.get("type"), event
    elif isinstance(event, list) and event:
        tag = event[0]
        names = _FIELDS.get(tag, ()) if isinstance(tag, str) else ()
        fields = _named(names, event[1:])
    else:
        raise KVEventError("an event is neither an array nor a map")
    if not isinstance(tag, str):
        raise KVEventError("an event has no type")
    if tag == "BlockStored":
        return _stored(fields)
    if tag == "BlockRemoved":
        return BlockRemoved(_hashes(fields), _tier(fields), _group(fields))
    return AllCleared() if tag == "AllBlocksCleared" else None


def _named(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """An array's values by the names they have in vLLM, up to where another engine means something else."""
    fields = dict(zip(names, values, strict=False))
    odd = fields.get("lora_name")
    if odd is None or isinstance(odd, str):
        return fields
    kept = dict(zip(names[: names.index("lora_name")], values, strict=False))
    return {**kept, "metadata": odd} if isinstance(odd, Mapping) else kept


def _stored(fields: Mapping[str, Any]) -> BlockStored:
    size = fields.get("block_size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= 1 << 20:
        raise KVEventError("BlockStored has no block size")
    hashes, parent = _hashes(fields), fields.get("parent_block_hash")
    lora = _lora(fields)
    metadata = fields.get("metadata")
    salt = metadata.get("cache_salt") if isinstance(metadata, Mapping) else fields.get("cache_salt")
    extras = _extras(fields.get("extra_keys"), lora)
    is_first = parent is None
    if is_first and extras and salt is None and len(extras[0]) == 1 and isinstance(extras[0][0], str):
        salt, extras = extras[0][0], [[], *extras[1:]]
    kind = fields.get("kv_cache_spec_kind")
    return BlockStored(
        hashes=hashes,
        parent=None if is_first else hash_of(parent),
        tokens=words(fields.get("token_ids")),
        block_tokens=size,
        tier=_tier(fields),
        group=_group(fields),
        kind=kind if isinstance(kind, str) else "",
        window=_whole(fields.get("kv_cache_spec_sliding_window")),
        lora=lora,
        salt=salt if isinstance(salt, str) and is_first else "",
        extras=tuple(repr(extra).encode("utf-8", "backslashreplace") if extra else b"" for extra in extras)
        if any(extras)
        else (),
    )


def _lora(fields: Mapping[str, Any]) -> str:
    """The adapter's name; its number after a ``#`` where an older engine tells nothing else."""
    name, number, metadata = fields.get("lora_name"), fields.get("lora_id"), fields.get("metadata")
    if name is None and isinstance(metadata, Mapping):
        name = metadata.get("lora_name")
    if isinstance(name, str):
        return name
    return f"#{number}" if isinstance(number, int) else ""


def _extras(value: Any, lora: str) -> list[list[Any]]:
    """For each block what went into its hash beside its tokens and the adapter's name."""
    if not isinstance(value, list):
        return []
    return [[part for part in block if part != lora] if isinstance(block, list) else [] for block in value]


def _hashes(fields: Mapping[str, Any]) -> tuple[int, ...]:
    hashes = fields.get("block_hashes")
    if not isinstance(hashes, list):
        raise KVEventError("an event has no block hashes")
    return tuple(map(hash_of, hashes))


def hash_of(value: Any) -> int:
    """An engine's hash as an unsigned 64-bit number: of bytes the last eight, as vLLM's own conversion has it.

    Raises:
        KVEventError: for what cannot be a hash.

    >>> hash_of(-1) == hash_of(bytes([1] + [255] * 8)) == 2**64 - 1
    True
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value & _U64
    if isinstance(value, bytes) and value:
        return int.from_bytes(value[-8:], "big")
    if isinstance(value, str) and value:
        return xxhash.xxh3_64_intdigest(value.encode("utf-8", "surrogatepass"))
    raise KVEventError("a block's hash is neither a number nor bytes")


def words(tokens: Any) -> bytes:
    """Token ids as unsigned 32-bit little-endian numbers; of pairs (SGLang's under EAGLE) the first of each.

    Raises:
        KVEventError: for what are no token ids.
    """
    if not isinstance(tokens, list):
        raise KVEventError("an event has no token ids")
    if tokens and isinstance(tokens[0], list):
        tokens = list(_firsts(tokens))
    try:
        packed = array("I", tokens)
    except (TypeError, OverflowError, ValueError) as error:
        raise KVEventError("a token id is not an unsigned 32-bit number") from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _firsts(pairs: Sequence[Any]) -> Iterator[Any]:
    for pair in pairs:
        if not isinstance(pair, list) or not pair:
            raise KVEventError("a pair of token ids is empty")
        yield pair[0]


def _tier(fields: Mapping[str, Any]) -> str:
    if str(fields.get("locality") or "").upper() == "REMOTE":
        return "remote"
    return tier_of(fields.get("medium"))


def tier_of(medium: Any) -> str:
    """The tier that an engine's word for a medium means; ``gpu`` if it has none.

    >>> tier_of(None), tier_of("CPU_PINNED"), tier_of("STORAGE")
    ('gpu', 'cpu', 'storage')
    """
    if not isinstance(medium, str) or not medium:
        return "gpu"
    word = medium.lower()[:_LONGEST_WORD]
    return _TIERS.get(word, word)


def _group(fields: Mapping[str, Any]) -> int:
    return _whole(fields.get("group_idx"))


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
