"""The metrics page: vLLM's names and labels, and figures that are true."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from kvfleet.mock.metrics import Histogram
from tests.mock.serving import HELLO, ask, served

# Names of vLLM 0.32 that routers, dashboards and autoscalers read.
NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:prompt_tokens",
    "vllm:prompt_tokens_cached",
    "vllm:generation_tokens",
    "vllm:num_preemptions",
    "vllm:request_success",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
}


async def page(count: int) -> dict[str, float]:
    """Every sample after so many chats of the same prompt."""
    async with served() as server:
        for _ in range(count):
            await ask(server, body={**HELLO, "messages": [{"role": "user", "content": "x" * 640}]})
        text = (await ask(server, "/metrics")).body.decode()
    families = list(text_string_to_metric_families(text))
    assert {family.name for family in families} == NAMES
    found = {}
    for family in families:
        for sample in family.samples:
            rest = {key: value for key, value in sample.labels.items() if key not in ("model_name", "engine")}
            assert sample.labels.get("engine", "0") == "0"
            found[sample.name + "".join(f" {value}" for value in rest.values())] = sample.value
    return found


async def test_the_page_counts_what_happened() -> None:
    """Three chats of 168 tokens with six words each, of which two found ten blocks."""
    found = await page(3)
    assert found["vllm:prompt_tokens_total"] == 3 * 168
    assert found["vllm:prefix_cache_queries_total"] == 3 * 168
    assert found["vllm:prefix_cache_hits_total"] == found["vllm:prompt_tokens_cached_total"] == 2 * 160
    assert found["vllm:generation_tokens_total"] == 18
    assert found["vllm:request_success_total stop"] == 3
    assert found["vllm:request_prompt_tokens_sum"] == 3 * 168
    assert found["vllm:time_to_first_token_seconds_count"] == 3
    assert found["vllm:inter_token_latency_seconds_count"] == 15
    assert found["vllm:request_time_per_output_token_seconds_count"] == 3
    assert found["vllm:e2e_request_latency_seconds_bucket +Inf"] == 3


async def test_a_page_of_an_idle_engine_is_whole() -> None:
    """Every name is there from the beginning, so that rates have a start."""
    found = await page(0)
    assert found["vllm:generation_tokens_total"] == 0
    assert found["vllm:time_to_first_token_seconds_count"] == 0


def test_a_histogram_counts_by_its_bounds() -> None:
    """A value on a bound belongs to it, and one above all bounds to the last bucket."""
    histogram = Histogram("h", "", (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert (histogram.buckets, histogram.total) == ([2, 1, 1], 12.0)
