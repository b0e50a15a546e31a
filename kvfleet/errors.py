"""Every exception kvfleet raises on purpose, in one tree.

::

    KVFleetError
    ├── ConfigError                 findings with file, line and column; ``kvfleet validate`` prints them
    ├── ComponentError              a component that cannot be found, loaded or built
    │   ├── PluginError             a distribution whose entry point is broken
    │   └── ContractError           a component that broke its contract at run time
    ├── RouteError                  a request that got no answer; carries ``.trace`` and an HTTP status
    │   ├── BadRequestError         400: the request itself is wrong
    │   ├── AuthenticationError     401: the gateway's own key
    │   ├── ModelNotFoundError      404: nobody is called that
    │   ├── NoCandidatesError       400 to 503: every candidate was dropped, and why
    │   ├── AdmissionError          429: refused before any backend was asked
    │   │   └── QuotaError          429: a budget is used up
    │   ├── StageError              500: a stage that must not fail, failed
    │   ├── DeadlineExceededError   504: the request's own deadline passed
    │   └── AttemptsExhaustedError  502..504, or the backend's own status: every attempt failed
    ├── BackendError                one backend call that failed; ``.kind`` is a `Fault`
    ├── KVEventError                a message of an engine's KV events that cannot be read
    └── TraceError                  a recorded trace that cannot be found or read

Where a message may reach an operator it says what is wrong, where, and what to do. No message holds a prompt, an answer
or a credential; those that reach a client hold no backend address either.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvfleet.config.findings import Finding
    from kvfleet.trace.spans import Trace

__all__ = [
    "AdmissionError",
    "AttemptsExhaustedError",
    "AuthenticationError",
    "BackendError",
    "BadRequestError",
    "ComponentError",
    "ConfigError",
    "ContractError",
    "DeadlineExceededError",
    "Fault",
    "KVEventError",
    "KVFleetError",
    "ModelNotFoundError",
    "NoCandidatesError",
    "PluginError",
    "QuotaError",
    "RouteError",
    "StageError",
    "TraceError",
]


class KVFleetError(Exception):
    """The root: catch this to catch everything kvfleet raises on purpose."""


class ConfigError(KVFleetError, ValueError):
    """A configuration with findings; all of them, not the first.

    Also a `ValueError`, because callers of `kvfleet.config.loader.load_config` expect one for a bad value.
    """

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(str(finding) for finding in self.findings))


class ComponentError(KVFleetError):
    """A component that cannot be found, loaded or built."""


class PluginError(ComponentError):
    """A plugin whose entry point cannot be used; names the distribution and the cause."""


class ContractError(ComponentError):
    """A component that broke its kind's contract: names component and distribution, and what was expected."""


class Fault(enum.StrEnum):
    """What went wrong in one backend call, in one vocabulary for retries, metrics, spans and error objects."""

    CONNECT = "connect"  # refused, unreachable, TLS or DNS failure: nothing was sent
    CONNECT_TIMEOUT = "connect_timeout"
    TIMEOUT = "timeout"  # no first byte in time
    IDLE_TIMEOUT = "idle_timeout"  # bytes stopped mid-answer
    DISCONNECTED = "disconnected"  # the connection ended before or amid the answer
    PROTOCOL = "protocol"  # not HTTP, not JSON, not SSE, or an answer of the wrong shape
    RATE_LIMITED = "rate_limited"  # 429
    OVERLOADED = "overloaded"  # 503, 529, or a full queue
    SERVER_ERROR = "server_error"  # any other 5xx
    BAD_REQUEST = "bad_request"  # 400, 422 and other 4xx: the caller's own
    CONTEXT_LENGTH = "context_length"  # the prompt is longer than this model's window
    CONTENT_POLICY = "content_policy"  # refused for its content
    UNAUTHORIZED = "unauthorized"  # 401, 403: kvfleet's credential for that backend
    NOT_FOUND = "not_found"  # 404: the backend does not know the model or the path
    CANCELLED = "cancelled"  # the client left
    DEADLINE = "deadline"  # the request's own deadline passed
    CIRCUIT_OPEN = "circuit_open"  # not called: its breaker lets one call through, and that is under way

    @property
    def is_callers(self) -> bool:
        """True if the same request would fail on every replica of the same model."""
        return self in (Fault.BAD_REQUEST, Fault.CONTEXT_LENGTH, Fault.CONTENT_POLICY)

    @property
    def counts_against_replica(self) -> bool:
        """True if the fault says something about the replica's health (breakers count these)."""
        return self in _REPLICAS_OWN


