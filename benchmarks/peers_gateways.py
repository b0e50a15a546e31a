"""The gateways that ``peers.py`` compares: how each is installed, and how it is started in front of some engines.

Each peer has a virtual environment of its own in a folder that the user names, as their dependencies exclude each
other. nginx is the system's. All run with their defaults, except that logs are quiet and no queue refuses requests.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs

MODEL = "mock"
KVFLEET = str(Path(sys.executable).with_name("kvfleet"))
PACKAGES: Mapping[str, str] = {
    "vllm-router": "vllm-router",
    "sglang-router": "sglang-router",
    "smg": "smg",
    "litellm": "litellm[proxy]",
    "kvfleet-0.11": "kvfleet[gateway]==0.11.*",
}
"""What pip installs, by the folder of its virtual environment."""


class NotHereError(Exception):
    """A peer that is not installed, or does not start."""


@attrs.frozen
class Place:
    """Where a gateway is to listen and what it is to forward to.

    Attributes:
        peers: The folder of the peers' virtual environments.
        folder: For its files; empty.
        port, metrics_port: Where it listens.
        engines: URLs of the engines.
        model: The name by which they know their model.
    """

    peers: Path
    folder: Path
    port: int
    metrics_port: int
    engines: tuple[str, ...]
    model: str = MODEL

    def program(self, venv: str, name: str) -> str:
        """A peer's command.

        Raises:
            NotHereError: if it is not installed.
        """
        path = (self.peers / venv / "bin" / name).absolute()
        if not path.exists():
            raise NotHereError(f"not installed ({venv})")
        return str(path)

    def file(self, name: str, text: str) -> str:
        """Write a file of its configuration."""
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return str(path)


@attrs.frozen
class Gateway:
    """A gateway by its name, the command that starts it, and whether it is ours."""

    name: str
    command: Callable[[Place], Sequence[str]]
    is_ours: bool = False


def _kvfleet(strategy: str) -> Callable[[Place], Sequence[str]]:
    def command(place: Place) -> Sequence[str]:
        first, *others = place.engines
        model = {"name": place.model, "provider": "vllm", "endpoint": first, "replicas": others, "timeout_seconds": 300}
        fleet = {
            "models": [{**model, "capabilities": {"max_context_window": 32_768}}],
            "strategy": strategy,
            "fallback": {"timeout_ms": 300_000},
            "telemetry": {"trace_store": {"path": str(place.folder / "traces.db")}},
        }
        path = place.file("fleet.yaml", json.dumps(fleet))  # JSON is YAML
        return [KVFLEET, "run", path, "-p", str(place.port), "--log-level", "error"]

    return command


def _rust(venv: str, words: Sequence[str], policy: str, more: Sequence[str] = ()) -> Callable[[Place], Sequence[str]]:
    """vllm-router, sglang-router and smg have one ancestor, and its options."""

    def command(place: Place) -> Sequence[str]:
        ports = ["--host", "127.0.0.1", "--port", str(place.port), "--prometheus-port", str(place.metrics_port)]
        found = [place.program(venv, words[0]), *words[1:], *ports, "--worker-urls", *place.engines]
        return [*found, "--policy", policy, "--log-level", "error", *more]

    return command


def _litellm(place: Place) -> Sequence[str]:
    def entry(url: str) -> Mapping[str, object]:
        backend = {"model": f"hosted_vllm/{place.model}", "api_base": f"{url}/v1", "api_key": "none"}
        return {"model_name": place.model, "litellm_params": backend}

    fleet = {
        "model_list": [entry(url) for url in place.engines],
        "router_settings": {"routing_strategy": "simple-shuffle", "num_retries": 0},
        "litellm_settings": {"telemetry": False, "drop_params": True, "request_timeout": 600},
        "general_settings": {"disable_spend_logs": True, "dangerously_permit_weak_or_unset_master_key": True},
    }
    path = place.file("litellm.yaml", json.dumps(fleet))
    program = place.program("litellm", "litellm")
    listening = ["--host", "127.0.0.1", "--port", str(place.port), "--num_workers", "1"]
    quiet = ["LITELLM_LOG=ERROR", "LITELLM_LOCAL_MODEL_COST_MAP=True"]
    return ["env", *quiet, program, *listening, "--config", path]


_NGINX = """
worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; daemon off;
events {{ worker_connections 4096; }}
http {{
  access_log off; tcp_nodelay on; client_body_buffer_size 1m;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream engines {{ {servers} keepalive 256; }}
  server {{
    listen 127.0.0.1:{port}; client_max_body_size 64m;
    location / {{
      proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 600;
    }}
  }}
}}
"""


def _nginx(place: Place) -> Sequence[str]:
    program = shutil.which("nginx")
    if program is None:
        raise NotHereError("not installed (the system's package nginx-light)")
    servers = " ".join(f"server {url.removeprefix('http://')};" for url in place.engines)
    text = _NGINX.format(folder=place.folder.absolute(), port=place.port, servers=servers)
    return [program, "-e", str(place.folder / "error.log"), "-c", place.file("nginx.conf", text)]


_SGLANG = ("--max-concurrent-requests", "100000")

GATEWAYS = (
    Gateway("kvfleet expected_latency", _kvfleet("expected_latency"), is_ours=True),
    Gateway("kvfleet round_robin", _kvfleet("round_robin"), is_ours=True),
    Gateway("vllm-router round_robin", _rust("vllm-router", ["vllm-router"], "round_robin")),
    Gateway("vllm-router cache_aware", _rust("vllm-router", ["vllm-router"], "cache_aware")),
    Gateway("vllm-router consistent_hash", _rust("vllm-router", ["vllm-router"], "consistent_hash")),
    Gateway(
        "sglang-router cache_aware", _rust("sglang-router", ["sglang-router", "launch"], "cache_aware", more=_SGLANG)
    ),
    Gateway("smg cache_aware", _rust("smg", ["smg", "launch"], "cache_aware")),
    Gateway("LiteLLM simple-shuffle", _litellm),
    Gateway("nginx round robin", _nginx),
)


def install(peers: Path) -> None:
    """Install each peer that is not there yet; says which could not be."""
    for venv, package in PACKAGES.items():
        if (peers / venv).exists():
            continue
        python = peers / venv / "bin" / "python"
        made = subprocess.run([sys.executable, "-m", "venv", str(peers / venv)], check=False)
        done = (
            made.returncode or subprocess.run([python, "-m", "pip", "install", "-q", package], check=False).returncode
        )
        print(f"{package}: {'failed' if done else 'installed'}", file=sys.stderr)


def version_of(peers: Path, gateway: str) -> str:
    """The version of a peer's package; empty if it is not known."""
    venv = next((name for name in PACKAGES if gateway.lower().startswith(name)), "")
    folders = (peers / venv).glob(f"lib/*/site-packages/{venv.replace('-', '_')}-*.dist-info") if venv else iter(())
    found = next(folders, None)
    return found.name.removesuffix(".dist-info").rpartition("-")[2] if found else ""
