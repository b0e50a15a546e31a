"""Plain data to attrs classes and back."""

from __future__ import annotations

import enum
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import attrs
import pytest

from kvfleet.config.convert import read, structure, unstructure
from kvfleet.config.fields import choice, flag, listing, mapping, number, secret, section, text
from kvfleet.config.findings import Finding
from kvfleet.config.origin import Origin
from kvfleet.config.schema import FleetConfig, ModelConfig, PolicyRule, StageConfig
from kvfleet.config.secrets import Secret, SecretReader
from kvfleet.errors import ComponentError, ConfigError


class Mode(enum.StrEnum):
    """Words."""

    FAST = "fast"
    SLOW = "slow"


@attrs.frozen(kw_only=True)
class Inner:
    """A section."""

    size: int = number(1, ge=1, doc="A size.")


@attrs.frozen(kw_only=True)
class Options:
    """One option of each kind."""

    ratio: float = number(0.5, ge=0, le=1, doc="A share.")
    wait_ms: float = number(10, gt=0, unit="ms", doc="A time.")
    count: int = number(3, lt=10, doc="A count.")
    limit: int | None = number(None, ge=0, doc="A limit.")
    name: str = text("", doc="A name.", pattern="[a-z]+", pattern_doc="small letters", example="abc")
    colour: str = choice("red", of=("red", "green"), doc="A colour.")
    mode: Mode = choice(Mode.FAST, doc="A mode.")
    level: Literal["low", "high"] = choice("low", doc="A level.")
    is_on: bool = flag(doc="A flag.")
    names: tuple[str, ...] = listing((), doc="Names.")
    pair: tuple[int, str] = listing((1, "a"), doc="A pair.")
    sizes: Mapping[str, int] = mapping(doc="Sizes.")
    anything: Mapping[str, Any] = mapping(doc="Anything.")
    inner: Inner = section(Inner, doc="A section.")
    maybe: Inner | None = section(None, doc="An optional section.")
    parts: tuple[Inner, ...] = listing((), doc="Sections.")
    either: str | tuple[str, ...] | int = text("", doc="One of several kinds.")
    folder: pathlib.Path = text(pathlib.Path(), doc="A type of Python's own.")
    key: str = secret(doc="A key.")
    keys: Mapping[str, str] = mapping(doc="Keys.", is_secret=True)
    model: str = text("", doc="A model.", refers_to="model")
    shares: Mapping[str, float] = mapping(doc="Shares by model.", refers_to="model")


def told(raw: Any, cls: type = Options, **kwargs: Any) -> list[str]:
    """The findings as text."""
    return [str(finding) for finding in structure(cls, raw, **kwargs)[1]]


def test_plain_data_becomes_an_instance() -> None:
    """Lists become tuples, whole numbers become floats where a float is wanted, words become members."""
    raw = {
        "ratio": 1,
        "limit": None,
        "mode": "slow",
        "level": "high",
        "names": ["a", "b"],
        "pair": [2, "b"],
        "sizes": {"x": 1},
        "anything": {"deep": [{"er": None}]},
        "inner": {"size": 4},
        "maybe": {},
        "parts": [{"size": 2}, {}],
        "either": ["x"],
        "folder": "/srv",
    }
    made, findings = structure(Options, raw)
    assert findings == []
    assert made == Options(
        ratio=1.0,
        mode=Mode.SLOW,
        level="high",
        names=("a", "b"),
        pair=(2, "b"),
        sizes={"x": 1},
        anything={"deep": [{"er": None}]},
        inner=Inner(size=4),
        maybe=Inner(),
        parts=(Inner(size=2), Inner()),
        either=("x",),
        folder=pathlib.Path("/srv"),
    )
    assert isinstance(made.ratio, float)


