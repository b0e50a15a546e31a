"""How close the simulated engine comes to a real one: fits its pace to measurements, and shows both side by side.

    python benchmarks/calibration.py measure http://127.0.0.1:8000 MODEL run.json    # asks a running engine, minutes
    python benchmarks/calibration.py fit run.json --block-tokens 32 --token-budget 2048
    python benchmarks/calibration.py kernels mlp.csv --layers 32    # kernel times as Microsoft's Vidur publishes them
    python benchmarks/calibration.py steps steps.json    # whole steps on a GPU, by gpu_steps.py

`fit` finds the numbers of an `EngineSpec` from prompts alone and from batches, and then checks them on what they were
not found from: a mixed load of growing conversations, replayed in virtual time.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
from probing import measure

from kvfleet.sim.engine import Engine
from kvfleet.sim.events import Finished, FirstToken, Job
from kvfleet.sim.spec import EngineSpec

_OPS = (
    *("input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "post_attention_layernorm"),
    *("mlp_up_proj", "mlp_act", "mlp_down_proj", "add", "add"),
)
_ROUNDS = 2_000
_BATCH = 256  # as many requests decode at once; a step with more tokens than that reads prompts


def nonnegative(rows: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """Numbers of at least 0 for which the rows come closest to what is wanted, errors taken relative to it."""
    scaled = [[value / goal for value in row] for row, goal in zip(rows, wanted, strict=True)]
    found = [0.0] * len(rows[0])
    errors = [-1.0] * len(rows)
    sizes = [sum(row[column] ** 2 for row in scaled) for column in range(len(found))]
    for _ in range(_ROUNDS):  # one number after the other, as far as it helps: coordinate descent
        for column, size in enumerate(sizes):
            if not size:
                continue
            slope = sum(row[column] * error for row, error in zip(scaled, errors, strict=True))
            step = max(-slope / size, -found[column])
            if step:
                found[column] += step
                errors = [error + row[column] * step for row, error in zip(scaled, errors, strict=True)]
    return found


@attrs.frozen
class Fitted:
    """A pace, and what a client waits beside it (HTTP, tokens to text)."""

    spec: EngineSpec
    overhead_s: float


def fit(run: dict[str, Any], settings: dict[str, int]) -> Fitted:
    """The pace that explains prompts alone and batches best."""
    rows, wanted = [], []
    for probe in run["prefill"]:
        tokens = probe["tokens"]
        steps = -(-tokens // settings["token_budget"])
        rows.append([1.0, steps, tokens, tokens * (tokens - 1) / 2, 0.0, 0.0])
        wanted.append(probe["ttft_s"])
    for probe in run["decode"]:
        rows.append([0.0, 1.0, 0.0, 0.0, probe["batch"], probe["batch"] * probe["context"]])
        wanted.append(probe["tpot_s"])
    overhead_s, step_s, prefill, pairs, per_seq, per_context = nonnegative(rows, wanted)
    spec = EngineSpec(
        **settings,
        step_s=step_s,
        prefill_s_per_token=prefill,
        prefill_s_per_token_context=pairs,
        decode_s_per_seq=per_seq,
        decode_s_per_context_token=per_context,
    )
    return Fitted(spec, overhead_s)


def replay(fitted: Fitted, mixed: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """What the fitted engine makes of a load, in virtual time."""
    engine, events = Engine(fitted.spec), []
    jobs = []
    for asked in sorted(mixed, key=lambda one: one["at_s"]):
        job = Job(asked["blocks"], asked["prompt_tokens"], asked["output"], key=asked)
        at_s = asked["at_s"] + fitted.overhead_s / 2
        events += engine.advance(at_s)
        engine.submit(job, at_s)
        jobs.append(job)
    while (now_s := engine.next_s()) is not None:
        events += engine.advance(now_s)
    events += engine.advance(jobs[-1].arrived_s)
    first = {event.job: event.at_s for event in events if isinstance(event, FirstToken)}
    last = {event.job: event.at_s for event in events if isinstance(event, Finished)}
    return [
        {
            "ttft_s": first[job] - job.key["at_s"] + fitted.overhead_s / 2,
            "tpot_s": (last[job] - first[job]) / max(1, job.output_tokens - 1),
            "cached": job.cached_tokens,
        }
        for job in jobs
    ]


# Tables --------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print()


def ms(seconds: float) -> str:
    """Seconds as milliseconds."""
    return f"{seconds * 1000:.1f}" if seconds >= 0.01 else f"{seconds * 1000:.2f}"


def off(predicted: float, measured: float) -> str:
    """How far a prediction is off."""
    return f"{(predicted / measured - 1) * 100:+.0f} %"


def show_fit(run: dict[str, Any], fitted: Fitted) -> None:
    """The probes that the pace was found from."""
    spec = fitted.spec
    rows = []
    for probe in run["prefill"]:
        tokens = probe["tokens"]
        predicted = fitted.overhead_s + _prefill_s(spec, tokens)
        rows.append((tokens, ms(probe["ttft_s"]), ms(predicted), off(predicted, probe["ttft_s"])))
    table(("prompt tokens", "TTFT measured (ms)", "predicted", "off"), rows)
    rows = []
    for probe in run["decode"]:
        batch, context = probe["batch"], probe["context"]
        predicted = spec.step_time_s(0, 0, batch, batch * context)
        rows.append((batch, context, ms(probe["tpot_s"]), ms(predicted), off(predicted, probe["tpot_s"])))
    table(("requests", "context tokens each", "TPOT measured (ms)", "predicted", "off"), rows)


def _prefill_s(spec: EngineSpec, tokens: int) -> float:
    """A prompt alone, in its chunks."""
    engine = Engine(attrs.evolve(spec, cache_blocks=-(-tokens // spec.block_tokens) + 1))
    engine.submit(Job((), tokens, 1), 0.0)
    end_s = 0.0
    while (now_s := engine.next_s()) is not None:
        engine.advance(now_s)
        end_s = now_s
    return end_s


def show_mixed(mixed: Sequence[dict[str, Any]], predicted: Sequence[dict[str, float]]) -> None:
    """The load that the pace was not found from."""
    asked = sorted(mixed, key=lambda one: one["at_s"])
    figures: dict[str, Callable[[Sequence[float]], float]] = {
        "mean": statistics.fmean,
        "p50": statistics.median,
        "p90": lambda values: statistics.quantiles(values, n=10)[-1],
    }
    rows = []
    for key, name in (("ttft_s", "TTFT"), ("tpot_s", "TPOT")):
        real, simulated = [one[key] for one in asked], [one[key] for one in predicted]
        for figure, of in figures.items():
            rows.append((f"{name} {figure}", ms(of(real)), ms(of(simulated)), off(of(simulated), of(real))))
        rows.append((f"{name} rank correlation", "", f"{_rank_correlation(real, simulated):.2f}", ""))
    real, simulated = sum(one["cached"] for one in asked), sum(one["cached"] for one in predicted)
    rows.append(("cached tokens", real, round(simulated), off(simulated, real) if real else ""))
    same = sum(one["cached"] == other["cached"] for one, other in zip(asked, predicted, strict=True))
    rows.append(("requests with exactly the predicted cached tokens", f"{same} of {len(asked)}", "", ""))
    table((f"mixed load, {len(asked)} requests", "measured (ms)", "predicted", "off"), rows)


def _rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    ranks = []
    for values in (one, other):
        order = sorted(range(len(values)), key=values.__getitem__)
        rank = [0.0] * len(values)
        for place, index in enumerate(order):
            rank[index] = place
        ranks.append(rank)
    return statistics.correlation(*ranks)


# Kernels -------------------------------------------------------------------------------------------------------------


def kernel_times(path: Path, layers: int) -> dict[int, float]:
    """By tokens in a step: seconds of all layers' kernels but attention, from a Vidur profile of one GPU."""
    found: dict[int, list[float]] = {}
    with path.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["num_tensor_parallel_workers"] == "1":
                times = sum(float(row[f"time_stats.{op}.median"]) for op in _OPS)
                found.setdefault(int(row["num_tokens"]), []).append(times * layers / 1000)
    return {tokens: statistics.median(times) for tokens, times in sorted(found.items())}


