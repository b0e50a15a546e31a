"""What the index of prompt blocks costs: time of a match, and memory of an entry.

Run ``python benchmarks/index.py``. Times are CPU microseconds, the least of several rounds; the prompt has 32 KB, and
each replica holds a beginning of it of its own length, which is the dearest case.
"""

from __future__ import annotations

import argparse
import random
import time
import tracemalloc
from collections.abc import Callable

from kvfleet.cache.blocks import Laid, byte_blocks
from kvfleet.cache.prefix_index import PrefixIndex
from kvfleet.cache.resuming import Resuming, Window
from kvfleet.cache.routed_index import RoutedIndex

PROMPT_BYTES = 32_768
ROUNDS = 7


def microseconds(what: Callable[[], object], times: int = 300) -> float:
    """CPU time of one call."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(times):
            what()
        found.append((time.process_time() - start) / times * 1e6)
    return min(found)


def filled(replicas: int, draw: random.Random, hashes: list[int]) -> RoutedIndex:
    """An index in which each replica holds some beginning of the prompt."""
    index = RoutedIndex(max_entries=10_000_000)
    index.register([f"replica-{i}" for i in range(replicas)])
    for i in range(replicas):
        index.record(f"replica-{i}", hashes[: draw.randrange(1, len(hashes) + 1)], 0.0, 1e9)
    return index


def told(replicas: int, draw: random.Random, window: Window | None) -> tuple[PrefixIndex, list[int]]:
    """What engines told of a prompt of 8,192 tokens, in blocks of 16; with a window, as those of hybrid models do."""
    index, hashes = PrefixIndex(), [draw.getrandbits(64) for _ in range(512)]
    for i in range(replicas):
        name, depth = f"replica-{i}", draw.randrange(1, len(hashes) + 1)
        index.store(name, hashes[:depth])
        if window is not None:
            index.store(name, hashes[max(0, depth - draw.randrange(1, 2 * window.blocks)) : depth], window)
            index.limit(name, Resuming.of([window], 1))
    return index, hashes


def bytes_per_entry(entries: int, draw: random.Random) -> float:
    """Memory of a block on a replica, where no two replicas share one: the dearest case again."""
    replicas, blocks = 64, 128
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    index = RoutedIndex(max_entries=2 * entries, capacity=entries)
    index.register([f"replica-{i}" for i in range(replicas)])
    for i in range(entries // blocks):
        index.record(f"replica-{i % replicas}", [draw.getrandbits(64) for _ in range(blocks)], 0.0, 1e9)
    found = (tracemalloc.get_traced_memory()[0] - before) / len(index)
    tracemalloc.stop()
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000, help="entries to measure memory with")
    entries = parser.parse_args().entries
    draw = random.Random(1)
    laid = Laid(bytes(draw.randrange(32, 127) for _ in range(PROMPT_BYTES)))
    hashes = list(byte_blocks(laid).hashes)
    print("| what | µs |")
    print("|---|---|")
    print(f"| hash a prompt of 32 KB | {microseconds(lambda: byte_blocks(laid)):.0f} |")
    for replicas in (8, 64, 512):
        index = filled(replicas, draw, hashes)
        spent = microseconds(lambda index=index: index.depths(hashes, 1.0))  # type: ignore[misc]
        print(f"| match it against {replicas} replicas | {spent:.0f} |")
    for replicas in (64, 512):
        for what, window in (("are told of", None), ("have windows of 512 tokens", Window.sliding(512, 16, 1))):
            known, prompt = told(replicas, draw, window)
            spent = microseconds(lambda known=known, prompt=prompt: known.match(prompt))  # type: ignore[misc]
            print(f"| match 512 blocks against {replicas} replicas that {what} | {spent:.0f} |")
    index = filled(8, draw, hashes)
    print(f"| note where it went | {microseconds(lambda: index.record('replica-1', hashes, 1.0, 1e9)):.0f} |")
    each = bytes_per_entry(entries, draw)
    print(f"\nA block on a replica takes {each:.0f} bytes; ten million take {each * 1e7 / 1e9:.2f} GB.")


if __name__ == "__main__":
    main()
