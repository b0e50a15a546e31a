"""The gateway's keys."""

from __future__ import annotations

import pytest

from kvfleet.config.schema import GatewayConfig
from kvfleet.errors import AuthenticationError
from kvfleet.gateway.auth import Keys

KEYS = Keys.of(GatewayConfig(api_key="sk-main", api_keys={"team-a": "sk-a", "team-b": "sk-ab"}), "sk-cli")


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (b"Bearer sk-main", "default"),
        (b"bearer sk-a", "team-a"),
        (b"Bearer  sk-ab ", "team-b"),
        (b"Bearer sk-cli", "command line"),
    ],
)
def test_a_key_is_known_by_its_name(header: bytes, name: str) -> None:
    """Each key has a name; the scheme's case does not matter."""
    assert KEYS.caller(header) == name


@pytest.mark.parametrize(
    "header", [b"Bearer sk-", b"Bearer sk-mai", b"Bearer sk-mainx", b"Bearer SK-MAIN", b"Bearer \xff\x00' OR 1=1"]
)
def test_a_wrong_key_is_refused(header: bytes) -> None:
    """What only begins like a key, or is longer, or differs in case, is none."""
    with pytest.raises(AuthenticationError) as caught:
        KEYS.caller(header)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


@pytest.mark.parametrize("header", [None, b"", b"sk-main", b"Basic sk-main", b"Bearer ", b"Bearer"])
def test_no_key_is_told_how_to_send_one(header: bytes | None) -> None:
    """A request without a bearer token learns what is missing."""
    with pytest.raises(AuthenticationError, match="Authorization: Bearer KEY"):
        KEYS.caller(header)


def test_without_keys_anybody_may_call() -> None:
    """Where no key is set, whatever a client sends is ignored, as clients that insist on a key need."""
    assert not Keys.of(GatewayConfig())
    assert Keys.of(GatewayConfig()).caller(b"Bearer optional") == ""


def test_keys_are_not_shown() -> None:
    """Neither a key nor its digest stands in a repr."""
    assert repr(KEYS) == "Keys()"
