"""The dashboard's page: one file for the browser, put together from the package's own, nothing from elsewhere."""

from __future__ import annotations

import base64
import functools
from hashlib import sha256
from importlib.resources import files

import attrs

__all__ = ["Page", "load_page"]

_SCRIPTS = ("core.js", "charts.js", "trace.js", "page.js")


@attrs.frozen
class Page:
    """The page and the headers it is sent with.

    Attributes:
        body: HTML with its style and script inside; the same for everybody, and without any data.
        headers: Its type, and a policy under which nothing but its own script runs and nothing is loaded or sent
            elsewhere.
    """

    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]


@functools.cache
def load_page(*, api: str, events: str = "") -> Page:
    """Put the page together.

    Args:
        api: Where its data is, relative to the page; ``/state`` and ``/route/ID`` below it.
        events: Where the data's changes are sent; the page asks every 3 seconds if empty.
    """
    folder = files("kvfleet.gateway") / "assets"
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    html = (folder / "page.html").read_text(encoding="utf-8")
    for mark, text in (("{api}", api), ("{events}", events), ("{style}", style), ("{script}", script)):
        html = html.replace(mark, text, 1)
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = (
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-security-policy", policy.encode()),
        (b"cache-control", b"no-cache"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
    )
    return Page(html.encode(), headers)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"
