"""What a request must be for an engine to take it."""

from __future__ import annotations

from kvfleet.errors import BackendError, Fault
from kvfleet.sim.events import Job
from kvfleet.sim.spec import EngineSpec

__all__ = ["check"]


def check(job: Job, spec: EngineSpec) -> None:
    """Refuse what cannot be.

    Raises:
        BackendError: `Fault.CONTEXT_LENGTH` if it can never fit.
        ValueError: if its block hashes do not fit its prompt's length, or there is nothing to compute.
    """
    full = job.prompt_tokens // spec.block_tokens
    if job.prompt_tokens < 1 or job.output_tokens < 0:
        raise ValueError("a job needs a prompt of at least one token, and an answer of none or more")
    if job.hashes and len(job.blocks) != full:
        raise ValueError(
            f"a prompt of {job.prompt_tokens} tokens has {full} full blocks of {spec.block_tokens}, but"
            f" {len(job.blocks)} hashes were given"
        )
    if job.prompt_tokens + job.output_tokens > spec.room_tokens:
        raise BackendError(
            Fault.CONTEXT_LENGTH,
            f"this model's context is {spec.room_tokens} tokens; {job.prompt_tokens} of prompt and"
            f" {job.output_tokens} of answer are more",
            status=400,
        )
