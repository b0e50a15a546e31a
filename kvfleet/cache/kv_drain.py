"""TensorRT-LLM's account of its cache: events that are handed out once, to whoever asks first.

``POST /kv_cache_events`` of ``trtllm-serve`` gives what happened since it was last asked, numbered from 0 in the
engine's life, and forgets it (``tensorrt_llm/_utils.py``, ``KVCacheEventSerializer``). So there is no replay, and only
one may ask: a number that is not the next one means that somebody else did, or that the engine's buffer was full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import orjson

from kvfleet.cache.kv_events import ANYWHERE, AllCleared, BlockRemoved, BlockStored, Event, hash_of, words
from kvfleet.cache.kv_state import CacheState
from kvfleet.errors import KVEventError

__all__ = ["Drained", "EventDrain", "decode_drain"]

_TIERS = ("gpu", "cpu", "disk")


@attrs.frozen
class Drained:
    """One of the engine's events.

    Attributes:
        number: Its place in the engine's life, for each data-parallel rank from 0.
        rank: That rank.
        window: The attention window, in tokens, of the layers it speaks of; 0 if the engine does not say.
        events: The same in our words; more than one if blocks of several tiers or lengths are stored.
    """

    number: int
    rank: int
    window: int
    events: tuple[Event, ...]


def decode_drain(body: bytes) -> tuple[tuple[Drained, ...], int]:
    """The events of one answer, and how many more could not be read.

    Raises:
        KVEventError: if the answer is no list of events at all.

    >>> decode_drain(b'[{"event_id":4,"data":{"type":"removed","block_hashes":[7]}}]')
    ((Drained(number=4, rank=0, window=0, events=(BlockRemoved(hashes=(7,), tier='', group=0),)),), 0)
    """
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise KVEventError("the answer is not JSON") from error
    if not isinstance(answer, list):
        raise KVEventError("the answer is not a list of events")
    found, malformed = [], 0
    for item in answer:
        try:
            found.append(_drained(item))
        except KVEventError:
            malformed += 1
    return tuple(found), malformed


def _drained(item: Any) -> Drained:
    data = item.get("data") if isinstance(item, Mapping) else None
    if not isinstance(data, Mapping):
        raise KVEventError("an event has no data")
    number = _whole(item.get("event_id"))
    if number is None:
        raise KVEventError("an event has no number")
    window = _whole(item.get("window_size")) or 0
    return Drained(number, _whole(item.get("attention_dp_rank")) or 0, window, tuple(_events(data, window)))


def _events(data: Mapping[str, Any], window: int) -> Iterator[Event]:
    kind = data.get("type")
    if kind == "created":
        yield AllCleared()
    elif kind == "removed":
        yield BlockRemoved(tuple(map(hash_of, _list(data, "block_hashes"))), ANYWHERE, window)
    elif kind == "stored":
        yield from _stored(data, window)
    elif kind == "updated" and isinstance(level := data.get("cache_level"), Mapping):
        block = hash_of(data.get("block_hash"))
        yield BlockStored((block,), None, b"", 1, tier=_tier(level.get("new_value")), group=window)
        yield BlockRemoved((block,), _tier(level.get("old_value")), window)


def _stored(data: Mapping[str, Any], window: int) -> Iterator[BlockStored]:
    """Each block by itself: they may differ in tier, and the last may be shorter than the others."""
    parent = None if data.get("parent_hash") is None else hash_of(data["parent_hash"])
    for block in _list(data, "blocks"):
        tokens = _list(block, "tokens") if isinstance(block, Mapping) else []
        if not all(isinstance(token, Mapping) for token in tokens) or not tokens:
            raise KVEventError("a stored block has no tokens")
        ids = words([token.get("token_id") for token in tokens])
        others = [token.get("token_extra_id") for token in tokens]
        extra = [*(others if any(others) else ()), *(block.get("mm_keys") or ())]
        name, salt = hash_of(block.get("block_hash")), block.get("cache_salt")
        yield BlockStored(
            hashes=(name,),
            parent=parent,
            tokens=ids,
            block_tokens=len(tokens),
            tier=_tier(block.get("cache_level")),
            group=window,
            salt=salt if isinstance(salt, str) and parent is None else "",
            extras=(repr(extra).encode("utf-8", "backslashreplace"),) if extra else (),
        )
        parent = name


def _tier(level: Any) -> str:
    return _TIERS[level] if isinstance(level, int) and 0 <= level < len(_TIERS) else "gpu" if level is None else "other"


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _list(holder: Mapping[str, Any], key: str) -> Sequence[Any]:
    found = holder.get(key)
    if not isinstance(found, list):
        raise KVEventError(f"an event has no {key}")
    return found


@attrs.define(eq=False, kw_only=True)
class EventDrain(CacheState):
    """The state that drained events make. Of several attention windows the widest is the one that counts."""

    _last: dict[int, int] = attrs.field(init=False, factory=dict)
    _widest: int = attrs.field(init=False, default=0)

    def drained(self, body: bytes) -> int:
        """Take in one answer; how many events it had."""
        self.connected()
        try:
            found, malformed = decode_drain(body)
        except KVEventError:
            found, malformed = (), 1
        self._widest = max(self._widest, *(one.window for one in found), 0)
        for one in found:
            self._follow(one)
            self.take_in(one.rank, [self._told_apart(event) for event in one.events], 0.0)
            self._last[one.rank] = one.number
        if malformed:
            self.counts.unreadable += malformed
            self.doubt("some of its events cannot be read")
        return len(found)

    def _follow(self, one: Drained) -> None:
        """See whether an event is the next of its rank, of another life, or after some that were missed."""
        last = self._last.get(one.rank)
        if last is None and self.is_whole is None:
            self.is_whole, self.why = one.number == 0, f"its first {one.number} events were not handed to us"
        elif last is not None and one.number <= last:
            self.counts.restarts += 1
            self.forget()
            self._last.clear()
            self.is_whole, self.why = one.number == 0, "the engine restarted, and its first events are missing"
        elif one.number != (0 if last is None else last + 1):
            self.counts.gaps += 1
            self.lose("events are missing: they were handed to somebody else, or were too many for the engine's buffer")

    def _told_apart(self, event: Event) -> Event:
        """A stored block's kind of attention, by its window."""
        if not isinstance(event, BlockStored):
            return event
        return attrs.evolve(event, kind="sliding_window" if event.group < self._widest else "full_attention")
