"""The JSON Schema of fleet files."""

from __future__ import annotations

import functools
import json
import re
from typing import Any, Literal

import attrs
import pytest

from kvfleet.config.convert import structure
from kvfleet.config.fields import choice, listing, number, secret, text
from kvfleet.config.jsonschema import DRAFT, schema
from kvfleet.config.schema import FleetConfig


@attrs.frozen
class Thing:
    """A component as the schema needs it."""

    kind: str
    name: str
    cls: type
    aliases: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Slow:
    """Drops what is slow."""

    limit_ms: float = number(5, gt=0, unit="ms", doc="The limit.")
    level: Literal["low", "high"] = choice("low", doc="The level.")


@attrs.frozen(kw_only=True)
class Wire:
    """Speaks to something."""

    endpoint: str = ""  # every adapter's own: not described, because the model says it
    retries: int = number(1, ge=0, doc="Retries.")


THINGS = (
    Thing("filter", "slow", Slow),
    Thing("adapter", "wire", Wire),
    Thing("action", "block", Slow),
    Thing("select", "mine", Slow),
)
SCHEMA = schema(THINGS)
TYPES: dict[str, Any] = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "array": list,
    "object": dict,
    "null": type(None),
}


def allows(rule: dict[str, Any], value: Any, root: dict[str, Any] | None = None) -> bool:
    """Whether a value obeys a schema: the small part of JSON Schema that ours uses, and an error for any other word."""
    root = root or rule
    check = functools.partial(allows, root=root)
    checks = {
        "$ref": lambda ref: check(root["$defs"][ref.rpartition("/")[2]], value),
        "type": lambda name: isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool)),
        "enum": lambda words: value in words,
        "const": lambda word: value == word,
        "anyOf": lambda rules: any(check(one, value) for one in rules),
        "allOf": lambda rules: all(check(one, value) for one in rules),
        "if": lambda condition: not check(condition, value) or check(rule["then"], value),
        "required": lambda names: not isinstance(value, dict) or set(names) <= set(value),
        "properties": lambda rules: (
            all(check(one, value[name]) for name, one in rules.items() if name in value)
            if isinstance(value, dict)
            else True
        ),
        "additionalProperties": lambda rest: (
            not isinstance(value, dict)
            or all(
                rest is not False and check(rest, item)
                for name, item in value.items()
                if name not in rule.get("properties", {})
            )
        ),
        "items": lambda one: not isinstance(value, list) or all(check(one, item) for item in value),
        "minItems": lambda least: not isinstance(value, list) or len(value) >= least,
        "pattern": lambda pattern: not isinstance(value, str) or bool(re.search(pattern, value)),
        "minimum": lambda limit: value >= limit,
        "maximum": lambda limit: value <= limit,
        "exclusiveMinimum": lambda limit: value > limit,
        "exclusiveMaximum": lambda limit: value < limit,
    }
    notes = ("$schema", "$defs", "title", "description", "default", "examples", "then")
    words = sorted((word for word in rule if word not in notes), key=lambda word: word != "type")
    return all(checks[word](rule[word]) for word in words)


def fleet(**keys: Any) -> dict[str, Any]:
    """A fleet file's data."""
    return {"models": [{"name": "a", "endpoint": "http://a"}], **keys}


def model(**keys: Any) -> dict[str, Any]:
    """A fleet file's data with one model."""
    return {"models": [{"name": "a", **keys}]}