def fit_kernels(times: dict[int, float]) -> EngineSpec:
    """The pace that explains them best: what the first tokens hide behind is tried out."""
    batches = [tokens for tokens in times if tokens <= _BATCH]
    specs = []
    for hidden in range(0, 260, 10):
        rows = [[1.0, max(0, tokens - hidden), 0.0] for tokens in times] + [[1.0, 0.0, tokens] for tokens in batches]
        goals = [*times.values(), *(times[tokens] for tokens in batches)]
        step_s, per_token, per_seq = nonnegative(rows, goals)
        specs.append(
            EngineSpec(step_s=step_s, prefill_s_per_token=per_token, decode_s_per_seq=per_seq, hidden_tokens=hidden)
        )
    return min(specs, key=lambda spec: sum(error**2 for error in _kernel_errors(times, spec)))


def _kernel_errors(times: dict[int, float], spec: EngineSpec) -> list[float]:
    """How far off the pace is for each size, as a prompt and, if it can be one, as a batch of decodes."""
    prompts = [spec.step_time_s(tokens, 0, 0, 0) / seconds - 1 for tokens, seconds in times.items()]
    batches = [spec.step_time_s(0, 0, n, 0) / seconds - 1 for n, seconds in times.items() if n <= _BATCH]
    return prompts + batches


def show_kernels(times: dict[int, float], spec: EngineSpec) -> None:
    """A selection of sizes."""
    shown = [tokens for tokens in times if tokens & (tokens - 1) == 0]
    rows = []
    for tokens in shown:
        prompt, batch = spec.step_time_s(tokens, 0, 0, 0), spec.step_time_s(0, 0, tokens, 0)
        as_batch = (ms(batch), off(batch, times[tokens])) if tokens <= _BATCH else ("", "")
        rows.append((tokens, ms(times[tokens]), ms(prompt), off(prompt, times[tokens]), *as_batch))
    table(("tokens in a step", "kernels (ms)", "as a prompt", "off", "as a batch", "off"), rows)
    errors = sorted(map(abs, _kernel_errors(times, spec)))
    print(f"{len(times)} sizes: median error {errors[len(errors) // 2]:.1%}, largest {errors[-1]:.1%}\n")


