"""``kvfleet keys``: keys of the gateway, and the digests that stand for them in a fleet file."""

from __future__ import annotations

import secrets
import sys

import click

from kvfleet.cli import render
from kvfleet.cli.options import json_option, reports
from kvfleet.gateway.auth import digest_text

__all__ = ["keys"]

_BYTES = 32


@click.group()
def keys() -> None:
    """Make keys of the gateway, and the digests that a fleet file may have instead of them."""


@keys.command(name="new")
@json_option
@reports
def new(*, as_json: bool) -> None:
    """Print a new key, for its owner, and its digest, for the fleet file. Nothing is kept."""
    key = f"kvf-{secrets.token_urlsafe(_BYTES)}"
    if as_json:
        render.echo_json({"key": key, "digest": digest_text(key)})
        return
    render.echo(render.fields([("key", key), ("digest", digest_text(key))]))


@keys.command(name="hash")
@json_option
@reports
def hash_key(*, as_json: bool) -> None:
    """Print the digest of a key, which is read from standard input; on a terminal it is asked for, and not shown."""
    key = click.prompt("key", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
    key = key.strip()
    if not key:
        raise click.UsageError("there is no key on standard input")
    if as_json:
        render.echo_json({"digest": digest_text(key)})
        return
    render.echo(digest_text(key))