RIGHT = [
    fleet(),
    fleet(strategy="mine", fleet_name="f", default_model=""),
    fleet(strategy="a_plugins"),
    fleet(
        pipeline=[
            "filter.slow",
            "filter.unknown",
            "select",
            {"use": "filter.slow", "with": {"limit_ms": 3}, "on_error": "skip"},
        ]
    ),
    fleet(pipeline=[{"use": "filter.unknown", "with": {"anything": 1}}]),
    fleet(gateway={"port": 0, "api_keys": {"a": "key"}, "cors_origins": ["*"]}),
    fleet(telemetry={"prometheus_port": None, "otlp": {"endpoint": "http://c:4318", "sample_ratio": 0.5}}),
    fleet(policy={"rules": [{"name": "r", "condition": "always", "action": "block"}]}),
    fleet(tenants={"t": {"allowed_data_classes": ["public"]}}, tests=[{"name": "x"}]),
    model(endpoint="", private=None, capabilities={"model_type": "rerank", "max_context_window": 5}),
    model(replicas=["https://b/v1"], provider="wire", options={"retries": 2}),
    model(provider="unknown", options={"anything": 1}),
]
WRONG = [
    {},
    {"models": []},
    fleet(stratgy="x"),
    fleet(fleet_name=5),
    fleet(shadow={"sample_rate": 2}),
    fleet(pipeline=["Filter"]),
    fleet(pipeline=[{"with": {}}]),
    fleet(pipeline=[{"use": "filter.slow", "on_error": "ignore"}]),
    fleet(pipeline=[{"use": "filter.slow", "wiht": {}}]),
    fleet(gateway={"port": 70000}),
    fleet(gateway={"port": "80"}),
    fleet(gateway={"port": True}),
    fleet(gateway=None),
    fleet(cache_affinity={"session_ttl_seconds": 0}),
    fleet(policy={"rules": [{"name": "r"}]}),
    fleet(policy={"default_data_class": "secret"}),
    fleet(tenants={"t": {"allowed_data_classes": ["pubic"]}}),
    fleet(tenants=[{}]),
    model(endpoint="gpu:8000"),
    model(replicas=["gpu:8000"]),
    model(name=""),
    model(tags={"n": 1}),
    model(quality_score=1.1),
    model(allowed_data_classes="public"),
]
COMPONENTS_OWN = [
    fleet(pipeline=[{"use": "filter.slow", "with": {"limit_ms": 0}}]),
    fleet(pipeline=[{"use": "filter.slow", "with": {"limit": 1}}]),
    fleet(pipeline=[{"use": "filter.slow", "with": {"level": "middle"}}]),
    model(provider="wire", options={"retires": 2}),
    model(provider="wire", options={"endpoint": "http://x"}),
]


@pytest.mark.parametrize("data", RIGHT)
def test_the_schema_allows_what_the_converter_does(data: dict[str, Any]) -> None:
    """Both are made from the same descriptions."""
    assert allows(SCHEMA, data)
    assert structure(FleetConfig, data)[1] == []


@pytest.mark.parametrize("data", WRONG)
def test_the_schema_refuses_what_the_converter_does(data: dict[str, Any]) -> None:
    """An editor underlines what `validate` would tell (a file without models is the loader's finding)."""
    assert not allows(SCHEMA, data)
    assert structure(FleetConfig, data)[1] != [] or data == {}


@pytest.mark.parametrize("data", COMPONENTS_OWN)
def test_the_options_of_components_are_part_of_it(data: dict[str, Any]) -> None:
    """Under a stage's `with` by its `use`, and under a model's `options` by its provider."""
    assert not allows(SCHEMA, data)
    assert allows(schema(), data)


def test_a_schema_is_plain_json_and_says_which_draft() -> None:
    """It can be written to a file that an editor's modeline names."""
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert SCHEMA["$schema"] == DRAFT == "https://json-schema.org/draft/2020-12/schema"


def test_every_option_is_described() -> None:
    """With its unit, its default, an example, and how a secret is written."""
    model_options = SCHEMA["$defs"]["ModelConfig"]["properties"]
    assert all("description" in option for option in model_options.values())
    assert model_options["latency_p50_ms"] == {
        "description": "Typical time to an answer, until measurements replace it. In ms.",
        "default": 500,
        "type": "number",
        "exclusiveMinimum": 0,
    }
    assert model_options["api_key"] == {
        "description": "The credential for this backend. Written as a reference: `env:NAME` or `file:/path`.",
        "type": "string",
    }
    assert model_options["replicas"]["examples"] == [["http://gpu-2:8000"]]


def test_no_default_that_is_a_secret_is_shown() -> None:
    """A component might have one, if only a made-up one."""

    @attrs.frozen(kw_only=True)
    class Keyed:
        """Has a key."""

        key: str = secret("hidden", doc="A key.")
        names: tuple[str, ...] = listing(("a",), doc="Names.")
        word: str = text("w", doc="A word.")

    assert "hidden" not in json.dumps(schema([Thing("filter", "keyed", Keyed)]))
