"""Personal data, residency and tenants, with the page's examples."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.config.schema import TenantConfig
from kvfleet.policy.pii import PIIDetector
from kvfleet.policy.residency import ResidencyEngine, ResidencyRule
from kvfleet.policy.tenant import TenantManager

DETECTOR = PIIDetector()


@pytest.mark.parametrize(
    ("text", "types"),
    [
        ("Email me at user@example.com, SSN: 123-45-6789", ["email", "ssn"]),
        ("Call (555) 123-4567 or +1 555-123-4567", ["phone_us"]),
        ("card 4111 1111 1111 1111", ["credit_card"]),
        ("order 4111 1111 1111 1112", []),
        ("zeros 0000 0000 0000 0000", []),
        ("host 10.0.0.1", ["ip_address"]),
        ("version 1.2.3.400", []),
        ("born 04/01/1980", ["date_of_birth"]),
        ("on 13/45/1980", []),
        ("Passport no: X1234567", ["passport"]),
        ("IBAN DE89 3704 0044 0532 0130 00", ["iban"]),
        ("IBAN GB82 WEST 1234 5698 7654 33", []),
        ("key sk-abcdefghijklmnop1234", ["api_key"]),
        ("key AKIA" + "ABCD1234" * 2, ["api_key"]),
        ("key AIza" + "x" * 35, ["api_key"]),
        ("key ghp_" + "a1" * 18, ["api_key"]),
        ("the sk-learn package, task-1234567890123456789", []),
        ("SSN 000-12-3456", []),
        ("SSN 900-12-3456", []),
        ("part 1234-56-7890-1", []),
        ("address 256.1.1.1", []),
        ("card 4111-1111-1111-1111, again 5500 0000 0000 0004", ["credit_card"]),
        ("mail o'neil+tag@mail.example.co.uk!", ["email"]),
        ("user@localhost", []),
        ("٤١١١ in other digits is no card", []),
        ("nothing personal here", []),
        ("", []),
    ],
)
def test_detection(text: str, types: list[str]) -> None:
    """Each type is found where it is, and not where a check digit or a range says no."""
    assert DETECTOR.detect(text).pii_types == types
    assert DETECTOR.has_pii(text) is bool(types)


def test_redaction_as_on_the_page() -> None:
    """The find is replaced and its type kept."""
    assert DETECTOR.redact("Call (555) 123-4567 for info").redacted_text == "Call [REDACTED](phone_us) for info"


def test_matches_say_where() -> None:
    """A match carries type, text and place."""
    (match,) = DETECTOR.detect("to a@b.co now").matches
    assert match == {"type": "email", "value": "a@b.co", "start": 3, "end": 9}


def test_finds_do_not_overlap() -> None:
    """Each piece of text is one find, so that it is replaced once."""
    result = DETECTOR.redact("IBAN DE89 3704 0044 0532 0130 00, SSN 123-45-6789, a@b.co")
    assert result.redacted_text == "IBAN [REDACTED](iban), SSN [REDACTED](ssn), [REDACTED](email)"
    assert result.pii_types == ["email", "ssn", "iban"]


def test_several_texts_are_looked_through_together() -> None:
    """Their types, in the detector's order."""
    assert DETECTOR.detect_all(["123-45-6789", "", "a@b.co"]).pii_types == ["email", "ssn"]


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "a.",
        "1",
        "1-",
        "1 ",
        "AB12 ",
        "passport ",
        "a@",
        "a@a.",
        " ",
        "1.",
        "DE89370400440532013000X",
        "(555) 123-",
        "sk-",
        "é",
    ],
)
def test_no_text_makes_a_pattern_run_away(piece: str) -> None:
    """Twice the text takes about twice the time, and not its square: so no attacker can stop the gateway."""
    short, long = piece * (8192 // len(piece)), piece * (65536 // len(piece))

    def time_of(text: str) -> float:
        def once() -> float:
            begin = time.process_time()
            DETECTOR.detect(text)
            return time.process_time() - begin

        return min(once() for _ in range(3))

    assert time_of(long) < 8 * 6 * time_of(short) + 0.02


@given(st.text(alphabet="0123456789-. @aAbB+()/:", max_size=200))
def test_redacted_text_is_the_text_without_the_finds(text: str) -> None:
    """Whatever the text: finds are where they say, and nothing else changes."""
    result = DETECTOR.redact(text, "#")
    rest, at = "", 0
    for match in result.matches:
        assert text[match["start"] : match["end"]] == match["value"]
        rest += text[at : match["start"]] + f"#({match['type']})"
        at = match["end"]
    assert result.redacted_text == rest + text[at:]
    assert result.has_pii is DETECTOR.has_pii(text) is bool(result.matches)


def test_the_repr_shows_no_text() -> None:
    """A result in a log or traceback gives nothing away."""
    assert repr(DETECTOR.redact("SSN 123-45-6789")) == "PIIDetectionResult(pii_types=['ssn'])"


def test_the_order_of_types_is_the_detectors() -> None:
    """Not the text's."""
    assert DETECTOR.detect("123-45-6789 then a@b.co").pii_types == ["email", "ssn"]


RULE = ResidencyRule(
    name="eu-data-stays-in-eu",
    source_regions=("eu-west-1", "eu-central-1"),
    allowed_model_regions=("eu-west-1", "eu-central-1"),
    blocked_providers=("openai_compat", "bedrock"),
)


@pytest.mark.parametrize(
    ("source", "region", "provider", "complies"),
    [
        ("eu-west-1", "eu-west-1", "vllm", True),
        ("eu-west-1", "us-east-1", "vllm", False),
        ("eu-west-1", "", "vllm", False),
        ("eu-west-1", "eu-west-1", "openai_compat", False),
        ("us-east-1", "us-east-1", "openai_compat", True),
    ],
)
def test_residency(source: str, region: str, provider: str, complies: bool) -> None:
    """Data stays in its regions and off blocked providers; a model of unknown region is not in any."""
    assert ResidencyEngine(rules=[RULE]).is_compliant(source, region, provider) is complies


def test_several_residency_rules_all_hold() -> None:
    """The allowed regions are those that every rule allows."""
    strict = ResidencyRule(name="here", source_regions=("eu-west-1",), allowed_model_regions=("eu-west-1",))
    engine = ResidencyEngine([RULE, strict])
    assert engine.get_allowed_regions("eu-west-1") == {"eu-west-1"}
    assert engine.get_allowed_regions("us-east-1") is None
    assert engine.get_blocked_providers("eu-west-1") == {"openai_compat", "bedrock"}


MODELS = ["llama-8b", "llama-70b", "gpt-4o"]


def test_preferred_models_exclude_the_others() -> None:
    """The page's example."""
    manager = TenantManager(tenants={"team-ml": TenantConfig(name="ML Team", preferred_models=("llama-70b",))})
    assert manager.filter_models_for_tenant("team-ml", MODELS) == ["llama-70b"]


def test_preferred_models_that_are_not_there_exclude_nobody() -> None:
    """A preference is not a demand."""
    manager = TenantManager({"t": TenantConfig(preferred_models=("gone",), blocked_models=("gpt-4o",))})
    assert manager.filter_models_for_tenant("t", MODELS) == ["llama-8b", "llama-70b"]


def test_blocked_beats_preferred() -> None:
    """A model that is both is blocked."""
    manager = TenantManager({"t": TenantConfig(preferred_models=("gpt-4o",), blocked_models=("gpt-4o",))})
    assert manager.filter_models_for_tenant("t", MODELS) == ["llama-8b", "llama-70b"]


def test_unknown_tenants() -> None:
    """They get nothing, unless the configuration lets them in; without tenants nobody is unknown."""
    known = {"t": TenantConfig()}
    assert TenantManager(known).filter_models_for_tenant("x", MODELS) == []
    assert TenantManager(known).excluded("", MODELS)["gpt-4o"] == ("the request names no tenant", "unknown_tenant")
    assert TenantManager(known, refuses_unknown=False).filter_models_for_tenant("x", MODELS) == MODELS
    assert TenantManager({}).filter_models_for_tenant("x", MODELS) == MODELS
    may = [TenantManager(t, refuses_unknown=r).may_send("x", "public") for t in ({}, known) for r in (True, False)]
    assert may == [True, True, False, True]


def test_a_tenant_sends_only_its_data_classes() -> None:
    """Public and internal unless it says otherwise."""
    manager = TenantManager({"t": TenantConfig(), "u": TenantConfig(allowed_data_classes=("restricted",))})
    assert [manager.may_send("t", name) for name in ("public", "internal", "confidential")] == [True, True, False]
    assert [manager.may_send("u", name) for name in ("public", "restricted")] == [False, True]
    assert (manager.get_tenant("u"), manager.get_tenant("v")) == (manager.tenants["u"], None)
