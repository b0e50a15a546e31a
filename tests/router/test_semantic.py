"""What prompts are about, and who is made for it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.config.schema import ModelConfig
from kvfleet.errors import ComponentError
from kvfleet.router.embedding import Embeddings, InThread, PromptEmbedding, has_minilm
from kvfleet.router.keywords import DOMAIN_KEYWORDS
from kvfleet.router.routes import RouteMatch
from kvfleet.router.scoring import ScoringContext
from kvfleet.router.semantic import (
    DOMAINS,
    DomainStrategy,
    PromptDomain,
    SemanticStrategy,
    classify_domain,
    describe_prompt,
    estimate_complexity,
)


def model(name: str, quality: float = 0.5, domain: str = "") -> ModelConfig:
    """A model, with a domain of its own or none."""
    tags = {"domain": domain} if domain else {}
    return ModelConfig(name=name, endpoint=f"http://{name}", quality_score=quality, tags=tags)


MODELS = (model("llama", 0.6), model("deepseek", 0.6, "coding"), model("minerva", 0.6, "math"), model("med", 0.6))


def first(strategy: SemanticStrategy | DomainStrategy, prompt: str) -> str:
    """Who comes first for a prompt, as a library's user asks."""
    return strategy.select(MODELS, ScoringContext(metadata={"prompt_text": prompt}))[0].model_name


def test_the_page_s_example() -> None:
    """The classifier prints what the page says, and the strategies choose whom it says."""
    domain, confidence = classify_domain("Write a Python function to sort a list")
    assert f"Domain: {domain}, confidence: {confidence:.2f}" == "Domain: coding, confidence: 0.70"
    assert first(SemanticStrategy(), "Solve this integral from 0 to pi") == "minerva"
    mapped = DomainStrategy(domain_model_map={"coding": "llama", "medical": "med"})
    assert first(mapped, "Write a Python function to sort a list") == "llama"
    assert first(mapped, "Which symptoms has a patient with diabetes?") == "med"


@pytest.mark.parametrize(
    ("prompt", "domain"),
    [
        ("Why does this SQL query raise an error in PostgreSQL?", "coding"),
        ("What is the derivative of x^3 + 2x?", "math"),
        ("Write a haiku about the sea", "creative"),
        ("A 45-year-old man comes to the hospital with chest pain. What is the diagnosis?", "medical"),
        ("Is a landlord liable for negligence of a tenant?", "legal"),
        ("Explain why electrons have a negative electric charge", "scientific"),
        ('Translate "good morning" into French', "translation"),
        ("How would you say fly in Italian", "translation"),
        ("Summarize the following article in two sentences", "summarization"),
        ("Summarise this contract between landlord and tenant", "summarization"),
        ("Hello, how are you?", "general"),
        ("", "general"),
    ],
)
def test_each_domain_is_recognised(prompt: str, domain: str) -> None:
    """A plain prompt of each domain; a task goes before a topic."""
    assert classify_domain(prompt)[0] == domain


@pytest.mark.parametrize(
    "prompt",
    ["What is the capital of France?", "My rapid therapist aspired", "Is the coder of conduct a codeine addict?"],
)
def test_parts_of_words_mean_nothing(prompt: str) -> None:
    """Matching is by words: "capital" does not hold "api", nor "therapist" the "api" in it."""
    assert classify_domain(prompt) == ("general", 0.5)


def test_plurals_count_as_their_singular() -> None:
    """`patients`, `algorithms` and `theories` are found where the singular is."""
    assert classify_domain("algorithms and databases")[0] == "coding"
    assert classify_domain("symptoms of patients")[0] == "medical"


@given(st.text(max_size=400))
def test_any_text_has_a_domain(text: str) -> None:
    """One of the nine, with a confidence between a half and one, and a complexity between nothing and one."""
    found = describe_prompt(text)
    assert found.domain in DOMAINS
    assert 0.5 <= found.confidence <= 1
    assert 0 <= found.complexity <= 1