@pytest.mark.parametrize(
    ("raw", "finding"),
    [
        ({"ratoi": 1}, "ratoi: unknown key; did you mean ratio?"),
        (
            {7: 1},
            "7: unknown key; known: anything, colour, count, either, folder, inner, is_on, key, keys, level, limit, maybe, …",
        ),
        ({"ratio": "0.5"}, "ratio: must be a number, not '0.5'; remove the quotes"),
        ({"ratio": "half"}, "ratio: must be a number, not 'half'; write a number, as in 0.5"),
        ({"ratio": True}, "ratio: must be a number, not true; write a number, as in 0.5"),
        ({"ratio": None}, "ratio: has no value; write one, or remove the key"),
        ({"ratio": 1.5}, "ratio: must be from 0 to 1, not 1.5"),
        ({"ratio": float("nan")}, "ratio: must be a finite number, not nan; write a number"),
        ({"wait_ms": 0}, "wait_ms: must be more than 0 ms, not 0"),
        ({"count": 10}, "count: must be less than 10, not 10"),
        ({"count": 1.0}, "count: must be a whole number, not the number 1.0; write it without a fraction"),
        ({"count": False}, "count: must be a whole number, not false; write a number, as in 3"),
        ({"limit": -1}, "limit: must be at least 0, not -1"),
        ({"limit": "x"}, "limit: must be a whole number, not 'x'; write a number"),
        ({"name": 8}, "name: must be text, not the number 8; put it in quotes"),
        ({"name": False}, "name: must be text, not false; put it in quotes"),
        ({"name": ["x"]}, "name: must be text, not a list; write one text"),
        ({"name": "A1"}, "name: must be small letters, not 'A1'; write it as in abc"),
        ({"colour": "gren"}, "colour: 'gren' is not allowed here; did you mean green?"),
        ({"mode": "fats"}, "mode: 'fats' is not allowed here; did you mean fast?"),
        ({"mode": None}, "mode: has no value; known: fast, slow"),
        ({"level": True}, "level: true is not allowed here; known: high, low"),
        ({"is_on": "false"}, "is_on: must be true or false, not 'false'; write true or false without quotes"),
        ({"is_on": 1}, "is_on: must be true or false, not the number 1; write true or false without quotes"),
        ({"names": "abc"}, "names: must be a list, not 'abc'; write it as a list, as in [a, b]"),
        ({"names": ["a", 1]}, "names[1]: must be text, not the number 1; put it in quotes"),
        ({"pair": [1]}, "pair: must have 2 items, not 1"),
        ({"pair": [1, 2]}, "pair[1]: must be text, not the number 2; put it in quotes"),
        ({"sizes": [1]}, "sizes: must be a mapping, not a list; write `key: value` lines below it"),
        ({"sizes": {"x": "1"}}, "sizes.x: must be a whole number, not '1'; remove the quotes"),
        ({"sizes": {1: 1}}, "sizes: has the key 1, which is not text; put it in quotes"),
        ({"inner": {"size": 0}}, "inner.size: must be at least 1, not 0"),
        ({"inner": 5}, "inner: must be a mapping, not the number 5; write `key: value` lines below it"),
        ({"inner": None}, "inner: has no value; write one, or remove the key"),
        ({"parts": [{}, {"szie": 1}]}, "parts[1].szie: unknown key; did you mean size?"),
        ({"either": 1.5}, "either: must be text or a list or a whole number, not the number 1.5; change it"),
        ({"either": ["a", 5]}, "either[1]: must be text, not the number 5; put it in quotes"),
        ({"folder": 5}, "folder: must be a Path, not the number 5; write it as text"),
        ({"key": 5}, "key: must be text, not a number; put it in quotes"),
        ({"keys": {"a": True}}, "keys.a: must be text, not a flag; put it in quotes"),
        ([], "must be a mapping, not a list; write `key: value` lines below it"),
    ],
)
def test_nothing_is_coerced(raw: Any, finding: str) -> None:
    """What is not exactly of its kind, or out of its range, is a finding that says what to write instead."""
    made, findings = structure(Options, raw)
    assert (made, [str(one) for one in findings]) == (None, [finding])


def test_every_finding_comes_at_once_with_its_place() -> None:
    """Nested ones too; a value without a place of its own stands at the nearest one around it."""
    origin = Origin("f.yaml", {(): (1, 1), ("parts",): (2, 1), ("parts", 1): (4, 5)})
    raw = {"ratio": "x", "parts": [{"size": 0}, {"size": "1", "sise": 2}]}
    assert told(raw, origin=origin) == [
        "f.yaml:1:1: ratio: must be a number, not 'x'; write a number, as in 0.5",
        "f.yaml:2:1: parts[0].size: must be at least 1, not 0",
        "f.yaml:4:5: parts[1].size: must be a whole number, not '1'; remove the quotes",
        "f.yaml:4:5: parts[1].sise: unknown key; did you mean size?",
    ]


