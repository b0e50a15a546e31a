"""What a trace costs beyond its recording: the bridge, the hand-over to the store, packing, and reading.

Run ``python benchmarks/trace.py``. Figures are CPU microseconds (best of rounds) for one route of nine stages and one
attempt over eight replicas; compare ratios between lines of one run, since machines differ and are busy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

from kvfleet.trace import names
from kvfleet.trace.attributes import is_attempt
from kvfleet.trace.explanation import Explanation
from kvfleet.trace.otel import Bridge, OTelBridge, OwnBridge
from kvfleet.trace.otlp import to_otlp
from kvfleet.trace.rows import pack, unpack
from kvfleet.trace.segments import Packer, unpack_segment
from kvfleet.trace.spans import Shape, Span, SpanKind, Status, Step, Trace
from kvfleet.trace.store import TraceStore

ROUNDS = 9
REPLICAS = 8
TOGETHER = 100
SHAPES: dict[str, Shape] = {}
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def example(replicas: int = REPLICAS) -> Trace:
    """A trace as the engine writes it."""
    ids = tuple(f"llama-3-8b@http://gpu-{i}:8000" for i in range(replicas))
    values = tuple(i / replicas for i in range(replicas))
    start = time.time_ns()
    route = Span(names.ROUTE_SPAN, start, start + 400_000_000, kind=SpanKind.SERVER, status=Status.OK)
    route.attributes = {
        names.REQUEST_ID: "0123456789abcdef",
        names.OPERATION: "chat",
        names.MODEL_REQUESTED: "auto",
        names.STREAM: True,
        names.DATA_CLASS: "internal",
        names.FLEET: "fleet",
        names.PIPELINE_HASH: "0a1b2c3d4e5f",
        names.SEED: 123456789,
        names.CANDIDATES: ids,
        names.STRATEGY: "hybrid_score",
        names.OUTCOME: "answered",
        names.REPLICA_SELECTED: ids[0],
        names.REPLICA_SERVED: ids[0],
    }
    filters = [("filter", name, {names.CANDIDATES_IN: replicas, names.CANDIDATES_OUT: replicas}) for name in ("a", "b")]
    scores = [
        ("score", name, {names.SCORED: ids, names.SCORE_VALUES: values, names.SCORE_UNIT: "s"})
        for name in ("c", "d", "e")
    ]
    facts = [("classify", name, {names.FACT_PREFIX + name: "312 tokens"}) for name in ("prompt", "modality")]
    affinity = [("affinity", "prefix", {names.SCORED: ids, names.SCORE_VALUES: values})]
    terms = {names.TERM_PREFIX + name: values for name in ("cost", "latency", "quality")}
    select = [("select", "hybrid_score", {names.SCORED: ids, names.SCORE_VALUES: values, **terms})]
    stages = [
        step(kind, name, more, start + i)
        for i, (kind, name, more) in enumerate([*facts, *filters, *affinity, *scores, *select])
    ]
    attempt = Span("chat llama-3-8b", start + 100, start + 400_000, kind=SpanKind.CLIENT, status=Status.OK)
    attempt.attributes = {
        names.ATTEMPT: 1,
        names.ATTEMPT_REASON: "first",
        names.REPLICA: ids[0],
        names.MODEL: "llama-3-8b",
        names.GEN_AI_OPERATION: "chat",
        names.GEN_AI_PROVIDER: "vllm",
        names.GEN_AI_INPUT_TOKENS: 312,
        names.GEN_AI_OUTPUT_TOKENS: 64,
    }
    return Trace("0" * 31 + "1", [route, *stages, attempt])


def step(kind: str, name: str, said: dict[str, Any], start_ns: int) -> Step:
    """A stage's record as the engine writes it."""
    about = names.SCORED if names.SCORED in said else ""
    values = {key: value for key, value in said.items() if key != about}
    shape = SHAPES.setdefault(
        name,
        Shape(f"kvfleet.{kind}.{name}", {names.STAGE_KIND: kind, names.STAGE_NAME: name}, tuple(values), about),
    )
    return Step(shape, tuple(values.values()), said.get(about, ()), start_ns, start_ns + 9)


