"""Traces as they lie in files: Mooncake's, Azure's, recorded requests, and our own store."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

import pytest

from kvfleet.clock import FrozenClock
from kvfleet.config.schema import FleetConfig, ModelConfig, StageConfig
from kvfleet.errors import Fault, RouteError, TraceError
from kvfleet.plugin.contract import RouteRequest
from kvfleet.replay.readers import read_trace
from kvfleet.replay.traces import RequestTrace, TracedRequest, spread
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply
from kvfleet.trace.store import TraceStore
from tests.replay.fleets import TABLE, fleet, replayed

_OPENS = FakeReply(text="It opens " * 50, latency_s=2.0)
MODEL = ModelConfig(name="m", endpoint="http://m", provider="vllm")


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    """Three requests; the second shares two whole blocks with the first."""
    rows = [
        {"timestamp": 3000, "input_length": 1500, "output_length": 20, "hash_ids": [0, 1, 2]},
        {"timestamp": 4500, "input_length": 1024, "output_length": 7, "hash_ids": [0, 1]},
        {"timestamp": 3200, "input_length": 100, "output_length": 1, "hash_ids": [9]},
    ]
    path = tmp_path / "conversation.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_a_mooncake_trace_is_read_in_the_order_of_its_times_with_its_whole_blocks(mooncake: Path) -> None:
    """Milliseconds become seconds from the first request; a block that is not full is nobody's to share."""
    trace = read_trace(mooncake)
    assert trace == RequestTrace(
        name="conversation",
        block_tokens=512,
        requests=(
            TracedRequest(at_s=0.0, prompt_tokens=1500, output_tokens=20, blocks=(spread(0), spread(1))),
            TracedRequest(at_s=pytest.approx(0.2), prompt_tokens=100, output_tokens=1),  # type: ignore[arg-type]
            TracedRequest(at_s=1.5, prompt_tokens=1024, output_tokens=7, blocks=(spread(0), spread(1))),
        ),
    )
    assert trace.shared_share == pytest.approx(1024 / 2624)
    assert len(read_trace(mooncake, limit=2).requests) == 2


def test_ids_that_say_what_a_block_holds_become_prefixes(tmp_path: Path) -> None:
    """The same block after another one is not the same in a cache; equal beginnings still are."""
    rows = [
        {"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": ids} for ids in ([1, 7], [2, 7], [1, 7])
    ]
    path = tmp_path / "blocks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    one, two, three = (request.blocks for request in read_trace(path).requests)
    assert one == three
    assert not {*one} & {*two}


def test_an_azure_trace_shares_nothing(tmp_path: Path) -> None:
    """Its times have seven digits after the point."""
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    first, second = read_trace(path).requests
    assert (first.at_s, first.prompt_tokens, first.output_tokens, first.blocks) == (0.0, 374, 44, ())
    assert second.at_s == pytest.approx(4.314579)


