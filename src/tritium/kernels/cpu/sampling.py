"""sampling, compiled (csrc/sampling.cpp). Not an op: the runtime calls it on the logits that a plan leaves."""

import ctypes

import torch

from tritium.errors import KernelError
from tritium.kernels.cpu import library
from tritium.kernels.kernel import Thunk
from tritium.kernels.sampling_table import Sampled, SamplingTable

_TABLE = ("temperature", "top_p", "min_p", "top_k", "num_logprobs", "seed", "counter", "edits_at", "forced")
_RESULTS = ("token_ids", "top_ids", "logprobs", "top_logprobs")


class SamplingArgs(ctypes.Structure):
    """csrc/sampling.cpp SamplingArgs."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", *_TABLE, *_RESULTS)),
        *((name, ctypes.c_int64) for name in ("num_rows", "vocab_size", "stride", "top_width")),
    ]


class Sampling:
    """Calls the compiled kernel; keeps its argument struct from call to call."""

    def __init__(self, vocab_size: int) -> None:
        self._args = SamplingArgs(vocab_size=vocab_size)
        self._thunks: dict[torch.dtype, Thunk] = {}
        self._table: SamplingTable | None = None
        self._out: Sampled | None = None

    def __call__(self, logits_RV: torch.Tensor, rows: SamplingTable, out: Sampled) -> None:
        """Fill `out` from the first R entries of `rows`. Raises `KernelError` for logits of another shape or dtype."""
        args, num_rows = self._args, logits_RV.shape[0]
        if logits_RV.shape[1] != args.vocab_size or logits_RV.stride(1) != 1:
            sizes = f"sizes {tuple(logits_RV.shape)} and strides {logits_RV.stride()}"
            raise KernelError(f"logits with {sizes} are not dense rows of {args.vocab_size}")
        if num_rows > len(rows.temperature):
            raise KernelError(f"{num_rows} rows of logits, but the table holds {len(rows.temperature)}")
        if rows is not self._table:
            self._table = rows
            for name in _TABLE:
                setattr(args, name, getattr(rows, name).ctypes.data)
        if out is not self._out:
            self._out = out
            for name in _RESULTS:
                setattr(args, name, getattr(out, name).ctypes.data)
        args.logits, args.stride = logits_RV.data_ptr(), logits_RV.stride(0)
        args.num_rows, args.top_width = num_rows, rows.num_top
        thunk = self._thunks.get(logits_RV.dtype)
        if thunk is None:
            if logits_RV.dtype not in library.SUFFIXES:
                raise KernelError(f"logits are {logits_RV.dtype}, which the sampler has no code for")
            thunk = self._thunks[logits_RV.dtype] = library.thunk("sampling", logits_RV.dtype, args)
        thunk()
