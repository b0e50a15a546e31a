"""Writes the skeleton of a plugin: a distribution that works, with tests that pass."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import keyword
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template

import attrs

from kvfleet.plugin.contract import Kind

__all__ = ["KINDS", "PluginName", "template", "write_plugin"]

KINDS: Mapping[str, Kind] = {
    "strategy": Kind.SELECT,
    "filter": Kind.FILTER,
    "scorer": Kind.SCORE,
    "classifier": Kind.CLASSIFY,
}
"""What a skeleton can be made for, by the word people use."""

_PREFIX = "kvfleet-"
_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")


@attrs.frozen
class PluginName:
    """A plugin's name in its various spellings, made from the one the author chose.

    >>> name = PluginName.of("kvfleet-least-busy")
    >>> name.distribution, name.module, name.component, name.cls
    ('kvfleet-least-busy', 'kvfleet_least_busy', 'least_busy', 'LeastBusy')
    """

    words: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> PluginName:
        """Read a name, with or without ``kvfleet-`` before it.

        Raises:
            ValueError: if it cannot name a distribution, a module and a class.
        """
        if not _NAME.fullmatch(text):
            raise ValueError(f"{text!r} must be lower-case words and digits joined by hyphens, as in least-busy")
        short = text.replace("_", "-").removeprefix(_PREFIX)
        if keyword.iskeyword(short) or not short or short == "kvfleet":
            raise ValueError(f"{text!r} cannot be a plugin's name")
        return cls(tuple(short.split("-")))

    @property
    def distribution(self) -> str:
        """As packaging has it."""
        return _PREFIX + "-".join(self.words)

    @property
    def module(self) -> str:
        """As Python imports it."""
        return self.distribution.replace("-", "_")

    @property
    def component(self) -> str:
        """As YAML has it."""
        return "_".join(self.words)

    @property
    def cls(self) -> str:
        """As the class is called."""
        return "".join(word.capitalize() for word in self.words)


def template(name: str) -> str:
    """The text of a packaged template."""
    return (importlib.resources.files("kvfleet.cli") / "templates" / name).read_text(encoding="utf-8")


def write_plugin(name: PluginName, kind: str, target: Path) -> tuple[Path, ...]:
    """Write the skeleton.

    Args:
        name: The plugin's.
        kind: One of `KINDS`.
        target: The directory to write; it must be absent or empty.

    Returns:
        The files, as written.

    Raises:
        FileExistsError: if there is something in the directory.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(17, "there is something already; choose another name or --path", str(target))
    words = {
        "distribution": name.distribution,
        "module": name.module,
        "name": name.component,
        "cls": name.cls,
        "kind": kind,
        "key": f"{KINDS[kind]}.{name.component}",
        "version": _minor(importlib.metadata.version("kvfleet")),
    }
    files = {
        "pyproject.toml": "pyproject.toml.tmpl",
        "README.md": "README.md.tmpl",
        f"src/{name.module}/__init__.py": f"{kind}.py.tmpl",
        f"tests/test_{name.component}.py": f"test_{kind}.py.tmpl",
        "pipeline.yaml": f"{kind}.yaml.tmpl",
    }
    written = []
    for path, source in files.items():
        file = target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(template(f"plugin/{source}")).substitute(words), encoding="utf-8")
        written.append(file)
    marker = target / f"src/{name.module}/py.typed"
    marker.touch()
    return (*written, marker)


def _minor(version: str) -> str:
    """``0.12`` of ``0.12.3``."""
    return ".".join(version.split(".")[:2])
