"""What must hold of configuration: no mistake is silent."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import pytest

from kvfleet.config.loader import check_text, dump_yaml, load_config, save_config
from kvfleet.config.options import options
from kvfleet.config.schema import FleetConfig, StageConfig
from tests.page.printed import findings

MODEL = {"name": "m", "endpoint": "http://m"}


def sections(cls: type, path: tuple[str | int, ...] = ()) -> Iterator[tuple[type, tuple[str | int, ...]]]:
    """Every class of the vocabulary, and a place where one of it may stand."""
    yield cls, path
    for name, option in options(cls).items():
        kind = option.type
        inner = [one for one in (kind, *typing.get_args(kind)) if isinstance(one, type) and attrs.has(one)]
        if not inner or inner[0] is StageConfig:
            continue
        step: tuple[str | int, ...] = (name,)
        if typing.get_origin(kind) is tuple:
            step = (name, 0)
        elif typing.get_origin(kind) not in (None, types.UnionType, typing.Union):
            step = (name, "x")
        yield from sections(inner[0], (*path, *step))


KEYS = [(path, key) for cls, path in sections(FleetConfig) for key in options(cls)]


def written(path: tuple[str | int, ...], key: str, value: Any) -> dict[str, Any]:
    """A fleet file in which a key stands at a place, and nothing else but a model."""
    inner: Any = {key: value}
    for step in reversed(path):
        inner = [inner] if isinstance(step, int) else {step: inner}
    whole = {"models": [MODEL], **inner}
    if path[:1] == ("models",):
        whole["models"] = [{**MODEL, **whole["models"][0]}]
    return typing.cast("dict[str, Any]", whole)


@pytest.mark.parametrize(("path", "key"), KEYS, ids=[".".join(map(str, (*path, key))) for path, key in KEYS])
def test_a_misspelt_key_is_a_finding(path: tuple[str | int, ...], key: str) -> None:
    """Anywhere: the finding stands at the key, and says what was meant."""
    typo = f"{key[:-1]}qq" if len(key) > 3 else f"{key}q"
    _, found = check_text(dump_yaml(written(path, typo, 1)), file="f.yaml", environ={})
    (finding,) = [one for one in found if one.path == (*path, typo)]
    assert finding.code == "unknown-key"
    assert finding.line > 0
    assert finding.remedy.startswith(("did you mean ", "known: "))


def test_there_are_as_many_places_as_the_vocabulary_has() -> None:
    """A walk that found nothing would let everything pass."""
    assert len(KEYS) > 150
    assert {path[0] for path, _ in KEYS if path} >= {"models", "policy", "tenants", "gateway", "telemetry", "budget"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [{name: a, endpoint: 'http://a'}]\nfallback: {fallback_order: [b]}\n", "no model is called 'b'"),
        ("models: [{name: a, endpoint: 'http://a'}, {name: a, endpoint: 'http://b'}]\n", "duplicate model 'a'"),
        ("models: [{name: a, endpoint: 'gpu-1'}]\n", "must be an http:// or https:// URL"),
        ("models: [{name: a, endpoint: 'http://a', cost_per_1k_input_tokens: -1}]\n", "must be at least 0"),
        ("models: []\n", "models: "),
        ("models: [{name: a, endpoint: 'http://a'}]\nstrategy: cost_frist\n", "did you mean select.cost_first?"),
        ("models: [{name: a, endpoint: 'http://a', provider: vlm}]\n", "did you mean vllm?"),
    ],
    ids=["unknown model", "duplicate", "URL", "negative cost", "no models", "strategy", "provider"],
)
def test_mistakes_are_findings(text: str, said: str) -> None:
    """One each, with its place."""
    (finding,) = findings(text)
    assert said in finding
    assert finding.startswith("page.yaml:")


def test_lists_and_their_items_can_be_set_by_the_environment() -> None:
    """As a whole, or one by its number; and a value is read by its field's type."""
    environ = {
        "KVFLEET__MODELS": '[{"name": "a", "endpoint": "http://a"}]',
        "KVFLEET__MODELS__0__REPLICAS": '["http://b"]',
        "KVFLEET__MODELS__0__TAGS__VERSION": "8",
        "KVFLEET__FLEET_NAME": "1",
        "KVFLEET__GATEWAY__CORS_ORIGINS__0": "https://x",
    }
    config = load_config(None, environ=environ)
    assert config.models[0].all_endpoints() == ("http://a", "http://b")
    assert (config.fleet_name, config.models[0].tags) == ("1", {"version": "8"})
    assert config.gateway.cors_origins == ("https://x",)


SECRETS: Mapping[str, Any] = {
    "models": [{**MODEL, "api_key": "sk-SECRET", "custom_headers": {"X-Key": "SECRET"}}],
    "gateway": {"api_key": "SECRET", "api_keys": {"team": "SECRET"}},
    "telemetry": {"otlp": {"endpoint": "http://c:4318", "headers": {"authorization": "SECRET"}}},
}


def test_no_secret_reaches_a_saved_file(tmp_path: Any) -> None:
    """Whether it was written out or read from elsewhere; its reference does."""
    config = load_config(None, SECRETS, environ={})
    save_config(config, tmp_path / "plain.yaml")
    assert "SECRET" not in (tmp_path / "plain.yaml").read_text()
    referred = load_config(None, {"models": [{**MODEL, "api_key": "env:KEY"}]}, environ={"KEY": "sk-SECRET"})
    save_config(referred, tmp_path / "referred.yaml")
    assert "env:KEY" in (tmp_path / "referred.yaml").read_text()
    assert "SECRET" not in (tmp_path / "referred.yaml").read_text()
