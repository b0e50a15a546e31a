"""Train and measure the prototypes by which `classify.domain` tells domains in embeddings.

    python benchmarks/domain_prototypes.py PATH [--train FILE] [--embedder PLACE] [--every N] [--cache FILE]

PATH is that of ``benchmarks/domains.py``, which has the labels and the halves: prototypes are trained on the half that
may be looked at, and on ``benchmarks/domain_examples.yaml``; the other half is counted. A prototype is a direction in
the embedder's space and a bias for each domain, trained together as a multinomial logistic model; the combination adds
the weights that words and phrases give each domain. Needs numpy, scikit-learn and the embedder.

Without ``--train`` it prints the tables of the how-to: by words and phrases, by embeddings, and by both; and once more
with whole subjects held out, because a held-out prompt of a known subject is an easy one.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from domains import is_held_out, prompts, show
from ruamel.yaml import YAML
from sklearn.linear_model import LogisticRegression

from kvfleet.router.embedding import MINILM, find_embedder
from kvfleet.router.prototypes import VECTOR_SCALE, Prototypes, keyword_weights
from kvfleet.router.semantic import DOMAINS, beginning_and_end, classify_domain

_EXAMPLES = Path(__file__).with_name("domain_examples.yaml")
_STRENGTH = 0.1
_EXAMPLE_WEIGHT = 2.0
_FOLDS = 6


@attrs.frozen
class Labelled:
    """Prompts with what is known of them, aligned."""

    texts: list[str]
    domains: Any
    sources: Any
    groups: Any
    vectors: Any
    keywords: Any
    is_example: Any

    def features(self, *, with_keywords: bool) -> Any:
        """One row for each prompt."""
        return np.hstack([self.vectors, self.keywords]) if with_keywords else self.vectors


def read(path: Path, embedder: Any, every: int, cache: Path | None) -> Labelled:
    """The labelled prompts, or one in so many of them, and our examples."""
    subjects = {
        row["prompt"].removesuffix("\nAnswer:"): row["subject"]
        for row in map(json.loads, (path / "mmlu_prompts.jsonl").read_text().splitlines())
    }
    rows = [
        (source, domain, text, subjects.get(text, source))
        for source, domain, text in prompts(path)
        if source != "mmlu" or zlib.crc32(text.encode()) // 2 % every == 0
    ]
    ours = YAML(typ="safe").load(_EXAMPLES.read_text())
    rows += [("ours", domain, text, "ours") for domain, texts in ours.items() for text in texts]
    sources, domains, texts, groups = zip(*rows, strict=True)
    if cache is not None and cache.exists():
        vectors = np.load(cache)
    else:
        read_texts = [beginning_and_end(text) for text in texts]
        vectors = np.array(embedder.embed(read_texts), dtype=np.float32)
        if cache is not None:
            np.save(cache, vectors)
    keywords = np.array([keyword_weights(text) for text in texts])
    is_example = np.array([source == "ours" for source in sources])
    return Labelled(
        list(texts),
        np.array(domains),
        np.array(sources),
        np.array(groups),
        vectors * VECTOR_SCALE,
        keywords,
        is_example,
    )


def fit(data: Labelled, which: Any, *, with_keywords: bool) -> Any:
    """Train on some of the prompts."""
    model = LogisticRegression(C=_STRENGTH, max_iter=500)
    weights = np.where(data.is_example[which], _EXAMPLE_WEIGHT, 1.0)
    return model.fit(data.features(with_keywords=with_keywords)[which], data.domains[which], weights)


def trained(data: Labelled, which: Any, embedder: str) -> Prototypes:
    """The prototypes, with and without words."""
    alone, both = (fit(data, which, with_keywords=one) for one in (False, True))
    assert tuple(sorted(DOMAINS)) == tuple(alone.classes_)  # noqa: S101 - every domain has examples
    size = data.vectors.shape[1]

    def rounded(matrix: Any) -> list[list[float]]:
        return [[round(float(value), 3) for value in row] for row in matrix]

    return Prototypes(
        embedder=embedder,
        domains=tuple(str(name) for name in alone.classes_),
        weights=rounded(alone.coef_),
        biases=rounded([alone.intercept_])[0],
        combined_weights=rounded(both.coef_[:, :size]),
        combined_biases=rounded([both.intercept_])[0],
        keywords=rounded(both.coef_[:, size:]),
    )


def unseen(data: Labelled, *, with_keywords: bool) -> float:
    """The share of MMLU's prompts that is right, by prototypes trained without the prompt's subject."""
    names = np.unique(data.groups[data.sources == "mmlu"])
    fold_of = dict(zip(names, np.random.default_rng(0).permutation(len(names)) % _FOLDS, strict=True))
    fold = np.array([fold_of.get(group, -1) for group in data.groups])
    right = 0
    for one in range(_FOLDS):
        model = fit(data, np.flatnonzero(fold != one), with_keywords=with_keywords)
        held = np.flatnonzero(fold == one)
        right += (model.predict(data.features(with_keywords=with_keywords)[held]) == data.domains[held]).sum()
    return right / (fold >= 0).sum()


def count(name: str, data: Labelled, said: Any, held: Any) -> None:
    """Print one method's table."""
    print(f"\n## {name}\n")
    found = Counter(zip(data.domains[held].tolist(), said.tolist(), strict=True))
    sources: Counter[tuple[str, bool]] = Counter(
        zip(data.sources[held].tolist(), (said == data.domains[held]).tolist(), strict=True)
    )
    show(found, sources)


def main() -> None:
    """Measure, or train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--train", type=Path, help="write the prototypes to this file")
    parser.add_argument("--embedder", default=MINILM, help="as classify.embedding takes it")
    parser.add_argument("--every", type=int, default=1, help="take one of so many of MMLU's prompts")
    parser.add_argument("--cache", type=Path, help="keep the vectors in this file (numpy)")
    options = parser.parse_args()
    embedder = find_embedder(options.embedder)
    data = read(options.path, embedder, options.every, options.cache)
    held = np.array([is_held_out(text) for text in data.texts]) & ~data.is_example
    prototypes = trained(data, np.flatnonzero(~held), embedder.name)
    if options.train:
        options.train.write_bytes(prototypes.to_json())
        print(f"{options.train} written", file=sys.stderr)
        return
    which = np.flatnonzero(held)
    words = np.array([classify_domain(data.texts[i])[0] for i in which])
    vectors = data.vectors / VECTOR_SCALE
    alone = np.array([prototypes.classify(vectors[i])[0] for i in which])
    both = np.array([prototypes.classify(vectors[i], keyword_weights(data.texts[i]))[0] for i in which])
    for name, said in (("words and phrases", words), ("embeddings", alone), ("both", both)):
        count(name, data, said, which)
    mmlu = np.flatnonzero(data.sources == "mmlu")
    by_words = np.mean([classify_domain(data.texts[i])[0] == data.domains[i] for i in mmlu])
    print("\nMMLU, subjects never seen in training:")
    print(f"words and phrases (which were chosen with these subjects in sight) {by_words:.2f}")
    print(f"embeddings {unseen(data, with_keywords=False):.2f}, both {unseen(data, with_keywords=True):.2f}")


if __name__ == "__main__":
    main()
