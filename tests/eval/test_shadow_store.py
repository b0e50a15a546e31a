"""The store of comparisons: what goes in comes out, bounded, private, and told from other files."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from kvfleet.errors import TraceError
from kvfleet.eval.shadow_store import ShadowRow, ShadowStore, summarise


def row(number: int = 0, **changes: object) -> ShadowRow:
    """A comparison."""
    return ShadowRow(**{"at_s": float(number), "primary": "a", "shadow": "b", "request_id": f"r-{number}", **changes})  # type: ignore[arg-type]


def test_rows_come_back_as_they_went_in_also_after_a_restart(tmp_path: Path) -> None:
    """Every field, in another process's hands."""
    whole = row(
        1, fleet="f", trace_id="t", tenant="x", error="no", primary_ms=1.5, shadow_ms=2.5, primary_usd=0.1, shadow_usd=0.2,
        primary_tokens=3, shadow_tokens=4, similarity=0.5, judgement=0.25, prompt="p", primary_output="o", shadow_output="s",
    )  # fmt: skip
    store = ShadowStore(tmp_path / "sub" / "shadow.sqlite")
    store.add([row(0), whole])
    store.close()
    store.close()
    again = ShadowStore(store.path)
    assert again.last(10) == [whole, row(0)]
    again.close()
    assert store.path.stat().st_mode & 0o777 == 0o600


def test_only_so_many_are_kept(tmp_path: Path) -> None:
    """The oldest go."""
    store = ShadowStore(tmp_path / "s.sqlite", most=3)
    for number in range(10):
        store.add([row(number)])
    assert [one.request_id for one in store.last(99)] == ["r-9", "r-8", "r-7"]
    store.close()


def test_a_text_of_any_kind_and_length_is_taken(tmp_path: Path) -> None:
    """Half a surrogate pair is replaced, and what is too long is cut."""
    store = ShadowStore(tmp_path / "s.sqlite")
    store.add([row(prompt="\ud800" + "x" * 50_000)])
    kept = store.last(1)[0].prompt
    assert kept.startswith("?x")
    assert len(kept) == 20_000
    store.close()


def test_other_files_are_refused(tmp_path: Path) -> None:
    """Another database, no database, and no file at all are told apart from a store."""
    other = tmp_path / "other.sqlite"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE t (x)")
    connection.commit()
    connection.close()
    text = tmp_path / "text"
    text.write_text("no database, but long enough to be taken for a header of one" * 20)
    for path, message in ((other, "is not a store"), (text, "cannot be used"), (tmp_path / "none", "there are no")):
        with pytest.raises(TraceError, match=message):
            ShadowStore(path).last(1)


def test_a_summary_counts_failures_and_measures_answers() -> None:
    """Medians of times and means of the rest, of those that answered, for each pair of models."""
    rows = [
        row(1, primary_ms=10.0, shadow_ms=20.0, shadow_tokens=10, similarity=0.5),
        row(2, primary_ms=30.0, shadow_ms=40.0, shadow_tokens=20, similarity=1.0),
        row(3, primary_ms=99.0, shadow_ms=99.0, error="broke"),
        row(4, shadow="c"),
    ]
    first, second = summarise(rows)
    assert (first.shadow, first.requests, first.failed) == ("b", 3, 1)
    assert (first.primary_ms, first.shadow_ms, first.shadow_tokens, first.similarity) == (10.0, 20.0, 15.0, 0.75)
    assert (second.shadow, second.requests, second.judgement) == ("c", 1, None)
