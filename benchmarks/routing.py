"""What each strategy does to the time to the first token: the same workloads for all, in virtual time, on 8 engines.

    nice python benchmarks/routing.py --trace mooncake_conversation.jsonl -n 2500 --only mooncake-1x --json figures.json
    python benchmarks/routing.py --json figures.json --tables

The trace is the conversation trace of Mooncake (https://github.com/kvcache-ai/Mooncake, FAST 2025), which is not in the
repository; without ``--trace`` only the generated workloads run. Every strategy has the same knowledge of caches and
load, and its published defaults; engines are the preset ``h100-8b``. With ``--json`` a setting's figures are added to
those that the file has, so that settings can run one at a time; ``--tables`` prints what it has, and runs nothing.
`docs/explanation/routing-benchmarks.md` has the tables and what they mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from kvfleet.config.schema import FleetConfig, ModelConfig, StageConfig
from kvfleet.config.simulation import EngineOptions, SimulatedFleet
from kvfleet.plugin.manager import ComponentTable, discover
from kvfleet.replay.driver import Replay
from kvfleet.replay.expect import shown
from kvfleet.replay.generate import generator_from
from kvfleet.replay.least import alone_s
from kvfleet.replay.measures import FIGURES, quantile
from kvfleet.replay.readers import read_trace
from kvfleet.replay.results import Comparison
from kvfleet.replay.slo import parse_slo
from kvfleet.replay.traces import RequestTrace
from kvfleet.sim.blocks import BlockPool
from kvfleet.sim.presets import PRESETS

OURS = "expected_latency"
STRATEGIES = (
    OURS, "round_robin", "random", "least_requests", "least_tokens", "power_of_two", "least_load", "consistent_hash",
    "session", "prefix_threshold", "block_cost", "weighted_prefix", "latency_product", "hybrid_score",
)  # fmt: skip
SAME_ESTIMATE = "hybrid_score"
"""Ours too: with replicas of one model it ranks by the column `latency` alone. It is shown, and no rule to be under."""
RIVALS = ("block_cost", "prefix_threshold", "weighted_prefix", "latency_product")
COLUMNS = (
    "ttft_mean", "ttft_p50", "ttft_p90", "ttft_p99", "tpot_mean", "e2e_mean", "cached_share", "imbalance", "failed",
)  # fmt: skip
MOST: Mapping[str, Mapping[str, float]] = {
    "ttft_mean": {"": 1.0, "block_cost": 0.9, "prefix_threshold": 0.9, "weighted_prefix": 0.9, "latency_product": 0.95},
    "ttft_p90": {"": 1.0},
    "ttft_p99": {"": 1.0},
    "e2e_mean": {"": 1.02},
}
"""The targets: by figure, the most that ours may be of another's; the empty name is the best of all others."""

ENGINES, SLOW = 8, 3
SMALL, LARGE = 410_000, 3_000_000
MOONCAKE = "mooncake"
PATIENCE_S = 3600


