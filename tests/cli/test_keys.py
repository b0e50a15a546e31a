"""Keys and their digests."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from kvfleet.cli.main import cli
from kvfleet.config.schema import GatewayConfig
from kvfleet.errors import AuthenticationError
from kvfleet.gateway.auth import Keys

DIGEST = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


def test_a_digest_is_made_of_standard_input() -> None:
    """A key never stands on the command line; its line's end is no part of it."""
    assert CliRunner().invoke(cli, ["keys", "hash"], input="test\n").output == f"{DIGEST}\n"
    assert json.loads(CliRunner().invoke(cli, ["keys", "hash", "--json"], input="test").output) == {"digest": DIGEST}


def test_nothing_is_no_key() -> None:
    """An empty input is a mistake."""
    result = CliRunner().invoke(cli, ["keys", "hash"], input="\n")
    assert (result.exit_code, "there is no key on standard input" in result.output) == (2, True)


def test_a_new_key_opens_what_its_digest_stands_for() -> None:
    """The two belong together, and no two are alike."""
    made = [json.loads(CliRunner().invoke(cli, ["keys", "new", "--json"]).output) for _ in range(2)]
    keys = Keys.of(GatewayConfig(api_key=made[0]["digest"]), tenants=())
    assert keys.caller(f"Bearer {made[0]['key']}".encode()).is_admin
    with pytest.raises(AuthenticationError):
        keys.caller(f"Bearer {made[1]['key']}".encode())
    assert len(made[0]["key"]) > 40