def test_there_are_eight_domains_and_general() -> None:
    """The documented ones."""
    assert DOMAINS == (
        "coding",
        "math",
        "creative",
        "medical",
        "legal",
        "scientific",
        "translation",
        "summarization",
        "general",
    )
    assert all(term == term.lower() and 0 < weight <= 3 for terms in DOMAIN_KEYWORDS.values() for term, weight in terms.items())  # fmt: skip


@pytest.mark.parametrize("text", ["python " * 10_000, "SELECT " * 10_000, "9" * 64_000, "x = " * 16_000, "?" * 64_000])
def test_a_long_text_takes_no_longer(text: str) -> None:
    """64 KB of anything are read in bounded time: only the beginning and the end count."""
    describe_prompt(text)
    begun = time.thread_time()
    describe_prompt(text)
    assert time.thread_time() - begun < 0.1  # 3 ms on a quiet machine


def test_complexity_grows_with_what_is_asked() -> None:
    """Length, questions and technical words each add their part."""
    assert estimate_complexity("Hello") == 0.0
    assert estimate_complexity("What is it?") == 0.1
    assert estimate_complexity("word " * 21) == 0.1
    assert estimate_complexity("word " * 51) == 0.2
    assert estimate_complexity("word " * 201) == 0.3
    assert estimate_complexity("a? b? c?") == 0.2
    assert estimate_complexity("Prove the theorem and analyze the algorithm step by step") == 0.4


def test_the_strongest_model_is_not_wasted_on_an_easy_prompt() -> None:
    """Among models for the same domain the one whose quality is closest to the complexity comes first."""
    models = (model("strong", 0.95, "coding"), model("weak", 0.2, "coding"), model("other", 0.2))
    ranking = SemanticStrategy().select(models, ScoringContext(metadata={"prompt_text": "Fix this Python code"}))
    assert [m.name for m in ranking.models] == ["weak", "strong", "other"]
    assert ranking.totals[0] == pytest.approx(0.6 * 1.0 + 0.4 * 0.8)
    assert ranking.mode == "domain coding"


def test_a_description_stands_in_for_a_tag() -> None:
    """A model without a tag is taken for what its description is about."""
    strategy = SemanticStrategy(model_descriptions={"med": "Expert at medical diagnosis"})
    assert first(strategy, "Which symptoms has a patient with diabetes?") == "med"


def test_a_classifier_s_finding_goes_before_the_text() -> None:
    """The fact of a pipeline is used as it is."""
    known = {"domain": PromptDomain("math", 0.9, 0.2), "prompt_text": "Write a Python function"}
    assert SemanticStrategy().select(MODELS, ScoringContext(metadata=known))[0].model_name == "minerva"


def test_a_model_tagged_with_the_route_goes_before_all_others() -> None:
    """Whatever the domain says; on a route that nobody is tagged with the domain counts as ever."""
    bot = ModelConfig(name="bot", endpoint="http://bot", quality_score=0.6, tags={"route": "billing"})
    known = {"route": RouteMatch("billing", 0.7, "billing"), "domain": PromptDomain("coding", 0.9, 0.2)}
    ranking = SemanticStrategy().select((*MODELS, bot), ScoringContext(metadata=known))
    assert ranking.models[0].name == "bot"
    assert ranking.terms["domain"] == (1.0, 0.3, 0.3, 0.3, 0.3)
    known["route"] = RouteMatch("careers", 0.7, "careers")
    assert SemanticStrategy().select((*MODELS, bot), ScoringContext(metadata=known)).models[0].name == "deepseek"


