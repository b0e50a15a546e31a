"""Where the gateway listens, and whether it may."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from kvfleet.config.findings import Finding
from kvfleet.config.findings import Path as Place
from kvfleet.errors import ConfigError
from kvfleet.gateway.auth import Keys

__all__ = [
    "bind",
    "bind_for",
    "check_exposure",
    "is_loopback",
    "let_nobody_in",
    "listening_at",
    "naming",
    "url_of",
]

_MOST_UNSENT_BYTES = 128 * 1024
_BACKLOG = 2048
_SO_ATTACH_FILTER = 26
_NO_BEGINNINGS = b"".join(
    struct.pack("HBBI", *step)
    for step in (
        (0x30, 0, 0, 13),  # load the byte with the flags of the TCP header
        (0x45, 0, 1, 0x02),  # unless SYN is among them, skip one
        (0x06, 0, 0, 0),  # ignore the packet
        (0x06, 0, 0, 0xFFFF),  # let it through
    )
)
"""A filter of packets in classic BPF, as Linux has it for sockets (its ``Documentation/networking/filter.rst``)."""


def check_exposure(host: str, keys: Keys, *, allowed: bool, place: Place = ("gateway", "host")) -> None:
    """Refuse to let the whole network spend the fleet's tokens by mistake.

    Args:
        host: Where is to be listened.
        keys: What clients need.
        allowed: True if it is meant.
        place: Where the file says so.

    Raises:
        ConfigError: for an address beyond loopback without a key, unless that is allowed.
    """
    if keys or allowed or is_loopback(host):
        return
    remedy = (
        "set gateway.api_key (as env:NAME), or listen on 127.0.0.1, "
        "or say that you mean it with --allow-unauthenticated"
    )
    raise ConfigError([Finding(f"{host or '*'} is not loopback and no key is set", remedy, place)])


def is_loopback(host: str) -> bool:
    """True if only this machine can reach the address; a name counts if all its addresses do."""
    try:
        found = socket.getaddrinfo(host or None, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


@contextlib.contextmanager
def naming(setting: str, host: str, port: int) -> Iterator[None]:
    """Say of a port that cannot be had which setting asked for it.

    Raises:
        OSError: instead of the one that was raised in the block.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"cannot listen on {host or '*'}:{port}: {reason}; take another {setting}") from error


def bind_for(workers: int, host: str, port: int) -> list[list[socket.socket]]:
    """Listening sockets for each of several workers, all on one port; the system shares connections out among them.

    Raises:
        OSError: if one cannot be had, also if another program has the port; names the address.
    """
    if workers == 1:
        return [bind(host, port)]
    alone = bind(host, port)  # or another program that shares its sockets too would get a part of the connections
    port = alone[0].getsockname()[1]
    for one in alone:
        one.close()
    found: list[list[socket.socket]] = []
    try:
        while len(found) < workers:
            found.append(bind(host, port, is_shared=True))
    except OSError:
        for one in (one for made in found for one in made):
            one.close()
        raise
    return found


def bind(host: str, port: int, *, is_shared: bool = False) -> list[socket.socket]:
    """Listening sockets for every address of a host, all on one port.

    Args:
        host: The host.
        port: The port; any free one if 0.
        is_shared: Others may listen there too.

    Raises:
        OSError: if one cannot be had; names the address.
    """
    found: list[socket.socket] = []
    try:
        for family, kind, proto, _, address in socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        ):
            # IPPROTO_TCP, not 0: asyncio sets TCP_NODELAY only on sockets that say so, and a stream needs it.
            one = socket.socket(family, kind, proto)
            found.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if is_shared:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            _hold_little(one)
            taken = found[0].getsockname()[1] if len(found) > 1 else port
            one.bind((address[0], taken, *address[2:]))
            one.listen(_BACKLOG)
            one.setblocking(False)
    except OSError as error:
        for one in found:
            one.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(error.errno, f"cannot listen on {host or '*'}:{port}: {reason}") from error
    return found


def _hold_little(one: socket.socket) -> None:
    """Have the system hold little of what a client does not read; connections have it from the socket they came by.

    Else it takes up to 4 MB for each (`tcp_wmem`), and 400 clients that read nothing use up the memory that all of the
    machine's connections share: then it drops what others send (`benchmarks/shapes.py`). What is on its way to a client
    that reads does not count, so nobody is slower.
    """
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        with contextlib.suppress(OSError):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MOST_UNSENT_BYTES)


def let_nobody_in(one: socket.socket) -> None:
    """Have the system ignore who begins to connect from now on; who has begun can be accepted.

    They ask again after a second, as TCP does, and by then the socket is closed: so they are refused, where they would
    have been reset had they come between the last look at who waits and the closing. Linux alone can do it.
    """
    if not sys.platform.startswith("linux") or one.family == socket.AF_UNIX:
        return
    program = ctypes.create_string_buffer(_NO_BEGINNINGS)
    told = struct.pack("HP", len(_NO_BEGINNINGS) // 8, ctypes.addressof(program))
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, told)


def listening_at(path: Path) -> socket.socket:
    """A listening socket of the file system, in the place of any before."""
    path.unlink(missing_ok=True)
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    found.setblocking(False)
    found.bind(str(path))
    found.listen(_BACKLOG)
    return found


def url_of(sock: socket.socket) -> str:
    """Where a listening socket is reached."""
    host, port = sock.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"