_REPLICAS_OWN = frozenset(
    {
        Fault.CONNECT,
        Fault.CONNECT_TIMEOUT,
        Fault.TIMEOUT,
        Fault.IDLE_TIMEOUT,
        Fault.DISCONNECTED,
        Fault.PROTOCOL,
        Fault.OVERLOADED,
        Fault.SERVER_ERROR,
    },
)


class BackendError(KVFleetError):
    """One backend call that failed.

    Args:
        kind: What went wrong.
        message: A sentence for a person; no address, no credential, no content.
        status: The backend's HTTP status, if it sent one.
        body: The backend's own error object (OpenAI shape), if it sent one that may be shown to the caller.
        retry_after_s: Seconds the backend asked to wait, if it did.
        headers: The headers of its refusal, lower-case, if there were any; they may tell its rate limits.
        received: True if any byte of an answer had arrived, so that the call must not be repeated.

    Attributes:
        limit: Which time limit ended the call, by the name of its option or header; empty if none did.
    """

    def __init__(
        self,
        kind: Fault,
        message: str,
        *,
        status: int | None = None,
        body: dict[str, Any] | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        received: bool = False,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.status = status
        self.body = body
        self.retry_after_s = retry_after_s
        self.headers: Mapping[str, str] = headers or {}
        self.received = received
        self.limit = ""


class KVEventError(KVFleetError, ValueError):
    """A message of an engine's KV events that cannot be read; says what is wrong with it, and shows none of it."""


class RouteError(KVFleetError, RuntimeError):
    """A request that got no answer.

    Attributes:
        status: The HTTP status a gateway answers with.
        code: A stable code for programs (``error.code`` in the OpenAI error object).
        type: The OpenAI error type.
        param: The request's field that is at fault, if one is.
        trace: The decision's record so far; None if the request was refused before a route began.
        retry_after_s: Seconds after which trying again may help, if that is known.
        details: More facts for programs, put under ``error.kvfleet``: for instance who was excluded by what.
    """

    status = 500
    code = "internal_error"
    type = "server_error"

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        trace: Trace | None = None,
        retry_after_s: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if status is not None:
            self.status = status
        if code is not None:
            self.code = code
        self.param = param
        self.trace = trace
        self.retry_after_s = retry_after_s
        self.details = details or {}


class BadRequestError(RouteError, ValueError):
    """400: the request itself is wrong; says which field and what it may be."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class AuthenticationError(RouteError):
    """401: no key, or a wrong one, for this gateway."""

    status = 401
    code = "invalid_api_key"
    type = "invalid_request_error"


class ModelNotFoundError(RouteError):
    """404: no model, alias or pipeline has the requested name."""

    status = 404
    code = "model_not_found"
    type = "invalid_request_error"


class NoCandidatesError(RouteError):
    """Nobody is left, and who was dropped by what.

    403 if policy alone did it, 400 if nobody can do what the request asks, 429 if waiting helps, else 503.
    """

    status = 503
    code = "no_candidates"


class AdmissionError(RouteError):
    """429: refused before any backend was asked; says when to come back."""

    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"


class QuotaError(AdmissionError):
    """429: a budget is used up; says when there is money again, if ever."""

    code = "insufficient_quota"
    type = "insufficient_quota"


class StageError(RouteError):
    """500: a stage that must not fail, failed; names the stage and its distribution, never the content."""

    code = "stage_failed"


class DeadlineExceededError(RouteError):
    """504: the request's own deadline passed before an answer began."""

    status = 504
    code = "deadline_exceeded"
    type = "timeout_error"


class AttemptsExhaustedError(RouteError):
    """Every attempt failed; the status is the most telling of theirs."""

    status = 502
    code = "attempts_exhausted"


class TraceError(KVFleetError):
    """A recorded trace, or the store of them, that cannot be found or read; says what to do instead."""
