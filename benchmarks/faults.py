"""The fault wall of ``tests/faults`` against kvfleet and other gateways: pass, safe and fail by the same rules.

Run ``python benchmarks/faults.py --peers-dir DIR [--install] [--only smg,kvfleet] [--api chat] [--json FILE]``. The
misbehaving engines and the client live in this process, gateways run one at a time in theirs; each is set to wait two
seconds for a backend and to try again as it does by default. Each case has a gateway of its own, so that one fault's
aftermath does not count as another's; but LiteLLM, which takes long to start, has one for all and is left alone between
two cases for longer than its cooldown.

With ``--api messages`` or ``responses`` clients ask in Anthropic's Messages or OpenAI's Responses, which the engines
speak beside chat, and the API's own SDK says what became of an answer under 200. A gateway that has no such path is
left out.

Rules, from the client's side alone: *pass* is a right answer, or the right honest error where none was to be had;
*safe* is an honest error where an answer was to be had; *fail* is a wrong or truncated answer called complete, a hang,
a dropped connection, an event that no client can read, an error that blames the caller or tells an engine's address.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs
from peers_gateways import KVFLEET, NotHereError, Place, install, version_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.faults.catalogue import Case, cases
from tests.faults.judge import TOLD_ADDRESS, Judgement, Verdict, ask
from tests.faults.site import Site, healthily, site
from tests.faults.tongues import CHAT, MESSAGES, MODEL, RESPONSES, TONGUES, Tongue
from tests.faults.wall import Times, run

UNIT_S = 1.0
WAIT_S = 2
OUTAGE_S = 5.0
TIMES = Times(
    UNIT_S, 12 * UNIT_S, lambda: asyncio.sleep(OUTAGE_S), lambda: asyncio.sleep(5.0), recoveries=15
)  # 75 s: every breaker's wait is over by then
START_S = 120.0
ALIVE_S = 20.0
SLOW_STARTERS = frozenset({"LiteLLM"})
PAUSE_S = 6.0
_NO_SUCH_PATH = (404, 405, 501)

# The gateways --------------------------------------------------------------------------------------------------------


def _kvfleet(*, continues: bool) -> Callable[[Place], Sequence[str]]:
    def command(place: Place) -> Sequence[str]:
        first, *others = place.engines
        limits = {"timeout_seconds": WAIT_S, "idle_timeout_seconds": WAIT_S}
        spoken = {**limits, "options": {"surfaces": [MESSAGES.name, RESPONSES.name]}}
        fleet = {
            "models": [{"name": MODEL, "provider": "vllm", "endpoint": first, "replicas": others, **spoken}],
            "fallback": {"timeout_ms": WAIT_S * 1000, "continue_streams": continues},
            "telemetry": {"trace_store": {"path": str(place.folder / "traces.db")}},
        }
        path = place.file("fleet.yaml", json.dumps(fleet))  # JSON is YAML
        return [KVFLEET, "run", path, "-p", str(place.port), "--log-level", "error"]

    return command


def _rust(venv: str, words: Sequence[str], *more: str) -> Callable[[Place], Sequence[str]]:
    def command(place: Place) -> Sequence[str]:
        listening = ["--host", "127.0.0.1", "--port", str(place.port), "--prometheus-port", str(place.metrics_port)]
        limits = ["--request-timeout-secs", str(WAIT_S), "--health-check-interval-secs", "1"]
        found = [place.program(venv, words[0]), *words[1:], *listening, *limits, *more, "--log-level", "error"]
        return [*found, "--policy", "round_robin", "--worker-urls", *place.engines]

    return command


def _litellm(place: Place) -> Sequence[str]:
    def entry(url: str) -> Mapping[str, object]:
        backend = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{url}/v1", "api_key": "none"}
        return {"model_name": MODEL, "litellm_params": {**backend, "timeout": WAIT_S, "stream_timeout": WAIT_S}}

    fleet = {
        "model_list": [entry(url) for url in place.engines],
        "router_settings": {"num_retries": 2},
        "litellm_settings": {"telemetry": False},
        "general_settings": {"disable_spend_logs": True, "dangerously_permit_weak_or_unset_master_key": True},
    }
    path = place.file("litellm.yaml", json.dumps(fleet))
    listening = ["--host", "127.0.0.1", "--port", str(place.port), "--num_workers", "1"]
    quiet = ["LITELLM_LOG=ERROR", "LITELLM_LOCAL_MODEL_COST_MAP=True"]
    return ["env", *quiet, place.program("litellm", "litellm"), *listening, "--config", path]


GATEWAYS: Mapping[str, Callable[[Place], Sequence[str]]] = {
    "kvfleet": _kvfleet(continues=False),
    "kvfleet, `continue_streams`": _kvfleet(continues=True),
    "LiteLLM": _litellm,
    "smg": _rust("smg", ["smg", "launch"], "--stream-body-stall-timeout-secs", str(WAIT_S)),
    "vllm-router": _rust("vllm-router", ["vllm-router"]),
    "sglang-router": _rust("sglang-router", ["sglang-router", "launch"]),
}


@contextlib.contextmanager
def _running(command: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            for kind in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, kind)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)


def _free_ports() -> tuple[int, int]:
    """Two ports that nobody listens on; from the system's range, so that several runs do not take each other's."""
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


# The measurement -----------------------------------------------------------------------------------------------------


@attrs.frozen
class Result:
    """What a gateway did in one case."""

    gateway: str
    version: str
    case: Case
    judgement: Judgement

    def as_dict(self) -> Mapping[str, object]:
        """For ``--json``."""
        case, found = self.case, self.judgement
        how = {"fault": case.fault.name, "stream": case.stream, "engines": case.engines}
        return {"gateway": self.gateway, "version": self.version, **how, "verdict": found.verdict, "why": found.why}


async def _is_alive(url: str, within_s: float, process: subprocess.Popen[bytes], tongue: Tongue) -> bool:
    """True once the gateway answers two plain requests, one after the other."""
    until, good, has_path = time.monotonic() + within_s, 0, False
    while time.monotonic() < until and process.poll() is None:
        heard = await ask(url, stream=False, deadline_s=5.0, tongue=tongue)
        has_path = has_path or heard.status not in (0, *_NO_SUCH_PATH)
        good = good + 1 if heard.status == 200 else 0
        if good == 2:
            return True
        if not good:
            await asyncio.sleep(0.3)
    if not has_path:  # some say 404 for as long as they know of no engine
        raise NotHereError(f"never had {tongue.path}")
    return False


async def _run_all(name: str, todo: Sequence[Case], site_: Site, peers: Path, tongue: Tongue) -> list[Result]:
    """A gateway's cases with so many engines; it is started anew whenever it does not come back."""
    found: list[Result] = []
    version = version_of(peers, name)
    waiting = list(todo)
    engines = tuple(engine.url for engine in site_.engines)
    while waiting:
        port, metrics_port = _free_ports()
        folder = Path(tempfile.mkdtemp())
        place = Place(peers, folder, port, metrics_port, engines)
        with _running(GATEWAYS[name](place), folder) as process:
            url = f"http://127.0.0.1:{port}"
            await site_.befall(healthily)
            if not await _is_alive(url, START_S, process, tongue):
                raise NotHereError(f"gave no answer; see {folder}/log")
            while waiting:
                case = waiting.pop(0)
                if len(engines) > 1 and name in SLOW_STARTERS:
                    await asyncio.sleep(PAUSE_S)
                judgement = await run(case, url, site_, TIMES, tongue)
                found.append(Result(name, version, case, judgement))
                print(f"{judgement.verdict.upper():5} {name}: {case}: {judgement.why}", file=sys.stderr, flush=True)
                is_last = name not in SLOW_STARTERS or case.fault.is_outage
                if is_last or not await _is_alive(url, ALIVE_S, process, tongue):
                    break
    return found


