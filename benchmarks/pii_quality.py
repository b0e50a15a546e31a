"""How well personal data is found, by type, on a labelled set in presidio-research's format.

Run ``python benchmarks/pii_quality.py generated_large.json``. A find counts if it overlaps a labelled span of its type;
a labelled span is found if a find of its type overlaps it. Dates are counted where the template asks for a date of
birth. Templates with an even number were looked at, find by find, when
the patterns were tuned; those with an odd number were not, though the list of telephone numbers was read as a whole.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from kvfleet.policy.pii import PIIDetector

LABELS = {
    "EMAIL_ADDRESS": "email",
    "PHONE_NUMBER": "phone",
    "US_SSN": "ssn",
    "CREDIT_CARD": "credit_card",
    "IP_ADDRESS": "ip_address",
    "DATE_TIME": "date_of_birth",
    "IBAN_CODE": "iban",
    "US_DRIVER_LICENSE": "us_driver_license",
}
BIRTH = "{{date_of_birth}}"
SAME = {"phone_us": "phone"}
PARTS = ("tuning", "held out")


@attrs.define
class Count:
    """Finds and labels of one type."""

    right: int = 0
    wrong: int = 0
    found: int = 0
    missed: int = 0

    def row(self) -> str:
        """Precision, recall and F1 as cells of a table."""
        finds, labels = self.right + self.wrong, self.found + self.missed
        precision = self.right / finds if finds else None
        recall = self.found / labels if labels else None
        f1 = 2 * precision * recall / (precision + recall) if precision and recall else None
        cells = ["-" if value is None else f"{value:.3f}" for value in (precision, recall, f1)]
        return f"{labels:6} | {finds:5} | " + " | ".join(cells)


def spans_of(record: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """The labelled spans of types that patterns are made for."""
    return [
        (LABELS[span["entity_type"]], span["start_position"], span["end_position"])
        for span in record["spans"]
        if span["entity_type"] in LABELS and (span["entity_type"] != "DATE_TIME" or BIRTH in record["masked"])
    ]


def overlaps(one: tuple[str, int, int], others: Sequence[tuple[str, int, int]]) -> bool:
    """True if another span of the same type shares a character with this one."""
    return any(one[0] == name and one[1] < end and start < one[2] for name, start, end in others)


def measure(records: Sequence[Mapping[str, Any]], *, is_shown: bool) -> Mapping[tuple[str, str], Count]:
    """Counts by part and type."""
    counts: dict[tuple[str, str], Count] = defaultdict(Count)
    detector = PIIDetector()
    for record in records:
        part = PARTS[record["template_id"] % 2]
        labels = spans_of(record)
        matches = detector.detect(record["full_text"]).matches
        finds = [(SAME.get(m["type"], m["type"]), m["start"], m["end"]) for m in matches]
        for find in finds:
            is_right = overlaps(find, labels)
            counts[part, find[0]].right += is_right
            counts[part, find[0]].wrong += not is_right
            if is_shown and not is_right:
                print("wrong ", find[0], repr(record["full_text"][max(find[1] - 20, 0) : find[2] + 10]))
        for label in labels:
            is_found = overlaps(label, finds)
            counts[part, label[0]].found += is_found
            counts[part, label[0]].missed += not is_found
            if is_shown and not is_found:
                print("missed", label[0], repr(record["full_text"][max(label[1] - 20, 0) : label[2] + 10]))
    return counts


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("path", type=Path, help="the labelled set, as JSON")
    parser.add_argument("--show", action="store_true", help="print what was wrong or missed in the tuning part")
    args = parser.parse_args()
    records = json.loads(args.path.read_text())
    shown = [record for record in records if record["template_id"] % 2 == 0]
    if args.show:
        measure(shown, is_shown=True)
        return
    counts = measure(records, is_shown=False)
    print("part     | type              | labels | finds | precision | recall | F1")
    for part, name in sorted(counts):
        print(f"{part:8} | {name:17} | {counts[part, name].row()}")


if __name__ == "__main__":
    main()
