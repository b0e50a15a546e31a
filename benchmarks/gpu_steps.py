"""What an engine's step takes on a GPU: a decoder's layers with random weights, and nothing of an engine around them.

    python benchmarks/gpu_steps.py steps.json --seconds 60
    python benchmarks/calibration.py steps steps.json

Needs PyTorch with CUDA; nothing of kvfleet. The shape is that of Llama 3 8B unless told otherwise. Attention is vLLM's
FlashAttention 3 where vLLM is installed, else PyTorch's. Steps are replayed as CUDA graphs, so launching costs nothing,
and nothing is fused. They are measured in random order until the time is up, so what is missing is missing everywhere.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from torch.nn import functional

_DEVICE, _TYPE = "cuda", torch.bfloat16
_PAGE = 16  # tokens in a block of the KV cache
_CHUNKS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_BATCHES = (1, 4, 16, 64, 128, 256)
_CONTEXTS = (128, 1024, 4096, 16384)


@attrs.frozen
class Shape:
    """A decoder of Llama's kind."""

    layers: int = 32
    width: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    vocabulary: int = 128_256


@attrs.frozen(order=True)
class Step:
    """What is computed: a chunk of a prompt after so many tokens, and a batch of answers that look back on so many."""

    prefill: int
    prefill_context: int
    decoding: int
    context: int

    @property
    def tokens(self) -> int:
        """Rows of the matrix products."""
        return self.prefill + self.decoding


