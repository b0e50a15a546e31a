"""Where engines are and what lies on their disks, taken out of what they say of errors before a client reads it."""

from __future__ import annotations

import re

__all__ = ["without_places"]

_ADDRESS = re.compile(
    r"""
      \b[a-z][a-z0-9+.-]{1,15}://[^\s"'<>\x60]+                         # a URL of any scheme
    | \b(?:\d{1,3}\.){3}\d{1,3}\b (?: (?::|["'],[ ]?)\d{1,5}\b )?      # an address, with its port or without; a pair
    | \[[0-9a-f]{0,4}:[0-9a-f]{0,4}:[\w:.%]{0,60}\] (?: :\d{1,5} )?      # version 6 in brackets
    | (?<![\w:]) (?: (?:[0-9a-f]{1,4}:){4,7}[0-9a-f]{1,4}              # and without
        | (?=[0-9a-f:]{6}) (?:[0-9a-f]{1,4}:){1,6}(?::[0-9a-f]{1,4}){1,6} ) (?![\w:])
    | \b(?:[a-z0-9_-]{1,63}\.){1,8}[a-z][a-z0-9-]{1,62}:\d{2,5}\b         # a name with dots, and a port
    | \b(?:localhost|[a-z0-9]{1,30}(?:-[a-z0-9]{1,30}){1,8}):\d{4,5}\b     # a name of a container
    | (?<=\bhost[ ]) [\w.-]{1,253} :\d{1,5}\b                           # as aiohttp says it
    | \bhost=["']?[\w.:-]{1,253}["']? (?: ,[ ]?port=\d{1,5} )?          # as urllib3 does
    | \b(?:[a-z0-9_-]{1,63}\.){1,8}(?:internal|local|localdomain|lan|svc|cluster|corp|intranet|consul)\b
    """,
    re.IGNORECASE | re.ASCII | re.VERBOSE,
)
_PATH = re.compile(
    r"""
      (?<![\w./~-]) ~?/(?:app|bin|data|dev|dshm|etc|home|lib|local|mnt|models?|nfs|opt|proc|repository|root|run|scratch
        |share|shared|sgl-workspace|srv|storage|tmp|Users|usr|var|vllm-workspace|volumes?|workspace)/[^\s"'<>\x60,;)]+
    | \b[A-Z]:\\[^\s"'<>\x60,;)]+
    """,
    re.ASCII | re.VERBOSE,
)


def without_places(text: str) -> str:
    """A text without addresses and names of hosts, and without paths of the file system.

    >>> without_places("Cannot connect to host gpu-7:8000, see /root/.cache/hub/m: at most 4096 tokens")
    'Cannot connect to host [address], see [path] at most 4096 tokens'
    """
    return _PATH.sub("[path]", _ADDRESS.sub("[address]", text))
