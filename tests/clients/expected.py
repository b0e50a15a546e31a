"""What every script is given, and expects."""

import os

URL = os.environ["KVFLEET_URL"]
KEY = os.environ["KVFLEET_KEY"]
TEXT = "This is a fake answer."
MESSAGES = [{"role": "user", "content": "Hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def done(what: str) -> None:
    """Say that everything held, and of which versions."""
    print(f"ok {what}")
