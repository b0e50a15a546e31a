"""Sound samples, damaged: what fuzzing of a format needs to get past its first line."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

__all__ = ["EXAMPLES", "cut", "fuzzed", "grows_like", "mutated"]

EXAMPLES = int(os.environ.get("KVFLEET_FUZZ", "60"))
"""Examples of each target; more of them with `KVFLEET_FUZZ`, as `nox -s fuzz -- 20000` sets it."""

LONGEST_S = 2.0
"""CPU seconds that one example of a few kilobytes may take."""

fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


def mutated(samples: Sequence[bytes], tokens: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """A sample after up to six changes: a token or noise put in or over something, a part left out or said twice."""
    place = st.floats(0, 1)
    piece = st.sampled_from(list(tokens)) | st.binary(max_size=6)
    change = st.tuples(st.sampled_from("iordt"), place, place, piece)
    return st.builds(_changed, st.sampled_from(list(samples)), st.lists(change, max_size=6))


def _changed(data: bytes, changes: Sequence[tuple[str, float, float, bytes]]) -> bytes:
    for how, first, second, piece in changes:
        begin, end = sorted((int(first * len(data)), int(second * len(data))))
        if how == "i":
            data = data[:begin] + piece + data[begin:]
        elif how == "o":
            data = data[:begin] + piece + data[begin + len(piece) :]
        elif how == "r":
            data = data[:begin] + data[begin + 1 + (end - begin) % 40 :]
        elif how == "d":
            data = data[:end] + data[begin:end][:2000] + data[end:]
        else:
            data = data[:end]
    return data[:20_000]


def cut(data: bytes, places: Sequence[float]) -> list[bytes]:
    """The data in pieces."""
    at = sorted({0, len(data), *(int(place * len(data)) for place in places)})
    return [data[begin:end] for begin, end in itertools.pairwise(at)]


def grows_like(prepare: Callable[[int], Callable[[], object]], size: int) -> float:
    """The exponent with which time grows with size: 1 if it is in proportion, 2 if it is quadratic.

    Args:
        prepare: Gives for a size what is to be timed.
        size: The smaller of the sizes compared; the larger is eight times as large.
    """
    best = [min(_timed(prepare(size * factor)) for _ in range(3)) for factor in (1, 8)]
    return _log8(best[1] / max(best[0], 1e-4))


def _log8(ratio: float) -> float:
    exponent, power = 0.0, 1.0
    while power * 8**0.1 <= ratio:
        power *= 8**0.1
        exponent += 0.1
    return exponent


def _timed(run: Callable[[], object]) -> float:
    began_s = time.process_time()
    run()
    return time.process_time() - began_s
