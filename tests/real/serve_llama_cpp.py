"""llama.cpp's HTTP server, as the xllamacpp wheel brings it. Run with that environment's Python: MODEL PORT ALIAS [embeddings]."""

from __future__ import annotations

import signal
import sys

import xllamacpp


def main() -> None:
    """Serve until told to stop."""
    model, port, alias = sys.argv[1:4]
    wanted = xllamacpp.CommonParams()
    wanted.model.path = model
    wanted.model_alias = {alias}
    wanted.hostnames = ["127.0.0.1"]
    wanted.port = int(port)
    wanted.n_ctx, wanted.n_parallel = 4096, 2
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1
    wanted.n_gpu_layers = 0
    wanted.endpoint_metrics = wanted.endpoint_slots = wanted.endpoint_props = True
    wanted.use_jinja = True
    wanted.ui = False
    if "embeddings" in sys.argv[4:]:
        wanted.embedding = True
        wanted.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = xllamacpp.Server(wanted)
    sys.stdout.write(f"listening on {server.listening_address}\n")
    sys.stdout.flush()
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