_MOONCAKE = (
    '{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}\n'
    '{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2], %s}\n'
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"hash_ids": [], "timestamp": 0, "input_length": 5}',
            ":1: is no line of a Mooncake trace: it has no 'output_",
        ),
        ('{"hash_ids": [1], "timestamp": 0, "input_length": "x", "output_length": 1}', ":1: is no line of a Mooncake"),
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,374", ":1: has no column GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2", ":2: is no line of an Azure trace"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
        ("hello", "is no trace that is known"),
        ("", "is empty, or begins with nothing but white space; name a file"),
        (
            _MOONCAKE % '"timestamp": -5',
            ":2: is no line of a Mooncake trace: timestamp is -5; give a number that is not",
        ),
        (_MOONCAKE % '"timestamp": "nan"', ":2: is no line of a Mooncake trace: timestamp is 'nan'; give a number"),
        (_MOONCAKE % '"timestamp": NaN', ":2: is no line of a Mooncake trace: unexpected character"),
        (_MOONCAKE % '"timestamp": 1e300', "days; give all its times from one beginning and in one unit"),
        (
            _MOONCAKE % '"input_length": "1024"',
            ":2: is no line of a Mooncake trace: input_length is '1024'; give a whole",
        ),
        (
            _MOONCAKE % '"input_length": 0',
            "input_length is 0; give a whole number of tokens, at least 1 and at most 100,",
        ),
        (
            _MOONCAKE % '"output_length": 1e15',
            "output_length is 1000000000000000; give a whole number of tokens, at leas",
        ),
        (
            _MOONCAKE % '"output_length": true',
            "output_length is True; give a whole number of tokens, at least 0 and at",
        ),
        (
            _MOONCAKE % '"input_length": 5000',
            (
                ":2: is no line of a Mooncake trace: it has 2 hash_ids for a prompt of 5000 tokens, which has 9 whole blocks of"
                " 512; give an id for each, and one more for an end that is no whole block, or none at all"
            ),
        ),
        (_MOONCAKE % '"hash_ids": [1, 2, 3, 4]', "it has 4 hash_ids for a prompt of 1024 tokens, which has 2 whole"),
        (_MOONCAKE % '"hash_ids": ["a", "b"]', "hash_ids is no list of whole numbers; give one for each block, or an"),
        (_MOONCAKE % '"x": [}', ":2: is no line of a Mooncake trace: "),
        (
            '{"hash_ids": []}'[:-1] + ', "timestamp": 0, "input_length": 1, "output_length": 1}\n[1]',
            ":2: is no line of a",
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,-1,2", ":2: is no line of an Azure trace: Cont"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46",
            ":2: is no line of an Azure trace: ContextTok",
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46," + "1" * 200_000, ":2: is no line of CSV: fie"),
        ('{"v": 1, "broken": true}\n', ":1: is no recorded request"),
    ],
)
def test_what_is_no_trace_is_told_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    """File and line."""
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(TraceError, match="trace") as caught:
        read_trace(path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b"x"), "is packed (gzip); unpack it first, with gunzip"),
        ('{"hash_ids": []}'.encode("utf-16"), "is written in UTF-16; save it as UTF-8"),
        (b'{"hash_ids": [], "x": "\xff"}\n', ":1: is no line of a Mooncake trace: "),
        (
            b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,\xff,1",
            ":2: is no line of an Azure trace: Con",
        ),
        (b'{"hash_ids": []}\n{"x": "' + b"a" * (17 << 20) + b'"}', ":2: is longer than 16 MiB; no request is so long"),
    ],
)
def test_what_is_no_text_is_told_too(tmp_path: Path, content: bytes, words: str) -> None:
    """What it is, or the line that cannot be read."""
    path = tmp_path / "trace"
    path.write_bytes(content.replace(b'{"hash_ids": []}\n', (_MOONCAKE % '"x": 1').splitlines()[0].encode() + b"\n"))
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}")
    assert words in str(caught.value)


def test_a_byte_order_mark_and_empty_lines_are_no_hindrance(tmp_path: Path) -> None:
    """As editors leave them."""
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (_MOONCAKE % '"x": 1').replace("\n", "\n\n").encode())
    assert len(read_trace(path).requests) == 2
    path.write_bytes(b"\n\n" + (_MOONCAKE % '"x": 1').encode())
    assert len(read_trace(path).requests) == 2


async def _serve(
    folder: Path, store: TraceStore | None = None, *, content: bool = False, reply: FakeReply = _OPENS
) -> None:
    """A conversation of two turns through a live router, recorded."""
    stages = [StageConfig(use=use) for use in ("classify.prompt", "select.static", "execute.fallback")]
    record = StageConfig(use="observe.record", options={"content": content})
    config = FleetConfig(models=(MODEL,), pipeline=(*stages, record))
    clock = FrozenClock()
    adapter = FakeAdapter(model_id="m", script=reply, time=clock)
    router = Router(config, table=TABLE, clock=clock, adapters={MODEL.id: adapter}, polls=False, state_dir=folder)
    if store is not None:
        router.add_sink(store)
    messages = [{"role": "user", "content": "Open sesame " * 100}]
    async with router:
        for _ in range(2):
            body = {"model": "auto", "messages": list(messages)}
            with contextlib.suppress(RouteError):
                await router.dispatch(RouteRequest(body=body, tenant="t", session="s"))
            messages += [{"role": "assistant", "content": "It opens " * 50}, {"role": "user", "content": "Again"}]
            clock.advance(5.0)
        await router.settled()


