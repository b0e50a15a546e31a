"""The gateway's own keys: whose each is, and what it opens. Only their digests are kept."""

from __future__ import annotations

import hmac
from collections.abc import Collection, Iterator, Mapping
from hashlib import sha256

import attrs

from kvfleet.config.key_checks import DIGEST
from kvfleet.config.schema import FleetConfig, GatewayConfig
from kvfleet.errors import AuthenticationError

__all__ = ["ANYBODY", "KEY_VARIABLE", "Caller", "Keys", "admin_key", "digest_text"]


@attrs.frozen
class Caller:
    """Who calls, by the key that came with the request.

    Attributes:
        name: The key's name; empty where no key is asked for.
        tenant: The tenant whose requests it makes; empty for none.
        is_admin: True if it may ask for any tenant, and see everything.
    """

    name: str = ""
    tenant: str = ""
    is_admin: bool = False


KEY_VARIABLE = "KVFLEET_ADMIN_KEY"
"""Where kvfleet's own commands find the key with which they ask a gateway."""

ANYBODY = Caller(is_admin=True)
"""Whoever calls where no key is asked for."""


@attrs.frozen
class Keys:
    """The keys clients may send as bearer tokens; none is asked for if there are none."""

    _digests: tuple[tuple[Caller, bytes], ...] = attrs.field(default=(), repr=False, alias="digests")

    @classmethod
    def of(cls, config: GatewayConfig, api_key: str = "", *, tenants: Collection[str]) -> Keys:
        """The configured keys, and one more given on the command line; each under its name.

        A key of `api_keys` that is named as a tenant is that tenant's client; all others of these are admins'.
        """
        return cls((*_plain(config, api_key, tenants), *_own(config)))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def caller(self, authorization: bytes | None, api_key: bytes | None = None) -> Caller:
        """Whose key stands in an ``Authorization`` header, or in the ``x-api-key`` that Anthropic's clients send.

        Every key is compared, as a digest and in constant time, so that neither a key's length nor its beginning can
        be found by measuring.

        Raises:
            AuthenticationError: for no key, or a wrong one.
        """
        if not self._digests:
            return ANYBODY
        if authorization is None and api_key is not None:
            authorization = b"Bearer " + api_key
        scheme, _, token = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise AuthenticationError("no API key; send it as 'Authorization: Bearer KEY'", code="missing_api_key")
        sent = sha256(token.strip()).digest()
        matches = [caller for caller, digest in self._digests if hmac.compare_digest(sent, digest)]
        if not matches:
            raise AuthenticationError("the API key is not one of this gateway's")
        return matches[0]


def admin_key(config: FleetConfig, environ: Mapping[str, str]) -> str:
    """A key with which the fleet's operator may ask its gateway; empty if there is none.

    `KEY_VARIABLE` has it where the file has digests alone.
    """
    if environ.get(KEY_VARIABLE):
        return environ[KEY_VARIABLE]
    gateway = config.gateway
    others = [key for name, key in gateway.api_keys.items() if name not in config.tenants]
    admins = [one.key for one in gateway.keys.values() if one.role == "admin"]
    return next((key for key in (gateway.api_key, *others, *admins) if key and not key.startswith(DIGEST)), "")


def digest_text(key: str) -> str:
    """What a fleet file may have instead of a key.

    >>> digest_text("test")
    'sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08'
    """
    return DIGEST + sha256(key.encode()).hexdigest()


def _digest(key: str) -> bytes:
    """The digest of a key, or the one that stands for it."""
    return bytes.fromhex(key.removeprefix(DIGEST)) if key.startswith(DIGEST) else sha256(key.encode()).digest()


def _plain(config: GatewayConfig, api_key: str, tenants: Collection[str]) -> Iterator[tuple[Caller, bytes]]:
    for name, key in {"default": config.api_key, "command line": api_key, **config.api_keys}.items():
        if key:
            is_tenants = name in tenants
            yield Caller(name, name if is_tenants else "", not is_tenants), _digest(key)


def _own(config: GatewayConfig) -> Iterator[tuple[Caller, bytes]]:
    for name, one in config.keys.items():
        if one.sha256 or one.key:
            digest = _digest(DIGEST + one.sha256.removeprefix(DIGEST) if one.sha256 else one.key)
            yield Caller(name, one.tenant, one.role == "admin"), digest
