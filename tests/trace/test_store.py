"""The local store: bounded, private, off the hot path, and readable while it is written."""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvfleet.clock import FrozenClock
from kvfleet.config.schema import TraceStoreConfig
from kvfleet.errors import ConfigError, TraceError
from kvfleet.trace import names
from kvfleet.trace.reader import TraceReader
from kvfleet.trace.rows import default_path, pack, unpack
from kvfleet.trace.segments import Packer, unpack_segment
from kvfleet.trace.spans import Shape, Span, SpanKind, Status, Step, Trace
from kvfleet.trace.store import TraceStore
from tests.trace.building import START_NS, fallback, nobody, page, stage, traces


def numbered(number: int, *, bulk: int = 0, start_ns: int = START_NS) -> Trace:
    """A trace of its own identifiers, with so many bytes that do not compress."""
    trace = page()
    trace.trace_id, trace.route.span_id = f"{number:08x}" + "ee" * 12, f"{number:016x}"
    trace.route.attributes[names.REQUEST_ID] = f"req-{number}"
    trace.route.start_ns, trace.route.end_ns = start_ns, start_ns + 1000
    if bulk:
        trace.route.attributes[names.TENANT] = secrets.token_hex(bulk)
    return trace


def young() -> FrozenClock:
    """A clock a moment after the traces were made."""
    return FrozenClock(epoch_ns=START_NS + 10**9)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TraceStore]:
    """A store that is open."""
    store = TraceStore(tmp_path / "state" / "traces.sqlite", clock=young())
    store.open()
    yield store
    store.close()


def size_of(path: Path) -> int:
    """What the store takes on disk, its log included."""
    return sum(one.stat().st_size for one in path.parent.glob(path.name + "*"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(traces())
def test_packing_loses_nothing(trace: Trace) -> None:
    """A packed trace unpacks to the same trace, infinities and all."""
    assert unpack(pack(trace)) == trace


def stepped(trace: Trace) -> Trace:
    """The same trace as an engine records it: stages as steps that share their shapes."""
    shapes: dict[tuple[str, ...], Shape] = {}
    records: list[Span | Step] = [trace.route]
    for span in trace.stages:
        attributes = dict(span.attributes)
        if span.status is not Status.UNSET or span.kind is not SpanKind.INTERNAL or span.span_id or span.message:
            records.append(span)
            continue
        is_about = isinstance(attributes.get(names.SCORED), tuple)
        about = attributes.pop(names.SCORED) if is_about else None
        key = (span.name, *attributes, str(about is None))
        shape = shapes.setdefault(
            key, Shape(span.name, {}, tuple(attributes), names.SCORED if about is not None else "")
        )
        records.append(Step(shape, tuple(attributes.values()), about or (), span.start_ns, span.end_ns))
    return Trace(trace.trace_id, records, trace.parent_span_id)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(traces(), min_size=1, max_size=4))
def test_a_segment_loses_nothing(several: list[Trace]) -> None:
    """Traces that are packed together come out the same, whether their stages were spans or steps."""
    packer = Packer()
    for trace in several:
        packer.add(trace, 10**9)
        packer.add(stepped(trace), 10**9)
    found = list(unpack_segment(packer.done()))
    assert found == [trace for trace in several for _ in range(2)]


def test_looking_makes_spans_of_steps() -> None:
    """A step reads as the span it stands for, and stays one once somebody has looked."""
    trace = stepped(fallback())
    assert any(isinstance(record, Step) for record in trace.records)
    assert trace == fallback()
    assert all(isinstance(record, Span) for record in trace.records)


def test_what_is_written_can_be_read(store: TraceStore) -> None:
    """A reader sees what was flushed while the store is still open, whole and newest first."""
    for trace in (page(), fallback(), nobody()):
        store.write(trace)
    assert store.flush()
    with TraceReader(store.path) as reader:
        rows = reader.list()
        assert [row.outcome for row in rows] == ["no_candidates", "answered", "answered"]
        assert reader.get("last") == nobody()
        assert reader.get("9d02") == nobody()
    answered = rows[1]
    assert attrs.asdict(answered) == {
        "id": 2,
        "trace_id": "4f1c9a2b" + "0" * 24,
        "span_id": "ab" * 8,
        "request_id": "req-1",
        "start_ns": START_NS,
        "duration_ms": 10_402.5,
        "ttfb_s": 10.0524,
        "operation": "chat",
        "is_stream": True,
        "tenant": "team-ml",
        "outcome": "answered",
        "error": "",
        "status": None,
        "strategy": "hybrid_score",
        "selected": "llama-3-70b",
        "served_by": "llama-3-8b",
        "attempts": 2,
        "prompt_tokens": 312,
        "completion_tokens": 64,
        "cached_tokens": 256,
        "cost_usd": 0.00031,
    }


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({}, [3, 2, 1]),
        ({"limit": 2}, [3, 2]),
        ({"model": "llama-3-70b"}, [2]),
        ({"model": "llama-3-8b"}, [2, 1]),
        ({"outcome": "no_candidates"}, [3]),
        ({"tenant": "team-ml"}, [2]),
        ({"status": 503}, [3]),
        ({"since_ns": START_NS + 1}, []),
        ({"model": "llama-3-8b", "tenant": "team-ml"}, [2]),
    ],
)
def test_filters(store: TraceStore, filters: dict[str, object], found: list[int]) -> None:
    """Each filter of the list narrows it, and they add up."""
    for trace in (page(), fallback(), nobody()):
        store.write(trace)
    store.flush()
    with TraceReader(store.path) as reader:
        assert [row.id for row in reader.list(**filters)] == found


