"""The gateway as a process of its own, in front of real engines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.real.engines import Engine, free_port


def gateway(models: Sequence[Mapping[str, Any]], folder: Path, **more: Any) -> Engine:
    """A gateway for these models, with all but `more` by default; its fleet file and traces are in the folder."""
    config = {
        "fleet_name": "real",
        "models": list(models),
        "telemetry": {"trace_store": {"path": str(folder / "traces.sqlite")}},
        **more,
    }
    path = folder / "fleet.yaml"
    path.write_text(json.dumps(config, indent=1))  # JSON is YAML
    port = free_port()
    kvfleet = Path(sys.executable).with_name("kvfleet")
    command = [kvfleet, "run", path, "--host", "127.0.0.1", "--port", str(port)]
    return Engine(name="gateway", command=command, port=port, ready_path="/readyz", start_s=60)


def model(engine: Engine, provider: str, **more: Any) -> dict[str, Any]:
    """The entry of a fleet file for an engine's model, which can do everything the tiny model can."""
    can = {"supports_tools": True, "supports_json_mode": True}
    return {"name": engine.model, "endpoint": engine.url, "provider": provider, "capabilities": can, **more}
