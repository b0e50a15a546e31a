"""Ports that two listeners of one gateway would want."""

from __future__ import annotations

import pytest

from kvfleet.config.loader import check_text

MODEL = "models: [{name: a, provider: mock}]\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("gateway: {port: 9, admin: {port: 9}}", "gateway.admin.port: is the port of gateway.port too"),
        ("gateway: {host: 0.0.0.0, port: 9, admin: {port: 9}}", "gateway.admin.port: is the port of gateway.port too"),
        (
            "gateway: {port: 9}\ntelemetry: {prometheus_port: 9}",
            "telemetry.prometheus_port: is the port of gateway.port",
        ),
        (
            "gateway: {admin: {port: 9}}\ntelemetry: {prometheus_port: 9}",
            "telemetry.prometheus_port: is the port of gateway.admin.port too",
        ),
    ],
)
def test_a_port_is_one_listeners(text: str, found: str) -> None:
    """It is said which two want it, when the file is checked and not when the gateway starts."""
    _, (finding,) = check_text(MODEL + text, environ={})
    assert found in str(finding)


@pytest.mark.parametrize(
    "text",
    [
        "gateway: {port: 0, admin: {port: 0}}",
        "gateway: {port: 9, admin: {port: 8}}\ntelemetry: {prometheus_port: 7}",
        "gateway: {host: 10.0.0.1, port: 9, admin: {port: 9}}",
    ],
)
def test_ports_of_their_own(text: str) -> None:
    """Any free ones, different ones, or one port at two addresses."""
    assert check_text(MODEL + text, environ={})[1] == ()
