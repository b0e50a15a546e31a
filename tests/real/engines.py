"""Real engines as processes: started on loopback, asked whether they serve, ended with all they started.

They run nicely (one thread, low priority) and log into `.real/logs/`; one that does not start says how its log ends.
"""

# ruff: noqa: S603, S607 - the commands are our own

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import httpx

from tests.real.environments import HERE, HOME, LOGS, EngineError, environment, model, tail

STOP_S = 20.0
MODEL_NAME = "tiny"


def free_port() -> int:
    """A port that is free on loopback now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@attrs.define(kw_only=True)
class Engine:
    """One process that serves a model on loopback.

    Attributes:
        name: What it is called in logs.
        command: How it is started.
        port: Where it listens.
        ready_path: What answers 200 as soon as it serves.
        env: What it needs beside the environment.
        start_s: Longest wait for that.
        model: The name of its model.
        metrics_url: Where its metrics are, if they have a port of their own.
    """

    name: str
    command: Sequence[str | Path]
    port: int
    ready_path: str = "/health"
    env: Mapping[str, str] = attrs.field(factory=dict)
    start_s: float = 240.0
    model: str = MODEL_NAME
    metrics_url: str = ""
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """Its log."""
        return LOGS / f"{self.name}.log"

    def start(self) -> None:
        """Start it, and wait until it serves.

        Raises:
            EngineError: with the end of its log, if it does not.
        """
        LOGS.mkdir(parents=True, exist_ok=True)
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                ["nice", "-n", "10", *map(str, self.command)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **quiet, **self.env},
                cwd=HOME,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        assert self._process is not None
        by_s = time.monotonic() + self.start_s
        while time.monotonic() < by_s:
            if self._process.poll() is not None:
                raise EngineError(f"{self.name} ended with {self._process.returncode}:\n{tail(self.log)}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url + self.ready_path, timeout=2, trust_env=False).status_code == 200:
                    return
            time.sleep(0.2)  # a process of somebody else's cannot be waited for in another way
        raise EngineError(f"{self.name} did not serve within {self.start_s:.0f} s:\n{tail(self.log)}")

    def kill(self) -> None:
        """End it as a crash would: at once, and amid whatever it says."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_S)

    def stop(self) -> None:
        """End it, with everything it started; safe twice."""
        process, self._process = self._process, None
        if process is None:
            return
        for signal_ in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal_)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        self._reap(process.pid)

    @staticmethod
    def _reap(group: int) -> None:
        """Nothing of the group is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def llama_cpp(*, embeddings: bool = False) -> Engine:
    """llama.cpp's server, for answers or for embeddings."""
    folder = model()
    python, port = environment("llama_cpp"), free_port()
    command = [python, HERE / "serve_llama_cpp.py", folder / "tiny.gguf", str(port), MODEL_NAME]
    command += ["embeddings"] if embeddings else []
    return Engine(name="llama_cpp", command=command, port=port, start_s=60)


def vllm(*, events: tuple[int, int] | None = None, blocks: int = 512, port: int = 0) -> Engine:
    """A vLLM on the CPU, with prefix caching, tool calls and JSON mode.

    Args:
        events: The ports on which it publishes its KV events, and replays them; None to publish none.
        blocks: How many blocks its KV cache has.
        port: Where it listens; any free one for 0.
    """
    folder = model()
    python, port = environment("vllm"), port or free_port()
    options = {
        "served-model-name": MODEL_NAME,
        "host": "127.0.0.1",
        "port": str(port),
        "dtype": "bfloat16",
        "max-model-len": "4096",
        "block-size": "32",
        "max-num-seqs": "8",
        "num-gpu-blocks-override": str(blocks),
        "distributed-executor-backend": "uni",
        "tool-call-parser": "hermes",
        "structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}',
    }
    if events is not None:
        told = {"enable_kv_cache_events": True, "publisher": "zmq", "topic": "kv"}
        ports = {"endpoint": f"tcp://*:{events[0]}", "replay_endpoint": f"tcp://*:{events[1]}"}
        options["kv-events-config"] = json.dumps({**told, **ports})
    flags = ("enforce-eager", "enable-prefix-caching", "enable-prompt-tokens-details", "enable-auto-tool-choice")
    command = [python.with_name("vllm"), "serve", folder / "hf", *(f"--{flag}" for flag in flags)]
    command += [word for key, value in options.items() for word in (f"--{key}", value)]
    env = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    name = "vllm" if events is None else "vllm-events"
    return Engine(name=name, command=command, port=port, env=env, start_s=900)


def triton() -> Engine:
    """Triton Inference Server with the text models of `triton_models/`."""
    python, port, metrics_port = environment("triton"), free_port(), free_port()
    (packages,) = python.parent.parent.glob("lib/python*/site-packages")
    server = packages / "pytriton" / "tritonserver"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    beside = server / "backends" / "python" / stub.name
    if not beside.exists():
        beside.symlink_to(stub)
    options = {
        "model-repository": str(HERE / "triton_models"),
        "backend-directory": str(server / "backends"),
        "cache-directory": str(server / "caches"),
        "http-address": "127.0.0.1",
        "http-port": str(port),
        "allow-grpc": "false",
        "metrics-address": "127.0.0.1",
        "metrics-port": str(metrics_port),
        "allow-gpu-metrics": "false",
        "model-control-mode": "explicit",
        "load-model": "*",
    }
    command = [server / "bin" / "tritonserver", *(f"--{key}={value}" for key, value in options.items())]
    libraries = [packages / "nvidia_pytriton.libs", Path(sys.base_prefix) / "lib"]
    env = {
        "LD_LIBRARY_PATH": ":".join([*map(str, libraries), os.environ.get("LD_LIBRARY_PATH", "")]),
        "PYTHONPATH": str(packages),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    ready = "/v2/health/ready"
    metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
    return Engine(
        name="triton", command=command, port=port, ready_path=ready, env=env, start_s=90, metrics_url=metrics_url
    )