async def test_recorded_requests_give_sizes_times_and_the_think_time_of_their_session(tmp_path: Path) -> None:
    """Without content nothing is known of what prompts share."""
    await _serve(tmp_path)
    first, second = read_trace(tmp_path / "requests.jsonl").requests
    assert (first.at_s, second.at_s, first.think_s, second.think_s) == pytest.approx((0.0, 7.0, None, 5.0))
    assert (first.tenant, first.session != "", first.blocks) == ("t", True, ())
    assert second.prompt_tokens > first.prompt_tokens > 100


async def test_with_content_a_turn_shares_the_turn_before_it_and_its_answer(tmp_path: Path) -> None:
    """The blocks of an answer are those that the next prompt has in its place."""
    await _serve(tmp_path, content=True)
    first, second = read_trace(tmp_path / "requests.jsonl").requests
    known = (*first.blocks, *first.answer_blocks)
    assert len(first.blocks) == first.prompt_tokens // 16
    assert len(first.answer_blocks) > 5
    assert second.blocks[: len(known)] == known


async def test_the_trace_store_gives_sizes_times_and_tenants(tmp_path: Path) -> None:
    """Of requests that a backend answered."""
    store = TraceStore(tmp_path / "traces.sqlite", clock=FrozenClock())
    store.open()
    await _serve(tmp_path, store)
    store.close()
    first, second = read_trace(tmp_path / "traces.sqlite").requests
    assert (first.at_s, second.at_s, first.tenant, first.blocks) == (0.0, pytest.approx(7.0), "t", ())
    assert second.prompt_tokens > first.prompt_tokens > 100
    assert first.output_tokens > 5


def test_every_format_can_be_replayed(mooncake: Path) -> None:
    """What was read is answered."""
    result = replayed(read_trace(mooncake), fleet(2)).run()
    assert [one.error for one in result.served] == ["", "", ""]


def test_blocks_that_do_not_fit_their_prompt_are_refused() -> None:
    """Every whole block, or none."""
    wrong = TracedRequest(at_s=0.0, prompt_tokens=100, output_tokens=1, blocks=(1, 2, 3))
    with pytest.raises(TraceError, match=r"request 0 of the trace t has 3 blocks of 64 tokens for a prompt of 100"):
        RequestTrace.of("t", 64, [wrong])


async def _serve_and_store(folder: Path, reply: FakeReply) -> None:
    store = TraceStore(folder / "traces.sqlite", clock=FrozenClock())
    store.open()
    await _serve(folder, store, reply=reply)
    store.close()


async def test_requests_that_nobody_answered_are_left_out_and_counted(tmp_path: Path) -> None:
    """Of recorded ones and of stored ones; where there are no others, that is an error which says so."""
    await _serve_and_store(tmp_path, FakeReply(fail=Fault.BAD_REQUEST))
    for name in ("requests.jsonl", "traces.sqlite"):
        with pytest.raises(TraceError, match=f"{name} holds no request that was answered"):
            read_trace(tmp_path / name)
    await _serve_and_store(tmp_path, _OPENS)
    for name in ("requests.jsonl", "traces.sqlite"):
        trace = read_trace(tmp_path / name)
        assert (len(trace.requests), trace.passed_over) == (2, 2)
    assert read_trace(tmp_path / "requests.jsonl", limit=1).passed_over == 2
