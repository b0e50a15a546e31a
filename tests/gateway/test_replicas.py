"""Names for replicas, and the removal of addresses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.config.schema import ModelConfig
from kvfleet.gateway.replicas import ReplicaNames

MODELS = (
    ModelConfig(name="llama", endpoint="http://gpu-1.internal:8000"),
    ModelConfig(name="llama", endpoint="http://10.0.0.5:8000/v1"),
    ModelConfig(name="org/qwen", endpoint="http://gpu-1.internal:8000"),
    ModelConfig(name="cloud", endpoint="https://api.example.com/v1"),
    ModelConfig(name="toy", endpoint="mock://toy"),
)
NAMES = ReplicaNames.of(MODELS)


def test_names_count_the_replicas_of_each_model() -> None:
    """Replicas are numbered from 1 within their model, in the fleet's order."""
    assert list(NAMES.by_id.values()) == ["llama#1", "llama#2", "org/qwen#1", "cloud#1", "toy#1"]


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("llama@http://gpu-1.internal:8000 is down", "llama#1 is down"),
        ("org/qwen@http://gpu-1.internal:8000 is down", "org/qwen#1 is down"),
        ("llama@10.0.0.5:8000 is down", "llama#2 is down"),
        ("POST http://10.0.0.5:8000/v1/chat/completions failed", "POST llama#2 failed"),
        ("Connect call failed ('10.0.0.5', 8000)", "Connect call failed (llama#2)"),
        ("Connect call failed ('gpu-1.internal', 8000)", "Connect call failed (llama#1)"),
        ("Connect call failed ('10.0.0.6', 8000)", None),
        ("gpu-1.internal:8000: refused", "llama#1: refused"),
        ("https://api.example.com/v1/embeddings says no", "cloud#1 says no"),
        ("toy@mock://toy broke", "toy#1 broke"),
        ("see https://docs.example.com/errors at 12:30, version 1.2.3.4", None),
    ],
)
def test_addresses_of_backends_are_replaced(text: str, hidden: str | None) -> None:
    """Ids, URLs, host:port and bare addresses become names; what is not a backend's stays."""
    assert NAMES.hide(text) == (text if hidden is None else hidden)


def test_data_is_searched_through() -> None:
    """Keys and values at any depth; numbers and None stay what they are."""
    data = {"llama@http://gpu-1.internal:8000": [{"reason": "10.0.0.5:8000 is gone", "n": 1, "none": None}]}
    assert NAMES.hide_in(data) == {"llama#1": [{"reason": "llama#2 is gone", "n": 1, "none": None}]}


@given(st.text(max_size=20), st.sampled_from(MODELS), st.text(max_size=20))
def test_no_endpoint_survives_in_any_text(before: str, model: ModelConfig, after: str) -> None:
    """Whatever stands around it, a backend's whole URL is not there afterwards."""
    assert model.endpoint not in NAMES.hide(f"{before} {model.endpoint} {after}")
