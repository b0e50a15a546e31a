"""What looking for personal data costs: ordinary text, and texts made to be slow.

Run ``python benchmarks/pii.py``. Figures are milliseconds for one text of 2, 32 and 64 KB, the best of several rounds,
once with RE2 (``pip install kvfleet[re2]``) and once without. "types" is what the classifier asks on every request,
"detect" what redaction asks: every find, so it grows with their number.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

from kvfleet.policy.pii import PII_PATTERNS, PIIDetector
from kvfleet.policy.pii_gate import PlainGate, RE2Gate

SIZES_KB = (2, 32, 64)
ROUNDS = 5
PROSE = (
    "The scheduler keeps a queue of requests, and a batch of those that run. In version 3.14 of 2024-05-01 the mean "
    "wait fell from 120 ms to 85 ms; see table 4, page 17, and https://example.org/notes?id=42 for the method.\n"
)
PIECES = (
    "a",
    "a.",
    "1",
    "1-",
    "1 ",
    "1.",
    "1:",
    "ab::",
    "a@",
    "a@a.",
    "a@a.1 ",
    "x@y.com ",
    "AB12 ",
    "DE89 3704 0044 0532 0130 0X ",
    "DE89370400440532013001 ",
    "4111 1111 1111 1112 ",
    "4111111111111112,",
    "(555) 123-",
    "000-12-3456 ",
    "1.2.3.400 ",
    "12:34:56 ",
    "+1 ",
    "01 23 45 67 8 ",
    "passport ",
    "born on ",
    "call me at ",
    "sk-aaaaaaaaaaaaaaaaaaaa ",
    "é",
)


def texts(size: int) -> Mapping[str, str]:
    """The texts by name."""
    chance = random.Random(1)
    made = {"prose": PROSE * (size // len(PROSE) + 1)}
    made |= {repr(piece): piece * (size // len(piece) + 1) for piece in PIECES}
    for alphabet in ("0123456789 -.", "aA0@. ", "0123456789abcdefABCDEF:"):
        made[f"random of {alphabet!r}"] = "".join(chance.choices(alphabet, k=size))
    return {name: text[:size] for name, text in made.items()}


def best_ms(work: Callable[[str], object], text: str) -> float:
    """The best of several rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work(text)
        best = min(best, time.perf_counter() - begin)
    return best * 1000


def main() -> None:
    """Print the tables."""
    for gate in (RE2Gate.of(PII_PATTERNS), PlainGate(tuple(PII_PATTERNS))):
        if gate is None:
            print("RE2 is not installed\n")
            continue
        detector = PIIDetector(gate=gate)
        title = type(gate).__name__
        print(f"{title:38}", *(f"{size:4} KB types" for size in SIZES_KB), "  64 KB detect")
        worst = [0.0] * (len(SIZES_KB) + 1)
        by_size = [texts(size * 1024) for size in SIZES_KB]
        for name in by_size[0]:
            row = [best_ms(detector.has_pii, made[name]) for made in by_size]
            row.append(best_ms(detector.detect, by_size[-1][name]))
            worst = [max(pair) for pair in zip(worst, row, strict=True)]
            print(f"{name:38}", *(f"{value:13.3f}" for value in row))
        print(f"{'worst':38}", *(f"{value:13.3f}" for value in worst), "\n")


if __name__ == "__main__":
    main()
