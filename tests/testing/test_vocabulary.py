"""The vocabulary of pipeline tests: documented, and known to editors."""

from __future__ import annotations

import json
import re

import attrs
import pytest

from kvfleet.config.fields import info_of, options_of
from kvfleet.config.jsonschema import schema
from kvfleet.plugin.manager import discover
from kvfleet.testing import vocabulary
from kvfleet.testing.vocabulary import Case

CLASSES = [getattr(vocabulary, name) for name in vocabulary.__all__ if attrs.has(getattr(vocabulary, name))]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_everything_one_can_write_has_a_doc(cls: type) -> None:
    """Each key has a sentence, which editors and the reference show."""
    assert [name for name, a in options_of(cls).items() if not (info := info_of(a)) or not info.doc.endswith(".")] == []


def test_the_schema_of_a_fleet_file_knows_it() -> None:
    """An editor completes `tests:` down to the names of faults and outcomes."""
    made = schema(case=Case)
    assert made["properties"]["tests"]["items"] == {"$ref": "#/$defs/Case"}
    definitions = made["$defs"]
    assert definitions["Case"]["required"] == ["name"]
    assert "connect_timeout" in definitions["BackendGiven"]["properties"]["fail"]["enum"]
    assert definitions["Case"]["properties"]["turns"]["items"] == {"$ref": "#/$defs/Turn"}
    assert schema()["properties"]["tests"]["items"] != {"$ref": "#/$defs/Case"}


def test_the_schema_refers_to_nothing_that_is_not_there() -> None:
    """Every reference in the schema, with all components, has its definition."""
    made = schema(discover().components, case=Case)
    wanted = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(made)))
    assert wanted - made["$defs"].keys() == set()
