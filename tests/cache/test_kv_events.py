"""Messages of engines, in every encoding they have been seen in."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.cache.kv_events import AllCleared, BlockRemoved, BlockStored, EventBatch, decode, hash_of, tier_of
from kvfleet.errors import KVEventError

msgspec = pytest.importorskip("msgspec")

SAMPLES = Path(__file__).parent / "samples"
TOKENS = [1, 2, 3, 4]
WORDS = struct.pack("<4I", *TOKENS)


def pack(value: Any) -> bytes:
    """A message."""
    packed: bytes = msgspec.msgpack.encode(value)
    return packed


def one(event: Any) -> Any:
    """The event that a batch of one holds."""
    (found,) = decode(pack([1.5, [event]])).events
    return found


def sample(name: str) -> EventBatch:
    """A recorded message."""
    return decode((SAMPLES / f"{name}.msgpack").read_bytes())


class TestRecorded:
    """What engines really sent."""

    def test_every_recorded_message_is_understood_whole(self) -> None:
        """No event is unknown or unreadable."""
        batches = [decode(path.read_bytes()) for path in sorted(SAMPLES.glob("*.msgpack"))]
        assert len(batches) == 7
        assert all(batch.events and not batch.unknown and not batch.malformed for batch in batches)
        assert all(event.is_dense for batch in batches for event in batch.events if isinstance(event, BlockStored))

    def test_vllm(self) -> None:
        """Maps within an array; group and kind of attention told."""
        batch = sample("vllm_0.32_first")
        (event,) = batch.events
        assert isinstance(event, BlockStored)
        assert (batch.rank, batch.time_s) == (0, 1795379382.5089214)
        assert (len(event.hashes), event.block_tokens, event.parent, event.kind) == (5, 32, None, "full_attention")
        assert event.tokens[:12] == struct.pack("<3I", 1, 1841, 203)
        assert (event.tier, event.group, event.lora, event.salt, event.extras) == ("gpu", 0, "", "", ())

    def test_a_salt_is_told_apart(self) -> None:
        """The same tokens under another salt: the salt is found among the first block's keys."""
        (plain,), (salted,) = sample("vllm_0.32_plain").events, sample("vllm_0.32_salted").events
        assert isinstance(plain, BlockStored)
        assert isinstance(salted, BlockStored)
        assert plain.tokens == salted.tokens
        assert (plain.salt, salted.salt, salted.extras) == ("", "tenantA", ())

    def test_removed_and_stored_in_one_message(self) -> None:
        """In the order in which they happened."""
        removed, stored = sample("vllm_0.32_evicting").events
        assert removed == BlockRemoved((11140687794085299716,))
        assert isinstance(stored, BlockStored)
        assert stored.parent == 3381910939134958040

    def test_sglang(self) -> None:
        """Signed hashes become unsigned."""
        (event,) = sample("sglang_0.5.23_first").events
        assert isinstance(event, BlockStored)
        assert event.hashes == (2**64 - 102974762547196680,)
        assert (event.block_tokens, event.kind) == (16, "")

    def test_dynamo(self) -> None:
        """Without medium and kind."""
        (event,) = sample("dynamo_mocker_1.6.1").events
        assert isinstance(event, BlockStored)
        assert (event.parent, event.block_tokens, event.tier) == (13252943723998844267, 32, "gpu")


class TestEncodings:
    """Array or map, at both levels, old and new."""

    STORED = BlockStored(hashes=(7,), parent=3, tokens=WORDS, block_tokens=4)
    MAP: ClassVar[dict[str, Any]] = {
        "type": "BlockStored",
        "block_hashes": [7],
        "parent_block_hash": 3,
        "token_ids": TOKENS,
        "block_size": 4,
    }
    ARRAY: ClassVar[list[Any]] = ["BlockStored", [7], 3, TOKENS, 4]

    @pytest.mark.parametrize(
        "batch",
        [
            [1.5, [ARRAY]],
            [1.5, [ARRAY], 2],
            [1.5, [MAP], 2],
            [1.5, [MAP], None, "more", {"to": "come"}],
            {"ts": 1.5, "events": [ARRAY]},
            {"ts": 1.5, "events": [MAP], "data_parallel_rank": 2, "new": 1},
            {"ts": 1.5, "events": [{**MAP, "new": [1]}], "attn_dp_rank": 2},
        ],
    )
    def test_all_mean_the_same(self, batch: Any) -> None:
        """Whatever the shape, and whatever is added to it."""
        found = decode(pack(batch))
        assert (found.events, found.time_s, found.rank in (2, None)) == ((self.STORED,), 1.5, True)

    def test_vllms_positions(self) -> None:
        """All its fields, and one it does not have yet."""
        event = [*self.ARRAY, None, "CPU", "tune", [["tune", ["picture", 0]]], 2, "mla_attention", None, "LOCAL", "?"]
        found = one(event)
        assert (found.tier, found.lora, found.group, found.kind) == ("cpu", "tune", 2, "mla_attention")
        assert (found.salt, found.extras) == ("", (b"['picture', 0]".join([b"[", b"]"]),))

    @pytest.mark.parametrize(
        ("odd", "salt"), [({"cache_salt": "team"}, "team"), (["swa", "full"], ""), ({}, ""), (7, "")]
    )
    def test_sglangs_seventh_field(self, odd: Any, salt: str) -> None:
        """It was used for other things, and nothing after it is trusted."""
        found = one(["BlockStored", [7], None, TOKENS, 4, None, "GPU", odd, "more", 5, "sliding_window"])
        assert found == BlockStored(hashes=(7,), parent=None, tokens=WORDS, block_tokens=4, salt=salt)

    def test_a_salt_by_name(self) -> None:
        """As SGLang says it in maps; it holds at the beginning of a prompt, and its children inherit it."""
        salted = {**self.MAP, "metadata": {"cache_salt": "team"}}
        assert one({**salted, "parent_block_hash": None}).salt == "team"
        assert one(salted).salt == ""
        assert one({**self.MAP, "cache_salt": "team", "parent_block_hash": None}).salt == "team"
        assert one({**self.MAP, "cache_salt": "team"}).salt == ""

    def test_an_adapter_without_a_name(self) -> None:
        """Older engines tell its number."""
        assert one({**self.MAP, "lora_id": 3}).lora == "#3"
        assert one({**self.MAP, "lora_id": 3, "lora_name": "tune"}).lora == "tune"
        assert one({**self.MAP, "metadata": {"lora_name": "tune"}}).lora == "tune"

    def test_pairs_of_tokens(self) -> None:
        """Under EAGLE, SGLang's keys are pairs."""
        assert one({**self.MAP, "token_ids": [[1, 2], [2, 3], [3, 4], [4, 5]]}).tokens == WORDS

    def test_hashes_as_bytes(self) -> None:
        """The last eight of them, so that both forms of one hash are one."""
        wide = bytes(24) + (7).to_bytes(8, "big")
        found = one({**self.MAP, "block_hashes": [wide, 7, -1], "parent_block_hash": wide})
        assert (found.hashes, found.parent) == ((7, 7, 2**64 - 1), 7)

    def test_what_is_elsewhere(self) -> None:
        """Blocks that only another machine has."""
        assert (
            one({"type": "BlockRemoved", "block_hashes": [1], "medium": "CPU", "locality": "REMOTE"}).tier == "remote"
        )
        assert one(["BlockRemoved", [1], "cpu", 4]) == BlockRemoved((1,), "cpu", 4)

    def test_unknown_events_are_counted(self) -> None:
        """And do not hide the others."""
        batch = decode(pack([0, [["BlockMigrated", [1]], {"type": "Later"}, ["AllBlocksCleared"]]]))
        assert (batch.events, batch.unknown, batch.malformed) == ((AllCleared(),), 2, 0)


