"""JSON of a schema: schema and answer both come from outside."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kvfleet.eval.schema_check import SchemaCheck, wanted_schema

pytest.importorskip("jsonschema")

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer", "minimum": 0}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture
def check() -> SchemaCheck:
    """A check."""
    return SchemaCheck()


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('{"city": "Paris"}', True),
        ('{"city": "Paris", "people": 2102650}', True),
        ('{"people": 1}', False),
        ('{"city": 3}', False),
        ('{"city": "Paris", "mayor": "x"}', False),
        ('```json\n{"city": "Paris"}\n```', False),
        ("Paris", False),
        ("", False),
    ],
)
def test_an_answer_fits_or_does_not(check: SchemaCheck, text: str, fits: bool) -> None:
    """As the schema says."""
    assert check.fits(text, CITY) is fits


def test_any_json_will_do_where_no_schema_was_given(check: SchemaCheck) -> None:
    """JSON mode."""
    assert check.fits("[1]", True) is True
    assert check.fits("no", True) is False


@pytest.mark.parametrize(
    ("body", "schema"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, True),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": CITY}}}, CITY),
        ({"response_format": {"type": "json_schema"}}, True),
        ({"response_format": "json"}, None),
    ],
)
def test_what_a_request_wants(body: dict[str, Any], schema: Any) -> None:
    """Nothing, any JSON, or a schema."""
    assert wanted_schema(body) == schema


BOMB = {"$defs": {"a0": {"type": "integer"}}, "$ref": "#/$defs/a24"}
for number in range(1, 25):
    part = {"$ref": f"#/$defs/a{number - 1}"}
    BOMB["$defs"][f"a{number}"] = {"allOf": [part, part]}  # type: ignore[index]


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "#/nowhere"},
        {"$ref": "#"},
        {"type": "no such type"},
        BOMB,
        {"minimum": "x"},
    ],
)
def test_a_schema_that_cannot_be_checked(check: SchemaCheck, schema: dict[str, Any]) -> None:
    """Nothing is fetched, nothing runs away, nothing raises: it cannot be told."""
    began = time.process_time()
    assert check.fits("3", schema) is None
    assert time.process_time() - began < 2


def test_a_callers_expressions_are_not_run(check: SchemaCheck) -> None:
    """One that takes for ever is as good as none."""
    began = time.process_time()
    assert check.fits('"' + "a" * 40 + '!"', {"type": "string", "pattern": "^(a+)+$"}) is True
    assert (
        check.fits('{"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!": 1}', {"patternProperties": {"^(a+)+$": {}}}) is True
    )
    assert time.process_time() - began < 2


def test_what_is_too_long_is_not_checked(check: SchemaCheck) -> None:
    """A quarter of a megabyte."""
    assert check.fits('"' + "a" * 300_000 + '"', CITY) is None
