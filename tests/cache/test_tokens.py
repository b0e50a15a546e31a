"""Prompts as tokens, and only what is new of them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from kvfleet.adapters.call import Operation
from kvfleet.cache.chat_template import ChatTemplate, UnrenderableError
from kvfleet.cache.tokens import LocalTokenizer, SegmentCache, given_tokens, packed
from kvfleet.errors import ComponentError
from tests.cache.tokenizing import KINDS, TEMPLATE, save

USER = {"role": "user", "content": "Hello there."}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind."""
    base = tmp_path_factory.mktemp("tokenizers")
    return {kind: save(base / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, LocalTokenizer]:
    """A tokenizer of each kind."""
    return {kind: LocalTokenizer.load(folder) for kind, folder in folders.items()}


@pytest.fixture
def tokenizer(folders: dict[str, Path]) -> LocalTokenizer:
    """A fresh one."""
    return LocalTokenizer.load(folders["byte_level"])


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    """A chat's body."""
    return {"messages": list(messages), **more}


def ids(tokens: bytes) -> list[int]:
    """Token ids."""
    return list(struct.unpack(f"<{len(tokens) // 4}I", tokens))


class TestPieces:
    """A prompt cut at its special tokens."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_may_be_cut(self, loaded: dict[str, LocalTokenizer], kind: str) -> None:
        """It was tried when it was loaded."""
        assert loaded[kind].cuts

    @settings(max_examples=120, deadline=None)
    @given(
        st.sampled_from(sorted(KINDS)),
        st.lists(
            st.sampled_from(
                [
                    "<|im_start|>",
                    "<|im_end|>",
                    "<|im|>",
                    "<mask>",
                    "<tool>",
                    "<|im_start|>x",
                    " ",
                    "\n",
                    "<|im",
                    "Hello",
                ]
            )
            | st.text(max_size=6),
            max_size=12,
        ),
    )
    def test_cutting_changes_nothing(self, loaded: dict[str, LocalTokenizer], kind: str, parts: list[str]) -> None:
        """Whatever stands where."""
        made, text = loaded[kind], "".join(parts).encode("utf-8", "ignore").decode()
        assert made._in_pieces(text) == made._whole(text)

    def test_a_growing_conversation_costs_its_end(self, tokenizer: LocalTokenizer) -> None:
        """What was seen before is not tokenised again."""
        long = {"role": "system", "content": "words and more " * 300}
        first = tokenizer.tokenise(Operation.CHAT, chat(long, USER))
        assert tokenizer.tokenised > 4000
        before = tokenizer.tokenised
        answer, more = {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "More."}
        second = tokenizer.tokenise(Operation.CHAT, chat(long, USER, answer, more))
        assert tokenizer.tokenised - before < 60
        assert second.startswith(first)
        assert ids(second) == ids(tokenizer._whole(tokenizer._template.render(chat(long, USER, answer, more))))  # type: ignore[union-attr]

    def test_a_tokenizer_without_special_tokens_is_used_whole(self, tmp_path: Path) -> None:
        """There is nowhere to cut."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        plain = Tokenizer(models.WordLevel({"Hello": 0, "[UNK]": 1}, unk_token="[UNK]"))
        plain.pre_tokenizer = pre_tokenizers.Whitespace()
        plain.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        made = LocalTokenizer.load(tmp_path)
        assert not made.cuts
        assert ids(made.tokenise(Operation.CHAT, chat({"role": "user", "content": "Hello you"}))) == [0, 1]


class TestPrompts:
    """Requests of each kind."""

    def test_a_chat(self, tokenizer: LocalTokenizer) -> None:
        """As the template lays it out, tools first."""
        found = tokenizer.tokenise(Operation.CHAT, chat(USER, tools=[{"type": "search"}]))
        text = tokenizer._tokenizer.decode(ids(found), skip_special_tokens=False)
        assert text == (
            '<|im_start|>tools\n[{"type": "search"}]<|im_end|>\n<|im_start|>user\nHello there.<|im_end|>\n'
            "<|im_start|>assistant\n"
        )

    def test_a_completion(self, tokenizer: LocalTokenizer) -> None:
        """Its text as it is."""
        found = tokenizer.tokenise(Operation.COMPLETION, {"prompt": "Hello there."})
        assert found == tokenizer._whole("Hello there.")

    @pytest.mark.parametrize(
        ("operation", "body"),
        [
            (Operation.COMPLETION, {"prompt": ["one", "two"]}),
            (Operation.COMPLETION, {}),
            (Operation.EMBEDDING, {"input": "text"}),
            (Operation.CHAT, chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]})),
            (Operation.CHAT, chat("text")),
            (Operation.CHAT, chat(USER, continue_final_message=True)),
            (Operation.CHAT, chat(USER, chat_template="{{ messages }}")),
        ],
    )
    def test_what_cannot_be_made_here(self, tokenizer: LocalTokenizer, operation: Operation, body: Any) -> None:
        """Is said so."""
        with pytest.raises(UnrenderableError):
            tokenizer.tokenise(operation, body)

    def test_a_prompt_given_as_tokens(self) -> None:
        """Needs no tokenizer."""
        assert given_tokens(Operation.COMPLETION, {"prompt": [1, 2]}) == packed([1, 2])
        assert given_tokens(Operation.COMPLETION, {"prompt": [[1, 2]]}) == packed([1, 2])
        for prompt in ("text", [], [[1], [2]], [1, "a"], [True], [-1], [2**40], None):
            assert given_tokens(Operation.COMPLETION, {"prompt": prompt}) is None
        assert given_tokens(Operation.CHAT, {"prompt": [1]}) is None


