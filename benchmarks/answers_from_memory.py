"""How often the semantic cache finds another wording of a question, and how often it is another question.

    python benchmarks/answers_from_memory.py FILE

FILE holds labelled utterances as CLINC150 has them: lists of ``[text, intent]``, by the part of the data set. Each text
is looked up among all the others. A find under another intent is a false hit, or the same question labelled twice:
those are printed, so that one can tell.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from kvfleet.cache.likeness import Sketch, Wording

THRESHOLDS = (0.7, 0.85, 0.9, 1.0)


def main() -> None:
    """Read, look up, print."""
    parser = argparse.ArgumentParser(description="Finds of the semantic cache on labelled utterances.")
    parser.add_argument("file", type=Path)
    parts = json.loads(parser.parse_args().file.read_text())
    texts = [(text, intent) for rows in parts.values() for text, intent in rows]
    wording = Wording()
    alike: dict[str, list[tuple[str, str, Sketch]]] = defaultdict(list)
    for text, intent in texts:
        sketch = wording.sketch(text)
        if sketch is not None:
            alike[sketch.must].append((text, intent, sketch))
    print(f"{len(texts):,} texts, {len(texts) - sum(map(len, alike.values())):,} of them not compared")
    for threshold in THRESHOLDS:
        found, doubtful = 0, set()
        for members in alike.values():
            for text, intent, sketch in members:
                others = [m for m in members if m[0] != text and wording.similarity(sketch, m[2]) >= threshold]
                found += bool(others)
                doubtful.update(tuple(sorted([text, o[0]])) for o in others if o[1] != intent)
        print(f"threshold {threshold:.2f}: {found:,} find another wording, {len(doubtful)} pairs under two intents")
        if threshold == THRESHOLDS[0]:
            for pair in sorted(doubtful):
                print(f"  {pair[0]!r} / {pair[1]!r}")


if __name__ == "__main__":
    main()