@attrs.frozen
class Topics:
    """Two directions: sums, and all else."""

    name: str = "topics"

    def embed(self, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        return [[1.0, 0.0] if "sum" in text else [0.0, 1.0] for text in texts]


async def test_descriptions_match_by_meaning() -> None:
    """In a pipeline the stage before brought the vector; without one the words of the description count, and it is said."""
    strategy = SemanticStrategy(model_descriptions={"llama": "good at sums", "med": "knows bones"}, use_embeddings=True)
    embeddings = Embeddings(InThread(Topics()))
    strategy.provision(SimpleNamespace(models=MODELS, embeddings=embeddings))
    await strategy.aopen()
    prompt = {"domain": PromptDomain(), "embedding": PromptEmbedding("topics", [1.0, 0.0])}
    ranking = strategy.select(MODELS, ScoringContext(metadata=prompt))
    assert ranking.models[0].name == "llama"
    assert dict(zip([m.name for m in ranking.models], ranking.terms["domain"], strict=True)) == pytest.approx(
        {"llama": 1.0, "med": 0.3, "deepseek": 0.3, "minerva": 0.3}
    )
    without = {"domain": PromptDomain("medical"), "embedding": PromptEmbedding(reason="timeout")}
    by_words = strategy.select(MODELS, ScoringContext(metadata=without))
    assert by_words.mode == "domain medical, by words"
    await embeddings.maker.aclose()


@pytest.mark.skipif(has_minilm(), reason="the extra is installed")
def test_the_page_s_example_of_embeddings_names_the_extra() -> None:
    """As a library's user meets it without the extra."""
    strategy = SemanticStrategy(model_descriptions={"code-model": "Expert at coding tasks"}, use_embeddings=True)
    with pytest.raises(ComponentError, match=r"pip install 'kvfleet\[semantic\]'"):
        strategy.select(MODELS, ScoringContext(metadata={"prompt_text": "Fix this bug"}))


@pytest.mark.skipif(not has_minilm(), reason="needs kvfleet[semantic]")
def test_the_page_s_example_of_embeddings_works() -> None:
    """Called by itself the strategy makes the vectors on the spot."""
    models = (model("code-model", 0.6), model("poet", 0.6), model("other", 0.6))
    descriptions = {"code-model": "Expert at coding tasks", "poet": "Writes poems and stories"}
    strategy = SemanticStrategy(model_descriptions=descriptions, use_embeddings=True)
    for prompt, wanted in (
        ("Why does my loop never end in Rust?", "code-model"),
        ("Rhyme about the autumn wind", "poet"),
    ):
        assert strategy.select(models, ScoringContext(metadata={"prompt_text": prompt}))[0].model_name == wanted


def test_the_map_goes_before_the_tag_and_the_tag_before_quality() -> None:
    """1 for the mapped model, 0.8 for a tag of that domain, half its quality for anybody else."""
    strategy = DomainStrategy(domain_model_map={"coding": "llama"})
    ranking = strategy.select(MODELS, ScoringContext(metadata={"prompt_text": "Debug my Python code"}))
    assert {m.name: t for m, t in zip(ranking.models, ranking.totals, strict=True)} == pytest.approx(
        {"llama": 1.0, "deepseek": 0.8, "minerva": 0.3, "med": 0.3}
    )
    assert first(strategy, "Hello") in {m.name for m in MODELS}


@pytest.mark.parametrize(
    ("strategy", "what"),
    [
        (DomainStrategy(domain_model_map={"codign": "llama"}), "there is no domain 'codign'; did you mean"),
        (DomainStrategy(domain_model_map={"coding": "lama"}), "names the model 'lama', which is not in the fleet"),
        (SemanticStrategy(model_descriptions={"lama": "x"}), "names the model 'lama', which is not in the fleet"),
    ],
)
def test_a_wrong_name_is_found_at_build(strategy: SemanticStrategy | DomainStrategy, what: str) -> None:
    """A misspelt domain or model is refused, with what it might be."""
    with pytest.raises(ValueError, match=what):
        strategy.provision(SimpleNamespace(models=MODELS))


def test_it_is_mostly_right_on_prompts_that_others_labelled() -> None:
    """On an excerpt of the held-out prompts it is right in five of eight or more, short and balanced as they are."""
    lines = (Path(__file__).parent / "samples" / "domains.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    right = [row for row in rows if classify_domain(row["text"])[0] == row["domain"]]
    assert len(rows) > 130
    assert len(right) / len(rows) >= 0.625


def test_it_says_the_same_in_every_process() -> None:
    """Hashes of words differ from one process to the next, and ties are decided all the same."""
    text = "A server and a matrix, a patient and a court, a planet and a poem"
    program = f"from kvfleet.router.semantic import classify_domain; print(classify_domain({text!r}))"
    said = {
        subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(said) == 1