# Steps ---------------------------------------------------------------------------------------------------------------


def fit_steps(steps: Sequence[dict[str, Any]]) -> EngineSpec:
    """The pace that explains steps of prompts alone and of answers alone best: what is hidden is tried out."""
    pure = [one for one in steps if not (one["prefill"] and one["decoding"])]
    specs = []
    for hidden in range(0, 260, 10):
        rows = [
            [1.0, max(0, one["prefill"] - hidden), step_pairs(one), one["decoding"], one["decoding"] * one["context"]]
            for one in pure
        ]
        step_s, per_token, pairs, per_seq, per_context = nonnegative(rows, [one["s"] for one in pure])
        specs.append(
            EngineSpec(
                step_s=step_s,
                prefill_s_per_token=per_token,
                hidden_tokens=hidden,
                prefill_s_per_token_context=pairs,
                decode_s_per_seq=per_seq,
                decode_s_per_context_token=per_context,
            )
        )
    return min(specs, key=lambda spec: sum((step_s_of(spec, one) / one["s"] - 1) ** 2 for one in pure))


def step_pairs(one: dict[str, Any]) -> float:
    """Pairs of a prompt token computed in a step and one before it."""
    return float(one["prefill"] * (one["prefill_context"] + (one["prefill"] - 1) / 2))


def step_s_of(spec: EngineSpec, one: dict[str, Any]) -> float:
    """What a pace makes of a measured step."""
    return spec.step_time_s(one["prefill"], step_pairs(one), one["decoding"], one["decoding"] * one["context"])


def show_steps(steps: Sequence[dict[str, Any]], spec: EngineSpec) -> None:
    """All steps, and how far off the pace is for those it was found from and for those with both in them."""
    rows, off_by = [], dict[str, list[float]]()
    for one in sorted(steps, key=lambda one: (one["prefill"], one["prefill_context"], one["decoding"], one["context"])):
        kind = "both" if one["prefill"] and one["decoding"] else "prompts" if one["prefill"] else "answers"
        predicted = step_s_of(spec, one)
        off_by.setdefault(kind, []).append(predicted / one["s"] - 1)
        sizes = [one[key] or "" for key in ("prefill", "prefill_context", "decoding", "context")]
        rows.append((*sizes, ms(one["s"]), ms(predicted), off(predicted, one["s"])))
    table(("prompt tokens", "after", "answers", "at", "measured (ms)", "predicted", "off"), rows)
    for kind, errors in off_by.items():
        sizes = sorted(map(abs, errors))
        mean = statistics.fmean(errors)
        print(
            f"{kind}: {len(sizes)} steps, off by {mean:+.1%} on average, median {statistics.median(sizes):.1%},", end=""
        )
        print(f" largest {sizes[-1]:.1%}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("measure")
    asking.add_argument("url")
    asking.add_argument("model")
    asking.add_argument("out", type=Path)
    asking.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 512, 1024, 2048, 3500])
    asking.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    asking.add_argument("--rounds", type=int, default=7)
    asking.add_argument("--block-tokens", type=int, default=16)
    asking.add_argument("--mixed", type=int, default=36, help="requests of the mixed load")
    asking.add_argument("--rate", type=float, default=2.0, help="of them, in a second")
    fitting = commands.add_parser("fit")
    fitting.add_argument("run", type=Path)
    for name, default in (("block-tokens", 16), ("token-budget", 2048), ("cache-blocks", 2048), ("max-running", 128)):
        fitting.add_argument(f"--{name}", type=int, default=default, help="of the engine, if the file does not say")
    profiles = commands.add_parser("kernels")
    profiles.add_argument("profile", type=Path)
    profiles.add_argument("--layers", type=int, default=32)
    whole = commands.add_parser("steps")
    whole.add_argument("run", type=Path)
    given = parser.parse_args()
    if given.command == "measure":
        found = asyncio.run(
            measure(
                given.url,
                given.model,
                lengths=given.lengths,
                batches=given.batches,
                rounds=given.rounds,
                block_tokens=given.block_tokens,
                mixed=given.mixed,
                rate_per_s=given.rate,
            )
        )
        given.out.write_text(json.dumps(found))
    elif given.command == "fit":
        run = json.loads(given.run.read_text())
        sizes = ("block_tokens", "token_budget", "cache_blocks", "max_running")
        fitted = fit(run, run.get("settings") or {name: getattr(given, name) for name in sizes})
        print(fitted, "\n")
        show_fit(run, fitted)
        show_mixed(run["mixed"], replay(fitted, run["mixed"]))
    elif given.command == "steps":
        run = json.loads(given.run.read_text())
        pace = fit_steps(run["steps"])
        print(pace, "\n")
        show_steps(run["steps"], pace)
    else:
        times = kernel_times(given.profile, given.layers)
        spec = fit_kernels(times)
        print(spec, "\n")
        show_kernels(times, spec)


if __name__ == "__main__":
    main()
