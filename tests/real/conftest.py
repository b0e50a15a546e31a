"""Real engines for the tests that are marked `real`; one engine at a time, each module's ended before the next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real import engines
from tests.real.engines import Engine
from tests.real.environments import EngineError, NotInstallableError

HERE = Path(__file__).parent

pytest.register_assert_rewrite("tests.real.contract")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs real engines."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.real)


def running(engine: Engine) -> Iterator[Engine]:
    """The engine, for as long as a module's tests run."""
    try:
        engine.start()
    except EngineError as error:
        pytest.fail(str(error), pytrace=False)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[Engine]:
    """llama.cpp's server."""
    yield from running(engines.llama_cpp())


@pytest.fixture(scope="module")
def vllm() -> Iterator[Engine]:
    """A vLLM on the CPU."""
    yield from running(engines.vllm())


@pytest.fixture(scope="module")
def triton() -> Iterator[Engine]:
    """Triton Inference Server; skipped where its wheel is not to be had (it exists for Linux on x86 only)."""
    try:
        engine = engines.triton()
    except NotInstallableError as error:
        pytest.skip(f"Triton cannot be installed here: {error}")
    yield from running(engine)
