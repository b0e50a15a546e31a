"""Under which names a gateway without keys may be called: a web page must not reach one on the reader's own machine.

A page whose domain is pointed at 127.0.0.1 (DNS rebinding) calls what listens there as its own origin, and sends no
``Origin`` with a GET. What it cannot change is the ``Host`` header: that holds the page's domain.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import attrs

from kvfleet.errors import RouteError

__all__ = ["Hosts"]

_MOST_KNOWN = 64


@attrs.define
class Hosts:
    """The names, beside those of the loopback.

    >>> hosts = Hosts.of(["gateway.test"])
    >>> [hosts.allows(name) for name in (b"localhost:8000", b"127.0.0.1", b"[::1]:80", b"gateway.test", b"evil.test")]
    [True, True, True, True, False]
    """

    names: frozenset[str]
    _known: dict[bytes, bool] = attrs.field(init=False, factory=dict, repr=False)

    @classmethod
    def of(cls, names: Iterable[str]) -> Hosts:
        """These names are allowed too."""
        return cls(frozenset(name.lower() for name in names if name))

    def check(self, host: bytes | None) -> None:
        """Refuse a request to another name.

        Raises:
            RouteError: 403.
        """
        if not self._known.get(host or b"") and not self.allows(host or b""):
            raise RouteError(
                "this gateway has no keys, so it answers under the loopback's names alone; "
                "set gateway.api_key, or name the host in gateway.allowed_hosts",
                status=403,
                code="host_not_allowed",
            )

    def allows(self, host: bytes) -> bool:
        """True if a ``Host`` header of this value is allowed."""
        known = self._known.get(host)
        if known is None:
            known = self._is_allowed(_name_of(host))
            if len(self._known) < _MOST_KNOWN:
                self._known[host] = known
        return known

    def _is_allowed(self, name: str) -> bool:
        if name == "localhost" or name.endswith(".localhost") or name in self.names:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _name_of(host: bytes) -> str:
    """The name without its port."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].removesuffix(".")
