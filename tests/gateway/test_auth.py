"""The gateway's keys: whose each is, and what it opens."""

from __future__ import annotations

import hashlib

import pytest

from kvfleet.config.loader import check_text
from kvfleet.config.schema import FleetConfig, GatewayConfig, KeyConfig, TenantConfig
from kvfleet.errors import AuthenticationError
from kvfleet.gateway.auth import ANYBODY, Caller, Keys, admin_key

UNHELD = "no stage of `pipeline:` holds the key to this;"
TENANTS = ("team-a", "team-b", "team-c")
KEYS = Keys.of(
    GatewayConfig(
        api_key="sk-main",
        api_keys={"team-a": "sk-a", "team-b": "sk-ab", "operator": "sk-op"},
        keys={
            "ci": KeyConfig(key="sk-ci", tenant="team-c"),
            "batch": KeyConfig(sha256=hashlib.sha256(b"sk-batch").hexdigest().upper(), tenant="team-c"),
            "loose": KeyConfig(key="sk-loose"),
            "root": KeyConfig(key="sk-root", role="admin"),
        },
    ),
    "sk-cli",
    tenants=TENANTS,
)


@pytest.mark.parametrize(
    ("header", "caller"),
    [
        (b"Bearer sk-main", Caller("default", is_admin=True)),
        (b"bearer sk-a", Caller("team-a", "team-a")),
        (b"Bearer  sk-ab ", Caller("team-b", "team-b")),
        (b"Bearer sk-op", Caller("operator", is_admin=True)),
        (b"Bearer sk-cli", Caller("command line", is_admin=True)),
        (b"Bearer sk-ci", Caller("ci", "team-c")),
        (b"Bearer sk-batch", Caller("batch", "team-c")),
        (b"Bearer sk-loose", Caller("loose")),
        (b"Bearer sk-root", Caller("root", is_admin=True)),
    ],
)
def test_a_key_is_known_by_its_name_and_opens_what_is_its_own(header: bytes, caller: Caller) -> None:
    """By the key or by its digest; the scheme's case does not matter."""
    assert KEYS.caller(header) == caller


@pytest.mark.parametrize(
    "header", [b"Bearer sk-", b"Bearer sk-mai", b"Bearer sk-mainx", b"Bearer SK-MAIN", b"Bearer \xff\x00' OR 1=1"]
)
def test_a_wrong_key_is_refused(header: bytes) -> None:
    """What only begins like a key, or is longer, or differs in case, is none."""
    with pytest.raises(AuthenticationError) as caught:
        KEYS.caller(header)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


def test_a_digest_is_no_key() -> None:
    """Who has read the file cannot call with what stands there."""
    digest = hashlib.sha256(b"sk-batch").hexdigest()
    with pytest.raises(AuthenticationError):
        KEYS.caller(f"Bearer {digest}".encode())


@pytest.mark.parametrize("header", [None, b"", b"sk-main", b"Basic sk-main", b"Bearer ", b"Bearer"])
def test_no_key_is_told_how_to_send_one(header: bytes | None) -> None:
    """A request without a bearer token learns what is missing."""
    with pytest.raises(AuthenticationError, match="Authorization: Bearer KEY"):
        KEYS.caller(header)


def test_without_keys_anybody_may_call() -> None:
    """Where no key is set, whatever a client sends is ignored, as clients that insist on a key need."""
    keys = Keys.of(GatewayConfig(), tenants=())
    assert not keys
    assert keys.caller(b"Bearer optional") == ANYBODY


def test_keys_are_not_shown() -> None:
    """Neither a key nor its digest stands in a repr."""
    assert repr(KEYS) == "Keys()"
    assert "sk-ci" not in repr(GatewayConfig(keys={"ci": KeyConfig(key="sk-ci")}))


def test_the_operators_key_is_found_for_the_command_line() -> None:
    """Never a tenant's; nothing if the file holds only digests."""
    tenants = {"team-a": TenantConfig()}

    def found(**gateway: object) -> str:
        return admin_key(FleetConfig(tenants=tenants, gateway=GatewayConfig(**gateway)), {})  # type: ignore[arg-type]

    assert found(api_keys={"team-a": "sk-a", "op": "sk-op"}) == "sk-op"
    assert found(keys={"ci": KeyConfig(key="sk-ci"), "root": KeyConfig(key="sk-root", role="admin")}) == "sk-root"
    assert found(keys={"root": KeyConfig(sha256="0" * 64, role="admin")}) == ""


def test_wrong_keys_are_findings() -> None:
    """Each at its place."""
    text = """models: [{name: m, provider: mock}]
tenants: {team: {}}
gateway:
  api_keys: {ci: sk-other}
  keys:
    ci: {key: sk-1}
    none: {tenant: team}
    both: {key: sk-2, sha256: "%s"}
    short: {sha256: abc}
    lost: {key: sk-3, tenant: taem}
    role: {key: sk-4, role: root}
    limited: {key: sk-5, max_concurrent: 2, budget: {enabled: true}}
pipeline: [select.static, execute.fallback]
""" % ("0" * 64)
    _, findings = check_text(text, file="f.yaml", environ={})
    assert [str(finding) for finding in findings if "tenants" not in finding.path] == [
        "f.yaml:9:13: gateway.keys.short.sha256: must be 64 hexadecimal digits, not 'abc'; correct it",
        "f.yaml:11:23: gateway.keys.role.role: 'root' is not allowed here; known: admin, client",
    ]
    sound = text.replace("    short: {sha256: abc}\n", "").replace("    role: {key: sk-4, role: root}\n", "")
    _, findings = check_text(sound, file="f.yaml", environ={})
    assert [str(finding) for finding in findings if finding.path[:1] == ("gateway",)] == [
        "f.yaml:6:5: gateway.keys.ci: another key has this name; rename one of them",
        "f.yaml:7:5: gateway.keys.none: has neither `key` nor `sha256`; give one of them",
        "f.yaml:8:5: gateway.keys.both: has both `key` and `sha256`; give one of them",
        "f.yaml:9:23: gateway.keys.lost.tenant: there is no tenant 'taem'; did you mean team?",
        f"f.yaml:10:26: gateway.keys.limited.max_concurrent: {UNHELD} add `- admit.concurrency`, or remove it",
        f"f.yaml:10:45: gateway.keys.limited.budget: {UNHELD} add `- admit.budget`, or remove it",
    ]


def test_where_the_file_has_digests_the_environment_has_the_operators_key() -> None:
    """A digest is no key to ask with; the variable has one, and is asked first."""
    config = FleetConfig(gateway=GatewayConfig(api_key="sha256:" + "0" * 64))
    assert admin_key(config, {}) == ""
    assert admin_key(config, {"KVFLEET_ADMIN_KEY": "sk-op"}) == "sk-op"