def pass_through(bridge: Bridge, trace: Trace, traceparent: str = "") -> None:
    """What the route and its attempts ask of a bridge."""
    route = trace.spans[0]
    handle = bridge.start_route(route.name, kind=route.kind, start_ns=route.start_ns, traceparent=traceparent)
    for span in trace.spans[1:]:
        if is_attempt(span):
            attempt = bridge.start_attempt(handle, span.name, span.start_ns)
            bridge.end_attempt(attempt, span)
    bridge.end_route(handle, trace)


class Nowhere(SpanExporter):
    """Takes spans and forgets them."""

    def export(self, spans: object) -> SpanExportResult:  # noqa: ARG002 - the SDK's signature
        """Forget them."""
        return SpanExportResult.SUCCESS


def best_us(call: Callable[[], object], number: int) -> float:
    """CPU microseconds for one call, the best of the rounds."""
    found = []
    for _ in range(ROUNDS):
        started = time.process_time()
        for _ in range(number):
            call()
        found.append((time.process_time() - started) / number * 1e6)
    return min(found)


def provider(sampler: object) -> TracerProvider:
    """An SDK that exports to nowhere."""
    made = TracerProvider(sampler=sampler, shutdown_on_exit=False)  # type: ignore[arg-type]
    made.add_span_processor(BatchSpanProcessor(Nowhere()))
    return made


def measure() -> dict[str, float]:
    """Every figure, by its name."""
    trace, own = example(), OwnBridge()
    off, on = provider(ALWAYS_OFF), provider(ALWAYS_ON)
    unsampled, sampled = OTelBridge(off), OTelBridge(on)
    figures = {
        "own bridge, route and one attempt": best_us(lambda: pass_through(own, trace), 5000),
        "own bridge, under a traceparent": best_us(lambda: pass_through(own, trace, TRACEPARENT), 5000),
        "OpenTelemetry, unsampled": best_us(lambda: pass_through(unsampled, trace), 2000),
        "OpenTelemetry, sampled (11 spans)": best_us(lambda: pass_through(sampled, trace), 200),
    }
    off.shutdown()
    on.shutdown()
    alone, together = pack(trace), segment(trace)
    figures |= {
        "store, write (on the hot path)": write_us(trace),
        "store, packing (in the writer's thread)": best_us(lambda: segment(trace), 20) / TOGETHER,
        "store, unpacking": best_us(lambda: list(unpack_segment(together)), 20) / TOGETHER,
        "packing alone": best_us(lambda: pack(trace), 1000),
        "unpacking alone": best_us(lambda: unpack(alone), 500),
        "explanation, made and not looked at": best_us(lambda: Explanation(trace), 5000),
        "explanation, summary": best_us(lambda: Explanation(trace).summary(), 500),
        "explanation, dictionary": best_us(lambda: Explanation(trace).to_dict(), 300),
        "OTLP JSON instead, to compare": best_us(lambda: orjson.dumps(to_otlp([trace])), 300),
        "size in the store, bytes": len(together) / TOGETHER,
        "size packed alone, bytes": float(len(alone)),
    }
    return figures


def segment(trace: Trace) -> bytes:
    """A trace packed with others of its kind."""
    packer = Packer()
    for _ in range(TOGETHER):
        packer.add(trace, 1 << 20)
    return packer.done()


def write_us(trace: Trace) -> float:
    """CPU microseconds of this thread for one hand-over, while the store's thread writes."""
    with tempfile.TemporaryDirectory() as place:
        store = TraceStore(Path(place) / "traces.sqlite")
        store.open()
        found = []
        for _ in range(ROUNDS):
            started = time.thread_time()
            for _ in range(1000):
                store.write(trace)
            found.append((time.thread_time() - started) / 1000 * 1e6)
            store.flush(30)
        store.close()
        return min(found)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    figures = measure()
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        print(f"{name:<50}{value:>10.2f}")


if __name__ == "__main__":
    main()
