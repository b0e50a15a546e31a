"""Every example in the documentation works, every link leads somewhere, and the generated reference is up to date."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from kvfleet.plugin.manager import ComponentTable, discover
from tests.docs.pages import ROOT, blocks_of
from tests.docs.running import Page

DOCS = ROOT / "docs"


def generator() -> ModuleType:
    """`docs/generate.py`, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("kvfleet_docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = generator()
GENERATED = [DOCS / "reference" / name for name in GENERATOR.PAGES]
WRITTEN = sorted({ROOT / "README.md", *DOCS.rglob("*.md")} - set(GENERATED))
LINKED = sorted({ROOT / "README.md", *DOCS.rglob("*.md")})

SKIPPED = [
    ("README.md", "runs the whole loop, these tests included"),
    ("docs/explanation/gateway-cost.md", "starts other projects' gateways"),
    ("docs/explanation/peers.md", "starts other projects' gateways"),
    *[("docs/how-to/engines.md", "starts an engine")] * 6,
    ("docs/how-to/providers.md", "needs the network"),
    ("docs/index.md", "stands in the README too, where it is run"),
]
"""Every example that is not run, by page and reason. Keep it short: what is not run is soon wrong."""


def name_of(page: Path) -> str:
    """A page's name from the repository's root."""
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def table() -> ComponentTable:
    """The installed components."""
    return discover(environ={})


@pytest.fixture(scope="session")
def ran(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, table: ComponentTable
) -> Mapping[Path, Future[None]]:
    """What came of each page that this session looks at; side by side, because pages wait for processes most of the time."""
    wanted = [item.callspec.params.get("page") for item in request.session.items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(4) as threads:
        pages = [page for page in WRITTEN if page in wanted]
        return {page: threads.submit(run_page, page, tmp_path_factory.mktemp(page.stem), table) for page in pages}


def run_page(page: Path, folder: Path, table: ComponentTable) -> None:
    """Run a page's examples, from its top to its end."""
    with Page(folder, table) as running:
        for block in blocks_of(page):
            running.run(block)


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("bash")), reason="the examples need bash and curl")
@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_the_examples_of_a_page_work(page: Path, ran: Mapping[Path, Future[None]]) -> None:
    """A reader who does what the page says, from its top to its end, sees what it shows."""
    ran[page].result()


def test_what_is_not_run_is_listed() -> None:
    """An example is skipped for a written reason, and nobody skips one by the way."""
    blocks = [block for page in WRITTEN for block in blocks_of(page)]
    assert [(block.page, block.rest) for block in blocks if block.word == "skip"] == SKIPPED


def test_there_are_examples() -> None:
    """Tutorial and guides are made of examples; a reader of blocks that finds none would let everything pass."""
    counted = {name_of(page): len(list(blocks_of(page))) for page in WRITTEN}
    few = {page: count for page, count in counted.items() if ("how-to" in page or "tutorial" in page) and count < 3}
    assert few == {}


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs and GitHub make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    """Pages and headings that are linked to are there."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and anchor not in slugs(found)):
            lost.append(target)
    assert lost == []


def test_the_generated_reference_is_up_to_date() -> None:
    """`docs/generate.py` would change nothing."""
    assert GENERATOR.stale() == []
