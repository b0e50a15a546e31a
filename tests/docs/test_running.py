"""What runs the examples finds examples that do not work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfleet.plugin.manager import discover
from tests.docs.pages import Block, ExampleError, blocks_of, commands_of, matches
from tests.docs.running import Page


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """A page of its own folder."""
    with Page(tmp_path, discover(environ={})) as page:
        yield page


def block(language: str, text: str, directive: str = "") -> Block:
    """A block on a page that is not there."""
    return Block("page.md", 1, language, text, directive)


@pytest.mark.parametrize(
    ("shown", "printed", "does"),
    [
        (["one", "two"], ["one", "two"], True),
        (["one", "two"], ["one", "three"], False),
        (["one"], ["one", "two"], False),
        (["one", "…"], ["one", "two", "three"], True),
        (["…", "three"], ["one", "two", "three"], True),
        (["one", "…", "three"], ["one", "three"], True),
        (["one", "…", "four"], ["one", "two", "three"], False),
        (["a … c"], ["a b c"], True),
        (["a … c"], ["a b d"], False),
        (["in 12 ms", "id 0123456789abcdef"], ["in 3.4 ms", "id fedcba9876543210"], True),
        (["in 12 ms"], ["in 12 tokens"], False),
        (["a    b"], ["a b"], True),
    ],
)
def test_what_is_shown_is_compared_with_what_is_printed(shown: list[str], printed: list[str], does: bool) -> None:
    """`…` stands for anything, a line of it for any lines; what changes from run to run does not count."""
    assert matches(shown, printed) is does


def test_blocks_are_read_with_their_directives(tmp_path: Path) -> None:
    """A directive belongs to the next block alone, and a block within a list loses its indentation."""
    path = tmp_path / "page.md"
    path.write_text("<!-- test: status 1 -->\n```console\n$ false\n```\n\n- item\n\n  ```text\n  words\n  ```\n")
    assert list(blocks_of(path)) == [
        Block("page.md", 2, "console", "$ false\n", "status 1"),
        Block("page.md", 8, "text", "words\n", ""),
    ]


def test_commands_are_told_from_what_they_print() -> None:
    """A backslash continues a command; what follows it up to the next `$` is its output."""
    text = "$ echo a \\\n    b\na b\n$ true\n"
    assert list(commands_of(text)) == [("echo a \\\n    b", ["a b"]), ("true", [])]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (block("console", "$ echo one\ntwo\n"), "`echo one` printed"),
        (block("console", "$ false\n"), "ended with 1, not 0"),
        (block("console", "$ true\n", "status 1"), "ended with 0, not 1"),
        (block("console", "no command\n"), "no line begins with"),
        (block("python", "raise SystemExit(2)\n"), "the program failed"),
        (block("yaml", "models: [{name: a, provider: nobody}]\n"), "the fleet file has findings"),
        (block("yaml", "a: [\n"), "no YAML"),
        (block("json", "{"), "no JSON"),
        (block("toml", "a ="), "no TOML"),
        (block("ruby", "puts 1\n"), "the language must be one of"),
        (block("text", "words\n", "wave"), "no directive is called 'wave'"),
    ],
)
def test_an_example_that_does_not_work_is_found(page: Page, wrong: Block, says: str) -> None:
    """The error names the page and the line."""
    with pytest.raises(ExampleError, match=r"page\.md:1: ") as caught:
        page.run(wrong)
    assert says in str(caught.value)


def test_a_page_remembers(page: Page) -> None:
    """Folder and exported variables stay from command to command, files from block to block."""
    page.run(block("python", "# made/hello.py\nprint('hello')\n"))
    page.run(block("console", "$ cd made\n$ export NAME=kvfleet\n"))
    page.run(block("console", "$ python hello.py\nhello\n$ echo $NAME\nkvfleet\n"))


def test_a_server_is_ended_with_its_page(tmp_path: Path) -> None:
    """What a page starts in the background listens while the page runs, and not after."""
    with Page(tmp_path, discover(environ={})) as page:
        page.run(block("console", "$ python -m http.server --bind 127.0.0.1 -- " + str(page.ports[8000]), "background"))
        assert page.listens(8000)
    assert not page.listens(8000)
