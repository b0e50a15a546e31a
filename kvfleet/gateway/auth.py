"""The gateway's own keys. Only their digests are kept."""

from __future__ import annotations

import hmac
from hashlib import sha256

import attrs

from kvfleet.config.schema import GatewayConfig
from kvfleet.errors import AuthenticationError

__all__ = ["ANYBODY", "Keys"]

ANYBODY = ""
"""The name of a caller where no key is asked for."""


@attrs.frozen
class Keys:
    """The keys clients may send as bearer tokens; none is asked for if there are none."""

    _digests: tuple[tuple[str, bytes], ...] = attrs.field(default=(), repr=False, alias="digests")

    @classmethod
    def of(cls, config: GatewayConfig, api_key: str = "") -> Keys:
        """The configured keys, and one more given on the command line; each under its name."""
        found = {"default": config.api_key, "command line": api_key, **config.api_keys}
        return cls(tuple((name, sha256(key.encode()).digest()) for name, key in found.items() if key))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def caller(self, authorization: bytes | None) -> str:
        """The name of the key in an ``Authorization`` header.

        Every key is compared, as a digest and in constant time, so that neither a key's length nor its beginning can
        be found by measuring.

        Raises:
            AuthenticationError: for no key, or a wrong one.
        """
        if not self._digests:
            return ANYBODY
        scheme, _, token = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise AuthenticationError("no API key; send it as 'Authorization: Bearer KEY'", code="missing_api_key")
        sent = sha256(token.strip()).digest()
        matches = [name for name, digest in self._digests if hmac.compare_digest(sent, digest)]
        if not matches:
            raise AuthenticationError("the API key is not one of this gateway's")
        return matches[0]
