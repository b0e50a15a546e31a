"""Holds a gateway to its own OpenAPI page: ``python tests/schema/run.py [--examples N]``.

Schemathesis asks what the page allows, and what it does not, of every path. The engine is a fake one that speaks every
API, so that an answer of 500 or more is the gateway's own failure. `nox -s schema` installs what is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile

import attrs

from kvfleet.adapters.call import Call, Reply
from kvfleet.config.schema import (
    FleetConfig,
    GatewayConfig,
    ModelCapabilities,
    ModelConfig,
    TelemetryConfig,
    TraceStoreConfig,
)
from kvfleet.gateway.server import running
from kvfleet.runtime import Router
from kvfleet.testing.fakes import FakeAdapter

KEY = "sk-for-the-schema"
KINDS = ("chat", "embedding", "rerank")
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("positive_data_acceptance", "negative_data_rejection", "unsupported_method", "ignored_auth"),
    *("response_headers_conformance", "missing_required_header"),
)
READ = ("model", "messages", "prompt", "input", "query", "documents", "stream")
NOT_ASKED = ("/dashboard/events", "/-/reload")  # one never ends, the other has no file to read again


class Engine(FakeAdapter):
    """Speaks every API."""

    def speaks(self, surface: str) -> bool:
        """All of them."""
        del surface
        return True

    async def send(self, call: Call) -> Reply:
        """Answer; of the body it reads only what the gateway has checked."""
        body = {key: value for key, value in call.body.items() if key in READ}
        body |= {key: "a text" for key in ("prompt", "input") if key in body}
        return await super().send(attrs.evolve(call, body=body))


async def main() -> int:
    """Serve a gateway, and let schemathesis at it; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100, help="most requests of a kind for each path")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    models = tuple(
        ModelConfig(
            name=kind,
            endpoint=f"http://{kind}.internal:8000",
            capabilities=ModelCapabilities(
                model_type=kind, supports_tools=True, supports_json_mode=True, supports_vision=True
            ),
        )
        for kind in KINDS
    )
    config = FleetConfig(
        models=models,
        gateway=GatewayConfig(api_key=KEY),
        telemetry=TelemetryConfig(trace_store=TraceStoreConfig(enabled=False)),
    )
    adapters = {one.id: Engine(endpoint=one.endpoint, model_id=one.name) for one in models}
    async with running(config, router=Router(config, adapters=adapters, polls=False)) as serving:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{serving.url}/openapi.json"]
        command += ["-H", f"Authorization: Bearer {KEY}", "--checks", ",".join(CHECKS), "--no-color"]
        command += ["--max-examples", str(asked.examples), "--seed", str(asked.seed), "--continue-on-failure"]
        command += ["--phases", "examples,coverage,fuzzing"]
        for path in NOT_ASKED:
            command += ["--exclude-path", path]
        with tempfile.TemporaryDirectory() as folder:  # where it keeps what it found
            child = await asyncio.create_subprocess_exec(*command, cwd=folder)
            return await child.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