@pytest.mark.parametrize("is_at_once", [True, False])
def test_a_span_that_comes_late(store: TraceStore, is_at_once: bool) -> None:
    """It is in the trace that is read, once; nothing is listed twice, and other routes stay as they were."""
    graded, other = page(), page()
    other.route.span_id = "cd" * 8
    for trace in (graded, other):
        store.write(trace)
    if not is_at_once:
        store.flush()
    graded.records.append(stage("observe", "judge", 10, 5, GRADE=0.5))
    store.amend(graded, graded.spans[-1])
    assert store.flush()
    with TraceReader(store.path) as reader:
        assert [row.span_id for row in reader.list()] == [other.route.span_id, graded.route.span_id]
        assert reader.get(graded.route.span_id) == graded
        assert reader.get("last") == other


def test_late_spans_go_with_their_traces(tmp_path: Path) -> None:
    """The file holds its size with them, too, and none outlives its trace for long."""
    path = tmp_path / "traces.sqlite"
    store = TraceStore(path, max_bytes=1_000_000, clock=young())
    store.open()
    for number in range(600):
        trace = numbered(number, bulk=1000)
        store.write(trace)
        store.amend(trace, stage("observe", "judge", 10, 5, GRADE_REASON="because " * 20))
        if number % 50 == 49:
            store.flush()
    store.close()
    assert store.dropped == 0
    assert size_of(path) <= 1_000_000
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (traces_,) = connection.execute("SELECT sum(count) FROM segments").fetchone()
        (late,) = connection.execute("SELECT count(*) FROM late").fetchone()
    assert 50 <= traces_ < 400
    assert late <= traces_ + 256


def test_an_ambiguous_beginning(store: TraceStore) -> None:
    """A beginning that fits several is an error that lists them; an exact identifier is not ambiguous."""
    store.write(numbered(1))
    store.write(numbered(10))
    store.flush()
    with TraceReader(store.path) as reader:
        assert reader.get("req-1") == numbered(1)
        assert reader.get("00000001") == numbered(1)
        with pytest.raises(
            TraceError,
            match=r"^'0000' is the beginning of several: trace 00000001eeee, span 0{15}1, request req-1, 2026-05-28 20:26:40 UTC; trace 0000000aeeee",
        ):
            reader.get("0000")


def test_routes_of_one_distributed_trace(store: TraceStore) -> None:
    """Two routes of one caller's trace are told apart by their spans' identifiers."""
    first, second = numbered(1), numbered(2)
    second.trace_id = first.trace_id
    store.write(first)
    store.write(second)
    store.flush()
    with TraceReader(store.path) as reader:
        with pytest.raises(TraceError, match="several"):
            reader.get(first.trace_id)
        assert reader.get(second.route.span_id) == second


def test_an_unknown_identifier(store: TraceStore) -> None:
    """An unknown identifier names the command that shows the known ones; nothing is matched by pattern."""
    store.write(page())
    store.flush()
    with TraceReader(store.path) as reader:
        for reference in ("zzz", "%", "*", ""):
            with pytest.raises(TraceError, match="`kvfleet trace list` shows what is there"):
                reader.get(reference)