@attrs.frozen(kw_only=True)
class Setting:
    """One workload on one fleet.

    Attributes:
        name: What it is called.
        workload: ``mooncake``, or a generator with its options.
        speed: How many times faster its requests come.
        slow: Engines at half speed.
        cache_tokens: Tokens of each engine's KV cache.
        is_closed_loop: True if a turn waits for the answer before it.
    """

    name: str
    workload: str
    speed: float = 1.0
    slow: int = 0
    cache_tokens: int = SMALL
    is_closed_loop: bool = False

    def trace(self, path: Path | None, limit: int, seed: int) -> RequestTrace:
        """Its requests, the first so many."""
        if self.workload == MOONCAKE:
            if path is None:
                sys.exit(f"{self.name} needs --trace")
            return read_trace(path, MOONCAKE, limit)
        made = generator_from(self.workload).generate(seed)
        return attrs.evolve(made, requests=made.requests[:limit])

    def pooled(self, trace: RequestTrace) -> dict[str, float]:
        """As `kvfleet.replay.least`, with as much cache as there is: all engines' in one, least recently used first.

        No bound in the strict sense, for a router may forget more wisely, but what there is to win with these caches.
        """
        size, spec = trace.block_tokens, PRESETS["h100-8b"].spec
        pool = BlockPool(ENGINES * self.cache_tokens // size)
        found = []
        for one in trace.requests:
            cached = pool.match(one.blocks, (one.prompt_tokens - 1) // size) * size
            found.append(alone_s(spec, one.prompt_tokens, cached))
            _keep(pool, [*one.blocks, *one.answer_blocks])
        found.sort()
        quantiles = {f"ttft_p{share}": quantile(found, share / 100) for share in (50, 90, 99)}
        return {"ttft_mean": sum(found) / len(found), **quantiles}

    def fleet(self) -> SimulatedFleet:
        """Its engines."""
        usual = EngineOptions(preset="h100-8b", cache_tokens=self.cache_tokens)
        half = attrs.evolve(usual, speed=0.5)
        return SimulatedFleet(default=usual, engines=dict.fromkeys(endpoints()[:: ENGINES // SLOW][: self.slow], half))


def _keep(pool: BlockPool, blocks: list[int]) -> None:
    """Hold a request's blocks, and let go of them."""
    hits = pool.match(blocks)
    pool.pin(blocks[:hits])
    if len(blocks) - hits <= pool.available:
        pool.take(len(blocks) - hits)
        pool.share(blocks[hits:])
        hits = len(blocks)
    pool.release(blocks[:hits], private=0)


def settings() -> Iterator[Setting]:
    """All of them; the most telling first."""
    for cache, size in (("", SMALL), ("-large", LARGE)):
        for uneven, slow in (("", 0), ("-uneven", SLOW)):
            for speed in (1.0, 1.3, 0.8):
                name = f"{MOONCAKE}-{speed:g}x{uneven}{cache}"
                yield Setting(name=name, workload=MOONCAKE, speed=speed, slow=slow, cache_tokens=size)
    sessions = "agent_sessions:sessions=600,session_rate_per_s=3"
    for uneven, slow in (("", 0), ("-uneven", SLOW)):
        yield Setting(name=f"shared_prefix{uneven}", workload="shared_prefix:rate_per_s=60", slow=slow)
        yield Setting(name=f"bursts{uneven}", workload="bursts:rate_per_s=20", slow=slow)
        yield Setting(name=f"agent_sessions{uneven}", workload=sessions, slow=slow, is_closed_loop=True)
        yield Setting(name=f"agent_sessions-open{uneven}", workload=sessions, slow=slow)


SETTINGS: Mapping[str, Setting] = {one.name: one for one in settings()}


def endpoints() -> list[str]:
    """Where the engines are."""
    return [f"http://engine-{i}:8000" for i in range(ENGINES)]


def pipeline(strategy: str) -> FleetConfig:
    """What every strategy knows, and the strategy with its defaults; nobody is given up on."""
    first, *more = endpoints()
    model = ModelConfig(
        name="m", provider="vllm", endpoint=first, replicas=tuple(more), timeout_seconds=PATIENCE_S
    )  # fmt: skip
    options: Mapping[str, Mapping[str, Any]] = {
        "classify.prompt": {},
        "affinity.prefix": {"min_affinity": 0.0},
        "score.latency": {},
        f"select.{strategy}": {},
        "execute.fallback": {"timeout_ms": 600_000},
    }
    stages = (
        StageConfig(use=use, options=given, path=("pipeline", i)) for i, (use, given) in enumerate(options.items())
    )
    return FleetConfig(models=(model,), strategy=strategy, pipeline=tuple(stages))


def measured(setting: Setting, strategies: Sequence[str], trace: RequestTrace, seed: int) -> dict[str, Any]:
    """The comparison of these strategies, as plain data."""
    table: ComponentTable = discover()
    results = []
    for strategy in strategies:
        run = Replay(
            config=pipeline(strategy),
            trace=trace,
            fleet=setting.fleet(),
            table=table,
            seed=seed,
            speed=setting.speed,
            is_closed_loop=setting.is_closed_loop,
        )
        results.append(run.run(strategy))
        print(f"{setting.name}: {strategy} done", file=sys.stderr)
    return Comparison.of(results, parse_slo("ttft < 2s"), speed=setting.speed, seed=seed).to_dict()


Figures = Mapping[str, Mapping[str, float]]


def figures_of(found: Mapping[str, Any]) -> Figures:
    """By strategy, from a comparison as plain data."""
    return {one["pipeline"]: one["figures"] for one in found["pipelines"]}


def show_setting(name: str, found: Mapping[str, Any]) -> None:
    """Print one setting's table, the lowest mean first."""
    trace, by_name = found["trace"], figures_of(found)
    print(f"\n### {name}\n")
    print(
        f"{trace['requests']:,} requests over {trace['duration_s'] / found['speed']:,.0f} s, {found['loop']} loop, "
        f"{trace['prompt_tokens'] / trace['requests']:,.0f} prompt and "
        f"{trace['output_tokens'] / trace['requests']:,.0f} answer tokens each, "
        f"{trace['shared_share']:.0%} of prompt tokens shared with earlier ones.\n"
    )
    print("| strategy | TTFT mean | p50 | p90 | p99 | TPOT | e2e mean | cached | imbalance | failed | mean less ours |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    against = {one["pipeline"]: one["against_first"] for one in found["pipelines"]}
    for strategy, figures in sorted(by_name.items(), key=lambda pair: pair[1]["ttft_mean"]):
        cells = [shown(figures.get(column), FIGURES[column]) for column in COLUMNS]
        cells.append(next((_difference(one) for one in against[strategy] if one["figure"] == "ttft_mean"), ""))
        print(f"| {f'**{strategy}**' if strategy == OURS else strategy} | {' | '.join(cells)} |")
    least = {column: by_name[OURS].get(f"least_{column}") for column in COLUMNS}
    for label, bound in (("no queue, one cache", found["pooled"]), ("no queue, one endless cache", least)):
        cells = ["" if (value := bound.get(column)) is None else shown(value, FIGURES[column]) for column in COLUMNS]
        print(f"| *{label}* | {' | '.join(cells)} | |")


def _difference(one: Mapping[str, Any]) -> str:
    """A difference of seconds with the middle 95 % of what resampling gives."""
    return f"{one['value'] * 1e3:+,.0f} ms [{one['low'] * 1e3:+,.0f}, {one['high'] * 1e3:+,.0f}]"


def compared(figures: Figures, figure: str) -> dict[str, float]:
    """Ours over the best of the others (under the empty name), and over each rival's; those that ran."""
    ours = figures[OURS][figure]
    others = {name: one[figure] for name, one in figures.items() if name not in (OURS, SAME_ESTIMATE)}
    return {"": ours / min(others.values())} | {name: ours / others[name] for name in RIVALS if name in others}


def show_summary(found: Mapping[str, Figures]) -> None:
    """Print, figure by figure, how ours stands in each setting, and which targets it meets."""
    print("Differences are those of `expected_latency` to the other strategy; ✓ and ✗ say whether a target is met.")
    for figure, targets in MOST.items():
        met = dict.fromkeys(targets, 0)
        print(f"\n**{figure}**\n\n| setting | ours | best other | to it | {' | '.join(RIVALS)} |")
        print("|---|--:|---|--:|--:|--:|--:|--:|")
        for setting, figures in found.items():
            ratios = compared(figures, figure)
            cells = [_cell(ratios.get(name), targets.get(name)) for name in ("", *RIVALS)]
            met = {name: count + (ratios.get(name, 2.0) <= targets[name]) for name, count in met.items()}
            others = [name for name in figures if name not in (OURS, SAME_ESTIMATE)]
            best = min(others, key=lambda name: figures[name][figure])
            ours = shown(figures[OURS][figure], FIGURES[figure])
            print(f"| {setting} | {ours} | {best} | {' | '.join(cells)} |")
        told = ", ".join(f"{_target(name, most)} in {met[name]} of {len(found)}" for name, most in targets.items())
        print(f"\nMet: {told}.")


def _cell(ratio: float | None, most: float | None) -> str:
    if ratio is None:
        return "-"
    mark = "" if most is None else " ✓" if ratio <= most else " ✗"
    return f"{(ratio - 1) * 100:+.1f} %{mark}"


def _target(name: str, most: float) -> str:
    whom = name or "the best other"
    if most == 1:
        return f"no more than {whom}"
    return (
        f"at least {(1 - most) * 100:.0f} % under {whom}" if most < 1 else f"within {(most - 1) * 100:.0f} % of {whom}"
    )


def wanted(options: argparse.Namespace) -> list[Setting]:
    """The settings to run."""
    if options.tables:
        return []
    if options.only:
        return [SETTINGS[name] for name in options.only]
    left_out = [one.name for one in SETTINGS.values() if one.workload == MOONCAKE and options.trace is None]
    if left_out:
        print(f"without --trace: {', '.join(left_out)} left out", file=sys.stderr)
    return [one for one in SETTINGS.values() if one.name not in left_out]


def strategies_from(text: str) -> list[str]:
    """Names in a list with commas; ours comes first, because the others are compared with it."""
    return list(dict.fromkeys([OURS, *text.split(",")]))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="Mooncake's conversation trace")
    parser.add_argument("-n", "--limit", type=int, default=2500, help="only the first so many requests")
    parser.add_argument("--only", action="append", choices=list(SETTINGS), help="this setting; may be repeated")
    parser.add_argument("--strategies", type=strategies_from, default=list(STRATEGIES), help="names, with commas")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where figures are added, by setting")
    parser.add_argument("--tables", action="store_true", help="print what the JSON file has, and run nothing")
    return parser.parse_args()


def main() -> None:
    """Run the settings, and print their tables and the summary."""
    options = parsed()
    kept = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for setting in wanted(options):
        trace = setting.trace(options.trace, options.limit, options.seed)
        kept[setting.name] = measured(setting, options.strategies, trace, options.seed)
        kept[setting.name]["pooled"] = setting.pooled(trace)
        if options.json:
            options.json.write_text(json.dumps(kept, indent=1) + "\n")
    ordered = {name: kept[name] for name in SETTINGS if name in kept}
    every = {name: figures_of(one) for name, one in ordered.items()}
    show_summary({name: one for name, one in every.items() if OURS in one and one.keys() - {OURS, SAME_ESTIMATE}})
    for name, one in ordered.items():
        show_setting(name, one)


if __name__ == "__main__":
    main()