class Decoder:
    """Layers with random weights, and a KV cache in pages."""

    def __init__(self, shape: Shape, cache_tokens: int) -> None:
        self.shape = shape
        self._wide = (shape.heads + 2 * shape.kv_heads) * shape.head
        self._layers = [
            (
                self._weights(shape.width, self._wide),
                self._weights(shape.heads * shape.head, shape.width),
                self._weights(shape.width, 2 * shape.inner),
                self._weights(shape.inner, shape.width),
            )
            for _ in range(shape.layers)
        ]
        self._output = self._weights(shape.width, shape.vocabulary)
        self._norm = torch.ones(shape.width, device=_DEVICE, dtype=_TYPE)
        self._pages = cache_tokens // _PAGE
        size = (self._pages, _PAGE, shape.kv_heads, shape.head)
        self._cache = [(self._filled(*size), self._filled(*size)) for _ in range(shape.layers)]
        self._turn = torch.rand(1, 1, shape.head // 2, device=_DEVICE, dtype=_TYPE)

    @staticmethod
    def _weights(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=_DEVICE, dtype=_TYPE) * rows**-0.5

    @staticmethod
    def _filled(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=_DEVICE, dtype=_TYPE)

    def fits(self, step: Step) -> bool:
        """Whether the cache has room for what it looks back on."""
        return step.decoding * step.context + step.prefill + step.prefill_context <= self._pages * _PAGE

    def prepared(self, step: Step) -> Callable[[], torch.Tensor]:
        """The step, ready to be taken again and again."""
        hidden = self._filled(step.tokens, self.shape.width)
        attend, used = self._attention(step)
        places = torch.randperm(self._pages * _PAGE, device=_DEVICE)[: step.tokens]
        last = torch.arange(step.tokens, device=_DEVICE)[-(step.decoding + bool(step.prefill)) :]

        def taken() -> torch.Tensor:
            flow = hidden
            for layer, weights in enumerate(self._layers):
                flow = self._layer(flow, layer, weights, attend, places)
            logits = self._normed(flow)[last] @ self._output
            return logits.argmax(-1)

        taken.used = used  # type: ignore[attr-defined]
        return taken

    def _normed(self, flow: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(flow, (self.shape.width,), self._norm)

    def _layer(self, flow: torch.Tensor, layer: int, weights: Any, attend: Any, places: torch.Tensor) -> torch.Tensor:
        shape, (wide, out, up, down) = self.shape, weights
        mixed = (self._normed(flow) @ wide).view(-1, shape.heads + 2 * shape.kv_heads, shape.head)
        query = self._turned(mixed[:, : shape.heads])
        key = self._turned(mixed[:, shape.heads : shape.heads + shape.kv_heads])
        keys, values = self._cache[layer]
        keys.view(-1, shape.kv_heads, shape.head)[places] = key
        values.view(-1, shape.kv_heads, shape.head)[places] = mixed[:, shape.heads + shape.kv_heads :]
        flow = flow + attend(query.contiguous(), keys, values).reshape(flow.shape[0], -1) @ out
        gate, value = (self._normed(flow) @ up).chunk(2, -1)
        return flow + (functional.silu(gate) * value) @ down

    def _turned(self, part: torch.Tensor) -> torch.Tensor:
        one, other = part.chunk(2, -1)
        return torch.cat((one * self._turn - other * self._turn, one * self._turn + other * self._turn), -1)

    def _attention(self, step: Step) -> tuple[Any, str]:
        lengths = [1] * step.decoding + ([step.prefill] if step.prefill else [])
        looks = [step.context] * step.decoding
        looks += [step.prefill_context + step.prefill] if step.prefill else []
        try:
            from vllm.vllm_flash_attn import flash_attn_varlen_func, is_fa_version_supported  # noqa: PLC0415

            if is_fa_version_supported(3):
                return self._paged(flash_attn_varlen_func, lengths, looks), "vLLM's FlashAttention 3"
        except ImportError:
            pass
        return self._plain(lengths, looks), "PyTorch's"

    def _paged(self, kernel: Any, lengths: list[int], looks: list[int]) -> Any:
        """All requests in one call, over pages that lie about."""
        pages = torch.randperm(self._pages, device=_DEVICE, dtype=torch.int32)
        table = torch.zeros(len(looks), -(-max(looks) // _PAGE), device=_DEVICE, dtype=torch.int32)
        begin = 0
        for row, look in enumerate(looks):
            need = -(-look // _PAGE)
            table[row, :need] = pages[begin : begin + need]
            begin += need
        starts = torch.tensor([0, *itertools.accumulate(lengths)], device=_DEVICE, dtype=torch.int32)
        used = torch.tensor(looks, device=_DEVICE, dtype=torch.int32)
        longest, furthest = max(lengths), max(looks)

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return kernel(  # type: ignore[no-any-return]
                q=query,
                k=keys,
                v=values,
                max_seqlen_q=longest,
                cu_seqlens_q=starts,
                max_seqlen_k=furthest,
                seqused_k=used,
                causal=True,
                block_table=table,
                fa_version=3,
            )

        return attend

    def _plain(self, lengths: list[int], looks: list[int]) -> Any:
        """Requests of a length together, over caches that lie in one piece."""
        from torch.nn.attention.bias import causal_lower_right  # noqa: PLC0415

        answers, (heads, size) = lengths.count(1), (self.shape.kv_heads, self.shape.head)

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            flat, other = keys.view(-1, heads, size), values.view(-1, heads, size)
            parts = []
            if answers:
                look = looks[0]
                shape = (answers, look, heads, size)
                key = flat[: answers * look].view(shape).transpose(1, 2)
                value = other[: answers * look].view(shape).transpose(1, 2)
                asked = query[:answers].view(answers, 1, -1, size).transpose(1, 2)
                parts.append(
                    functional.scaled_dot_product_attention(asked, key, value, enable_gqa=True).transpose(1, 2)
                )
            if len(query) > answers:
                look, asked = looks[-1], query[answers:].transpose(0, 1)[None]
                key, value = flat[-look:].transpose(0, 1)[None], other[-look:].transpose(0, 1)[None]
                mask = causal_lower_right(len(query) - answers, look)
                found = functional.scaled_dot_product_attention(asked, key, value, attn_mask=mask, enable_gqa=True)
                parts.append(found.transpose(1, 2))
            return torch.cat([part.reshape(-1, query.shape[1], size) for part in parts])

        return attend


def steps() -> Iterator[Step]:
    """Those to measure: prompts alone, answers alone, both."""
    yield from (Step(chunk, 0, 0, 0) for chunk in _CHUNKS)
    yield from (Step(chunk, context, 0, 0) for chunk in (512, 2048, 8192) for context in (4096, 16384, 65536))
    yield from (Step(0, 0, batch, context) for batch in _BATCHES for context in _CONTEXTS)
    yield from (
        Step(chunk, before, batch, context)
        for chunk in (128, 512, 2048)
        for before in (0, 4096)
        for batch in (8, 32, 128)
        for context in (1024, 4096)
    )


def measured(decoder: Decoder, step: Step, least_s: float) -> dict[str, Any]:
    """Seconds of the step: the median of some, each timed by the GPU."""
    take = decoder.prepared(step)
    used = take.used  # type: ignore[attr-defined]
    take()
    take()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take()
    take = graph.replay
    take()
    times: list[float] = []
    began_s = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - began_s < least_s and len(times) < 50):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        take()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return {**attrs.asdict(step), "s": statistics.median(times), "spread": max(times) / min(times), "attention": used}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=90.0, help="of measuring, at most")
    parser.add_argument("--least", type=float, default=0.15, help="seconds for one step, if it is short")
    parser.add_argument("--cache-tokens", type=int, default=280_000)
    for field in attrs.fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    given = parser.parse_args()
    shape = Shape(**{field.name: getattr(given, field.name) for field in attrs.fields(Shape)})
    began_s = time.perf_counter()
    torch.manual_seed(0)
    with torch.inference_mode():
        decoder = Decoder(shape, given.cache_tokens)
        todo = [step for step in steps() if decoder.fits(step)]
        random.Random(0).shuffle(todo)
        found = []
        for place, step in enumerate(todo):
            if time.perf_counter() - began_s > given.seconds:
                sys.stderr.write(f"{len(todo) - place} of {len(todo)} steps are left out: the time is up\n")
                break
            found.append(measured(decoder, step, given.least))
    card = torch.cuda.get_device_name()
    about = {"card": card, "torch": torch.__version__, "shape": attrs.asdict(shape)}
    given.out.write_text(json.dumps({**about, "steps": sorted(found, key=str)}, indent=1))
    for one in sorted(found, key=lambda one: (one["prefill"], one["prefill_context"], one["decoding"], one["context"])):
        sys.stdout.write(
            f"{one['prefill']:5} after {one['prefill_context']:5}, {one['decoding']:3} at {one['context']:5}: "
            f"{one['s'] * 1000:8.2f} ms\n"
        )
    sys.stdout.write(f"{card}, {found[0]['attention']} attention, {time.perf_counter() - began_s:.0f} s\n")


if __name__ == "__main__":
    main()
