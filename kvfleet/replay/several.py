"""Several replays at once: each in a process of its own, as many at a time as there are cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import cast

import attrs

from kvfleet.errors import KVFleetError
from kvfleet.replay.driver import Replay, ReplayResult
from kvfleet.replay.traces import RequestTrace

__all__ = ["ReplayError", "cores", "replay_all"]

_TOLD_EVERY = 50
_NO_TRACE = RequestTrace(name="", requests=(), block_tokens=1)


class ReplayError(KVFleetError):
    """A replay that ended before its trace did; says which, and of what."""


@attrs.frozen
class _Broke:
    """Why a replay broke, in words: not every exception can be sent to another process."""

    why: str


def cores() -> int:
    """How many replays are worth running at once here."""
    if sys.platform != "linux":  # elsewhere a process cannot simply go on from where another stands
        return 1
    return len(os.sched_getaffinity(0))


def replay_all(
    runs: Mapping[str, Replay], jobs: int, progress: Callable[[int], None] | None = None
) -> list[ReplayResult]:
    """The results, by the runs' order; they are the same whatever the number of jobs.

    Args:
        runs: By label; none of them has run.
        jobs: Most that run at once; with 1 everything happens in this process.
        progress: Told how many requests are done, over all of them.

    Raises:
        ReplayError: if one of them breaks in another process; here it raises what it raises.
    """
    done = dict.fromkeys(runs, 0)

    def tell(label: str, count: int) -> None:
        done[label] = count
        if progress is not None:
            progress(sum(done.values()))

    if jobs == 1 or len(runs) == 1:
        return [_run(label, run, partial(tell, label)) for label, run in runs.items()]
    results: dict[str, ReplayResult] = {}
    waiting = list(runs.items())
    with contextlib.ExitStack() as stack:
        under_way: dict[Connection, tuple[str, ForkProcess]] = {}
        while waiting or under_way:
            while waiting and len(under_way) < jobs:
                label, run = waiting.pop(0)
                told, process = stack.enter_context(_started(label, run))
                under_way[told] = label, process
            for one in wait(list(under_way)):
                told = cast("Connection", one)
                label, process = under_way[told]
                said = _heard(told, process, label)
                if isinstance(said, int):
                    tell(label, said)
                else:
                    results[label] = attrs.evolve(said, trace=runs[label].trace)
                    tell(label, len(said.served))
                    del under_way[told]
    return [results[label] for label in runs]


def _run(label: str, run: Replay, tell: Callable[[int], None]) -> ReplayResult:
    total = len(run.trace.requests)
    run.progress = lambda count: tell(count) if count % _TOLD_EVERY == 0 or count == total else None
    return run.run(label)


@contextlib.contextmanager
def _started(label: str, run: Replay) -> Iterator[tuple[Connection, ForkProcess]]:
    """A process that runs it and tells of it; it is ended with the context."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_tell, args=(label, run, there), daemon=True)
    process.start()
    there.close()
    try:
        yield here, process
    finally:
        process.terminate()
        process.join()
        here.close()


def _tell(label: str, run: Replay, there: Connection) -> None:
    """In its own process: run it, and say how it goes."""
    try:
        result = _run(label, run, there.send)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is to be told where somebody can read it
        there.send(_Broke(f"{type(error).__name__}: {error}"))
    else:
        there.send(attrs.evolve(result, trace=_NO_TRACE))  # the trace is known there, and the largest part


def _heard(told: Connection, process: ForkProcess, label: str) -> int | ReplayResult:
    """What a process says next: how far it is, or what came of it.

    Raises:
        ReplayError: if it broke, or is gone.
    """
    try:
        said = told.recv()
    except EOFError:
        process.join()
        raise ReplayError(
            f"the replay of {label} was ended from outside, with status {process.exitcode}; "
            "if that was for memory, use fewer --jobs or --limit"
        ) from None
    if isinstance(said, _Broke):
        raise ReplayError(f"the replay of {label} broke: {said.why}")
    return cast("int | ReplayResult", said)
