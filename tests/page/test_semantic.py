"""Semantic Routing (Content-Aware), and Domain Mapping."""

from __future__ import annotations

import pytest

from kvfleet.errors import ComponentError
from kvfleet.router.embedding import has_minilm
from tests.page.living import live
from tests.page.models import MODELS
from tests.page.printed import fleet, run

FLEET = (
    MODELS
    + """
models += [ModelConfig(name=name, endpoint=f"http://{name}:8000", tags={"domain": domain}) for name, domain in (
    ("math-model", "math"), ("deepseek-coder", "coding"), ("med-llama", "medical"), ("llama-3-70b", "creative"))]
"""
)
"""The scoring section's models, and those that these examples speak of."""

CODE_MODEL = """
models += [ModelConfig(name=name, endpoint=f"http://{name}:8000", quality_score=0.6) for name in ("code-model", "other")]
"""

SEMANTIC = """
from kvfleet.router.semantic import SemanticStrategy, classify_domain

# Built-in domain classifier (works without ML dependencies)
domain, confidence = classify_domain("Write a Python function to sort a list")
print(f"Domain: {domain}, confidence: {confidence:.2f}")
# → Domain: coding, confidence: 0.70

# Route by content
strategy = SemanticStrategy()
scores = strategy.select(models, ScoringContext(
    metadata={"prompt_text": "Solve this integral from 0 to pi"}
))
# → Routes to math-specialized model
"""

EMBEDDED = """
# With optional embedding support (requires sentence-transformers)
strategy = SemanticStrategy(
    model_descriptions={"code-model": "Expert at coding tasks"},
    use_embeddings=True,  # pip install sentence-transformers
)
"""

ROUTED = """
models:
  - {name: math-model, endpoint: "http://a:8000", provider: vllm, tags: {domain: math}}
  - {name: deepseek-coder, endpoint: "http://b:8000", provider: vllm, tags: {domain: coding}}
strategy: semantic
"""

DOMAIN = """
from kvfleet.router.semantic import DomainStrategy

# Explicit domain → model mapping
strategy = DomainStrategy(domain_model_map={
    "coding": "deepseek-coder",
    "medical": "med-llama",
    "creative": "llama-3-70b",
})
# Coding prompt → deepseek-coder, medical → med-llama
"""

DOMAINS = {
    "coding": "Write a Python function that parses JSON and handles the exception",
    "math": "Solve the equation and prove the theorem",
    "creative": "Write a short story, a poem or a haiku about a dragon",
    "medical": "Which symptoms does a patient with this diagnosis have, and which treatment helps?",
    "legal": "Does this clause of the contract make the defendant liable in court?",
    "scientific": "Explain the physics of quantum entanglement and the experiment that showed it",
    "translation": "Translate this sentence from English to French",
    "summarization": "Summarize the following article in three bullet points",
}


async def test_the_example_prints_what_it_says() -> None:
    """Domain and confidence; and the integral goes to the model for mathematics."""
    ran = await run(FLEET + SEMANTIC)
    assert ran.printed == "Domain: coding, confidence: 0.70\n"
    assert ran["scores"][0].model_name == "math-model"
    assert ran["scores"][0].selected


async def test_each_of_the_eight_domains_is_known() -> None:
    """A prompt of each goes where it belongs."""
    classify = (await run(FLEET + SEMANTIC))["classify_domain"]
    assert {domain: classify(prompt)[0] for domain, prompt in DOMAINS.items()} == {domain: domain for domain in DOMAINS}


async def test_a_live_request_goes_where_its_content_belongs() -> None:
    """By the prompt alone; and the trace has the domain, and no word of the prompt."""
    async with live(fleet(ROUTED)) as gateway:
        assert await gateway.served("Solve this integral from 0 to pi") == "math-model"
        assert await gateway.served("Write a Python function to sort a list") == "deepseek-coder"
        (stage,) = [stage for stage in gateway.last.stages if stage.key == "classify.domain"]
        assert "coding" in str(stage.to_dict())
        assert "sort a list" not in str(gateway.last.to_dict())


async def test_the_example_of_embeddings() -> None:
    """With the extra a question in other words is recognised; without it the error names the line that installs it."""
    ran = await run(MODELS + CODE_MODEL + SEMANTIC + EMBEDDED)
    asked = ran["ScoringContext"](metadata={"prompt_text": "Why does my loop never end in Rust?"})
    if has_minilm():
        assert ran["strategy"].select(ran["models"], asked)[0].model_name == "code-model"
    else:
        with pytest.raises(ComponentError, match=r"pip install 'kvfleet\[semantic\]'"):
            ran["strategy"].select(ran["models"], asked)


async def test_domains_are_mapped_to_models() -> None:
    """What the comment says, and the third entry too."""
    ran = await run(FLEET + DOMAIN)

    def goes_to(domain: str) -> str:
        context = ran["ScoringContext"](metadata={"prompt_text": DOMAINS[domain]})
        return str(ran["strategy"].select(ran["models"], context)[0].model_name)

    assert [goes_to(domain) for domain in ("coding", "medical", "creative")] == [
        "deepseek-coder",
        "med-llama",
        "llama-3-70b",
    ]
