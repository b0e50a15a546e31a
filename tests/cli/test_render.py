"""How findings, tables and fields look, on a terminal and elsewhere."""

from __future__ import annotations

import click
import pytest

from kvfleet.cli import render
from kvfleet.config.findings import Finding

FINDING = Finding("no adapter is called 'vlm'", "did you mean vllm?", ("models", 0, "provider"), "f.yaml", 3, 9, "type")


def test_a_coloured_finding_reads_like_a_plain_one() -> None:
    """Colours are all that a terminal adds."""
    assert click.unstyle(render.finding_line(FINDING)) == str(FINDING)
    bare = Finding("no such file", file="f.yaml")
    assert click.unstyle(render.finding_line(bare)) == str(bare) == "f.yaml: no such file"


def test_a_finding_as_an_annotation_is_escaped() -> None:
    """GitHub's own characters do not break the line."""
    finding = Finding("50% of\nit: wrong", path=("a",), file="a,b:c.yaml", line=2, column=1, code="range")
    assert render.github_line(finding) == (
        "::error file=a%2Cb%3Ac.yaml,line=2,col=1,title=kvfleet range::a: 50%25 of%0Ait: wrong"
    )


def test_an_annotation_without_a_place_has_none() -> None:
    """A finding about the environment has no line."""
    assert render.github_line(Finding("x", file="<environment>")) == (
        "::error file=<environment>,title=kvfleet invalid::x"
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({}, None), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, None), ({"FORCE_COLOR": "1"}, True)],
)
def test_no_color_is_obeyed(environ: dict[str, str], expected: bool | None) -> None:
    """NO_COLOR counts if it is not empty, and wins."""
    assert render.choose_colour(environ) is expected


def test_a_table_is_aligned_by_what_is_seen() -> None:
    """Colour codes take no room."""
    made = click.unstyle(render.table(["a", "bb"], [[render.good("up"), "x"], ["down", "y"]]))
    assert made == "A     BB\nup    x\ndown  y"


def test_the_last_column_is_wrapped_below_itself() -> None:
    """Nothing is lost on a narrow terminal."""
    made = click.unstyle(render.table(["k", "what"], [["a", "one two three four five six"]], columns=24))
    assert made == "K  WHAT\na  one two three four\n   five six"


def test_a_table_keeps_some_room_on_the_narrowest_terminal() -> None:
    """The last column never shrinks to nothing."""
    made = render.table(["key", "what"], [["k" * 30, "some words to wrap here"]], columns=10)
    assert [len(line) for line in made.splitlines()[1:]] == [30 + 2 + 18, 30 + 2 + 4]


def test_fields_leave_out_what_is_empty() -> None:
    """Values stand below each other."""
    made = click.unstyle(render.fields([("a", "1"), ("long", ""), ("bc", "2")]))
    assert made == "  a   1\n  bc  2"
