"""YAML with positions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.config.loader import dump_yaml
from kvfleet.config.yaml import parse_yaml, scalar_value


def test_every_key_and_item_has_its_place() -> None:
    """Lines and columns count from 1; keys stand where they begin, list items where their value does."""
    parsed = parse_yaml("a: 1\nb:\n  - x\n  - {c: [y]}\n", file="f.yaml")
    assert parsed.data == {"a": 1, "b": ["x", {"c": ["y"]}]}
    assert parsed.origin.file == "f.yaml"
    assert parsed.origin.positions == {
        (): (1, 1),
        ("a",): (1, 1),
        ("b",): (2, 1),
        ("b", 0): (3, 5),
        ("b", 1): (4, 5),
        ("b", 1, "c"): (4, 6),
        ("b", 1, "c", 0): (4, 10),
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-7", -7),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 17),
        ("1.50", 1.5),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("on", "on"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("+", "+"),
        ("tRUE", "tRUE"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_plain_scalars_follow_the_core_schema(text: str, value: object) -> None:
    """YAML 1.2's core schema and nothing else: what looks like a date, a time or a yes is text."""
    found = scalar_value(text)
    assert found == value
    assert type(found) is type(value)


def test_quotes_and_the_text_tag_make_text() -> None:
    """Quoted scalars, block scalars and !!str are text, whatever they look like."""
    parsed = parse_yaml("[\"1\", '2', !!str 3, ! 4]\n")
    assert (parsed.data, parsed.findings) == (["1", "2", "3", "4"], ())
    assert parse_yaml("a: |\n  5\n").data == {"a": "5\n"}


def test_all_duplicate_keys_are_told_and_the_first_holds() -> None:
    """Each with its own place, and the line of the one before."""
    parsed = parse_yaml("a: 1\nb: {x: 1, x: 2}\na: {y: 3}\na: 4\n", file="f.yaml")
    assert parsed.data == {"a": 1, "b": {"x": 1}}
    assert [str(finding) for finding in parsed.findings] == [
        "f.yaml:2:11: b.x: duplicate key; it is on line 2 already; remove one of them",
        "f.yaml:3:1: a: duplicate key; it is on line 1 already; remove one of them",
        "f.yaml:4:1: a: duplicate key; it is on line 1 already; remove one of them",
    ]


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (
            "a: b: c",
            "f:1:5: not valid YAML: mapping values are not allowed here; check the indentation, the quotes and the brackets here",
        ),
        (
            "a: [1",
            "f:1:6: not valid YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'; check the indentation, the quotes and the brackets here",
        ),
        (
            "a:\n\t- x",
            "f:2:1: not valid YAML: while scanning for the next token found character '\\t' that cannot start any token; indent with spaces",
        ),
        (
            "a: 1\nb: \x07",
            "f:2:4: not valid YAML: the character 0x0007 is not allowed; check the indentation, the quotes and the brackets here",
        ),
        ("a: 1\n---\nb: 2\n", "f:2:1: a second document begins; keep one document in a file"),
        ("a: " + "[" * 70 + "]" * 70, "f:1:67: nested deeper than 64 levels; make it flatter"),
    ],
)
def test_what_cannot_be_parsed_is_one_finding(text: str, finding: str) -> None:
    """With the place where it went wrong; there is no data then."""
    parsed = parse_yaml(text, file="f")
    assert (parsed.is_yaml, parsed.data, [str(one) for one in parsed.findings]) == (False, None, [finding])


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("1: a", 'f:1:1: 1: a key must be text; quote it: "1"'),
        ("true: a", 'f:1:1: true: a key must be text; quote it: "true"'),
        ("[a, b]: c", "f:1:1: a key must be text, not a list or mapping; write a plain key"),
        ("? {a: 1}\n: c", "f:1:3: a key must be text, not a list or mapping; write a plain key"),
        ("a: !env X", "f:1:4: a: the tag !env is not supported; remove it"),
        ("a: !!set {b}", "f:1:4: a: the tag !!set is not supported; remove it"),
        (
            "a: *x",
            "f:1:4: a: no anchor is called &x here; an alias must follow the anchor it names, and not stand inside it",
        ),
        (
            "a: &x [*x]",
            "f:1:8: a[0]: no anchor is called &x here; an alias must follow the anchor it names, and not stand inside it",
        ),
        ("a: &x 1\n*x : 2", "f:2:1: a key must be text, not an alias; write the key itself"),
        ("<<: 5", "f:1:5: <<: `<<` merges mappings only; name the anchor of a mapping"),
    ],
)
def test_what_a_fleet_file_does_not_use_is_a_finding(text: str, finding: str) -> None:
    """Odd keys, tags and wrong aliases; the rest of the file is still read."""
    parsed = parse_yaml(text, file="f")
    assert parsed.is_yaml
    assert [str(one) for one in parsed.findings] == [finding]


def test_aliases_and_merges_keep_the_place_of_what_they_repeat() -> None:
    """A finding about a repeated value points to where it is written; written keys win over merged ones."""
    parsed = parse_yaml("base: &b\n  x: 1\n  l: [2]\na:\n  <<: *b\n  x: 3\nc: *b\n")
    assert parsed.findings == ()
    assert parsed.data == {"base": {"x": 1, "l": [2]}, "a": {"x": 3, "l": [2]}, "c": {"x": 1, "l": [2]}}
    at = parsed.origin.positions
    assert (at["a", "x"], at["a", "l"], at["a", "l", 0]) == ((6, 3), (3, 3), (3, 7))
    assert (at["c",], at["c", "x"]) == ((7, 1), (2, 3))


def test_of_several_merged_mappings_the_first_holds() -> None:
    """As YAML's merge key type has it."""
    assert parse_yaml("a: &a {x: 1}\nb: &b {x: 2, y: 3}\nc: {<<: [*a, *b]}\n").data["c"] == {"x": 1, "y": 3}


def test_aliases_cannot_fill_the_memory() -> None:
    """Repeating repetitions ends in a finding, not in gigabytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    parsed = parse_yaml("\n".join(lines), file="f")
    assert [(one.code, one.message) for one in parsed.findings] == [("too-large", "more than 1000000 values")]


def test_empty_texts_and_byte_order_marks_are_read() -> None:
    """A file of comments holds nothing; a mark at the beginning means nothing."""
    assert parse_yaml("# nothing\n").data is None
    assert parse_yaml("\ufeffa: 1\n").data == {"a": 1}


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20)
words = st.sampled_from(
    ["", "yes", "null", "~", "1", "1e3", "0x1", "<<", "-", "? a", "a: b", "#", "1_0", ".inf", "Null"]
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts | words, inner, max_size=4),
    max_leaves=12,
)


@given(plain)
def test_what_is_dumped_is_read_back_as_it_was(data: object) -> None:
    """Types included: no text becomes a number, no number a text."""
    parsed = parse_yaml(dump_yaml(data))
    assert parsed.findings == ()
    assert repr(parsed.data) == repr(data)
