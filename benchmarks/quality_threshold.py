"""Train and measure the model behind the strategy `quality_threshold`.

    python benchmarks/quality_threshold.py OUTCOMES [--train FILE] [--weights FILE]

OUTCOMES is a file of JSON lines. Either it is ``mmlu_prompts.jsonl`` (from lm-sys/RouteLLM: MMLU's prompts, and whether
Mixtral-8x7B and GPT-4-1106 answered right), or each line is ``{"prompt": …, "weak": true, "strong": true}`` (with
``"group": …`` if you like) of your own two models. Needs numpy and scikit-learn.

Without ``--train`` it prints the table of the how-to: the share of calls to the stronger model that recovers 50 % and
80 % of the quality between the two (CPT), and the mean share recovered over all shares of calls (APGR), as RouteLLM
defines them (arXiv:2406.18665). Each row is trained and counted on different prompts: a random quarter is held out, or
whole subjects are. With ``--train`` it trains on all and writes the weights; `quality_threshold` takes them as
`weights:`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from scipy.sparse import csr_matrix, hstack, vstack
from sklearn.linear_model import LogisticRegression

from kvfleet.router.semantic import estimate_complexity
from kvfleet.router.sufficiency import PLACES, Sufficiency, figures_of, places_of

WEAK, STRONG = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"
OPTIONS = re.compile(r"\nA\. ")
PUBLISHED = (
    ("RouteLLM, random (published)", 0.500, 0.5007, 0.7993),
    ("RouteLLM, matrix factorisation, arena data (published)", 0.524, 0.4500, 0.7686),
    ("RouteLLM, causal LLM, arena + MMLU labels (published)", 0.600, 0.3549, 0.7031),
    ("RouteLLM, similarity-weighted, arena + MMLU labels (published)", 0.603, 0.3540, 0.7155),
)
"""Ong et al. 2024, table of the results on 5-shot MMLU; the best rows of each kind. APGR, CPT(50 %), CPT(80 %)."""
_STRENGTH = 0.02
_FOLDS = 4


@attrs.frozen
class Outcomes:
    """Prompts, who answered them right, and the group each belongs to."""

    prompts: Sequence[str]
    weak: Any
    strong: Any
    groups: Any

    def some(self, which: Any) -> Outcomes:
        """A part of them."""
        return Outcomes([self.prompts[i] for i in which], self.weak[which], self.strong[which], self.groups[which])


def read(path: Path) -> Outcomes:
    """The recorded outcomes."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    is_mmlu = WEAK in rows[0]
    return Outcomes(
        [row["prompt"].removesuffix("\nAnswer:") for row in rows],
        np.array([row[WEAK] == "True" if is_mmlu else bool(row["weak"]) for row in rows]),
        np.array([row[STRONG] == "True" if is_mmlu else bool(row["strong"]) for row in rows]),
        np.array([row["subject"] if is_mmlu else str(row.get("group", "")) for row in rows]),
    )


def question_of(prompt: str) -> str:
    """A prompt without its options: as people ask."""
    return OPTIONS.split(prompt)[0]


def matrix(prompts: Sequence[str]) -> Any:
    """One row for each prompt: its words, then its figures."""
    rows = [places_of(prompt) for prompt in prompts]
    counts = np.array([len(row) for row in rows])
    values = np.repeat(3 / np.sqrt(np.maximum(counts, 1)), counts)
    at = np.concatenate([np.array(row, dtype=np.int64) for row in rows])
    words = csr_matrix((values, at, np.concatenate([[0], np.cumsum(counts)])), shape=(len(rows), PLACES))
    return hstack([words, csr_matrix(np.array([figures_of(prompt) for prompt in prompts]))]).tocsr()


def fit(outcomes: Outcomes) -> Any:
    """Train on the prompts, and on their questions alone, so that options are not taken for granted."""
    suffices = outcomes.weak | ~outcomes.strong
    rows = vstack([matrix(outcomes.prompts), matrix([question_of(prompt) for prompt in outcomes.prompts])])
    model = LogisticRegression(C=_STRENGTH, max_iter=100)
    return model.fit(rows, np.concatenate([suffices, suffices]))


def splits(outcomes: Outcomes, *, by_group: bool) -> Iterator[tuple[Any, Any]]:
    """What to train on and what to count on, by turns: every prompt is counted once."""
    random = np.random.default_rng(5)
    if by_group:
        names, number = np.unique(outcomes.groups, return_inverse=True)
        fold = (random.permutation(len(names)) % (2 * _FOLDS))[number]
    else:
        fold = random.permutation(len(outcomes.prompts)) % _FOLDS
    for one in range(fold.max() + 1):
        yield np.flatnonzero(fold != one), np.flatnonzero(fold == one)


def held_out(outcomes: Outcomes, *, by_group: bool, most: int = 0, bare: bool = False) -> Any:
    """The chance of each prompt, by a model that has not seen it; `most` limits the training, `bare` drops options."""
    chances = np.zeros(len(outcomes.prompts))
    for train, test in splits(outcomes, by_group=by_group):
        model = fit(outcomes.some(np.random.default_rng(1).permutation(train)[: most or None]))
        asked = [question_of(outcomes.prompts[i]) if bare else outcomes.prompts[i] for i in test]
        chances[test] = model.predict_proba(matrix(asked))[:, 1]
    return chances


