"""Notices that a fleet file, or a file whose content is a secret in it, has changed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import attrs

from kvfleet.config.schema import FleetConfig
from kvfleet.config.secrets import Secret

__all__ = ["files_of", "watch"]

_EVERY_S = 1.0

Seen = Mapping[Path, tuple[int, int, int] | None]


async def watch(
    files: Callable[[], tuple[Path, ...]], changed: Callable[[], Awaitable[None]], *, every_s: float = _EVERY_S
) -> None:
    """Call `changed` after each change of any of the files, until cancelled.

    Files are looked at, not listened to, so that it works on every file system, and when a symbolic link is moved, as
    Kubernetes does. A change counts once it has been the same for two looks: nobody writes any more.

    Args:
        files: Which; asked anew at each look.
        changed: What is to be done.
        every_s: Seconds between two looks.
    """
    told = before = await anyio.to_thread.run_sync(_look, files())
    while True:
        await anyio.sleep(every_s)
        now = await anyio.to_thread.run_sync(_look, files())
        if now == before and now != told:
            told = now
            await changed()
        before = now


def _look(files: tuple[Path, ...]) -> Seen:
    return {path: _stamp(path) for path in files}


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None while there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def files_of(path: Path, config: FleetConfig) -> tuple[Path, ...]:
    """A fleet file, and the files whose content stands in it as ``file:/path``."""
    found = {Path(one.reference.removeprefix("file:")) for one in _secrets(config) if one.reference[:5] == "file:"}
    return (path, *sorted(found))


def _secrets(value: Any) -> Iterator[Secret]:
    if isinstance(value, Secret):
        yield value
    elif attrs.has(type(value)):
        for field in attrs.fields(type(value)):
            yield from _secrets(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _secrets(one)
    elif isinstance(value, tuple):
        for one in value:
            yield from _secrets(one)
