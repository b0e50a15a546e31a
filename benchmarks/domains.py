"""How often the domain classifier is right on prompts that others labelled.

    python benchmarks/domains.py PATH [--part held-out|tuning|all] [--mistakes N]

PATH holds ``mmlu_prompts.jsonl`` and ``mt_bench.jsonl`` (from lm-sys/RouteLLM) and ``data_full.json`` (from
clinc/oos-eval). Subjects, categories and intents are mapped to our domains as `MMLU`, `MT_BENCH` and `CLINC` say; what
is in none of them is left out, because it has no clear domain. Half of the prompts, by a hash of their text, are there
to look at while terms are chosen; the other half is only counted.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from kvfleet.router.semantic import DOMAINS, classify_domain

MMLU = {
    "coding": "college_computer_science high_school_computer_science computer_security machine_learning",
    "math": "abstract_algebra college_mathematics elementary_mathematics "
    "high_school_mathematics high_school_statistics",
    "medical": "anatomy clinical_knowledge college_medicine medical_genetics professional_medicine virology nutrition",
    "legal": "professional_law international_law jurisprudence",
    "scientific": "astronomy college_biology college_chemistry college_physics conceptual_physics high_school_biology "
    "high_school_chemistry high_school_physics",
    "general": "miscellaneous global_facts marketing management public_relations sociology high_school_geography "
    "high_school_world_history high_school_us_history world_religions philosophy high_school_macroeconomics",
}
MT_BENCH = {"coding": "coding", "math": "math", "creative": "writing roleplay", "scientific": "stem"}
CLINC = {
    "translation": "translate",
    "general": "greeting goodbye tell_joke weather play_music book_flight restaurant_suggestion recipe reminder timer "
    "meal_suggestion shopping_list traffic travel_suggestion what_is_your_name order calendar fun_fact balance "
    "pay_bill",
}


def by_label(known: dict[str, str]) -> dict[str, str]:
    """Our domain for each label of theirs."""
    return {label: domain for domain, labels in known.items() for label in labels.split()}


def prompts(path: Path) -> Iterator[tuple[str, str, str]]:
    """Source, domain and text of each prompt that has a clear domain."""
    for name, key, labels in (("mmlu_prompts", "subject", MMLU), ("mt_bench", "category", MT_BENCH)):
        domains = by_label(labels)
        for line in (path / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row[key] in domains:
                text = row["prompt"].removesuffix("\nAnswer:") if "prompt" in row else row["turns"][0]
                yield name.partition("_prompts")[0], domains[row[key]], text
    domains = by_label(CLINC)
    for text, intent in json.loads((path / "data_full.json").read_text())["test"]:
        if intent in domains:
            yield "clinc", domains[intent], text


def is_held_out(text: str) -> bool:
    """True for half of the prompts, always the same."""
    return zlib.crc32(text.encode()) % 2 == 1


def main() -> None:
    """Count, and print the table of the how-to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--part", choices=("held-out", "tuning", "all"), default="held-out")
    parser.add_argument("--mistakes", type=int, default=0, help="show so many, of the tuning part alone")
    options = parser.parse_args()
    found: Counter[tuple[str, str]] = Counter()
    sources: Counter[tuple[str, bool]] = Counter()
    left = options.mistakes
    for source, domain, text in prompts(options.path):
        if options.part != "all" and is_held_out(text) != (options.part == "held-out"):
            continue
        said, confidence = classify_domain(text)
        found[domain, said] += 1
        sources[source, domain == said] += 1
        if left and domain != said and options.part == "tuning":
            left -= 1
            print(f"{domain} -> {said} {confidence}: {text[:200]!r}")
    show(found, sources)


def show(found: Counter[tuple[str, str]], sources: Counter[tuple[str, bool]]) -> None:
    """Print precision and recall by domain, and the share that is right by source."""
    print("| Domain | Prompts | Precision | Recall |\n| --- | --- | --- | --- |")
    for domain in DOMAINS:
        whole = sum(n for (true, _), n in found.items() if true == domain)
        said = sum(n for (_, other), n in found.items() if other == domain)
        right = found[domain, domain]
        if whole:
            print(f"| {domain} | {whole} | {right / max(said, 1):.2f} | {right / whole:.2f} |")
    whole, right = found.total(), sum(n for (true, said), n in found.items() if true == said)
    print(f"| all | {whole} | {right / whole:.2f} | {right / whole:.2f} |\n")
    for source in dict.fromkeys(name for name, _ in sources):
        print(f"{source}: {sources[source, True] / (sources[source, True] + sources[source, False]):.2f} right")


if __name__ == "__main__":
    main()
