"""The built-in adapters."""

from __future__ import annotations

from collections.abc import Iterable

from kvfleet.adapters.anthropic import AnthropicAdapter
from kvfleet.adapters.custom_http import CustomHTTPAdapter
from kvfleet.adapters.llama_cpp import LlamaCppAdapter
from kvfleet.adapters.mock import MockAdapter
from kvfleet.adapters.ollama import OllamaAdapter
from kvfleet.adapters.openai_compat import OpenAICompatAdapter
from kvfleet.adapters.sglang import SGLangAdapter
from kvfleet.adapters.tgi import TGIAdapter
from kvfleet.adapters.triton import TritonAdapter
from kvfleet.adapters.vllm import VLLMAdapter
from kvfleet.plugin.component import Component, Stability
from kvfleet.plugin.contract import Kind
from kvfleet.plugin.spec import hookimpl

__all__ = ["kvfleet_components"]


@hookimpl
def kvfleet_components() -> Iterable[Component]:
    """Every adapter that comes with kvfleet; a model's ``provider`` names one."""
    yield Component(Kind.ADAPTER, "vllm", VLLMAdapter, stability=Stability.STABLE)
    yield Component(Kind.ADAPTER, "sglang", SGLangAdapter)
    yield Component(Kind.ADAPTER, "llama_cpp", LlamaCppAdapter)
    yield Component(Kind.ADAPTER, "openai_compat", OpenAICompatAdapter, stability=Stability.STABLE)
    yield Component(Kind.ADAPTER, "mock", MockAdapter)
    yield Component(Kind.ADAPTER, "ollama", OllamaAdapter)
    yield Component(Kind.ADAPTER, "tgi", TGIAdapter)
    yield Component(Kind.ADAPTER, "triton", TritonAdapter)
    yield Component(Kind.ADAPTER, "custom_http", CustomHTTPAdapter)
    yield Component(Kind.ADAPTER, "anthropic", AnthropicAdapter)
