"""Secrets: written as references (``env:NAME``, ``file:/path``), resolved when a configuration is read, never shown.

A resolved value is a `Secret`: a text whose repr hides it and that remembers its reference, so that a saved file can
name the reference again. A value written out in the file is accepted, and is a `Secret` without a reference.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import attrs

from kvfleet.errors import KVFleetError

__all__ = ["Problem", "Resolver", "Secret", "SecretReader", "is_reference"]

Resolver = Callable[[str], str | None]
"""Resolves references of a scheme of its own (``vault:kv/x``); None for those of others."""

_OWN = re.compile(r"(?:env|file):")
_SCHEMES = ("aws", "azure", "gcp", "k8s", "keyring", "op", "sops", "ssm", "vault")
_FOREIGN = re.compile(rf"(?:{'|'.join(_SCHEMES)}):\S")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAX_BYTES = 64 * 1024


class Secret(str):
    """A credential: a text that does not show itself.

    >>> Secret("s3cret", "env:API_KEY")
    <secret env:API_KEY>
    """

    __slots__ = ("reference",)
    reference: str

    def __new__(cls, value: str, reference: str = "") -> Self:
        """Make one; `reference` is what the file says instead of the value, empty if it says the value."""
        made = super().__new__(cls, value)
        made.reference = reference
        return made

    def __repr__(self) -> str:
        return f"<secret {self.reference}>" if self.reference else "<secret>"

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        return type(self), (str(self), self.reference)


@attrs.frozen
class Problem:
    """Why a reference could not be resolved; names the reference's target, never a value."""

    message: str
    remedy: str


def is_reference(text: str) -> bool:
    """True if a text is a reference to a secret, and not a secret.

    >>> is_reference("env:API_KEY"), is_reference("sk-123")
    (True, False)
    """
    return _OWN.match(text) is not None or _FOREIGN.match(text) is not None


@attrs.frozen
class SecretReader:
    """Resolves references.

    Attributes:
        environ: Variables for ``env:``; the process's own if None.
        resolvers: Asked, in order, about references that are neither ``env:`` nor ``file:``.
    """

    environ: Mapping[str, str] | None = attrs.field(default=None, repr=False)
    resolvers: Sequence[Resolver] = attrs.field(default=(), repr=False)

    def read(self, text: str) -> Secret | Problem:
        """The secret that `text` refers to; `text` itself if it is not a reference."""
        scheme, colon, rest = text.partition(":")
        if not colon:
            return Secret(text)
        if scheme == "env":
            return self._variable(rest, text)
        if scheme == "file":
            return _file(rest, text)
        return self._ask(scheme, text)

    def _variable(self, name: str, reference: str) -> Secret | Problem:
        if not _VARIABLE.fullmatch(name):
            return Problem("`env:` must be followed by the name of a variable", "write it as in env:API_KEY")
        environ = os.environ if self.environ is None else self.environ
        value = environ.get(name)
        if value is None:
            return Problem(f"the environment variable {name} is not set", f"set {name}, or correct the reference")
        if not value.strip():
            return Problem(f"the environment variable {name} is empty", f"set {name}, or correct the reference")
        return Secret(value.strip(), reference)

    def _ask(self, scheme: str, text: str) -> Secret | Problem:
        for resolver in self.resolvers:
            try:
                value = resolver(text)
            except Exception as error:  # noqa: BLE001 - a plugin's border: its failure is a finding
                # Our own errors name the plugin; any other's text, and the text asked about, may hold a secret.
                what = str(error) if isinstance(error, KVFleetError) else f"a plugin failed with {type(error).__name__}"
                return Problem(f"the reference cannot be resolved: {what}", "see `kvfleet plugins`")
            if value is not None:
                return Secret(value, text)
        if _FOREIGN.match(text):
            return Problem(f"no plugin resolves `{scheme}:` references", "install one, or use env:NAME or file:/path")
        return Secret(text)


def _file(name: str, reference: str) -> Secret | Problem:
    path = Path(name)
    if not path.is_absolute():
        return Problem("`file:` must be followed by an absolute path", "write it as in file:/run/secrets/api_key")
    try:
        with path.open("rb") as stream:
            value = stream.read(_MAX_BYTES + 1)
        text = value.decode()
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        return Problem(f"the secret file {name} cannot be read: {reason}", "correct the path, or its permissions")
    except UnicodeDecodeError:
        return Problem(f"the secret file {name} is not UTF-8 text", "correct the path")
    if len(value) > _MAX_BYTES:
        return Problem(f"the secret file {name} is larger than {_MAX_BYTES} bytes", "correct the path")
    if not text.strip():
        return Problem(f"the secret file {name} is empty", "write the secret into it")
    return Secret(text.strip(), reference)
