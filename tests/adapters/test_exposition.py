"""Reading a few figures out of a Prometheus page."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvfleet.adapters.exposition import Rate, Reader, totals

SAMPLES = Path(__file__).with_name("samples")


@pytest.mark.parametrize("name", ["vllm", "sglang", "llamacpp"])
def test_agrees_with_the_reference_parser(name: str) -> None:
    """Every line of a recorded page is read as prometheus-client reads it."""
    page = (SAMPLES / f"{name}_metrics.txt").read_text()
    expected: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if f"\n{sample.name}" in page:  # that parser gives every counter a `_total`, llama.cpp does not
                expected.setdefault(sample.name, []).append((dict(sample.labels), float(sample.value)))
    assert len(expected) > 10
    found = Reader(expected).read(page.encode())
    got = {key: [(dict(s.labels), s.value) for s in found.all(key)] for key in expected}
    assert repr(got) == repr(expected)  # NaN is not equal to itself


@given(st.lists(st.tuples(st.text(max_size=12), st.floats()), min_size=1, max_size=4, unique_by=lambda pair: pair[0]))
def test_any_label_value(rows: list[tuple[str, float]]) -> None:
    """Braces, quotes, line feeds and spaces in label values do not confuse it."""
    registry = CollectorRegistry()
    gauge = Gauge("x_now", "Help with x_now 5", ["a"], registry=registry)
    for label, value in rows:
        gauge.labels(label).set(value)
    found = Reader(["x_now"]).read(generate_latest(registry)).all("x_now")
    assert [repr(sample.value) for sample in found] == [repr(value) for _, value in rows]


def test_names_must_match_in_full() -> None:
    """A longer name, a help text and a comment are other lines; a missing name is unknown, not zero."""
    page = b"# HELP up up 3\nup_total 7\nupper 8\nup 1\n"
    found = Reader(["up", "down"]).read(page)
    assert (found.total("up"), found.total("down"), found.total("down", "up"), found.first("down")) == (
        1.0,
        None,
        1.0,
        None,
    )


def test_sums_and_means_leave_nan_out() -> None:
    """A gauge that was never set says nothing."""
    found = Reader(["a"]).read(b'a{e="0"} 1\na{e="1"} 4\na{e="2"} NaN\na{e="3"} broken\n')
    assert (found.total("a"), found.mean("a"), found.count("a")) == (5.0, 2.5, 5)
    only_nan = Reader(["a"]).read(b"a NaN\n")
    assert (only_nan.total("a"), only_nan.mean("a"), only_nan.count("a")) == (None, None, None)


def test_what_cannot_be_a_count_is_left_out() -> None:
    """Less than nothing, and more than anybody has: an engine that reports it is one whose load is not known."""
    found = Reader(["a"]).read(b"a -5\na +Inf\na 1e308\na 3\n")
    assert (found.total("a"), found.mean("a"), found.count("a")) == (3.0, 3.0, 3)
    assert Reader(["a"]).read(b"a 1e308\n").count("a") is None
    assert totals(b"v:a -Inf\nv:b 2\n", "v:") == {"v:b": 2.0}


def test_only_some_ranks() -> None:
    """Ranks that repeat one engine's figures are left out; lines without the label stay."""
    page = b'a{tp_rank="0",dp_rank="0"} 1\na{tp_rank="1",dp_rank="0"} 1\na{tp_rank="0",dp_rank="1"} 2\na 4\na{tp_rank="00"} 8\n'
    assert Reader(["a"], only={"tp_rank": "0"}).read(page).total("a") == 7.0


def test_totals() -> None:
    """All metrics of a prefix, summed over labels, without buckets and creation times."""
    page = b'v:a{e="0"} 1\nv:a{e="1"} 2\nv:t_bucket{le="1"} 5\nv:t_sum 3\nv:t_created 9\nw:a 7\nv:n NaN\nv:b{x="}"} 4\n'
    assert totals(page, "v:") == {"v:a": 3.0, "v:t_sum": 3.0, "v:b": 4.0}


def test_rate() -> None:
    """Per second between two readings; nothing to say at first, nor after a restart; readings too close are one."""
    rate = Rate()
    assert rate.update(10.0, 1.0) is None
    assert rate.update(20.0, 1.1) is None
    assert rate.update(30.0, 2.0) == 20.0
    assert rate.update(31.0, 2.1) == 20.0
    assert rate.update(None, 3.0) is None
    assert rate.update(30.0, 4.0) == 0.0
    assert rate.update(5.0, 5.0) is None
    assert rate.update(6.0, 6.0) == 1.0
    assert math.isfinite(rate.update(1e300, 7.0) or 0.0)
