"""TensorRT-LLM's events, which are handed out once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.cache.engine_blocks import EngineBlocks
from kvfleet.cache.kv_drain import EventDrain, decode_drain
from kvfleet.cache.kv_state import KVMode
from kvfleet.clock import FrozenClock
from kvfleet.errors import KVEventError
from tests.cache.made import Noted, held

PROMPT = range(100, 112)


@pytest.fixture
def index() -> Noted:
    """An index."""
    return Noted()


@pytest.fixture
def drain(index: Noted) -> EventDrain:
    """A drain."""
    return EventDrain(
        make_blocks=lambda rank: [EngineBlocks(index=index, holder="a", block_tokens=4)], clock=FrozenClock()
    )


def event(number: int, kind: str, window: int = 4096, **data: Any) -> dict[str, Any]:
    """An event."""
    return {"event_id": number, "window_size": window, "data": {"type": kind, **data}}


def block(name: int, tokens: Sequence[int], **more: Any) -> dict[str, Any]:
    """A stored block."""
    told = [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens]
    return {"type": "stored_block", "block_hash": name, "tokens": told, "cache_level": 0, "priority": 35, **more}


def stored(number: int, *blocks: dict[str, Any], parent: int | None = None, window: int = 4096) -> dict[str, Any]:
    """An event of blocks stored."""
    return event(number, "stored", window, parent_hash=parent, blocks=list(blocks))


CREATED = event(0, "created", num_blocks_per_cache_level=[100, 0])
FIRST = stored(1, block(1, PROMPT[:4]), block(2, PROMPT[4:8]), block(3, PROMPT[8:11]))


def take(drain: EventDrain, *events: Any) -> KVMode:
    """Drain these events; the mode after that."""
    drain.drained(json.dumps(events).encode())
    return drain.judge()[0]


def test_from_the_beginning_it_is_exact(drain: EventDrain, index: Noted) -> None:
    """Whole blocks are claimed; the last, which is not, is passed over."""
    assert drain.judge()[0] is KVMode.APPROXIMATE
    assert take(drain) is KVMode.APPROXIMATE
    assert take(drain, CREATED, FIRST) is KVMode.EXACT
    assert held(index, PROMPT) == 8
    assert take(drain, event(2, "removed", block_hashes=[3, 2])) is KVMode.EXACT
    assert held(index, PROMPT) == 4


def test_blocks_move_between_tiers(drain: EventDrain, index: Noted) -> None:
    """To the host's memory, and out of it."""
    take(drain, CREATED, FIRST)
    take(drain, event(2, "updated", block_hash=2, cache_level={"type": "event_diff", "old_value": 0, "new_value": 1}))
    assert (held(index, PROMPT), held(index, PROMPT, tier="cpu")) == (4, 0)
    assert len(index.claims["a", "cpu"]) == 1
    take(drain, event(3, "updated", block_hash=2, cache_level=None, priority={"old_value": 1, "new_value": 2}))
    take(drain, event(4, "removed", block_hashes=[2]))
    assert index.claims["a", "cpu"] == set()
    assert drain.judge()[0] is KVMode.EXACT


def test_narrow_windows_are_passed_over(drain: EventDrain, index: Noted) -> None:
    """Of layers with a sliding window only the last blocks are kept; then the widest window is not all there is."""
    narrow = event(1, "created", 128, num_blocks_per_cache_level=[10, 0])
    assert take(drain, CREATED, narrow, stored(2, block(7, PROMPT[:4]), window=128)) is KVMode.DEGRADED
    assert not index.claims
    take(drain, stored(3, block(7, PROMPT[:4])), event(4, "removed", 128, block_hashes=[7]))
    assert held(index, PROMPT) == 4


def test_salts_and_pictures(drain: EventDrain, index: Noted) -> None:
    """Keep prompts apart."""
    picture = block(8, PROMPT[4:8], mm_keys=[{"hash": "abc", "start_offset": 0}])
    take(drain, CREATED, stored(1, block(7, PROMPT[:4], cache_salt="team"), picture))
    assert (held(index, PROMPT), held(index, PROMPT, salt="team")) == (0, 4)


def test_events_handed_to_somebody_else(drain: EventDrain, index: Noted) -> None:
    """Are missing, and nothing that was known before is claimed any more."""
    take(drain, CREATED, FIRST)
    assert take(drain, stored(5, block(9, [7, 7, 7, 7]))) is KVMode.DEGRADED
    assert "somebody else" in drain.judge()[1]
    assert (held(index, PROMPT), held(index, [7, 7, 7, 7]), drain.counts.gaps) == (0, 4, 1)


def test_who_comes_late(drain: EventDrain) -> None:
    """Knows a part."""
    assert take(drain, stored(5, block(9, [7, 7, 7, 7]))) is KVMode.DEGRADED
    assert "5 events" in drain.judge()[1]


def test_a_restart(drain: EventDrain, index: Noted) -> None:
    """The numbers begin anew."""
    take(drain, CREATED, FIRST)
    assert take(drain, CREATED, stored(1, block(9, [7, 7, 7, 7]))) is KVMode.EXACT
    assert (held(index, PROMPT), held(index, [7, 7, 7, 7]), drain.counts.restarts) == (0, 4, 1)


def test_a_lost_engine(drain: EventDrain) -> None:
    """Cannot be asked."""
    take(drain, CREATED, FIRST)
    drain.disconnected()
    assert drain.judge() == (KVMode.DEGRADED, "the connection is lost")
    assert take(drain) is KVMode.EXACT


def test_unreadable_events(drain: EventDrain) -> None:
    """Make the account worthless for a while."""
    take(drain, CREATED, FIRST)
    assert take(drain, event(2, "removed")) is KVMode.APPROXIMATE
    assert drain.counts.unreadable == 1


@pytest.mark.parametrize("body", [b"", b"{}", b"nothing", b"3"])
def test_no_answer_at_all(drain: EventDrain, body: bytes) -> None:
    """The same."""
    take(drain, CREATED, FIRST)
    drain.drained(body)
    assert drain.judge()[0] is KVMode.APPROXIMATE


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 2**64) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    ["event_id", "data", "type", "blocks", "tokens", "token_id", "block_hash", "cache_level"]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=20,
    )
)
def test_any_answer(value: Any) -> None:
    """Gives events or our error."""
    data = {"type": "stored", "parent_hash": None, "blocks": value}
    for body in (value, [value], [{"event_id": 1, "data": value}], [{"event_id": 1, "data": data}]):
        with contextlib.suppress(KVEventError):
            assert isinstance(decode_drain(json.dumps(body).encode())[0], tuple)
