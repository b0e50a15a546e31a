"""What a model's entry says of its engines' KV caches: who tells of them, and in which unit prompts are compared."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import attrs

from kvfleet.config.fields import choice, flag, number, text

__all__ = ["KVEventsConfig", "PromptBlocksConfig", "address_of"]

_HOST = r"(?:\{host\}|\*|\[[0-9A-Fa-f:*]+\]|[^\s/:\[\]{}*]+)"
_PORT = r"(?:\d{1,5}|\{port(?:\+\d{1,5})?\})"
_ADDRESS = rf"tcp://{_HOST}:{_PORT}|ipc://\S+"
_ADDRESS_DOC = (
    "tcp://HOST:PORT or ipc://PATH; {host} and {port} stand for those of the replica's endpoint, {port+1000} for more"
)
_PLACE = re.compile(r"\{port(?:\+(\d+))?\}")


def address_of(pattern: str, endpoint: str, above: int = 0) -> str:
    """A ZMQ address for one engine: its endpoint's host and port filled in, and the port so much higher.

    >>> address_of("tcp://{host}:5557", "http://gpu-1:8000/v1", 2)
    'tcp://gpu-1:5559'
    >>> address_of("tcp://{host}:{port+1000}", "http://gpu-1:8001")
    'tcp://gpu-1:9001'
    """
    url = urlsplit(endpoint)
    host = url.hostname or ""
    own = url.port or (443 if url.scheme == "https" else 80)
    address = pattern.replace("{host}", f"[{host}]" if ":" in host else host)
    address = _PLACE.sub(lambda match: str(own + int(match[1] or 0)), address)
    if not above or not address.startswith("tcp://"):
        return address
    place, _, port = address.rpartition(":")
    return f"{place}:{int(port) + above}"


@attrs.frozen(kw_only=True)
class KVEventsConfig:
    """Where the engines of a model tell what is in their KV caches. Needs `prompt_blocks` of tokens."""

    source: str = choice(
        "zmq",
        of=("zmq", "trtllm"),
        doc="`zmq` for what vLLM and SGLang publish (needs kvfleet[events]); `trtllm` asks trtllm-serve for it.",
    )
    endpoint: str = text(
        "tcp://{host}:5557",
        doc="Where the engine publishes; a data-parallel rank's port is its number higher.",
        pattern=_ADDRESS,
        pattern_doc=_ADDRESS_DOC,
    )
    replay: str = text(
        "",
        doc="Where messages that were missed can be asked for; without it a gap costs all that was known.",
        pattern=_ADDRESS,
        pattern_doc=_ADDRESS_DOC,
        example="tcp://{host}:5558",
    )
    topic: str = text("", doc="Only messages whose topic begins so; all if empty.")
    bind: bool = flag(doc="Listen on `endpoint`, for engines that connect to us; each replica's on the next port.")
    data_parallel_ranks: int = number(
        1, ge=1, le=256, doc="Ranks that each publish on a port of their own, where the engine chooses among them."
    )
    lora: str = text("", doc="The adapter's name, if this model is a LoRA adapter of its engine.")
    poll_ms: float = number(500, gt=0, unit="ms", doc="Time between two questions to a `trtllm` source.")
    silence_seconds: float = number(
        10, gt=0, unit="s", doc="How long an engine at work may tell nothing before it is asked, or not believed."
    )
    attention_chunk_tokens: int = number(
        0,
        ge=0,
        unit="tokens",
        doc="Tokens in a chunk of attention of the model's (`attention_chunk_size`; 8192 for Llama 4), which no event"
        " says; 0 if it has none.",
    )
    max_blocks: int = number(
        1_000_000, ge=1, doc="Most blocks remembered of one rank's cache; each takes about 300 bytes."
    )


@attrs.frozen(kw_only=True)
class PromptBlocksConfig:
    """In which unit a model's prompts are compared with what its engines hold."""

    mode: str = choice(
        "bytes",
        of=("bytes", "engine", "tokenizer"),
        doc="`bytes` needs nothing; `engine` asks a replica for the prompt's tokens; `tokenizer` makes them here ("
        "needs kvfleet[tokenizers]). Exact knowledge of a cache needs tokens.",
    )
    block_tokens: int = number(
        16, ge=1, unit="tokens", doc="Tokens in a block; best the engine's own block size, or a multiple of it."
    )
    tokenizer: str = text(
        "", doc="A folder with `tokenizer.json` and the chat template, or the file itself.", example="/models/llama-3"
    )
    chat_template: str = text("", doc="The file of another chat template than the folder's.")
    deadline_ms: float = number(
        50, gt=0, unit="ms", doc="Longest wait for a prompt's tokens; after it the prompt is compared by bytes."
    )
    cache_megabytes: float = number(64, gt=0, doc="Memory for the tokens of text that was seen before.")