def recovered(outcomes: Outcomes, chances: Any) -> Any:
    """The share of the quality recovered if the first n prompts, the least chance first, go to the stronger model."""
    order = np.argsort(chances, kind="stable")
    gain = outcomes.strong[order].astype(int) - outcomes.weak[order].astype(int)
    return np.concatenate([[0], np.cumsum(gain)]) / max(gain.sum(), 1)


def measures(curve: Any) -> tuple[float, float, float]:
    """APGR, CPT(50 %) and CPT(80 %)."""
    share = np.linspace(0, 1, len(curve))
    return (
        float(np.trapezoid(curve, share)),
        float(share[np.argmax(curve >= 0.5)]),
        float(share[np.argmax(curve >= 0.8)]),
    )


def calibration(outcomes: Outcomes, chances: Any) -> list[tuple[float, float, int]]:
    """Five groups of prompts by their chance: the chance said, the share that was so, and how many."""
    suffices = outcomes.weak | ~outcomes.strong
    return [
        (float(chances[part].mean()), float(suffices[part].mean()), len(part))
        for part in np.array_split(np.argsort(chances), 5)
    ]


def trained(outcomes: Outcomes, name: str) -> Sufficiency:
    """A model of all prompts; its thresholds are those of groups (or at least prompts) it had not seen."""
    chances = held_out(outcomes, by_group=len(set(outcomes.groups)) >= 2 * _FOLDS)
    curve, model = recovered(outcomes, chances), fit(outcomes)
    hundredths = np.linspace(0, 1, 101)
    return Sufficiency(
        bias=round(float(model.intercept_[0]), 4),
        words=[round(float(w), 4) for w in model.coef_[0][:PLACES]],
        figures=[round(float(w), 4) for w in model.coef_[0][PLACES:]],
        shares=[round(float(c), 4) for c in np.quantile(chances, hundredths)],
        recovered=[round(float(c), 4) for c in np.interp(hundredths, np.linspace(0, 1, len(curve)), curve)],
        name=name,
    )


def show(outcomes: Outcomes) -> None:
    """Print the tables of the how-to."""
    weak, strong = outcomes.weak.mean(), outcomes.strong.mean()
    print(f"{len(outcomes.prompts)} prompts; right: weaker {weak:.1%}, stronger {strong:.1%}\n")
    print("| | APGR | CPT(50 %) | CPT(80 %) |\n| --- | --- | --- | --- |")
    subjects = held_out(outcomes, by_group=True)
    prompts = held_out(outcomes, by_group=False)
    rows = (
        ("subjects never seen", subjects),
        ("subjects never seen, questions without their options", held_out(outcomes, by_group=True, bare=True)),
        ("prompts never seen", prompts),
        ("prompts never seen, trained on 1,500", held_out(outcomes, by_group=False, most=1500)),
        ("the longest first", -np.array([len(prompt) for prompt in outcomes.prompts])),
        ("by estimate_complexity", -np.array([estimate_complexity(prompt) for prompt in outcomes.prompts])),
        ("who knows the outcome", (outcomes.weak.astype(int) - outcomes.strong.astype(int))),
    )
    for name, chances in rows:
        apgr, half, most = measures(recovered(outcomes, chances))
        print(f"| {name} | {apgr:.3f} | {half:.1%} | {most:.1%} |")
    for name, apgr, half, most in (("drawn at random (expected)", 0.5, 0.5, 0.8), *PUBLISHED):
        print(f"| {name} | {apgr:.3f} | {half:.1%} | {most:.1%} |")
    print("\n| chance said | weaker sufficed | prompts |\n| --- | --- | --- |")
    for said, was, count in calibration(outcomes, subjects):
        print(f"| {said:.2f} | {was:.2f} | {count} |")


def check(outcomes: Outcomes, path: Path) -> None:
    """Print how trained weights do on outcomes; on those they were trained on it says nothing."""
    model = Sufficiency.load(path)
    chances = np.array([model.chance(prompt) for prompt in outcomes.prompts])
    apgr, half, most = measures(recovered(outcomes, chances))
    print(f"{path}: APGR {apgr:.3f}, CPT(50 %) {half:.1%}, CPT(80 %) {most:.1%}")


def main() -> None:
    """Measure, or train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outcomes", type=Path)
    parser.add_argument("--train", type=Path, help="write weights trained on all outcomes to this file")
    parser.add_argument("--name", default="", help="what the weights are to say they were trained on")
    parser.add_argument("--weights", type=Path, help="measure these weights")
    options = parser.parse_args()
    outcomes = read(options.outcomes)
    if options.train:
        options.train.write_bytes(trained(outcomes, options.name or options.outcomes.stem).to_json())
        print(f"{options.train} written", file=sys.stderr)
    elif options.weights:
        check(outcomes, options.weights)
    else:
        show(outcomes)


if __name__ == "__main__":
    main()