async def measure(options: argparse.Namespace) -> list[Result]:
    """All gateways, all cases."""
    found: list[Result] = []
    words, tongue = options.only.split(","), next(one for one in TONGUES if one.name == options.api)
    for name in (name for name in GATEWAYS if any(word in name for word in words)):
        for engines in (1, 2):
            todo = [case for case in cases(UNIT_S) if case.engines == engines]
            async with site(engines, *TONGUES[1:]) as site_:
                try:
                    found += await _run_all(name, todo, site_, options.peers_dir, tongue)
                except NotHereError as error:
                    print(f"{name}: {error}", file=sys.stderr)
                    break
    return found


# The report ----------------------------------------------------------------------------------------------------------

_LETTERS = {Verdict.PASS: "✓", Verdict.SAFE: "○", Verdict.FAIL: "✗"}


def report(results: Sequence[Result]) -> Iterator[str]:
    """Three tables: the counts, fault by fault, and what each gateway failed by."""
    names = list(dict.fromkeys(result.gateway for result in results))
    yield "| gateway | cases | pass | safe | fail | only by an address |"
    yield "|---|---|---|---|---|---|"
    for name in names:
        own = [result for result in results if result.gateway == name]
        counts = [sum(one.judgement.verdict is verdict for one in own) for verdict in Verdict]
        told = sum(one.judgement.why == TOLD_ADDRESS for one in own)
        yield f"| {name} {own[0].version} | {len(own)} | " + " | ".join(map(str, [*counts, told])) + " |"
    yield ""
    yield "| fault | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for fault in dict.fromkeys(result.case.fault.name for result in results):
        cells = ["".join(_cells(results, name, fault)) for name in names]
        yield f"| {fault} | " + " | ".join(cells) + " |"
    failed = [one for one in results if one.judgement.verdict is Verdict.FAIL]
    yield ""
    yield "| fails because it | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for why in sorted({one.judgement.why for one in failed}):
        counts = [sum(one.gateway == name and one.judgement.why == why for one in failed) for name in names]
        yield f"| {why} | " + " | ".join(map(str, counts)) + " |"


def _cells(results: Sequence[Result], name: str, fault: str) -> Iterator[str]:
    """Whole alone, whole with another engine, stream alone, stream with another engine."""
    for stream in (False, True):
        for engines in (1, 2):
            for one in results:
                if (one.gateway, one.case.fault.name, one.case.stream, one.case.engines) == (
                    name,
                    fault,
                    stream,
                    engines,
                ):
                    yield _LETTERS[one.judgement.verdict]


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-dir", type=Path, default=Path(), help="folder of the peers' virtual environments")
    parser.add_argument("--install", action="store_true", help="install those that are not there yet")
    parser.add_argument("--only", default="", help="gateways whose name has one of these words, by commas")
    parser.add_argument("--json", type=Path, help="also write every case here")
    parser.add_argument("--api", default=CHAT.name, choices=[one.name for one in TONGUES], help="what is asked in")
    options = parser.parse_args()
    if options.install:
        install(options.peers_dir)
    results = asyncio.run(measure(options))
    if options.json:
        options.json.write_text(json.dumps([one.as_dict() for one in results], indent=1), encoding="utf-8")
    print("\n".join(report(results)))


if __name__ == "__main__":
    main()
