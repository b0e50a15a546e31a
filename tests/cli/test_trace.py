"""`kvfleet trace`, from a store and from files; what it prints, and how it fails."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvfleet.cli.main import cli
from kvfleet.cli.trace import follow
from kvfleet.trace import names
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.otlp import to_otlp
from kvfleet.trace.reader import TraceReader
from kvfleet.trace.render import render
from kvfleet.trace.spans import Trace
from kvfleet.trace.store import TraceStore
from tests.trace.building import START_NS, fallback, nobody, page

YEARS_S = 1e9


def simple() -> Trace:
    """The documentation's example, under identifiers of its own."""
    trace = page()
    trace.trace_id, trace.route.span_id = "aaaa0001" + "0" * 24, "cc" * 8
    trace.route.attributes[names.REQUEST_ID] = "req-page"
    return trace


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A store with three routes: the example, a fallback, and one without candidates."""
    store = TraceStore(tmp_path / "traces.sqlite", max_age_s=YEARS_S)
    store.open()
    for trace in (simple(), fallback(), nobody()):
        store.write(trace)
    store.close()
    return store.path


def run(*args: object, **environ: str) -> Result:
    """`kvfleet trace ARGS`."""
    return CliRunner().invoke(cli, ["trace", *map(str, args)], env={"TZ": "UTC", **environ})


def told(result: Result) -> Any:
    """What a command printed as JSON."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_list(path: Path) -> None:
    """The list is a plain table when piped, the newest first, with who answered, how fast, and how it ended."""
    time.tzset()
    result = run("list", "--store", path)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "WHEN            TRACE     TENANT   MODEL       TOOK     FIRST BYTE  TOKENS  TRIES  OUTCOME",
        "05-28 20:26:40  9d02be11  -        -           0.06 ms  -           -       0      no_candidates",
        "05-28 20:26:40  4f1c9a2b  team-ml  llama-3-8b  10.4 s   10.1 s      312/64  2      answered",
        "05-28 20:26:40  aaaa0001  -        llama-3-8b  400 ms   -           -       1      answered",
    ]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ((), ["9d02be11", "4f1c9a2b", "aaaa0001"]),
        (("-n", 1), ["9d02be11"]),
        (("--model", "llama-3-70b"), ["4f1c9a2b"]),
        (("--outcome", "answered"), ["4f1c9a2b", "aaaa0001"]),
        (("--tenant", "team-ml"), ["4f1c9a2b"]),
        (("--status", 503), ["9d02be11"]),
        (("--since", "2026-05-28T20:26:40+00:00"), ["9d02be11", "4f1c9a2b", "aaaa0001"]),
        (("--since", "2026-05-28T20:26:41+00:00"), []),
        (("--since", "9999d"), ["9d02be11", "4f1c9a2b", "aaaa0001"]),
    ],
)
def test_list_as_json(path: Path, options: tuple[object, ...], found: list[str]) -> None:
    """With --json the rows come as JSON, narrowed by the options."""
    assert [row["trace_id"][:8] for row in told(run("list", "--store", path, "--json", *options))] == found


def test_an_empty_list_says_so(path: Path) -> None:
    """A list without rows is no failure, and says on standard error how to see more."""
    result = run("list", "--store", path, "--tenant", "nobody")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "`kvfleet trace list` without options shows all" in result.stderr


@pytest.mark.parametrize(
    ("reference", "trace"),
    [("last", nobody()), ("9d02", nobody()), ("4f1c9a2b", fallback()), ("req-page", simple()), ("cc" * 8, simple())],
)
def test_show(path: Path, reference: str, trace: Trace) -> None:
    """A route is found by the beginning of its identifiers, and drawn as a tree without colours when piped."""
    result = run("show", reference, "--store", path)
    assert (result.exit_code, result.stdout) == (0, render(Explanation(trace)) + "\n")


def test_show_without_an_identifier(path: Path) -> None:
    """Without an identifier the newest route is shown."""
    assert run("show", "--store", path).stdout.startswith("route 9d02be11")


