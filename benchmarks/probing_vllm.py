"""Measures a vLLM in this process for `benchmarks/calibration.py`, on a machine that others use as well.

Its clock is the CPU time of the process: it stands still while the process waits for a core, so what is measured is
vLLM's own scheduler and its own arithmetic, whatever else runs. Requests arrive by that clock too. Run it with the
Python of an environment that has vLLM for CPUs (`nox -s real` makes one) and nothing of kvfleet::

    OMP_NUM_THREADS=1 PYTHON benchmarks/probing_vllm.py MODEL run.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numbering import Numbering

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, one clock
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")

_VOCABULARY = range(5, 300)
_BLOCKS, _BLOCK_TOKENS = 512, 32
_LOAD, _NEW_TOKENS = 0.6, 120  # of the mixed load: share of the time for prompts, about so many new tokens in each


class Clock:
    """CPU seconds of this process, and the idle time that was skipped."""

    def __init__(self) -> None:
        self._skipped_s = 0.0

    def now_s(self) -> float:
        """The time."""
        return time.process_time() + self._skipped_s

    def skip_to(self, at_s: float) -> None:
        """Let idle time pass at once."""
        self._skipped_s += max(0.0, at_s - self.now_s())


class Prober:
    """Drives one engine step by step."""

    def __init__(self, engine: Any, params: Any) -> None:
        self.engine, self._params = engine, params
        self.clock, self.chance = Clock(), random.Random(1)
        self._count = 0

    def prompt(self, tokens: int) -> list[int]:
        """A prompt that nobody has sent before."""
        return [self.chance.choice(_VOCABULARY) for _ in range(tokens)]

    def submit(self, prompt: list[int], output: int) -> str:
        """Hand a request to the engine."""
        self._count += 1
        name = str(self._count)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, self._params(output))
        return name

    def run(self, arrivals: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Requests at their moments (`at_s` after now), to their ends; by name, what came of each."""
        began_s = self.clock.now_s()
        waiting = sorted(arrivals, key=lambda one: one["at_s"])
        found: dict[str, dict[str, Any]] = {}
        while waiting or self.engine.has_unfinished_requests():
            if not self.engine.has_unfinished_requests():
                self.clock.skip_to(began_s + waiting[0]["at_s"])
            while waiting and began_s + waiting[0]["at_s"] <= self.clock.now_s():
                asked = waiting.pop(0)
                found[self.submit(asked["prompt"], asked["output"])] = {**asked, "moments": []}
            for output in self.engine.step():
                one = found[output.request_id]
                one["moments"].append(self.clock.now_s() - began_s)
                one["cached"] = output.num_cached_tokens or 0
        return found

    def alone(self, prompts: Sequence[list[int]], output: int) -> list[dict[str, Any]]:
        """Some requests at once, and nothing else."""
        return list(self.run([{"at_s": 0.0, "prompt": prompt, "output": output} for prompt in prompts]).values())


def measure(prober: Prober, lengths: Sequence[int], batches: Sequence[int], rounds: int) -> dict[str, Any]:
    """Everything `calibration.py` needs to know."""
    prober.alone([prober.prompt(64)], 16)  # it may compile something first
    prefill, decode = [], []
    for length in lengths:
        times = [prober.alone([prober.prompt(length)], 1)[0]["moments"][0] for _ in range(rounds)]
        prefill.append({"tokens": length, "ttft_s": statistics.median(times)})
        print(f"prompt of {length} tokens: {prefill[-1]['ttft_s'] * 1000:.2f} ms", flush=True)
    for batch in batches:
        for length in (32, 1024):
            steps: list[float] = []
            for _ in range(rounds):
                last = prober.alone([prober.prompt(length) for _ in range(batch)], 24)[-1]["moments"]
                steps += [later - earlier for earlier, later in itertools.pairwise(last)]
            decode.append({"batch": batch, "context": length + 12, "tpot_s": statistics.median(steps)})
            print(f"{batch} requests of {length}: {decode[-1]['tpot_s'] * 1000:.2f} ms a token", flush=True)
    per_token_s = prefill[-1]["ttft_s"] / prefill[-1]["tokens"]
    rate = _LOAD / (_NEW_TOKENS * per_token_s)
    print(f"mixed load: {rate:.2f} requests a second", flush=True)
    return {"prefill": prefill, "decode": decode, "mixed": _mixed(prober, max(lengths), rate)}


def _mixed(prober: Prober, longest: int, rate: float) -> list[dict[str, Any]]:
    """Conversations that grow, at random moments, several at a time."""
    chance, at_s = prober.chance, 0.0
    sessions = [prober.prompt(chance.randint(64, longest // 4)) for _ in range(8)]
    arrivals = []
    for _ in range(120):
        at_s += chance.expovariate(rate)
        session = chance.choice(sessions)
        if len(session) < longest // 2:
            session.extend(prober.prompt(chance.randint(16, 160)))
        arrivals.append({"at_s": at_s, "prompt": list(session), "output": chance.randint(4, 48)})
    found = []
    numbering = Numbering(_BLOCK_TOKENS)
    for one in prober.run(arrivals).values():
        first, last = one["moments"][0], one["moments"][-1]
        found.append(
            {
                "at_s": one["at_s"],
                "prompt_tokens": len(one["prompt"]),
                "blocks": numbering.blocks(one["prompt"]),
                "output": one["output"],
                "cached": one["cached"],
                "ttft_s": first - one["at_s"],
                "tpot_s": (last - first) / max(1, one["output"] - 1),
            }
        )
    return found


def main() -> None:
    """Read the command line."""
    from vllm import EngineArgs, LLMEngine, SamplingParams  # noqa: PLC0415 - after the environment is set

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024, 2048, 3500])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=512, help="of the model's layers, a multiple of 256")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--token-budget", type=int, default=512)
    given = parser.parse_args()
    args = EngineArgs(
        model=given.model,
        dtype="float32",
        max_model_len=4096,
        block_size=_BLOCK_TOKENS,
        max_num_seqs=16,
        max_num_batched_tokens=given.token_budget,
        num_gpu_blocks_override=_BLOCKS,
        enforce_eager=True,
        enable_prefix_caching=True,
        async_scheduling=False,
        distributed_executor_backend="uni",
        load_format="dummy",  # the weights do not matter, their number does
        hf_overrides={
            "hidden_size": given.width,
            "intermediate_size": 3 * given.width,
            "num_hidden_layers": given.layers,
            "num_attention_heads": given.width // 64,
            "num_key_value_heads": given.width // 256,
        },
    )
    prober = Prober(
        LLMEngine.from_engine_args(args),
        lambda output: SamplingParams(max_tokens=output, min_tokens=output, ignore_eos=True, temperature=0.0),
    )
    found = measure(prober, given.lengths, given.batches, given.rounds)
    settings = {
        "token_budget": given.token_budget,
        "block_tokens": _BLOCK_TOKENS,
        "cache_blocks": _BLOCKS,
        "max_running": 16,
    }
    given.out.write_text(json.dumps({**found, "settings": settings}))


if __name__ == "__main__":
    main()