def test_following(store: TraceStore) -> None:
    """A follower gets what came after the number it has, the oldest first."""
    for number in range(1, 5):
        store.write(numbered(number))
    store.flush()
    with TraceReader(store.path) as reader:
        assert [row.request_id for row in reader.since(2)] == ["req-3", "req-4"]
        store.write(numbered(5))
        store.flush()
        assert [row.request_id for row in reader.since(4)] == ["req-5"]


def test_the_size_is_held(tmp_path: Path) -> None:
    """However much is written, file and log stay within the limit; the oldest go, and the newest are there."""
    store = TraceStore(tmp_path / "traces.sqlite", max_bytes=2_000_000, clock=young())
    store.open()
    largest = 0
    for number in range(1500):
        store.write(numbered(number, bulk=1000 if number % 10 else 20_000))
        if number % 100 == 99:
            assert store.flush(30)
            largest = max(largest, size_of(store.path))
    assert 1_000_000 < largest <= 2_000_000
    assert store.dropped == 0
    with TraceReader(store.path) as reader:
        rows = reader.list(10_000)
    assert [row.request_id for row in rows] == [f"req-{n}" for n in range(1499, 1499 - len(rows), -1)]
    assert len(rows) > 100
    store.close()
    assert size_of(store.path) <= 2_000_000


def test_a_smaller_limit(tmp_path: Path) -> None:
    """A store opened with a smaller limit than it has shrinks to it, and keeps the newest."""
    path = tmp_path / "traces.sqlite"
    store = TraceStore(path, max_bytes=8_000_000, clock=young())
    store.open()
    for number in range(1000):
        store.write(numbered(number, bulk=2000))
    assert store.flush(30)
    store.close()
    before = size_of(path)
    store = TraceStore(path, max_bytes=1_000_000, clock=young())
    store.open()
    store.close()
    assert size_of(path) <= 1_000_000 < before
    with TraceReader(path) as reader:
        assert reader.get("last").route.attributes[names.REQUEST_ID] == "req-999"


def test_the_age_is_held(tmp_path: Path) -> None:
    """What is older than the limit goes, at opening and, when others come, while running."""
    clock = young()
    store = TraceStore(tmp_path / "traces.sqlite", max_age_s=3600, clock=clock)
    store.open()
    for number in range(600):
        store.write(numbered(number))
    store.flush()
    clock.advance(3700)
    store.write(numbered(600, start_ns=clock.time_ns()))
    store.flush()
    store.write(numbered(601, start_ns=clock.time_ns()))
    store.flush()
    store.close()
    with TraceReader(store.path) as reader:
        assert [row.request_id for row in reader.list(9999)] == ["req-601", "req-600"]
    clock.advance(3700)
    store = TraceStore(store.path, max_age_s=3600, clock=clock)
    store.open()
    store.close()
    with TraceReader(store.path) as reader:
        assert reader.list() == ()
        with pytest.raises(TraceError, match="is empty"):
            reader.get("last")


def test_a_full_queue(tmp_path: Path) -> None:
    """Beyond the queue's length traces are counted as dropped, and nothing raises or waits."""
    store = TraceStore(tmp_path / "traces.sqlite")
    store.write(page())
    assert store.dropped == 1  # not open
    store.open()
    trace = page()
    for _ in range(20_000):
        store.write(trace)
    dropped = store.dropped
    assert dropped > 10_000
    assert store.flush(30)
    store.close()
    with TraceReader(store.path) as reader:
        assert len(reader.list(30_000)) == 20_001 - dropped


def test_a_record_that_cannot_be_kept(store: TraceStore) -> None:
    """A trace too large for the store, or that is no record, is counted; the ones around it are kept."""
    store.write(numbered(1))
    store.write(numbered(2, bulk=5_000_000))
    store.write("not a trace")
    strange = numbered(3)
    strange.route.attributes[names.TENANT] = "half a pair \ud800"
    strange.stages[-1].attributes[names.GEN_AI_INPUT_TOKENS] = 10**30
    store.write(strange)
    store.write(numbered(4))
    store.flush()
    with TraceReader(store.path) as reader:
        assert [row.request_id for row in reader.list()] == ["req-4", "req-3", "req-1"]
        assert reader.get("req-3") == strange
    assert store.dropped == 2