def test_show_as_json_can_be_shown_again(path: Path, tmp_path: Path) -> None:
    """The JSON is the explanation, and at the same time a file that `show` reads: nothing is lost."""
    document = told(run("show", "4f1c", "--store", path, "--json"))
    assert {key: document[key] for key in Explanation(fallback()).to_dict()} == Explanation(fallback()).to_dict()
    file = tmp_path / "route.json"
    file.write_text(json.dumps(document))
    assert run("show", file).stdout == render(Explanation(fallback())) + "\n"
    assert told(run("show", file, "--json")) == document


def test_a_file_of_several_routes(tmp_path: Path) -> None:
    """A collector's file is shown whole; one of its routes is named after a colon; elsewhere one must be named."""
    file = tmp_path / "spans.jsonl"
    file.write_text("\n".join(json.dumps(to_otlp([trace])) for trace in (simple(), fallback())))
    assert run("show", file).stdout == f"{render(Explanation(simple()))}\n\n{render(Explanation(fallback()))}\n"
    assert [one["trace_id"][:8] for one in told(run("show", file, "--json"))] == ["aaaa0001", "4f1c9a2b"]
    assert run("show", f"{file}:req-page").stdout == render(Explanation(simple())) + "\n"
    assert "gpt-4o was dropped by filter.policy" in run("why-not", f"{file}:4f1c", "gpt-4o").stdout
    several = run("why-not", file, "gpt-4o")
    assert several.exit_code == 1
    assert "holds 2 routes; name one as FILE:ID, for instance cccccccccccccccc, abababababababab" in several.stderr
    assert "no route in" in run("show", f"{file}:zzz").stderr


def test_show_all(path: Path, tmp_path: Path) -> None:
    """A long ranking is cut, and shown whole if asked."""
    trace = simple()
    ids = tuple(f"m@http://gpu-{i}:1" for i in range(40))
    trace.stages[1].attributes |= {names.SCORED: ids, names.SCORE_VALUES: (0.5,) * 40}
    file = tmp_path / "large.json"
    file.write_text(json.dumps(to_otlp([trace])))
    assert "… and 35 more" in run("show", file).stdout
    assert "m@gpu-39:1" not in run("show", file).stdout
    assert "m@gpu-39:1" in run("show", file, "--all").stdout


def test_why_not(path: Path) -> None:
    """One or two sentences, and below them what would have to change."""
    result = run("why-not", "4f1c", "llama-3-70b", "--store", path)
    assert result.exit_code == 0
    assert result.stdout == (
        "✗  llama-3-70b was tried as attempt 1 and failed after 10.0 s with timeout: no first token within 10 s. "
        "llama-3-8b@gpu-1:8000 answered instead.\n"
        "   Give it longer (`fallback.timeout_ms`, the model's `timeout_seconds`) or less to do.\n"
    )
    document = told(run("why-not", "4f1c", "gpt-4o", "--store", path, "--json"))
    assert document["trace_id"] == fallback().trace_id
    assert [(v["verdict"], v["stage"], v["rule"]) for v in document["verdicts"]] == [
        ("dropped", "filter.policy", "pii-to-private")
    ]


def test_diff(path: Path) -> None:
    """The difference shows both routes, and then what differs by part, before and after."""
    result = run("diff", "aaaa", "4f1c", "--store", path)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "- route aaaa0001  answered by llama-3-8b in 400 ms"
    assert lines[1].startswith("+ route 4f1c9a2b  answered by llama-3-8b@gpu-1:8000 in 10.4 s")
    assert lines[2] == "request"
    assert [line.split() for line in lines if line.startswith("  time ")] == [["time", "400", "ms", "→", "10.4", "s"]]
    assert told(run("diff", "4f1c", "4f1c", "--store", path, "--json"))["changes"] == []
    assert "nothing differs" in run("diff", "4f1c", "4f1c", "--store", path).stdout


