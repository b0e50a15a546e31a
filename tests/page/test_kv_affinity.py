"""KV-Cache Affinity Routing."""

from __future__ import annotations

import re

from tests.page.printed import run

EXAMPLE = """\
from kvfleet.cache.fingerprints import PromptFingerprinter
from kvfleet.cache.kv_affinity import KVAffinityScorer
from kvfleet.adapters.base import ChatMessage

# Fingerprint a prompt
fingerprinter = PromptFingerprinter(prefix_tokens=128)
messages = [
    ChatMessage(role="system", content="You are a helpful coding assistant."),
    ChatMessage(role="user", content="Write a binary search in Python"),
]
fingerprint = fingerprinter.fingerprint(messages)

# Score cache affinity across endpoints
scorer = KVAffinityScorer(virtual_nodes=150, session_ttl=3600)
scorer.register_endpoints("llama-8b", ["http://gpu-1:8000", "http://gpu-2:8000"])

# After first request, record which endpoint served it
scorer.record_routing(fingerprint, "http://gpu-1:8000")

# Next request with same system prompt → routes to same GPU
best_ep, affinity = scorer.best_endpoint(
    fingerprint, "llama-8b",
    ["http://gpu-1:8000", "http://gpu-2:8000"],
)
print(f"Best endpoint: {best_ep}, affinity: {affinity:.2f}")
# → Best endpoint: http://gpu-1:8000, affinity: 0.50
"""


async def test_the_example_goes_where_it_was_answered() -> None:
    """The page's own slip: it prints 0.50 where more is known; the endpoint is the same, the affinity at least that."""
    ran = await run(EXAMPLE)
    found = re.fullmatch(r"Best endpoint: http://gpu-1:8000, affinity: (\d\.\d\d)\n", ran.printed)
    assert found
    assert float(found[1]) >= 0.5


async def test_whoever_answered_it_is_found_again() -> None:
    """The second endpoint just as the first one: it is not the order that decides."""
    elsewhere = EXAMPLE.replace(
        'record_routing(fingerprint, "http://gpu-1:8000")', 'record_routing(fingerprint, "http://gpu-2:8000")'
    )
    assert (await run(elsewhere)).printed.startswith("Best endpoint: http://gpu-2:8000, ")
