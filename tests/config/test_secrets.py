"""References to secrets."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from kvfleet.config.secrets import Problem, Secret, SecretReader, is_reference
from kvfleet.errors import PluginError


def test_a_secret_is_its_value_and_does_not_show_it() -> None:
    """It works as a text; only its repr hides it."""
    secret = Secret("s3cret", "env:KEY")
    assert secret == "s3cret"
    assert f"Bearer {secret}" == "Bearer s3cret"
    assert (repr(secret), repr(Secret("x")), repr([secret])) == ("<secret env:KEY>", "<secret>", "[<secret env:KEY>]")


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])  # noqa: S301
def test_a_copied_secret_remembers_its_reference(duplicate: object) -> None:
    """Otherwise a saved copy would lose it."""
    again = duplicate(Secret("x", "env:KEY"))  # type: ignore[operator]
    assert (again, again.reference) == ("x", "env:KEY")


def test_variables_are_read() -> None:
    """Without the white space around the value."""
    found = SecretReader({"KEY": " s3cret\n"}).read("env:KEY")
    assert isinstance(found, Secret)
    assert (found, found.reference) == ("s3cret", "env:KEY")


def test_files_are_read(tmp_path: Path) -> None:
    """Without the newline that editors add."""
    path = tmp_path / "key"
    path.write_text("s3cret\n")
    found = SecretReader({}).read(f"file:{path}")
    assert isinstance(found, Secret)
    assert (found, found.reference) == ("s3cret", f"file:{path}")


def test_the_processes_own_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read when the secret is, not before."""
    reader = SecretReader()
    monkeypatch.setenv("KVFLEET_TEST_KEY", "s3cret")
    assert reader.read("env:KVFLEET_TEST_KEY") == "s3cret"


@pytest.mark.parametrize("text", ["sk-123", "abc:def", "Bearer x", "https://host/path", "", "environ:x"])
def test_what_is_no_reference_is_the_secret(text: str) -> None:
    """A plain secret has no reference."""
    found = SecretReader({}).read(text)
    assert isinstance(found, Secret)
    assert (found, found.reference) == (text, "")
    assert not is_reference(text)


def problem(reader: SecretReader, text: str) -> str:
    """The problem as a finding would print it."""
    found = reader.read(text)
    assert isinstance(found, Problem)
    assert is_reference(text)
    return f"{found.message}; {found.remedy}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("env:KEY", "the environment variable KEY is not set; set KEY, or correct the reference"),
        ("env:EMPTY", "the environment variable EMPTY is empty; set EMPTY, or correct the reference"),
        ("env:A-B", "`env:` must be followed by the name of a variable; write it as in env:API_KEY"),
        ("env:", "`env:` must be followed by the name of a variable; write it as in env:API_KEY"),
        ("file:key", "`file:` must be followed by an absolute path; write it as in file:/run/secrets/api_key"),
        ("vault:kv/x", "no plugin resolves `vault:` references; install one, or use env:NAME or file:/path"),
    ],
)
def test_what_cannot_be_resolved_says_why(text: str, told: str) -> None:
    """And what to do."""
    assert problem(SecretReader({"EMPTY": " "}), text) == told


def test_files_that_are_no_secret_say_why(tmp_path: Path) -> None:
    """Missing, a folder, empty, not text, far too large."""
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b"x" * 70_000)
    at = f"the secret file {tmp_path}"
    fix = "correct the path"
    assert [
        problem(SecretReader(), f"file:{tmp_path}/{name}") for name in ("none", "", "empty", "binary", "large")
    ] == [
        f"{at}/none cannot be read: no such file or directory; {fix}, or its permissions",
        f"{at}/ cannot be read: is a directory; {fix}, or its permissions",
        f"{at}/empty is empty; write the secret into it",
        f"{at}/binary is not UTF-8 text; {fix}",
        f"{at}/large is larger than 65536 bytes; {fix}",
    ]


def test_resolvers_are_asked_in_order() -> None:
    """The first that knows the reference answers; the built-in schemes never reach them."""
    asked: list[str] = []

    def first(reference: str) -> None:
        asked.append(reference)

    def second(reference: str) -> str | None:
        return "s3cret" if reference.startswith("mine:") else None

    reader = SecretReader({"K": "v"}, (first, second))
    found = reader.read("mine:a")
    assert isinstance(found, Secret)
    assert (found, found.reference) == ("s3cret", "mine:a")
    assert reader.read("env:K") == "v"
    assert reader.read("other:a") == "other:a"
    assert asked == ["mine:a", "other:a"]


def test_a_failing_resolver_is_a_problem_without_its_text() -> None:
    """Its message may hold what it was reading."""

    def broken(reference: str) -> str:
        raise RuntimeError("hunter2 is wrong")

    found = SecretReader({}, (broken,)).read("hunter2:x")
    assert found == Problem(
        "the reference cannot be resolved: a plugin failed with RuntimeError", "see `kvfleet plugins`"
    )


def test_our_own_error_of_a_resolver_names_the_plugin() -> None:
    """The plugin manager's text holds no secret, and helps."""

    def broken(reference: str) -> str:
        raise PluginError("plugin vault (kvfleet-vault 1.0) failed on a secret reference (TimeoutError)")

    found = SecretReader({}, (broken,)).read("vault:x")
    assert found == Problem(
        "the reference cannot be resolved: plugin vault (kvfleet-vault 1.0) failed on a secret reference (TimeoutError)",
        "see `kvfleet plugins`",
    )