class TestTemplates:
    """Chat templates."""

    def render(self, tmp_path: Path, template: Any, body: dict[str, Any], **config: Any) -> str:
        """What a template makes of a request."""
        made = ChatTemplate.load(save(tmp_path, template=template, **config))
        assert made is not None
        return made.render(body)

    def test_the_words_of_the_tokenizer(self, tmp_path: Path) -> None:
        """Special tokens by name, and what a request adds."""
        body = chat(USER, chat_template_kwargs={"think": True}, add_generation_prompt=False)
        found = self.render(tmp_path, "{{ bos_token }}{{ think }}{{ add_generation_prompt }}", body)
        assert found == "<|im|>TrueFalse"

    def test_several_by_name(self, tmp_path: Path) -> None:
        """The usual one is taken."""
        named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
        assert self.render(tmp_path, named, chat(USER)) == "d"

    def test_arguments_become_objects(self, tmp_path: Path) -> None:
        """As engines make them; what is no JSON stays."""
        call = {"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        assert "Paris<|im_end|>" in self.render(tmp_path, TEMPLATE, chat(message))
        odd = {"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}, 3]}
        assert self.render(tmp_path, "{{ messages[0].tool_calls[0].function.arguments }}", chat(odd)) == "{"

    def test_tools_are_as_engines_read_them(self, tmp_path: Path) -> None:
        """One order, null for what is absent, and nothing that is not known."""
        tool = {
            "function": {"parameters": {"b": 1, "a": 2}, "name": "f", "odd": 1, "strict": True},
            "type": "function",
            "odd": 2,
        }
        found = self.render(tmp_path, "{{ tools | tojson }}", chat(USER, tools=[tool]))
        assert found == (
            '[{"type": "function", "function": {"name": "f", "description": null, "parameters": {"b": 1, "a": 2}, '
            '"strict": true}}]'
        )
        assert self.render(tmp_path, "{{ tools }}", chat(USER, tools=[])) == "None"

    def test_a_developer(self, tmp_path: Path) -> None:
        """Is the system, unless the template knows developers."""
        says = chat({"role": "developer", "content": "x"})
        assert self.render(tmp_path / "1", "{{ messages[0].role }}", says) == "system"
        assert self.render(tmp_path / "2", "{# developer #}{{ messages[0].role }}", says) == "developer"

    def test_texts_in_parts(self, tmp_path: Path) -> None:
        """Become one, unless the template takes them apart itself."""
        parts = chat({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})
        assert self.render(tmp_path / "1", "{{ messages[0].content }}", parts) == "a\nb"
        itself = "{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}"
        assert self.render(tmp_path / "2", itself, parts) == "[a][b]"

    def test_what_templates_use(self, tmp_path: Path) -> None:
        """Marks for training, loops that end early, dates, JSON as it is."""
        template = (
            "{% generation %}g{% endgeneration %}{% for i in [1, 2] %}{{ i }}{% break %}{% endfor %}"
            "{{ {'é': '<'} | tojson }}{{ strftime_now('%Y') | length }}"
        )
        assert self.render(tmp_path, template, chat(USER)) == 'g1{"é": "<"}4'

    @pytest.mark.parametrize(
        "template", ["{{ raise_exception('no') }}", "{{ messages[0].x.y }}", "{{ ().__class__.__bases__[0] }}"]
    )
    def test_a_refusal(self, tmp_path: Path, template: str) -> None:
        """Is ours, with nothing of the prompt in it; and the sandbox holds."""
        with pytest.raises(UnrenderableError) as refused:
            self.render(tmp_path, template, chat(USER))
        assert "Hello" not in str(refused.value)

    def test_another_file(self, tmp_path: Path) -> None:
        """Instead of the folder's."""
        (tmp_path / "mine.jinja").write_text("mine")
        made = ChatTemplate.load(save(tmp_path), tmp_path / "mine.jinja")
        assert made is not None
        assert made.render(chat(USER)) == "mine"


class TestLoading:
    """What can be wrong with files."""

    def test_no_file(self, tmp_path: Path) -> None:
        """Is an error of ours."""
        with pytest.raises(ComponentError, match="is no tokenizer"):
            LocalTokenizer.load(tmp_path)

    def test_a_broken_template(self, tmp_path: Path) -> None:
        """Too."""
        with pytest.raises(ComponentError, match="not one"):
            LocalTokenizer.load(save(tmp_path, template="{% if %}"))

    def test_a_broken_config(self, tmp_path: Path) -> None:
        """Too."""
        (save(tmp_path) / "tokenizer_config.json").write_text("{")
        with pytest.raises(ComponentError, match="cannot be read"):
            LocalTokenizer.load(tmp_path)

    def test_no_template(self, tmp_path: Path) -> None:
        """Completions have tokens all the same."""
        made = LocalTokenizer.load(save(tmp_path, template=None))
        assert made.tokenise(Operation.COMPLETION, {"prompt": "Hello"})
        with pytest.raises(UnrenderableError):
            made.tokenise(Operation.CHAT, chat(USER))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 300)), max_size=60))
def test_the_memory_is_held(puts: list[tuple[int, int]]) -> None:
    """The least recently used go first, and what is kept is what was put."""
    cache = SegmentCache(max_bytes=1000)
    for digest, size in puts:
        cache.put(digest, bytes([digest]) * size)
        assert cache.size <= 1000
        found = cache.get(digest)
        assert found is None or set(found) <= {digest}
    assert cache.size == sum(len(t) + 160 for t in cache._kept.values())
