"""How often routes told by examples are found, and descriptions of models matched: by words, and by embeddings.

    python benchmarks/routes.py PATH [--draws N] [--embedder PLACE]

PATH holds ``data_full.json`` (from clinc/oos-eval: 150 intents of short requests, and requests of none of them). Each
draw takes 8 intents as routes with 6 examples each from the training part, and counts on the test part: requests of
these routes, and as many strangers (of other intents, and of none). Descriptions are those below; the prompts are
``benchmarks/domain_examples.yaml``. Embeddings are left out where the embedder is not installed.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
from ruamel.yaml import YAML

from kvfleet.errors import ComponentError
from kvfleet.router.embedding import MINILM, Embedder, find_embedder
from kvfleet.router.lexical import words_vector
from kvfleet.router.routes import NO_ROUTE, RouteExamples, embedded_routes, worded_routes
from kvfleet.router.semantic import classify_domain
from kvfleet.router.vectors import cosine

DESCRIPTIONS = {
    "coding": "Expert at coding tasks: writes, explains and debugs programs",
    "math": "Solves mathematics problems step by step",
    "creative": "Writes poems, stories, speeches and other creative texts",
    "medical": "Answers medical questions about symptoms, diseases and treatments",
    "legal": "Knows the law: contracts, courts and rights",
    "scientific": "Explains physics, chemistry, biology and astronomy",
    "translation": "Translates between languages",
    "summarization": "Summarizes long texts and documents",
}
ROUTES, EXAMPLES = 8, 6
THRESHOLDS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55)


@attrs.define
class Count:
    """What was counted of one method."""

    asked: int = 0
    found: int = 0
    scored: list[tuple[float, bool, bool]] = attrs.field(factory=list)

    def add(self, similarity: float, *, is_right: bool, is_stranger: bool) -> None:
        """One request: its best similarity, whether the route is right, and whether it has one."""
        self.asked += not is_stranger
        self.found += is_right and not is_stranger
        self.scored.append((similarity, is_right, is_stranger))

    def placed(self, threshold: float) -> float:
        """The share that is placed rightly, or rightly nowhere."""
        right = [stranger != (s >= threshold) and (stranger or found) for s, found, stranger in self.scored]
        return sum(right) / len(right)


def by_intent(rows: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """The requests of each intent."""
    found: dict[str, list[str]] = {}
    for text, intent in rows:
        found.setdefault(intent, []).append(text)
    return found


def draw(data: Any, seed: int) -> tuple[dict[str, RouteExamples], list[tuple[str, str]]]:
    """Routes, and requests each with its route."""
    chance = random.Random(seed)
    train, test = by_intent(data["train"]), by_intent(data["test"])
    names = chance.sample(sorted(train), ROUTES)
    routes = {
        name: RouteExamples(examples=tuple(chance.sample(train[name], EXAMPLES)), threshold=0, words_threshold=0)
        for name in names
    }
    asked = [(text, name) for name in names for text in chance.sample(test[name], 15)]
    others = [text for name, texts in test.items() if name not in names for text in texts]
    strangers = chance.sample(others, len(asked) // 2)
    strangers += chance.sample([text for text, _ in data["oos_test"]], len(asked) - len(strangers))
    return routes, asked + [(text, NO_ROUTE) for text in strangers]


def count(data: Any, draws: int, embedder: Embedder | None) -> dict[str, Count]:
    """All draws, by each method."""
    counts = {"words": Count(), **({"embeddings": Count()} if embedder else {})}
    for seed in range(draws):
        routes, asked = draw(data, seed)
        matchers: dict[str, Callable[[int], Any]] = {}
        worded = worded_routes(routes)
        matchers["words"] = lambda i, worded=worded, asked=asked: worded.match(words_vector(asked[i][0]))  # type: ignore[misc]
        if embedder:
            placed = embedded_routes(routes, {n: embedder.embed(route.examples) for n, route in routes.items()})
            vectors = embedder.embed([text for text, _ in asked])
            matchers["embeddings"] = lambda i, placed=placed, vectors=vectors: placed.match(vectors[i])  # type: ignore[misc]
        for method, match in matchers.items():
            for i, (_, wanted) in enumerate(asked):
                said = match(i)
                counts[method].add(said.similarity, is_right=said.nearest == wanted, is_stranger=wanted == NO_ROUTE)
    return counts


def show(counts: dict[str, Count]) -> None:
    """Print the table of the how-to, and how the thresholds were chosen."""
    usual = {"words": 0.25, "embeddings": 0.45}
    print("| compared | right route | right, or rightly nowhere |\n| --- | --- | --- |")
    for method, one in counts.items():
        print(f"| {method} | {one.found / one.asked:.0%} | {one.placed(usual[method]):.0%} |")
    print("\nplaced rightly by threshold:", *THRESHOLDS)
    for method, one in counts.items():
        print(method, *(f"{one.placed(threshold):.2f}" for threshold in THRESHOLDS))


def describe(embedder: Embedder | None) -> None:
    """Print how often the right description is the nearest one."""
    ours = YAML(typ="safe").load(Path(__file__).with_name("domain_examples.yaml").read_text())
    rows = [(text, domain) for domain, texts in ours.items() if domain in DESCRIPTIONS for text in texts]
    words = {domain: classify_domain(text)[0] for domain, text in DESCRIPTIONS.items()}
    by_words = sum(words[domain] == domain == classify_domain(text)[0] for text, domain in rows)
    print(f"\ndescriptions, {len(rows)} prompts: by words {by_words / len(rows):.0%}", end="")
    if embedder is None:
        print()
        return
    known = dict(zip(DESCRIPTIONS, embedder.embed(list(DESCRIPTIONS.values())), strict=True))
    near = [
        {name: cosine(vector, other) for name, other in known.items()}
        for vector in embedder.embed([text for text, _ in rows])
    ]
    right = [max(one, key=one.__getitem__) == domain for one, (_, domain) in zip(near, rows, strict=True)]
    own = sorted(one[domain] for one, (_, domain) in zip(near, rows, strict=True))
    other = sorted(
        value for one, (_, domain) in zip(near, rows, strict=True) for n, value in one.items() if n != domain
    )
    print(f", by embeddings {sum(right) / len(right):.0%}")
    for name, values in (("own description", own), ("other descriptions", other)):
        print(f"cosine with the {name}: 10 % {values[len(values) // 10]:.2f}, median {values[len(values) // 2]:.2f}, "
              f"90 % {values[len(values) * 9 // 10]:.2f}")  # fmt: skip


def main() -> None:
    """Count, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--embedder", default=MINILM)
    options = parser.parse_args()
    try:
        embedder: Embedder | None = find_embedder(options.embedder)
    except ComponentError as error:
        print(f"without embeddings: {error}\n")
        embedder = None
    show(count(json.loads((options.path / "data_full.json").read_text()), options.draws, embedder))
    describe(embedder)


if __name__ == "__main__":
    main()
