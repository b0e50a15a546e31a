"""Policy Engine: personal data, data classes, and rules."""

from __future__ import annotations

from kvfleet.config.schema import ModelConfig
from tests.page.fleets import QUICKSTART
from tests.page.living import live
from tests.page.printed import findings, fleet, run

PII = """
from kvfleet.policy.pii import PIIDetector

detector = PIIDetector()

# Detect PII
result = detector.detect("Email me at user@example.com, SSN: 123-45-6789")
print(f"Has PII: {result.has_pii}")
print(f"Types: {result.pii_types}")
# → Has PII: True
# → Types: ['email', 'ssn']

# Redact PII
redacted = detector.redact("Call (555) 123-4567 for info")
print(redacted.redacted_text)
# → Call [REDACTED](phone_us) for info
"""

RULES = """\
# In fleet.yaml
policy:
  enabled: true
  pii_detection: true
  default_data_class: internal
  rules:
    - name: confidential-to-local
      condition: "data_class == confidential"
      action: require_model
      target_models: [llama-3-local]
      priority: 1
"""

ENGINE = """
from kvfleet.policy.engine import PolicyEngine, PolicyContext
from kvfleet.config.schema import PolicyConfig, PolicyRule

engine = PolicyEngine(PolicyConfig(
    enabled=True,
    pii_detection=True,
    rules=[
        PolicyRule(
            name="pii-to-private",
            condition="has_pii == true",
            action="require_private",
        ),
    ],
))

# Evaluate — PII triggers private-only routing
filtered, decisions = engine.evaluate(
    candidates=all_models,
    context=PolicyContext(has_pii=True),
)
for d in decisions:
    print(f"[{d.rule_name}] {'PASS' if d.passed else 'BLOCK'}: {d.reason}")
"""

LOCAL = """\
models:
  - {name: llama-3-local, endpoint: "http://gpu-3:8000", provider: vllm}
"""
"""The model that the page's rule speaks of."""


async def test_personal_data_is_found_and_taken_out() -> None:
    """All three lines as the page prints them."""
    assert (await run(PII)).lines == [
        "Has PII: True",
        "Types: ['email', 'ssn']",
        "Call [REDACTED](phone_us) for info",
    ]


async def test_the_engine_keeps_personal_data_on_private_models() -> None:
    """Models of one's own remain, and the decision that blocked the others says so."""
    models = [
        ModelConfig(name="ours", endpoint="http://gpu-1:8000", provider="vllm"),
        ModelConfig(name="theirs", endpoint="https://api.openai.com", provider="openai_compat"),
    ]
    ran = await run(ENGINE, all_models=models)
    assert [model.name for model in ran["filtered"]] == ["ours"]
    assert any(line.startswith("[pii_detection] BLOCK: ") for line in ran.lines)
    assert any(line.startswith("[pii-to-private] ") for line in ran.lines)


async def test_a_live_request_obeys_the_rule() -> None:
    """Confidential requests go to the model that the rule requires, and the trace names the rule."""
    async with live(fleet(QUICKSTART, LOCAL, RULES)) as gateway:
        assert await gateway.served(X_KVFleet_Data_Class="confidential") == "llama-3-local"
        assert {drop.rule for drop in gateway.last.drops} == {"confidential-to-local", "data_class_enforcement"}
        assert {drop.rule for drop in gateway.last.drops if drop.model == "llama-3-8b"} == {"confidential-to-local"}
        assert await gateway.served() != "gpt-4o-fallback"


async def test_a_live_request_with_personal_data_stays_private() -> None:
    """Though it may be called public: what is found in the prompt counts."""
    async with live(fleet(QUICKSTART, LOCAL, RULES)) as gateway:
        body = {"model": "gpt-4o-fallback", "messages": [{"role": "user", "content": "My SSN is 123-45-6789"}]}
        answer = await gateway.ask(body, X_KVFleet_Data_Class="public")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "policy_excluded_all")
        assert [drop.rule for drop in gateway.last.drops] == ["pii_detection"]
        assert gateway.asked_of("gpt-4o-fallback") == 0


def test_a_rule_for_a_model_that_is_not_there_is_a_finding() -> None:
    """As the page's rule is without its model."""
    (finding,) = findings(QUICKSTART, RULES)
    assert "llama-3-local" in finding
