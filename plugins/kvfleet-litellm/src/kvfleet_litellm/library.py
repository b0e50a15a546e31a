"""LiteLLM itself, imported when it is first needed and told to keep quiet.

The import takes seconds, so it is done in a thread. Before it, LiteLLM is told not to fetch its price list from the
network and not to read a ``.env`` file; after it, not to print and not to count tokens with a tokenizer it would have
to download. No callback is registered, and so nothing is reported to anybody.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from typing import Any

__all__ = ["litellm"]

_ENVIRONMENT = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}
_LOGGERS = ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy")


async def litellm() -> Any:
    """The package, ready for use.

    Raises:
        ImportError: if it cannot be imported.
    """
    return await asyncio.to_thread(_imported)


def _imported() -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    found: Any = importlib.import_module("litellm")  # Python's import lock makes the second thread wait
    found.suppress_debug_info = True
    found.turn_off_message_logging = True
    found.disable_hf_tokenizer_download = True
    found.disable_aiohttp_transport = True  # its sessions complain when nobody closes them
    for name in _LOGGERS:
        # what goes wrong is told by kvfleet, without the prompts that LiteLLM's own messages may hold
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return found