def test_paths_begin_where_the_data_stands() -> None:
    """So options under `with:` are found in the whole file."""
    assert told({"x": 1}, Inner, path=("pipeline", 0, "with")) == ["pipeline[0].with.x: unknown key; known: size"]


def test_a_missing_required_option_is_told_at_its_parent() -> None:
    """With the key to add."""
    origin = Origin("f.yaml", {(): (3, 1)})
    assert told({"action": "block"}, PolicyRule, origin=origin) == [
        "f.yaml:3:1: name: is missing; add `name:`",
        "f.yaml:3:1: condition: is missing; add `condition:`",
    ]


def test_instances_are_taken_as_they_are() -> None:
    """At the top and within: programs may mix both."""
    inner = Inner(size=7)
    assert structure(Inner, inner) == (inner, [])
    made, _ = structure(Options, {"inner": inner, "parts": (inner, {"size": 2})})
    assert made is not None
    assert made.inner is inner
    assert made.parts == (inner, Inner(size=2))


def test_references_to_models_are_checked_if_the_fleet_is_known() -> None:
    """In texts, and in the keys of mappings."""
    raw = {"model": "lama", "shares": {"llama": 1, "lama": 2}}
    assert told(raw) == []
    assert told(raw, models=["llama"]) == [
        "model: no model is called 'lama'; did you mean llama?",
        "shares.lama: no model is called 'lama'; did you mean llama?",
    ]


def test_read_gives_what_can_be_passed_over() -> None:
    """Unknown keys, unknown models and unset secrets leave an instance; a wrong value does not."""
    origin = Origin(secrets=SecretReader({}))
    made, findings = read(Options, {"x": 1, "model": "m", "key": "env:K"}, origin=origin, models=[])
    assert [finding.code for finding in findings] == ["unknown-key", "unknown-model", "secret"]
    assert made == Options(model="m")
    assert read(Options, {"ratio": 2})[0] is None


def test_secrets_are_resolved_and_hidden() -> None:
    """Through the origin's reader; the instance and its repr remember the reference only."""
    origin = Origin(secrets=SecretReader({"K": "s3cret"}))
    made, findings = structure(Options, {"key": "env:K", "keys": {"a": "env:K", "b": "pl4in"}}, origin=origin)
    assert findings == []
    assert made is not None
    assert (made.key, made.keys) == ("s3cret", {"a": "s3cret", "b": "pl4in"})
    assert "s3cret" not in repr(made)
    assert "pl4in" not in repr(made) + repr(made.keys)


def test_secret_values_are_in_no_finding() -> None:
    """Neither as the wrong type nor as a part of a URL."""
    assert told({"models": [{"name": "a", "endpoint": "ftp://user:hunter2@host/"}]}, FleetConfig) == [
        "models[0].endpoint: must be an http:// or https:// URL, not 'ftp://…@host/'; write it as in http://gpu-1:8000"
    ]
    assert told({"keys": {"a": 12345}}) == ["keys.a: must be text, not a number; put it in quotes"]


def test_long_texts_are_cut_in_findings() -> None:
    """A finding stays a line."""
    assert told({"ratio": "x" * 500}) == [f"ratio: must be a number, not '{'x' * 60}…'; write a number, as in 0.5"]


@attrs.frozen(kw_only=True)
class Strict:
    """Has a validator of its own."""

    low: int = number(0, doc="The lower end.")
    high: int = number(1, doc="The upper end.")

    def __attrs_post_init__(self) -> None:
        """Check."""
        if self.high == 13:
            raise ValueError("13 is unlucky")
        if self.low > self.high:
            raise ConfigError([Finding("must not be above high", "swap them", ("low",), code="order")])


def test_a_components_own_validator_speaks_in_findings() -> None:
    """A ConfigError's findings are placed in the file; any other exception is one finding at the component."""
    origin = Origin("f", {("with",): (2, 3), ("with", "low"): (3, 5)})
    assert told({"low": 5}, Strict, path=("with",), origin=origin) == [
        "f:3:5: with.low: must not be above high; swap them"
    ]
    assert told({"high": 13}, Strict, path=("with",), origin=origin) == [
        "f:2:3: with: is refused: 13 is unlucky; see `kvfleet components`"
    ]


