"""Environment Variable Overrides."""

from __future__ import annotations

import json
from pathlib import Path

from tests.page.fleets import QUICKSTART
from tests.page.printed import run_apart, shell

EXPORTS = """\
export KVFLEET__STRATEGY=cost_first
export KVFLEET__FLEET_NAME=production
export KVFLEET__CACHE_AFFINITY__ENABLED=true
export KVFLEET__TELEMETRY__PROMETHEUS_PORT=9091

# Or use KVFLEET_CONFIG to set the default config path
export KVFLEET_CONFIG=/etc/kvfleet/fleet.yaml
"""

READS = """
python -c 'from kvfleet import load_config; import json
c = load_config()
print(json.dumps([c.strategy, c.fleet_name, c.cache_affinity.enabled, c.telemetry.prometheus_port]))'
"""


async def test_variables_override_the_file(tmp_path: Path) -> None:
    """All four, of three types; and the file is the one that `KVFLEET_CONFIG` names."""
    (tmp_path / "fleet.yaml").write_text(QUICKSTART + "\ntelemetry: {prometheus_port: 9090}\n")
    exports = EXPORTS.replace("/etc/kvfleet/fleet.yaml", str(tmp_path / "fleet.yaml"))
    assert json.loads(await shell(exports + READS)) == ["cost_first", "production", True, 9091]


async def test_the_commands_obey_them_too(tmp_path: Path) -> None:
    """A decision is made by the strategy that the environment names."""
    (tmp_path / "fleet.yaml").write_text(QUICKSTART)
    exports = EXPORTS.replace("/etc/kvfleet/fleet.yaml", str(tmp_path / "fleet.yaml"))
    shown = await shell(exports + "kvfleet simulate --prompt Hello")
    assert shown.splitlines()[0] == "Strategy: cost_first"


async def test_without_variables_the_file_counts(tmp_path: Path) -> None:
    """So it is the variables that made the difference."""
    (tmp_path / "fleet.yaml").write_text(QUICKSTART)
    code = f"from kvfleet import load_config\nconfig = load_config({str(tmp_path / 'fleet.yaml')!r})"
    config = (await run_apart(code))["config"]
    assert (config.strategy, config.fleet_name) == ("hybrid_score", "my-fleet")