class TestMalformed:
    """What cannot be read."""

    @pytest.mark.parametrize(
        "event",
        [
            3,
            [],
            [3],
            {},
            {"type": 3},
            ["BlockRemoved"],
            ["BlockRemoved", [None]],
            ["BlockStored", [b""], None, [], 4],
            ["BlockStored", [1], None, TOKENS],
            ["BlockStored", [1], None, TOKENS, 0],
            ["BlockStored", [1], None, TOKENS, True],
            ["BlockStored", [1], None, "text", 4],
            ["BlockStored", [1], None, [1.5], 4],
            ["BlockStored", [1], None, [-1], 4],
            ["BlockStored", [1], None, [2**32], 4],
            ["BlockStored", [1], None, [[]], 4],
            ["BlockStored", [1], 1.5, TOKENS, 4],
        ],
    )
    def test_one_event_is_counted(self, event: Any) -> None:
        """The others are still read."""
        batch = decode(pack([0, [event, ["AllBlocksCleared"]]]))
        assert (batch.events, batch.malformed) == ((AllCleared(),), 1)

    @pytest.mark.parametrize("batch", [3, None, [], [1.0], "text", {}, {"ts": 1.0}, {"events": {}}, [1.0, None]])
    def test_what_is_no_batch_is_refused(self, batch: Any) -> None:
        """With an error of ours."""
        with pytest.raises(KVEventError):
            decode(pack(batch))

    @pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x93\x01", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"{}"])
    def test_what_is_no_msgpack_is_refused(self, payload: bytes) -> None:
        """However deep or long it pretends to be."""
        with pytest.raises(KVEventError):
            decode(payload)

    @pytest.mark.parametrize("time", [None, "now", -1.0, float("nan"), float("inf"), 2**63, True])
    def test_an_impossible_time_is_none(self, time: Any) -> None:
        """It is only used to tell how late events are."""
        assert decode(pack([time, []])).time_s == 0.0

    @given(st.binary(max_size=200))
    def test_any_bytes(self, payload: bytes) -> None:
        """Give events or our error, and nothing else."""
        with contextlib.suppress(KVEventError):
            assert isinstance(decode(payload), EventBatch)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary() | st.text()
            | st.sampled_from(["BlockStored", "BlockRemoved", "ts", "events", "type", "block_hashes", "token_ids"]),
            lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text() | st.sampled_from(
                ["ts", "events", "type", "block_hashes", "token_ids", "block_size", "metadata", "extra_keys"]
            ), inner, max_size=6),
            max_leaves=30,
        )
    )  # fmt: skip
    def test_any_message(self, value: Any) -> None:
        """The same for what is msgpack."""
        for message in (
            value,
            [0, [value]],
            [0, [["BlockStored", value, value, value, 4]]],
            {"ts": 0, "events": value},
        ):
            with contextlib.suppress(KVEventError):
                assert isinstance(decode(pack(message)), EventBatch)


@given(st.integers(0, 2**64 - 1))
def test_forms_of_a_hash(value: int) -> None:
    """Signed, unsigned and as bytes, it is one hash."""
    signed = value - 2**64 if value >= 2**63 else value
    assert hash_of(value) == hash_of(signed) == hash_of(value.to_bytes(8, "big")) == value


def test_words_for_tiers() -> None:
    """Of which some mean the same; unknown ones are kept, and cut."""
    assert [tier_of(word) for word in ("GPU", "HBM", "host", "DISK", "x" * 99, 3, "")] == [
        *("gpu", "gpu", "cpu", "disk", "x" * 32, "gpu", "gpu"),
    ]  # fmt: skip
