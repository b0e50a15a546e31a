"""Runs every client's script against a gateway: ``python tests/clients/run.py [--node FOLDER] [NAME ...]``.

The gateway is kvfleet's own, with a key, before an engine that says one sentence, and calls a tool whenever it is given
one and has no result yet; one that is always busy; and one that breaks amid its answer. `nox -s clients` installs the clients. Nothing leaves the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from kvfleet.adapters.call import Call, Reply, Tally, Usage
from kvfleet.adapters.translation import as_stream
from kvfleet.config.schema import (
    FallbackConfig,
    FleetConfig,
    GatewayConfig,
    HealthConfig,
    ModelCapabilities,
    ModelConfig,
    TelemetryConfig,
    TraceStoreConfig,
)
from kvfleet.errors import Fault
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter, FakeReply

HERE = Path(__file__).parent
KEY = "sk-for-clients"
CAPABLE = ModelCapabilities(supports_tools=True, supports_json_mode=True)
MOST_S = 120
SCRIPTS = {
    "llama": FakeReply(),
    "busy": FakeReply(fail=Fault.RATE_LIMITED, retry_after_s=0.1),
    "breaks": FakeReply(fail=Fault.DISCONNECTED, fail_after=2),
}


def called(name: str) -> dict[str, Any]:
    """An answer that calls a tool."""
    function = {"name": name, "arguments": '{"city":"Rome"}'}
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "llama",
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 9, "total_tokens": 29},
    }


class Engine(FakeAdapter):
    """Says one sentence; with tools and without a result, calls the first of them."""

    async def send(self, call: Call) -> Reply:
        """Answer one call."""
        tools, last = call.body.get("tools"), call.body["messages"][-1]
        if not tools or last["role"] == "tool":
            return await super().send(call)
        answer = called(tools[0]["function"]["name"])
        if not call.stream:
            self.script = FakeReply(answer=answer)
            reply = await super().send(call)
            self.script = FakeReply()
            return reply
        told = as_stream(call.operation, answer, include_usage=True)

        async def events() -> AsyncIterator[bytes]:
            for event in told.split(b"\n\n")[:-1]:
                yield event + b"\n\n"

        return Reply(events=events(), tally=Tally(usage=Usage(20, 9, 29)))


async def run_script(script: Path, url: str, node: str) -> bool:
    """Run one script to its end; True if everything in it held."""
    program = ["node"] if script.suffix == ".mjs" else [sys.executable, "-W", "ignore"]
    environ = {**os.environ, "KVFLEET_URL": url, "KVFLEET_KEY": KEY, "KVFLEET_NODE": node, "NO_PROXY": "127.0.0.1"}
    child = await asyncio.create_subprocess_exec(
        *program, str(script), env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(MOST_S):
            told, _ = await child.communicate()
    except TimeoutError:
        child.kill()
        told = b"not done in time"
    held = child.returncode == 0 and b"\nok " in b"\n" + told
    print(told.decode().strip().splitlines()[-1] if held else f"FAILED {script.name}\n{told.decode()}", flush=True)
    return held


async def main() -> int:
    """Run the scripts one after the other; how many failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--node", default="", help="folder with node_modules; without it no script of Node's is run")
    parser.add_argument("names", nargs="*", help="only scripts whose names begin so")
    asked = parser.parse_args()
    scripts = [path for path in sorted(HERE.iterdir()) if path.suffix in (".py", ".mjs")]
    scripts = [path for path in scripts if path.name not in ("run.py", "expected.py")]
    scripts = [path for path in scripts if asked.node or path.suffix == ".py"]
    if asked.names:
        scripts = [path for path in scripts if path.name.startswith(tuple(asked.names))]
    models = [ModelConfig(name=name, endpoint=f"http://{name}.internal:8000", capabilities=CAPABLE) for name in SCRIPTS]
    config = FleetConfig(
        models=tuple(models),
        fallback=FallbackConfig(enabled=False),
        health=HealthConfig(failure_threshold=1000),
        gateway=GatewayConfig(api_key=KEY),
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )
    adapters = {
        model.id: Engine(endpoint=model.endpoint, model_id=model.name, script=SCRIPTS[model.name]) for model in models
    }
    async with running(config, router=Router(config, adapters=adapters, polls=False)) as serving:
        held = [await run_script(script, serving.url, asked.node) for script in scripts]
    print(f"{sum(held)} of {len(held)} clients")
    return len(held) - sum(held)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
