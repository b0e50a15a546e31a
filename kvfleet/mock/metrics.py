"""The metrics page of a mock engine: vLLM's names, labels and buckets (those of 0.32)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

import attrs
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvfleet.adapters.base import EngineLoad
from kvfleet.adapters.mock_answer import MockText
from kvfleet.sim.events import Decoded, Event, Finished, FirstToken, Job, Preempted, Started
from kvfleet.sim.spec import EngineSpec

__all__ = ["CONTENT_TYPE", "EngineMetrics", "Histogram", "MetricsPage"]

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LONG = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_REASONS = ("stop", "length", "abort", "error", "repetition")


@attrs.define
class Histogram:
    """Counts by bucket, many at once.

    >>> histogram = Histogram("seconds", "How long.", (1.0, 2.0))
    >>> histogram.observe(1.5, 3)
    >>> histogram.buckets
    [0, 3, 0]
    """

    name: str
    doc: str
    bounds: Sequence[float]
    total: float = attrs.field(init=False, default=0.0)
    buckets: list[int] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.buckets = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value so many times."""
        self.buckets[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def family(self, labels: Sequence[str], values: Sequence[str]) -> HistogramMetricFamily:
        """As Prometheus has it."""
        found = HistogramMetricFamily(self.name, self.doc, labels=labels)
        bounds = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        sums, running = [], 0
        for bound, count in zip(bounds, self.buckets, strict=True):
            running += count
            sums.append((bound, running))
        found.add_metric(list(values), buckets=sums, sum_value=self.total)
        return found


@attrs.define(eq=False)
class EngineMetrics(Collector):
    """Follows one engine's events, and writes its page.

    Args:
        model: The name of its model.
        spec: Its size.
        load: Its load by now.
        rank: Its data-parallel rank, the label ``engine`` of all that is on the page.
    """

    model: str
    spec: EngineSpec
    load: Callable[[], EngineLoad]
    rank: int = 0
    ttft: Histogram = attrs.field(
        init=False,
        factory=lambda: Histogram(
            "vllm:time_to_first_token_seconds", "Histogram of time to first token in seconds.", _TTFT
        ),
    )
    per_token: Histogram = attrs.field(
        init=False,
        factory=lambda: Histogram(
            "vllm:inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", _PER_TOKEN
        ),
    )
    tpot: Histogram = attrs.field(
        init=False,
        factory=lambda: Histogram(
            "vllm:request_time_per_output_token_seconds", "Histogram of time per output token per request.", _PER_TOKEN
        ),
    )
    whole: Histogram = attrs.field(
        init=False,
        factory=lambda: Histogram(
            "vllm:e2e_request_latency_seconds", "Histogram of end to end request latency.", _LONG
        ),
    )
    queue: Histogram = attrs.field(
        init=False,
        factory=lambda: Histogram(
            "vllm:request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", _LONG
        ),
    )
    prefill: Histogram = attrs.field(
        init=False,
        factory=lambda: Histogram(
            "vllm:request_prefill_time_seconds", "Histogram of time spent in PREFILL phase for request.", _LONG
        ),
    )
    decode: Histogram = attrs.field(
        init=False,
        factory=lambda: Histogram(
            "vllm:request_decode_time_seconds", "Histogram of time spent in DECODE phase for request.", _LONG
        ),
    )
    prompts: Histogram = attrs.field(
        init=False,
        factory=lambda: Histogram("vllm:request_prompt_tokens", "Number of prefill tokens processed.", _COUNTS),
    )
    answers: Histogram = attrs.field(
        init=False,
        factory=lambda: Histogram("vllm:request_generation_tokens", "Number of generation tokens processed.", _COUNTS),
    )
    preemptions: int = attrs.field(init=False, default=0)
    generated_tokens: int = attrs.field(init=False, default=0)
    read_tokens: int = attrs.field(init=False, default=0)
    ended: dict[str, int] = attrs.field(init=False, factory=lambda: dict.fromkeys(_REASONS, 0))
    _started_s: dict[Job, float] = attrs.field(init=False, factory=dict, repr=False)
    _first_s: dict[Job, float] = attrs.field(init=False, factory=dict, repr=False)
    _last_s: float = attrs.field(init=False, default=0.0)

    def follow(self, events: Sequence[Event]) -> None:
        """Take in what happened."""
        for event in events:
            match event:
                case Started(at_s, job):
                    self._started_s[job] = at_s
                    self.queue.observe(at_s - job.arrived_s)
                case FirstToken(at_s, job):
                    self._first(job, at_s)
                case Decoded(at_s, jobs, tokens):
                    self._decoded(at_s, len(jobs), tokens)
                case Finished(at_s, job):
                    self._finish(job, at_s)
                case Preempted():
                    self.preemptions += 1
                case _:
                    pass
            self._last_s = event.at_s

    def abort(self, jobs: Sequence[Job]) -> None:
        """Requests were cancelled."""
        for job in jobs:
            self._first_s.pop(job, None)
            if self._started_s.pop(job, None) is not None:
                self.ended["abort"] += 1

    def _first(self, job: Job, at_s: float) -> None:
        self._first_s[job] = at_s
        self.generated_tokens += 1
        self.read_tokens += job.prompt_tokens
        self.ttft.observe(at_s - job.arrived_s)
        self.prefill.observe(at_s - self._started_s.get(job, at_s))

    def _decoded(self, at_s: float, jobs: int, tokens: int) -> None:
        self.generated_tokens += jobs * tokens
        # A run's steps are not told apart; those before the last told event are as long as the mean.
        self.per_token.observe(max(0.0, at_s - self._last_s) / tokens, jobs * tokens)

    def _finish(self, job: Job, at_s: float) -> None:
        started_s = self._started_s.pop(job, at_s)
        first_s = self._first_s.pop(job, at_s)
        self.whole.observe(at_s - job.arrived_s)
        self.decode.observe(at_s - first_s)
        self.prompts.observe(job.prompt_tokens)
        self.answers.observe(job.output_tokens)
        if not job.output_tokens:
            self.read_tokens += job.prompt_tokens
            self.prefill.observe(at_s - started_s)
        if job.output_tokens > 1:
            self.tpot.observe((at_s - first_s) / (job.output_tokens - 1))
        reason = job.key.finish_reason if isinstance(job.key, MockText) else ""
        self.ended[reason if reason in self.ended else "stop"] += 1

    def collect(self) -> Iterator[Metric]:
        """Everything on the page."""
        load = self.load()
        labels, values = ["model_name", "engine"], [self.model, str(self.rank)]
        for name, doc, value in _gauges(load):
            gauge = GaugeMetricFamily(name, doc, labels=labels)
            gauge.add_metric(values, value)
            yield gauge
        yield self._waiting(load)
        yield self._config()
        for name, doc, value in self._counters(load):
            counter = CounterMetricFamily(name, doc, labels=labels)
            counter.add_metric(values, value)
            yield counter
        yield self._successes()
        for histogram in (
            *(self.ttft, self.per_token, self.tpot, self.whole, self.queue),
            *(self.prefill, self.decode, self.prompts, self.answers),
        ):
            yield histogram.family(labels, values)

    def _counters(self, load: EngineLoad) -> Iterator[tuple[str, str, float]]:
        queries, hits = load.prefix_queries_tokens or 0.0, load.prefix_hits_tokens or 0.0
        yield "vllm:prefix_cache_queries", "Prefix cache queries, in terms of number of queried tokens.", queries
        yield "vllm:prefix_cache_hits", "Prefix cache hits, in terms of number of cached tokens.", hits
        yield "vllm:prompt_tokens", "Number of prefill tokens processed.", self.read_tokens
        yield "vllm:prompt_tokens_cached", "Number of cached prompt tokens.", hits
        yield "vllm:generation_tokens", "Number of generation tokens processed.", self.generated_tokens
        yield "vllm:num_preemptions", "Cumulative number of preemption from the engine.", self.preemptions

    def _waiting(self, load: EngineLoad) -> Metric:
        gauge = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Number of waiting requests by reason.",
            labels=["model_name", "engine", "reason"],
        )
        for reason, value in (("capacity", load.waiting or 0), ("deferred", 0)):
            gauge.add_metric([self.model, str(self.rank), reason], value)
        return gauge

    def _config(self) -> Metric:
        labels = {
            "block_size": str(self.spec.block_tokens),
            "num_gpu_blocks": str(self.spec.all_blocks),
            "kv_cache_size_tokens": str(self.spec.cache_blocks * self.spec.block_tokens),
            "enable_prefix_caching": "True",
            "cache_dtype": "auto",
            "engine": str(self.rank),
        }
        gauge = GaugeMetricFamily(
            "vllm:cache_config_info", "Information of the LLMEngine CacheConfig", labels=list(labels)
        )
        gauge.add_metric(list(labels.values()), 1)
        return gauge

    def _successes(self) -> Metric:
        counter = CounterMetricFamily(
            "vllm:request_success",
            "Count of successfully processed requests.",
            labels=["model_name", "engine", "finished_reason"],
        )
        for reason, count in self.ended.items():
            counter.add_metric([self.model, str(self.rank), reason], count)
        return counter


@attrs.frozen(eq=False)
class MetricsPage(Collector):
    """The page of an engine: of all its data-parallel ranks."""

    ranks: Sequence[EngineMetrics]

    def read(self) -> bytes:
        """The page."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """Each metric once, with the samples of all ranks."""
        for family, *others in zip(*(rank.collect() for rank in self.ranks), strict=True):
            for other in others:
                family.samples.extend(other.samples)
            yield family


def _gauges(load: EngineLoad) -> Iterator[tuple[str, str, float]]:
    yield "vllm:num_requests_running", "Number of requests in model execution batches.", load.running or 0
    yield "vllm:num_requests_waiting", "Number of requests waiting to be processed.", load.waiting or 0
    yield "vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", load.kv_usage or 0.0