def test_classes_made_at_run_time_are_read_as_well() -> None:
    """Their annotations may be texts, as those they were made from."""
    holder = attrs.make_class("Holder", {"names": attrs.field(type="Sequence[str]", default=())})
    made, findings = structure(holder, {"names": ["a"]})
    assert findings == []
    assert attrs.asdict(made) == {"names": ("a",)}


def test_an_option_of_an_unknown_type_is_the_classes_fault() -> None:
    """Told to its author, and not as a finding of the file."""
    holder = attrs.make_class("Holder", {"it": attrs.field(type="NoSuchType", default=None)})
    with pytest.raises(ComponentError, match=r"the type 'NoSuchType' of the option 'it' of Holder cannot be resolved"):
        structure(holder, {})


# Stages


@pytest.mark.parametrize(
    ("raw", "stage"),
    [
        ("filter.health", StageConfig(use="filter.health", path=("pipeline", 0))),
        (
            {"use": "select", "name": "mine", "on_error": "fail", "with": {"a": [1]}},
            StageConfig(use="select", name="mine", on_error="fail", options={"a": [1]}, path=("pipeline", 0)),
        ),
    ],
)
def test_stages_are_written_in_two_forms(raw: Any, stage: StageConfig) -> None:
    """As a name, or as a mapping; the stage knows where it stands."""
    made, findings = structure(FleetConfig, {"pipeline": [raw]})
    assert findings == []
    assert made is not None
    assert made.pipeline == (stage,)


@pytest.mark.parametrize(
    ("raw", "finding"),
    [
        ({"use": "a.b", "wiht": {}}, "pipeline[0].wiht: unknown key; did you mean with?"),
        ({"with": {}}, "pipeline[0].use: is missing; add `use:`"),
        ({"use": 5}, "pipeline[0].use: must be text, not the number 5; put it in quotes"),
        ("a.b.c", "pipeline[0]: must be a stage's `kind.name`, not 'a.b.c'; write it as in filter.health"),
        ({"use": "a.b", "on_error": "ignore"}, "pipeline[0].on_error: 'ignore' is not allowed here; known: fail, skip"),
        ({"use": "a.b", "on_error": None}, "pipeline[0].on_error: has no value; write one, or remove the key"),
        (
            {"use": "a.b", "with": [1]},
            "pipeline[0].with: must be a mapping, not a list; write `key: value` lines below it",
        ),
        (7, "pipeline[0]: must be `kind.name`, or a mapping with `use`, not the number 7; as in `- filter.health`"),
    ],
)
def test_wrong_stages_are_findings(raw: Any, finding: str) -> None:
    """Each part of an entry is checked."""
    assert told({"pipeline": [raw]}, FleetConfig) == [finding]


# Back to plain data


def test_defaults_are_left_out() -> None:
    """What is not said needs not be written."""
    assert unstructure(Options()) == {}
    assert unstructure(Options(ratio=0.25, mode=Mode.SLOW, inner=Inner(size=2), parts=(Inner(),))) == {
        "ratio": 0.25,
        "mode": "slow",
        "inner": {"size": 2},
        "parts": [{}],
    }


def test_only_references_of_secrets_are_written() -> None:
    """A plain secret is dropped, also where a component did not declare it as one."""
    made = Options(key=Secret("x", "env:K"), keys={"a": "plain", "b": Secret("y", "file:/k"), "c": Secret("z")})
    assert unstructure(made) == {"key": "env:K", "keys": {"b": "file:/k"}}
    assert unstructure(Options(key="plain", keys={"a": "plain"})) == {}
    model = ModelConfig(
        name="a", options={"api_key": "plain", "token": "env:T", "n": 1, "deep": {"Authorization": "x"}}
    )
    assert unstructure(model) == {"name": "a", "options": {"token": "env:T", "n": 1, "deep": {}}}
    stage = StageConfig(use="a.b", options={"password": "plain", "max_tokens": 5})
    assert unstructure(stage) == {"use": "a.b", "with": {"max_tokens": 5}}
    assert "plain" not in repr(model) + repr(stage)


def test_there_and_back_is_the_same() -> None:
    """What was written is read as it was."""
    made = Options(
        names=("a",), pair=(4, "x"), sizes={"a": 1}, limit=0, maybe=Inner(), either=("a",), folder=pathlib.Path("/a")
    )
    assert structure(Options, unstructure(made)) == (made, [])
