"""How the process of a gateway deals with memory: when it looks for cycles, and what it gives back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator

__all__ = ["calm_memory", "keep_what_is_there", "undisturbed"]

_MIB = 1024 * 1024
_SELDOM = (10_000, 10, 10)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LONGEST_IN_A_THREAD_S = 0.001
"""For so long a thread may keep the event loop waiting, when both have work to do; Python's default is 5 ms."""
_FROM_SYSTEM_BYTES, _KEPT_BYTES = 64 * _MIB, 128 * _MIB


def calm_memory() -> None:
    """Call this once everything that lives as long as the process is there."""
    _calm_garbage_collector()
    _keep_large_pieces()
    sys.setswitchinterval(_LONGEST_IN_A_THREAD_S)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Do not look for cycles while so much is made at once, all of which stays, that each look would be a long one."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def keep_what_is_there() -> None:
    """Look no more at what lives as long as a fleet does, if this process is calm; what goes is freed none the less."""
    if gc.get_threshold() == _SELDOM:  # to count what is frozen would take 10 ms
        gc.freeze()


def _calm_garbage_collector() -> None:
    """Look for cycles less often, and not among what lives as long as the process.

    Requests leave no cycles behind, and Python's default looks for them after every 700 new objects, which traces on
    their way to the store are soon enough: then it is one pass of 3 ms in some thousands of requests. With 1,000 it
    was eighty times as often, and as long.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_SELDOM)


def _keep_large_pieces() -> None:
    """Have glibc keep the memory of large bodies for the next ones, 128 MB of it at most.

    Else it is given back after each, and every page of 4 KB that is touched anew costs a fault: in a virtual machine
    4 µs. That was more than half of the time that a prompt of 4 MB takes (parsing it 6.5 ms, and 2.6 without). orjson
    asks for room for twelve times a body's size, of which it uses a twelfth, so a piece may be large. Another C library
    has no such switch, and is left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _FROM_SYSTEM_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
