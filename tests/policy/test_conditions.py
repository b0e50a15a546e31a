"""The condition language: what holds, and what a mistake is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfleet.policy.conditions import ConditionError, PolicyContext, parse

CONTEXT = PolicyContext(
    data_class="confidential",
    tenant_id="research",
    source_region="eu-west-1",
    tags={"domain": "medical"},
    has_pii=True,
    pii_types=("email", "ssn"),
    tokens=9000,
    headers={"x-purpose": "audit"},
    domain="legal",
    route="billing",
)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("always", True),
        ("data_class == confidential", True),
        ("data_class == CONFIDENTIAL", True),
        ("data_class != public", True),
        ("data_class >= confidential", True),
        ("data_class > confidential", False),
        ("data_class < restricted", True),
        ("data_class in [public, internal]", False),
        ("data_class not in [public, internal]", True),
        ("has_pii", True),
        ("has_pii == true", True),
        ("has_pii == false", False),
        ("not has_pii", False),
        ("'ssn' in pii_types", True),
        ("passport in pii_types", False),
        ("passport not in pii_types", True),
        ("'ssn' not in pii_types", False),
        ("us_bank_account in pii_types", False),
        ("pii_types in [iban, email]", True),
        ("pii_types != email", False),
        ("pii_types == email", True),
        ("tenant == research", True),
        ('tenant_id == "research"', True),
        ("source_region == eu-west-1", True),
        ("region in [us-east-1, eu-west-1]", True),
        ("tags.domain == medical", True),
        ("tags.missing == ''", True),
        ("headers.X-Purpose == audit", True),
        ("tokens > 8000", True),
        ("tokens <= 8000", False),
        ("domain == legal", True),
        ("domain in [coding, math]", False),
        ("route == billing", True),
        ("route != none and not route in [careers]", True),
        ("has_pii and tenant == other", False),
        ("tenant == other or has_pii", True),
        ("tenant == other and has_pii or data_class == confidential", True),
        ("tenant == other and (has_pii or data_class == confidential)", False),
        ("not (tenant == other or tokens < 5)", True),
    ],
)
def test_conditions(text: str, holds: bool) -> None:
    """Each form of the language means what it says; `and` binds closer than `or`."""
    assert parse(text)(CONTEXT) is holds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dataclass == public", "unknown name 'dataclass'; did you mean data_class? (column 1)"),
        ("data_class == privat", "'privat' is no data class; known: confidential, internal, public, restricted"),
        ("tokens > many", "'many' is not a number (column 10)"),
        ("has_pii == yes", "it can only be == or != true or false (column 12)"),
        ("tenant > a", "texts have no order; only data_class and tokens do (column 10)"),
        ("data_class", "data_class must be compared with something (column 1)"),
        ("data_class ==", "the condition ends where a value should stand (column 14)"),
        ("data_class == public tenant", "unexpected 'tenant'; join conditions with and / or (column 22)"),
        ("domain == leagl", "there is no domain 'leagl'; did you mean legal? (column 11)"),
        ("domain > legal", "domains have no order (column 10)"),
        ("route < billing", "texts have no order"),
        ("tokens < 0", "tokens can never be < 0 (column 10)"),
        ("tokens == 1.5", "tokens can never be == 1.5 (column 11)"),
        ("data_class < public", "data_class can never be < public (column 14)"),
        ("data_class > restricted", "data_class can never be > restricted (column 14)"),
        ("emial in pii_types", "'emial' is no type of personal data; did you mean email? (column 1)"),
        ("pii_types == credit_cards", "'credit_cards' is no type of personal data; did you mean credit_card?"),
        ("pii_types < email", "pii_types has no order (column 1)"),
        ("data_class in [public", "']' should stand here (column 22)"),
        ("(has_pii", "')' should stand here (column 9)"),
        ("has_pii ; drop", "unexpected ';' (column 9)"),
        ("public == data_class", "unknown name 'public'"),
        ("'a' in tenant", "tenant is not a list; write tenant in [a, b] (column 8)"),
        ("has_pii in [true]", "has_pii is true or false; a list makes no sense (column 1)"),
        ("", "the condition ends where a name should stand (column 1)"),
        ("not " * 40 + "has_pii", "the condition is nested more than 32 deep"),
        ("x" * 2001, "the condition is longer than 2000 characters"),
    ],
)
def test_mistakes(text: str, said: str) -> None:
    """A condition that cannot be read, or can never hold, says what is wrong and where."""
    with pytest.raises(ConditionError) as raised:
        parse(text)
    assert said in str(raised.value)


def test_a_condition_knows_the_names_it_reads() -> None:
    """The build learns from them which facts it needs."""
    assert parse("has_pii or tags.a == b and tokens > 1").names == {"has_pii", "tags", "tokens"}


@given(st.text(max_size=80))
def test_any_text_is_either_a_condition_or_a_condition_error(text: str) -> None:
    """Nothing else can come out of the parser, whatever goes in."""
    try:
        condition = parse(text)
    except ConditionError as error:
        assert error.column >= 1  # noqa: PT017 - both outcomes are fine, and each has its own promise
    else:
        assert condition(CONTEXT) in (True, False)


def test_a_data_class_that_does_not_exist_counts_as_the_most_sensitive() -> None:
    """So a rule that guards sensitive data holds for it: mistakes fail closed."""
    context = PolicyContext(data_class="top-secret")
    held = [parse(f"data_class {rest}")(context) for rest in (">= confidential", "<= restricted", "== restricted")]
    assert held == [True, False, False]