def test_closing_writes_what_waits(tmp_path: Path) -> None:
    """Closing loses nothing that was handed over; twice is safe; after it, traces are counted as dropped."""
    store = TraceStore(tmp_path / "traces.sqlite", clock=young())
    store.open()
    for number in range(50):
        store.write(numbered(number))
    store.close()
    store.close()
    store.write(page())
    assert store.dropped == 1
    with TraceReader(store.path) as reader:
        assert len(reader.list(100)) == 50


def test_opening_again(tmp_path: Path) -> None:
    """A store that was closed can be opened again, and goes on where it was."""
    store = TraceStore(tmp_path / "traces.sqlite", clock=young())
    for number in range(3):
        store.open()
        store.open()
        store.write(numbered(number))
        assert store.flush()
        store.close()
    with TraceReader(store.path) as reader:
        assert [row.id for row in reader.list()] == [3, 2, 1]


async def test_closing_from_a_loop(tmp_path: Path) -> None:
    """A store closes from an event loop too, twice."""
    store = TraceStore(tmp_path / "traces.sqlite", clock=young())
    store.open()
    store.write(page())
    await store.aclose()
    await store.aclose()
    with TraceReader(store.path) as reader:
        assert len(reader.list()) == 1


def test_only_the_owner_may_read(store: TraceStore) -> None:
    """The file and its log are readable by their owner alone, and so is a directory made for them."""
    store.write(page())
    store.flush()
    for path in store.path.parent.glob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700


def test_two_gateways_on_one_store(store: TraceStore) -> None:
    """Two writers of one file do not lose each other's traces."""
    other = TraceStore(store.path, clock=young())
    other.open()
    for number in range(100):
        (store if number % 2 else other).write(numbered(number))
    assert store.flush()
    assert other.flush()
    other.close()
    with TraceReader(store.path) as reader:
        assert len(reader.list(1000)) == 100


def test_no_store_yet(tmp_path: Path) -> None:
    """Without a store the error says what makes one."""
    with pytest.raises(
        TraceError,
        match=r"there is no trace store at .*; `kvfleet run` keeps traces by default: send it a request first",
    ):
        TraceReader(tmp_path / "traces.sqlite")


def test_another_programs_file(tmp_path: Path) -> None:
    """Neither reader nor writer touches a file that is not a store."""
    text, database = tmp_path / "notes.txt", tmp_path / "other.sqlite"
    text.write_text("not a database, but long enough to be taken for one" * 20)
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    for path in (text, database):
        before = path.read_bytes()
        with pytest.raises(TraceError, match=r"not a trace store|cannot be used"):
            TraceReader(path)
        with pytest.raises(TraceError, match=r"not a trace store|cannot be used"):
            TraceStore(path).open()
        assert path.read_bytes() == before


def test_a_newer_version(store: TraceStore) -> None:
    """A store of another version is refused with what to do."""
    store.close()
    connection = sqlite3.connect(store.path)
    connection.execute("PRAGMA user_version = 4")
    connection.close()
    with pytest.raises(
        TraceError, match="has version 4, and this kvfleet reads version 3; use the kvfleet that wrote it"
    ):
        TraceReader(store.path)
    with pytest.raises(TraceError, match="has version 4"):
        TraceStore(store.path).open()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    """An unusable place is an error at opening that says how to go on without."""
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match=r"cannot be used: .*; name another file, or turn telemetry.trace_store off"):
        TraceStore(tmp_path / "file" / "traces.sqlite").open()


def test_the_usual_place() -> None:
    """The store lies in the state directory; a relative one is ignored, as the specification says."""
    assert default_path({"XDG_STATE_HOME": "/s"}) == Path("/s/kvfleet/traces.sqlite")
    assert default_path({"HOME": "/h"}) == Path("/h/.local/state/kvfleet/traces.sqlite")
    assert default_path({"XDG_STATE_HOME": "here", "HOME": "/h"}) == Path("/h/.local/state/kvfleet/traces.sqlite")


def test_from_the_configuration() -> None:
    """The section's megabytes and days become the store's bytes and seconds; too small a limit is a finding."""
    store = TraceStore.from_config(TraceStoreConfig(path="/x/y.sqlite", max_megabytes=2, max_age_days=0.5), {})
    assert (store.path, store.max_bytes, store.max_age_s) == (Path("/x/y.sqlite"), 2_000_000, 43_200)
    with pytest.raises(ConfigError, match=r"^telemetry\.trace_store\.max_megabytes: must be at least 1; not 0\.5$"):
        TraceStore.from_config(TraceStoreConfig(max_megabytes=0.5), {})
