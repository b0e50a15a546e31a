"""No address and no path in what a client reads of an engine's errors, and the rest as it was."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.adapters.places import without_places


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("see http://gpu-1:8000/v1/chat for more", "see [address] for more"),
        ("at grpc://gpu-1:50051, or tcp://x", "at [address] or [address]"),
        ("worker 10.0.0.7:8000 refused", "worker [address] refused"),
        ("worker 10.0.0.7 refused", "worker [address] refused"),
        ("failed: ('10.0.0.7', 8000)", "failed: ('[address])"),
        ("at [fd00::17]:8000 now", "at [address] now"),
        ("at fd00:1:2:3:4:5:6:7 now", "at [address] now"),
        ("at fe80::1:2:3:17 now, or fe80::9", "at [address] now, or [address]"),
        ("at engine-7.pool.svc.cluster.local:8000.", "at [address]."),
        ("at engine-7.corp, which", "at [address], which"),
        ("at gpu-7:8000, which", "at [address], which"),
        ("at localhost:8000", "at [address]"),
        ("Cannot connect to host vllm:8000 ssl:default", "Cannot connect to host [address] ssl:default"),
        ("HTTPConnectionPool(host='vllm', port=8000): refused", "HTTPConnectionPool([address]): refused"),
        ("no /root/.cache/hub/models--m/x.json, sorry", "no [path], sorry"),
        ('File "/opt/vllm/engine.py", line 3', 'File "[path]", line 3'),
        ("model '/models/llama-3' has 4096 tokens", "model '[path]' has 4096 tokens"),
        ("no ~/data/x or C:\\models\\x", "no [path] or [path]"),
    ],
)
def test_no_place_leaves(said: str, shown: str) -> None:
    """Hosts, ports and files are an operator's business."""
    assert without_places(said) == shown


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 5000 (4000:1000).",
        "messages.0.content: Field required; max_tokens:32768 is too large at line 4:17, at 12:34:56",
        "unknown field `a::b`, std::runtime_error, llama3.1:70b, phi-3:14b",
        "use /v1/chat/completions or /v1/responses, and text/plain or application/json",
        "temperature must be between 0.0 and 2.0, e.g. 0.7; version 1.2.3 and 50/50",
        "Jinja: 'dict object' has no attribute 'x': {{ messages[0]['role'] }}",
    ],
)
def test_what_helps_stays(said: str) -> None:
    """What a caller did wrong is told as the engine told it."""
    assert without_places(said) == said


@given(st.text(string.ascii_letters + "0123456789.:/-_[]'\" \\=", max_size=300), st.ip_addresses())
def test_an_address_is_found_among_anything(around: str, address: object) -> None:
    """Wherever it stands between spaces."""
    assert f" {address} " not in without_places(f"{around} http://{address}/ {around}")
    if "." in str(address):
        assert f" {address} " not in without_places(f"{around} {address} {around}")