def test_tail(path: Path) -> None:
    """The tail begins with the last routes, the oldest first; as JSON, one document a line."""
    result = run("tail", "--no-follow", "-n", 2, "--store", path)
    assert [line.split()[2] for line in result.stdout.splitlines()] == ["4f1c9a2b", "9d02be11"]
    lines = run("tail", "--no-follow", "--json", "--store", path).stdout.splitlines()
    assert [json.loads(line)["trace_id"][:8] for line in lines] == ["aaaa0001", "4f1c9a2b", "9d02be11"]
    assert run("tail", "--no-follow", "-n", 0, "--store", path).stdout == ""


def test_following(path: Path) -> None:
    """A follower sees what a running gateway adds, each route once and in order."""
    store = TraceStore(path, max_age_s=YEARS_S)
    store.open()
    rounds = iter([["later-1", "later-2"], [], ["later-3"]])

    def sleep(seconds: float) -> None:
        assert seconds > 0
        for request_id in next(rounds):
            trace = simple()
            trace.route.attributes[names.REQUEST_ID] = request_id
            store.write(trace)
        assert store.flush()

    with TraceReader(path) as reader:
        seen = [row.request_id for row in itertools.islice(follow(reader, 1, sleep=sleep), 4)]
    store.close()
    assert seen == ["req-1", "later-1", "later-2", "later-3"]


def test_following_an_empty_store(tmp_path: Path) -> None:
    """A follower of a store without routes waits for the first one."""
    store = TraceStore(tmp_path / "traces.sqlite", max_age_s=YEARS_S)
    store.open()
    with TraceReader(store.path) as reader:
        assert list(follow(reader, 5, sleep=None)) == []
    store.close()


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (("show", "zzz"), 1, "no trace 'zzz' in"),
        (("show", "gone.json"), 1, "gone.json: no such file"),
        (("why-not", "4f1c", "llama-3"), 1, "did you mean llama-3-8b?"),
        (("why-not", "4f1c"), 2, "Missing argument 'MODEL'"),
        (("list", "--since", "yesterday"), 2, "'yesterday' is neither like 30m, 2h or 7d nor like 2026-05-28"),
        (("list", "-n", "0"), 2, "0 is not in the range x>=1"),
        (("shown",), 2, "No such command 'shown'"),
    ],
)
def test_failures(path: Path, args: tuple[str, ...], status: int, message: str) -> None:
    """Failures go to standard error: 1 for what is not there, 2 for a wrong call; each says what to do."""
    options = () if args == ("shown",) else ("--store", path)
    result = run(*args, *options)
    assert (result.exit_code, result.stdout) == (status, "")
    assert message in result.stderr


def test_no_store_yet(tmp_path: Path) -> None:
    """Before the first request the error says where the store would be and what fills it."""
    result = run("list", XDG_STATE_HOME=str(tmp_path))
    assert result.exit_code == 1
    assert (
        f"there is no trace store at {tmp_path}/kvfleet/traces.sqlite; `kvfleet run` keeps traces by default"
        in result.stderr
    )


def test_the_usual_store(path: Path, tmp_path: Path) -> None:
    """Without --store the one in the state directory is read."""
    (tmp_path / "kvfleet").mkdir()
    path.rename(tmp_path / "kvfleet" / "traces.sqlite")
    assert len(told(run("list", "--json", XDG_STATE_HOME=str(tmp_path)))) == 3


def test_a_reader_that_leaves(path: Path) -> None:
    """A pipe whose reader has seen enough ends the command quietly."""
    command = [
        sys.executable,
        "-c",
        "from kvfleet.cli.main import main; main()",
        "trace",
        "list",
        "--json",
        "--store",
        str(path),
    ]
    reader, writer = os.pipe()
    os.close(reader)
    root = Path(__file__).parents[2]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=root, timeout=60, check=False)  # noqa: S603
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_times_are_local(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list shows local time, as clocks on the wall do."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert "05-29 05:26:40" in CliRunner().invoke(cli, ["trace", "list", "--store", str(path)]).stdout
    finally:
        monkeypatch.undo()
        time.tzset()
    assert START_NS // 10**9 == 1_780_000_000
