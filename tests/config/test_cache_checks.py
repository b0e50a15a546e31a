"""What is found of `kv_events` and `prompt_blocks` that would come to nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvfleet.config.caching import address_of
from kvfleet.config.findings import path_text
from kvfleet.config.loader import check_text

MODEL = {"name": "m", "endpoint": "http://gpu-1:8000", "provider": "vllm"}


def found(model: dict[str, Any], **more: Any) -> list[tuple[str, str]]:
    """Where something is found, and its code."""
    _, findings = check_text(json.dumps({"models": [{**MODEL, **model}], **more}), environ={})
    return [(path_text(one.path), one.code) for one in findings]


@pytest.fixture
def blocks(tmp_path: Path) -> dict[str, Any]:
    """Blocks of tokens made here."""
    return {"mode": "tokenizer", "tokenizer": str(tmp_path)}


def installed(*modules: str) -> None:
    """Skip where an extra is not installed: then that is found too."""
    for module in modules:
        pytest.importorskip(module)


def test_events_with_tokens(blocks: dict[str, Any]) -> None:
    """Nothing is wrong with them."""
    installed("zmq", "msgspec", "tokenizers", "jinja2")
    assert found({"kv_events": {}, "prompt_blocks": blocks}) == []
    assert found({"kv_events": {"endpoint": "tcp://*:5557", "bind": True}, "prompt_blocks": blocks}) == []
    assert found({"kv_events": {"source": "trtllm"}, "prompt_blocks": {"mode": "engine"}}) == []


def test_events_without_tokens() -> None:
    """Could be compared with nothing."""
    assert found({"kv_events": {"source": "trtllm"}}) == [("models[0].kv_events", "events-without-tokens")]


@pytest.mark.parametrize("events", [{"endpoint": "tcp://*:5557"}, {"endpoint": "tcp://{host}:5557", "bind": True}])
def test_addresses(events: dict[str, Any]) -> None:
    """One connects to a host, and listens at a star."""
    installed("zmq", "msgspec")
    model = {"kv_events": events, "prompt_blocks": {"mode": "engine"}}
    assert found(model) == [("models[0].kv_events.endpoint", "address")]


def test_ranks_are_counted_once_and_where_the_engine_takes_them(blocks: dict[str, Any]) -> None:
    """By us or by the engine; each of them publishes on a port of its own."""
    installed("zmq", "msgspec", "tokenizers", "jinja2")
    events = {"endpoint": "tcp://{host}:{port+1}", "replay": "tcp://{host}:{port+9}"}
    told = {"kv_events": events, "prompt_blocks": blocks, "data_parallel_ranks": 4}
    assert found(told) == []
    assert found({**told, "kv_events": {**events, "data_parallel_ranks": 4}})[-1] == (
        "models[0].data_parallel_ranks",
        "ranks",
    )
    assert found({"data_parallel_ranks": 4, "provider": "tgi"}) == [("models[0].data_parallel_ranks", "ranks")]
    beside = {**told, "replicas": ["http://gpu-1:8002"]}
    assert ("models[0].kv_events.endpoint", "duplicate-address") in found(beside)


@pytest.mark.parametrize("address", ["gpu-1:5557", "tcp://gpu-1", "http://gpu-1:5557", "tcp://{port}:1"])
def test_what_is_no_address(address: str) -> None:
    """Is found by its pattern."""
    assert ("models[0].kv_events.endpoint", "pattern") in found({"kv_events": {"endpoint": address}})


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    """Is found before the gateway starts."""
    installed("tokenizers", "jinja2")
    nowhere = str(tmp_path / "nowhere")
    assert found({"prompt_blocks": {"mode": "tokenizer"}}) == [("models[0].prompt_blocks", "missing")]
    assert found({"prompt_blocks": {"mode": "tokenizer", "tokenizer": nowhere}}) == [
        ("models[0].prompt_blocks.tokenizer", "file")
    ]


def test_stages_that_are_missing_or_late() -> None:
    """Tokens need somebody who makes them, and somebody who uses them, in this order."""
    model = {"prompt_blocks": {"mode": "engine"}}
    stages = ["classify.prompt", "affinity.prefix", "select", "execute"]
    assert found(model, pipeline=stages) == [("models[0].prompt_blocks", "unused-section")]
    assert found(model, pipeline=["classify.prompt", "classify.tokens", *stages[1:]]) == []
    late = [*stages[:2], "classify.tokens", *stages[2:]]
    assert [code for _, code in found(model, pipeline=late)] == ["order"]


@pytest.mark.parametrize(
    ("pattern", "endpoint", "above", "expected"),
    [
        ("tcp://{host}:5557", "https://gpu-1.internal/v1", 0, "tcp://gpu-1.internal:5557"),
        ("tcp://{host}:5557", "http://[fe80::1]:8000", 1, "tcp://[fe80::1]:5558"),
        ("tcp://*:5557", "http://gpu-1:8000", 2, "tcp://*:5559"),
        ("tcp://{host}:{port+1000}", "http://gpu-1:8003", 1, "tcp://gpu-1:9004"),
        ("tcp://{host}:{port}", "https://gpu-1", 0, "tcp://gpu-1:443"),
        ("ipc:///run/kv", "http://gpu-1:8000", 2, "ipc:///run/kv"),
    ],
)
def test_addresses_of_engines(pattern: str, endpoint: str, above: int, expected: str) -> None:
    """Host and port from the endpoint, and a port for each rank."""
    assert address_of(pattern, endpoint, above) == expected


@pytest.mark.parametrize(
    ("events", "code"),
    [
        ({"endpoint": "tcp://{host}:5557"}, "duplicate-address"),
        ({"endpoint": "tcp://{host}:{port+1}", "data_parallel_ranks": 2}, "duplicate-address"),
        ({"endpoint": "tcp://{host}:{port+60000}"}, "address"),
    ],
)
def test_engines_on_one_machine(events: dict[str, Any], code: str) -> None:
    """Need ports of their own, and such as there are."""
    installed("zmq", "msgspec")
    model = {"replicas": ["http://gpu-1:8001"], "kv_events": events, "prompt_blocks": {"mode": "engine"}}
    assert {code for _, code in found(model)} == {code}
    fine = {"endpoint": "tcp://{host}:{port+1000}"}
    assert found({**model, "kv_events": fine}) == []
    assert found({**model, "kv_events": {"endpoint": "tcp://*:5557", "bind": True}}) == []
