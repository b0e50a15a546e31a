"""How often the language of a text is told rightly.

``python benchmarks/languages.py --catalogues PATH --english PATH``

Catalogues are a folder of compiled message catalogues (``LANGUAGE/LC_MESSAGES/*.mo``), as free software is installed
with: short texts by many translators. The words were written down without them; what is enough to be sure was set by
the totals of these tables. English is a folder with CLINC150 (``data_full.json``) and MMLU's questions
(``mmlu_prompts.jsonl``): here false alarms count, because a prompt that is taken for another language may not reach a
model, and one of which nobody can tell may go anywhere.
"""

from __future__ import annotations

import argparse
import gettext
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvfleet.router.language import LANGUAGES, UNKNOWN, detect_language

_SAME = {"nb": "no", "nn": "no", "zh_CN": "zh", "zh_TW": "zh", "pt_BR": "pt"}
_MARKUP = re.compile(r"%[-#0-9.]*[a-z]+|\{[^}]*\}|<[^>]+>|--?[a-z-]+")


def translations(folder: Path) -> Iterator[tuple[str, str]]:
    """Language and text of every translated message of at least 25 characters, each once."""
    seen: set[str] = set()
    for path in sorted(folder.rglob("LC_MESSAGES/*.mo")):
        name = path.parent.parent.name
        language = _SAME.get(name, name)
        if language not in LANGUAGES:
            continue
        try:
            with path.open("rb") as file:
                catalogue = vars(gettext.GNUTranslations(file))["_catalog"]
        except (OSError, UnicodeDecodeError, ValueError):
            continue
        for source, text in catalogue.items():
            if not source or not isinstance(text, str) or text == source:
                continue
            plain = _MARKUP.sub(" ", text).strip()
            if len(plain) >= (25 if plain.isascii() else 15) and plain not in seen:
                seen.add(plain)
                yield language, plain


def english(folder: Path) -> Iterator[tuple[str, str]]:
    """Source and text of English prompts."""
    for part in json.loads((folder / "data_full.json").read_text()).values():
        for text, _ in part:
            yield "CLINC150", text
    for line in (folder / "mmlu_prompts.jsonl").read_text().splitlines():
        yield "MMLU", json.loads(line)["prompt"]


def table(found: Mapping[str, Counter[str]], right: Mapping[str, str]) -> None:
    """Print a row for each, as Markdown."""
    print("| | texts | right | nobody can tell | wrong | mostly taken for |\n| --- | --- | --- | --- | --- | --- |")
    for name, counts in sorted(found.items()):
        total = sum(counts.values())
        wrong = Counter({one: n for one, n in counts.items() if one not in (right[name], UNKNOWN)})
        most = ", ".join(f"{one} {n}" for one, n in wrong.most_common(2))
        shares = [counts[right[name]] / total, counts[UNKNOWN] / total, wrong.total() / total]
        print(f"| {name} | {total} | {' | '.join(f'{share:.1%}' for share in shares)} | {most} |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--catalogues", type=Path, required=True)
    parser.add_argument("--english", type=Path, required=True)
    parser.add_argument("--most", type=int, default=2000, help="most texts of each language, drawn by chance")
    given = parser.parse_args()
    texts = defaultdict(list)
    for language, text in translations(given.catalogues):
        texts[language].append(text)
    draw = random.Random(1)
    found = {
        language: Counter(map(detect_language, draw.sample(there, min(given.most, len(there)))))
        for language, there in texts.items()
    }
    table(found, {language: language for language in found})
    prompts: dict[str, Counter[str]] = defaultdict(Counter)
    for source, text in english(given.english):
        prompts[source][detect_language(text)] += 1
    print()
    table(prompts, dict.fromkeys(prompts, "en"))


if __name__ == "__main__":
    main()
